"""What the commands of `opd` share: their common arguments, and how a mistake is said."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from opd_governor.services.job.settings import Job, JobError, load_job

JobFile = Annotated[Path, typer.Argument(help="A job file such as deploy/jobs/sums.yaml.", metavar="JOB.yaml")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: learner.total_steps=10 (may be repeated).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def load(job_file: Path, sets: list[str] | None) -> Job:
    """The job, or one line per mistake and exit code 2."""
    try:
        return load_job(job_file, tuple(sets or ()))
    except JobError as error:
        fail(str(error).split("\n"), 2)


def fail(lines: list[str], code: int) -> NoReturn:
    """End the command with these lines on stderr."""
    for line in lines:
        print(f"opd: {line}", file=sys.stderr)
    raise typer.Exit(code)
