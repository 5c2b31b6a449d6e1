"""The commands for other people's trainers: diagnose a log, govern over HTTP. Alone they are the `opd` of the light distribution."""

import json
from pathlib import Path
from typing import Annotated

import typer

from opd_governor.services.cli.plain import AsJson, fail

others = typer.Typer()


@others.command()
def diagnose(
    logs: Annotated[list[Path], typer.Argument(help="Log files of any trainer, or folders with them.", metavar="LOG...")],
    as_json: AsJson = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write the picture to this file too (.png, .svg, .pdf).")] = None,
) -> None:
    """Read any trainer's log: is the length of its answers sick, since when, how sure, and what to try first.

    Reads TRL's trainer_state.json, this project's metrics.jsonl, the logs of verl, NeMo-RL, prime-rl, slime, ms-swift and OpenRLHF,
    W&B exports and TensorBoard event files, by content. Exit code 0: healthy, 1: sick, 2: unreadable.

    Example: `opd diagnose outputs/checkpoint-500/trainer_state.json`
    """
    from opd_governor.services.sidecar.diagnosing import draw, judge, read_logs, render, to_json
    from opd_governor.services.sidecar.formats import LogError

    try:
        found = [(log, judge(log)) for log in read_logs(logs)]
        if picture is not None:
            for number, (log, diagnosis) in enumerate(found):
                draw(log, diagnosis, picture if number == 0 else picture.with_stem(f"{picture.stem}-{number + 1}"))
    except LogError as error:
        fail(str(error).split("\n"), 2)
    if as_json:
        typer.echo(json.dumps([to_json(log, diagnosis) for log, diagnosis in found], indent=1))
    else:
        typer.echo("\n\n".join(render(log, diagnosis) for log, diagnosis in found))
    raise typer.Exit(int(any(diagnosis.sick for _, diagnosis in found)))


@others.command()
def govern(
    policy: Annotated[Path, typer.Argument(help="Policy file; {} on its own is the default policy.", metavar="POLICY.yaml")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)] = 9400,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs' records; what is there goes on.")] = Path("governed"),
    proxy: Annotated[str | None, typer.Option("--proxy", help="Stand in front of this generation server (vLLM or SGLang).")] = None,
    run: Annotated[str, typer.Option("--run", help="Name of the run that the proxy's requests belong to.")] = "proxy",
) -> None:
    """Run the length governor as a service for any trainer: it posts its steps and is told a cap, a learning-rate factor, and why.

    The token is OPD_TOKEN, or the file `token` in --out. With --proxy, requests to the generation server go through it: it counts
    tokens and ends, and lowers max_tokens when length inflates.

    Example: `opd govern policy.yaml --port 9400` or `opd govern policy.yaml --proxy http://127.0.0.1:8000`
    """
    from opd_governor.services.sidecar.serving import ServingError, serve

    try:
        serve(policy, host=host, port=port, out=out, upstream=proxy, proxy_run=run, say=typer.echo)
    except ServingError as error:
        fail(str(error).split("\n"), 2)


def main() -> None:
    """The entry point of `opd` in the light distribution."""
    alone = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    alone.add_typer(others)
    alone()
