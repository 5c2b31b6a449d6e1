"""Step records to the trackers a job names; each package is imported only when chosen. metrics.jsonl is always written, whatever is here.

>>> with Trackers(job, run_dir, say=print) as trackers:
...     trackers.log({"step": 1, "kl_nats": 0.4, ...})
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.record.rundir import Record, finite

PROJECT = "opd-governor"
"""W&B's and Trackio's project, MLflow's experiment. Their servers and keys are set as each documents, by its environment variables."""
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Where the values of a step go."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, module: Any, job: Job, run_dir: Path) -> None:
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A W&B run of the job's name; WANDB_MODE=offline keeps it in the run directory."""

    def __init__(self, module: Any, job: Job, run_dir: Path) -> None:
        self._run = module.init(project=PROJECT, name=job.name, config=job.model_dump(mode="json"), dir=str(run_dir))

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A Trackio run of the job's name."""

    def __init__(self, module: Any, job: Job, run_dir: Path) -> None:
        self._trackio = module
        module.init(project=PROJECT, name=job.name, config=job.model_dump(mode="json"))

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """An MLflow run of the job's name, with the job file as its artifact."""

    def __init__(self, module: Any, job: Job, run_dir: Path) -> None:
        self._mlflow = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=job.name)
        module.log_dict(job.model_dump(mode="json"), "job.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.end_run()


KINDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def load_packages(job: Job) -> dict[str, Any]:
    """The modules of the trackers the job names. Raises JobError for one that is not installed."""
    modules: dict[str, Any] = {}
    for name in job.service.trackers:
        try:
            modules[name] = importlib.import_module(PACKAGES[name])
        except ImportError:
            raise JobError(f"service.trackers: {name} is not installed here; pip install {name}, or take it off the list") from None
    return modules


class Trackers:
    """All of a job's trackers as one, open while it is entered."""

    def __init__(self, job: Job, run_dir: Path, say: Callable[[str], None]) -> None:
        """Raises JobError for a package that is not installed; nothing is opened yet."""
        self._job, self._run_dir, self._say = job, run_dir, say
        self._modules = load_packages(job)
        self._open: dict[str, Tracker] = {}

    def __enter__(self) -> "Trackers":
        self._open = {name: KINDS[name](module, self._job, self._run_dir) for name, module in self._modules.items()}
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
