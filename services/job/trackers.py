"""The trackers that a job can name. A further one is one class, in a file of its own:

>>> @TRACKERS.add("lines")
... class Lines:
...     package = "json"
...     def __init__(self, module, job, run_dir): ...
...     def log(self, values, step): ...
...     def close(self): ...
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from opd_governor.actors.extensions import Kind

if TYPE_CHECKING:
    from opd_governor.services.job.settings import Job

PROJECT = "opd-governor"
"""W&B's and Trackio's project, MLflow's experiment. Their servers and keys are set as each documents, by its environment variables."""


class Tracker(Protocol):
    """Where the values of a step go. Made with (module, job, run directory) when the run begins; may raise anything."""

    package: ClassVar[str]
    """Module to import, given to the constructor. A job that names the tracker is refused where it cannot be imported."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


TRACKERS: Kind[Any] = Kind("tracker")
"""Name -> class of a Tracker."""


@TRACKERS.add("tensorboard")
class TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    package = "torch.utils.tensorboard"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@TRACKERS.add("wandb")
class WandB:
    """A W&B run of the job's name; WANDB_MODE=offline keeps it in the run directory."""

    package = "wandb"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._run = module.init(project=PROJECT, name=job.name, config=job.model_dump(mode="json"), dir=str(run_dir))

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


@TRACKERS.add("trackio")
class Trackio:
    """A Trackio run of the job's name."""

    package = "trackio"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._trackio = module
        module.init(project=PROJECT, name=job.name, config=job.model_dump(mode="json"))

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


@TRACKERS.add("mlflow")
class MLflow:
    """An MLflow run of the job's name, with the job file as its artifact."""

    package = "mlflow"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._mlflow = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=job.name)
        module.log_dict(job.model_dump(mode="json"), "job.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.end_run()
