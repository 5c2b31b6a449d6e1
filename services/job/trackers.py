"""The trackers that a job can name. A further one is one class, in a file of its own:

>>> @TRACKERS.add("lines")
... class Lines:
...     package = "json"
...     def __init__(self, module, job, run_dir): ...
...     def log(self, values, step): ...
...     def close(self): ...
"""

import uuid
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


def run_id(run_dir: Path, tracker: str, made: str | None = None) -> tuple[str, bool]:
    """(id of this run directory's run at the tracker, whether there was one before). `made`: an id that the tracker gave, if it does."""
    file = run_dir / f".{tracker}-run"
    if file.exists():
        return file.read_text().strip(), True
    new = made or uuid.uuid4().hex
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(new + "\n")
    return new, False


@TRACKERS.add("tensorboard")
class TensorBoard:
    """Event files in `tensorboard/` of the run directory. Steps taken again replace what was drawn of them."""

    package = "torch.utils.tensorboard"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._open = lambda step: module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=step)
        self._writer: Any = None
        self._last_step = 0

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is None or step <= self._last_step:
            self.close()
            self._writer = self._open(step)
        self._last_step = step
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@TRACKERS.add("wandb")
class WandB:
    """One W&B run for a run directory, resumed or not; WANDB_MODE=offline keeps it in the run directory.

    Steps taken again replace those before: the run is rewound to the step where it goes on (not offline, where W&B cannot).
    """

    package = "wandb"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._id, _ = run_id(run_dir, "wandb")
        terms = {"project": PROJECT, "name": job.name, "config": job.model_dump(mode="json"), "dir": str(run_dir)}
        self._open = lambda **how: module.init(**terms, **how)
        self._run = self._open(id=self._id, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        if step < self._run.step:
            self._run.finish()
            self._run = self._open(resume_from=f"{self._id}?_step={step - 1}")
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


@TRACKERS.add("trackio")
class Trackio:
    """One Trackio run for a run directory, resumed or not. Of a step taken again it keeps both: it can take none back."""

    package = "trackio"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._trackio = module
        number, before = run_id(run_dir, "trackio")
        name = f"{job.name}-{number[:8]}"  # Trackio knows a run by its name: two run directories of one job are two runs
        module.init(project=PROJECT, name=name, config=job.model_dump(mode="json"), resume="must" if before else "never")

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


@TRACKERS.add("mlflow")
class MLflow:
    """One MLflow run for a run directory, resumed or not, with the job file as its artifact.

    Of a step taken again it keeps both values and shows the latest: it can take none back.
    """

    package = "mlflow"

    def __init__(self, module: Any, job: "Job", run_dir: Path) -> None:
        self._mlflow = module
        module.set_experiment(PROJECT)
        if (run_dir / ".mlflow-run").exists():
            module.start_run(run_id=run_id(run_dir, "mlflow")[0])
        else:
            run_id(run_dir, "mlflow", made=module.start_run(run_name=job.name).info.run_id)
        module.log_dict(job.model_dump(mode="json"), "job.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.end_run()
