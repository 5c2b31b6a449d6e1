"""The commands for a run elsewhere: submit, list, status, logs, stop, pause, resume, tune. Ray and HTTP are loaded when one is called."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_governor.services.cli.terminal import AsJson, JobFile, Sets, fail, load
from opd_governor.services.job.settings import JobError

if TYPE_CHECKING:
    from opd_governor.services.control.app import Verb
    from opd_governor.services.remote.jobs import JobClient, Submission
    from opd_governor.services.remote.steer import Endpoint

commands = typer.Typer()

SHOWN = (
    "name", "id", "status", "exit_code", "message", "started", "ended", "out", "url",
    "phase", "step", "total_steps", "weight_version", "cap_tokens", "pressure",
)  # fmt: skip
"""Lines of `opd status`; --json has everything."""

RunName = Annotated[str, typer.Argument(help="A run's name on the cluster, its run directory, or its URL.", metavar="RUN")]
Address = Annotated[
    str | None, typer.Option("--address", envvar="RAY_ADDRESS", help="The cluster: http://HEAD:8265, or what Ray itself takes.")
]


@commands.command()
def submit(
    job_file: JobFile,
    address: Address = None,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory, a path on the cluster. Default: runs/NAME here.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log; exit as the run exits.")] = False,
) -> None:
    """Run a job on a cluster through Ray Jobs; it goes on when this machine leaves. A run that is already there is attached to.

    The job file travels; data, models and the run directory are paths that the cluster must share, or ids.
    A run that had ended goes on from its newest checkpoint.

    Example: `opd submit deploy/jobs/sums.yaml --address http://127.0.0.1:8265 --wait`
    """
    job = load(job_file, sets)
    from opd_governor.services.remote import jobs

    with _one_line():
        client = jobs.connect(address)
        submission, new = jobs.submit(client, job, (out or Path("runs") / job.name).absolute())
        if new:
            typer.echo(f"submitted {submission.run} as {submission.id}; run directory {submission.out}")
        else:
            typer.echo(f"attached to {submission.run}, live as {submission.id} since {_clock(submission.started_s)}; nothing was submitted")
        if wait:
            _follow(client, submission)


@commands.command("list")
def list_runs(address: Address = None, as_json: AsJson = False) -> None:
    """The runs submitted to a cluster, oldest first.

    Example: `opd list --address http://127.0.0.1:8265`
    """
    from opd_governor.services.remote import jobs

    with _one_line():
        found = jobs.submissions(jobs.connect(address))
    if as_json:
        typer.echo(json.dumps([submission.to_json() for submission in found], indent=1))
        return
    rows = [(s.run, s.id, s.status, _clock(s.started_s), _clock(s.ended_s), s.url or "-", s.out or "-") for s in found]
    _print_table(("RUN", "JOB", "STATUS", "STARTED", "ENDED", "SERVICE", "DIRECTORY"), rows)


@commands.command()
def status(run: RunName, address: Address = None, as_json: AsJson = False) -> None:
    """What a run is doing: phase, step, limits in force, pressure; for one that has ended, how.

    Example: `opd status sums`
    """
    from opd_governor.services.remote import jobs, steer

    facts: dict[str, Any] = {}
    with _one_line():
        endpoint = steer.local_endpoint(run)
        if endpoint is None:
            submission = jobs.find(jobs.connect(address), run)
            facts = submission.to_json()
            endpoint = jobs.endpoint(submission) if submission.live and submission.url else None
        if endpoint is not None:
            with steer.RunClient(endpoint) as client:
                facts |= client.status() | {"governor": client.governor()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    facts |= {"pressure": facts.get("governor", {}).get("pressure"), "cap_tokens": facts.get("limits", {}).get("cap_tokens")}
    facts |= {"started": _clock(facts.get("started_s")), "ended": _clock(facts.get("ended_s")), "name": facts.get("run", facts.get("name"))}
    _print_table((), [(key, facts[key]) for key in SHOWN if facts.get(key) not in (None, "", "-")])


@commands.command()
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the run ends; exit as it exits.")] = False,
) -> None:
    """The log of a submitted run.

    Example: `opd logs sums --follow`
    """
    from opd_governor.services.remote import jobs

    with _one_line():
        client = jobs.connect(address)
        submission = jobs.find(client, run)
        if follow:
            _follow(client, submission)
        else:
            typer.echo(client.get_job_logs(submission.id), nl=False)


@commands.command()
def stop(run: RunName, address: Address = None) -> None:
    """End a run at its next step border, with a checkpoint and its student in `final/`. One that has not begun ends at once.

    Example: `opd stop sums`
    """
    from opd_governor.services.remote import jobs, steer

    with _one_line():
        endpoint = steer.local_endpoint(run)
        if endpoint is None:
            client = jobs.connect(address)
            submission = jobs.find(client, run)
            if not submission.live or submission.ending:
                typer.echo(f"{run}: {'is ending' if submission.live else 'has ended'} already ({submission.status})")
                return
            if submission.url is None:
                client.stop_job(submission.id)
                typer.echo(f"{run}: had not begun; its job was ended")
                return
            endpoint = jobs.endpoint(submission)
        _ask(endpoint, "stop")


@commands.command()
def pause(run: RunName, address: Address = None) -> None:
    """Hold a run at its next step border; its actors stay up.

    Example: `opd pause sums`
    """
    with _one_line():
        _ask(_endpoint(run, address), "pause")


@commands.command()
def resume(run: RunName, address: Address = None) -> None:
    """Let a paused run go on.

    Example: `opd resume sums`
    """
    with _one_line():
        _ask(_endpoint(run, address), "resume")


@commands.command()
def tune(
    run: RunName,
    changes: Annotated[list[str], typer.Argument(help="rollout.max_new_tokens=128; null: the job file's value.", metavar="KEY=VALUE...")],
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Change tunable settings of a live run: all of them or, where one is refused, none. In force from the next step border.

    Example: `opd tune sums rollout.max_new_tokens=128 governor.length_factor=0.8`
    """
    from opd_governor.services.remote import steer

    with _one_line():
        patch = steer.parse_changes(changes)
        with steer.RunClient(_endpoint(run, address)) as client:
            tuning = client.tune(patch, dry_run=dry_run)
    if as_json:
        listed = [{"key": key, "old": old, "new": new} for key, old, new in tuning.changes]
        typer.echo(json.dumps({"generation": tuning.generation, "dry_run": dry_run, "changes": listed}, indent=1))
        return
    if not tuning.changes:
        typer.echo(f"nothing to change: generation {tuning.generation} has these values")
        return
    _print_table(("SETTING", "OLD", "NEW"), [(key, json.dumps(old), json.dumps(new)) for key, old, new in tuning.changes])
    typer.echo(f"dry run: generation {tuning.generation} stays" if dry_run else f"generation {tuning.generation}")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """A run or cluster that cannot be reached, or refuses, is one line and exit code 1."""
    try:
        yield
    except (JobError, OSError) as error:
        fail([str(error).split("\n")[0]], 1)


def _endpoint(run: str, address: str | None) -> "Endpoint":
    from opd_governor.services.remote import jobs, steer

    return steer.local_endpoint(run) or jobs.endpoint(jobs.find(jobs.connect(address), run))


def _ask(endpoint: "Endpoint", verb: "Verb") -> None:
    from opd_governor.services.remote.steer import RunClient

    with RunClient(endpoint) as client:
        answer = client.ask(verb)
        typer.echo(f"{client.name} ({answer['phase']}): {verb} asked for; taken at the next step border")


def _follow(client: "JobClient", submission: "Submission") -> None:
    from opd_governor.services.remote import jobs

    try:
        ended = asyncio.run(jobs.follow(client, submission, lambda text: typer.echo(text, nl=False)))
    except KeyboardInterrupt:
        fail([f"no longer following; {submission.run} goes on (`opd logs {submission.run} --follow`)"], 130)
    if ended.status != "SUCCEEDED":
        fail([f"{ended.run}: {ended.status}: {ended.message}"], ended.exit_code or 1)


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> None:
    lines = [tuple(str(cell) for cell in row) for row in ([header] if header else []) + list(rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _clock(unix_s: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s)) if unix_s else "-"
