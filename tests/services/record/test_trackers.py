"""Step records in the trackers a job names."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_governor.services.job.settings import JobError
from opd_governor.services.job.trackers import TRACKERS
from opd_governor.services.record.trackers import Trackers
from tests.services.control.fake_run import make_job, make_step


class FakeModule:
    """One module that is wandb, trackio and mlflow at once: what is called is written down."""

    def __init__(self, broken: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.broken = broken
        self.options: list[dict[str, Any]] = []

    step = 0
    """The next one, as W&B knows it from its server."""

    def init(self, **options: Any) -> "FakeModule":
        self.calls.append(("init", options["name"].partition("-")[0]))
        self.options.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("no route to the server")
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self, **options: str) -> Any:
        self.calls.append(("init", options.get("run_name", "")))
        self.options.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id="given-by-the-server"))

    def log_dict(self, document: dict[str, Any], name: str) -> None:
        self.calls.append(("dict", name))

    def log_metrics(self, values: dict[str, float], step: int, synchronous: bool) -> None:
        assert not synchronous
        self.log(values, step)

    def end_run(self) -> None:
        self.finish()


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeModule]:
    fakes = {name: FakeModule() for name in TRACKERS}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, TRACKERS[name].package, fake)  # type: ignore[arg-type]
    return fakes


def job(*trackers: str) -> Any:
    return make_job(service={"trackers": trackers})


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_is_opened_fed_and_closed(modules: dict[str, FakeModule], tmp_path: Path, name: str) -> None:
    with Trackers(job(name), tmp_path, print) as trackers:
        trackers.log(make_step(1))
        trackers.log(make_step(3))
    calls = [call for call in modules[name].calls if call[0] in ("init", "log", "finish")]
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1] == "sums"
    (first, values), (second, _) = calls[1][1], calls[2][1]
    assert (first, second) == (1, 3)
    assert values["length_mean"] == 61.0
    assert values["kl_by_position/16-63"] == 0.5
    assert not {"step", "time", "eval_accuracy"} & values.keys()


def test_what_is_not_a_number_is_left_out(modules: dict[str, FakeModule], tmp_path: Path) -> None:
    with Trackers(job("wandb"), tmp_path, print) as trackers:
        trackers.log(make_step(3) | {"lengths": [1, 2], "note": "text"})
    _, (_, values) = modules["wandb"].calls[1]
    assert not {"loss", "lengths", "note"} & values.keys()


def test_no_package_is_imported_that_the_job_does_not_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with Trackers(job(), tmp_path, print) as trackers:
        trackers.log(make_step(1))


def test_a_missing_package_is_one_line_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"^service\.trackers: wandb is not installed here; pip install wandb, or take it off the list$"):
        Trackers(job("wandb"), tmp_path, print)


def test_an_outage_of_one_tracker_ends_neither_the_run_nor_the_others(modules: dict[str, FakeModule], tmp_path: Path) -> None:
    modules["wandb"].broken = True
    said: list[str] = []
    with Trackers(job("wandb", "trackio"), tmp_path, said.append) as trackers:
        trackers.log(make_step(1))
        trackers.log(make_step(2))
    assert said == ["wandb failed and is left out from here on: no route to the server"]
    assert [call[0] for call in modules["trackio"].calls] == ["init", "log", "log", "finish"]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(job("tensorboard"), tmp_path, print) as trackers:
        for step in (1, 2):
            trackers.log(make_step(step))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("length_mean")] == [(1, 61.0), (2, 62.0)]
    assert "kl_by_position/0-15" in events.Tags()["scalars"]


def test_a_resumed_run_goes_on_as_the_same_run_at_every_tracker(modules: dict[str, FakeModule], tmp_path: Path) -> None:
    for _ in range(2):
        with Trackers(job("wandb", "trackio", "mlflow"), tmp_path, print) as trackers:
            trackers.log(make_step(1))
    with Trackers(job("wandb", "trackio"), tmp_path / "another", print):
        pass
    first, second, other = modules["wandb"].options
    assert first["id"] == second["id"] != other["id"]
    assert second["resume"] == "allow"
    first, second, other = modules["trackio"].options
    assert first["name"] == second["name"] != other["name"]
    assert (first["resume"], second["resume"]) == ("never", "must")
    assert modules["mlflow"].options == [{"run_name": "sums"}, {"run_id": "given-by-the-server"}]


def test_w_and_b_is_rewound_to_where_steps_are_taken_again(modules: dict[str, FakeModule], tmp_path: Path) -> None:
    modules["wandb"].step = 41
    with Trackers(job("wandb"), tmp_path, print) as trackers:
        trackers.log(make_step(31))
    first, second = modules["wandb"].options
    assert second["resume_from"] == f"{first['id']}?_step=30"


def test_tensorboard_replaces_steps_that_are_taken_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((1, 2, 3), (2, 3), (3, 2)):
        with Trackers(job("tensorboard"), tmp_path, print) as trackers:
            for step in steps:
                trackers.log(make_step(step))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("length_mean")] == [1, 2]


OUTSIDE = """
from opd_governor.services.job.trackers import TRACKERS


@TRACKERS.add("lines")
class Lines:
    package = "json"

    def __init__(self, module, job, run_dir):
        self._dumps, self._path = module.dumps, run_dir / f"{job.name}.lines"

    def log(self, values, step):
        with self._path.open("a") as file:
            file.write(self._dumps({"step": step} | values) + "\\n")

    def close(self):
        self._path.with_suffix(".closed").touch()
"""


def test_a_tracker_from_a_file_outside_the_package_is_named_in_a_job_fed_and_closed(tmp_path: Path) -> None:
    (tmp_path / "lines.py").write_text(OUTSIDE)
    (tmp_path / "job.yaml").write_text(
        "name: x\nextensions: [lines.py]\nstudent: {model: a}\nteacher: {model: b}\ndata: {prompts: {path: p}}\n"
        "service: {trackers: [lines]}\n"
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from opd_governor.services.job.load import load_job\n"
        "from opd_governor.services.record.trackers import Trackers\n"
        "with Trackers(load_job(Path('job.yaml')), Path('.'), print) as trackers:\n"
        "    trackers.log({'step': 3, 'time': 0.0, 'length_mean': 61.0})\n"
    )
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)  # names stay in that process
    assert json.loads((tmp_path / "x.lines").read_text()) == {"step": 3, "length_mean": 61.0}
    assert (tmp_path / "x.closed").exists()


def test_a_tracker_that_nobody_added_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="no such tracker; did you mean wandb"):
        job("wandv")
