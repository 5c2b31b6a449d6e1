"""Step records to the trackers a job names; each package is imported only when chosen. metrics.jsonl is always written beside them.

>>> with Trackers(job, run_dir, say=print) as trackers:
...     trackers.log({"step": 1, "kl_nats": 0.4, ...})
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.job.trackers import TRACKERS, Tracker
from opd_governor.services.record.rundir import Record, finite


def load_packages(job: Job) -> dict[str, Any]:
    """The modules of the trackers the job names. Raises JobError for one that is not installed."""
    modules: dict[str, Any] = {}
    for name in job.service.trackers:
        try:
            modules[name] = importlib.import_module(TRACKERS[name].package)
        except ImportError as error:
            missing = (error.name or name).partition(".")[0]
            it = "it" if missing == name else name
            raise JobError(f"service.trackers: {missing} is not installed here; pip install {missing}, or take {it} off the list") from None
    return modules


class Trackers:
    """All of a job's trackers as one, open while it is entered."""

    def __init__(self, job: Job, run_dir: Path, say: Callable[[str], None]) -> None:
        """Raises JobError for a package that is not installed; nothing is opened yet."""
        self._job, self._run_dir, self._say = job, run_dir, say
        self._modules = load_packages(job)
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> "Trackers":
        """Raises JobError for a tracker that cannot be opened: nobody has waited for a step yet."""
        for name, module in self._modules.items():
            try:
                self._open[name] = TRACKERS[name](module, self._job, self._run_dir)
            except Exception as error:
                self.__exit__()
                why = " ".join(f"{type(error).__name__}: {error}".split())
                raise JobError(f"service.trackers: {name} does not open ({why}); set it up, or take it off the list") from error
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._open):
            self._attempt(name, lambda tracker: tracker.close())

    def log(self, record: Record) -> None:
        """One step record, nested ones as `kl_by_position/16-63`."""
        values = dict(_scalars(record))
        for name in list(self._open):
            self._attempt(name, lambda tracker: tracker.log(values, record["step"]))

    def _attempt(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._open[name])
        except Exception as error:  # an outage of a tracker must not end a run: the records are in metrics.jsonl
            del self._open[name]
            self._say(f"{name} failed and is left out from here on: {error}")


def _scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in finite(record).items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and (prefix or key not in ("step", "time")):
            yield f"{prefix}{key}", float(value)
