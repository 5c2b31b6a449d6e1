"""`opd plan`: time, memory and network of a job on described hardware, and which role to add next."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from opd_governor.services.cli.terminal import AsJson, JobFile, Sets, fail, load, quiet_environment
from opd_governor.services.job.settings import JobError

if TYPE_CHECKING:
    from opd_governor.services.plan.hardware import Hardware

commands = typer.Typer()
Gpus = Annotated[str | None, typer.Option("--gpus", help="Described hardware: GPUs x GiB (8x80), or nodes x GPUs x GiB (4x8x80).")]


@commands.command()
def plan(
    job_file: JobFile,
    gpus: Annotated[str, typer.Option("--gpus", help="GPUs x GiB (8x80), or nodes x GPUs x GiB (4x8x80).")],
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Lay a job out on described hardware and say what a step takes there: no cluster, no GPU, no weights.

    Example: `opd plan deploy/jobs/qwen3-32-gpus.yaml --gpus 32x80`
    """
    job = load(job_file, sets)
    quiet_environment()
    from opd_governor.services.plan.forecast import forecast, render
    from opd_governor.services.plan.layout import plan as lay_out

    try:
        found = lay_out(job, described(gpus))
    except JobError as error:
        fail([str(error)], 3)
    told = forecast(found)
    typer.echo(json.dumps(told.to_json(), indent=1) if as_json else render(told))


def described(gpus: str) -> "Hardware":
    """The hardware that `--gpus` names, or one line and exit code 2."""
    from opd_governor.services.plan.hardware import parse_gpus

    try:
        return parse_gpus(gpus)
    except JobError as error:
        fail([str(error)], 2)
