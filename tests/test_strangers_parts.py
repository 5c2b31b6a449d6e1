"""One part of every kind, from files outside the package, works from the job file to the dashboards."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.grafana.dashboards import dashboards
from opd_governor.actors import extensions
from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.learner.divergences import LOSSES
from opd_governor.actors.learner.supports import SUPPORTS
from opd_governor.actors.teacher.backends import TEACHER_BACKENDS
from opd_governor.services.inputs.rows import open_rows
from opd_governor.services.inputs.verifiers import Response, load_verifier, summarise
from opd_governor.services.job.load import load_job
from opd_governor.services.job.reference import render
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import RunDirectory, read_records
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.record.trackers import Trackers
from opd_governor.services.report.replay import replay as replay_here
from opd_governor.services.run.terms import base_limits
from tests.strangers import FILES, NAMES, own_parts, write_parts

NUM_HEALTHY, NUM_STEPS = 6, 40


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(extensions.VARIABLE, "")
    with own_parts():
        yield write_parts(tmp_path)


class OwnSource:
    """What the run's own /metrics would serve, without the network."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def read(self) -> Snapshot:
        families = text_string_to_metric_families(generate_latest(self._telemetry.registry).decode())
        return Snapshot.of((sample.name, sample.labels, sample.value) for family in families for sample in family.samples)


def govern(job: Job, out: Path) -> tuple[Telemetry, RunMonitor, RunDirectory]:
    """A governor over the metrics of a run whose entropy falls from 2 nats to .01."""
    directory, telemetry = RunDirectory(out, resume=False), Telemetry(job.name)
    directory.write_job(job)
    monitor = RunMonitor(job.name, NUM_STEPS, base_limits(job))
    journal = Journal(directory, telemetry, monitor, samples_per_step=0, decode=str)
    governor = Governor(OwnSource(telemetry), job.governor, base_limits(job))
    for step in range(1, NUM_STEPS + 1):
        telemetry.inc("opd_rollouts_total", 32, finish_reason="stop")
        telemetry.inc("opd_learner_steps_total")
        telemetry.set("opd_student_entropy_nats", 2.0 if step <= NUM_HEALTHY else 0.01)
        journal.decision(*governor.tick(step))
    return telemetry, monitor, directory


def test_the_job_file_takes_every_name_and_its_schema_lists_them(job_file: Path) -> None:
    names = {*NAMES.values()}
    assert not names & {*LOSSES, *SUPPORTS, *TEACHER_BACKENDS}
    job = load_job(job_file)
    assert job.extensions == tuple(str(job_file.parent / name) for name in FILES)
    assert (job.objective.loss, job.objective.support, job.teacher[0].backend) == ("total_variation", "teacher_two", "own_torch")
    assert job.objective.needs.teacher_top_k == 8
    schema, page = json.dumps(Job.model_json_schema()), render()
    assert all(f'"{name}"' in schema and f"`{name}`" in page for name in names)


@pytest.mark.parametrize(("key", "name"), NAMES.items())
def test_without_its_file_each_name_is_refused_by_its_key(job_file: Path, key: str, name: str) -> None:
    job_file.write_text(job_file.read_text().replace("extensions:", "# extensions:"))
    with pytest.raises(JobError, match=rf"(?m)^.*job\.yaml: {key}: no such .*\(got '{name}'\)$"):
        load_job(job_file)


def test_the_reader_reads_the_prompts_and_the_verifier_judges_answers(job_file: Path) -> None:
    job = load_job(job_file)
    assert [row.value["prompt"] for row in open_rows(job.data.prompts)] == ["1 + 1", "2 + 2"]
    verify = load_verifier(job.data.eval.verifier)
    responses = [Response("it is 2", "2", 3, False), Response("it is 5", "4", 3, False)]
    assert summarise(responses, verify).accuracy_ratio == 0.5


def test_the_tracker_gets_every_step(job_file: Path) -> None:
    with Trackers(load_job(job_file), job_file.parent, print) as trackers:
        trackers.log({"step": 3, "time": 1.0, "kl_nats": 0.5, "entropy_weight": 0.2})
    assert json.loads((job_file.parent / "lines.txt").read_text()) == [3, {"kl_nats": 0.5, "entropy_weight": 0.2}]


def test_the_signal_moves_the_actuator_and_both_reach_record_metric_page_and_dashboard(job_file: Path) -> None:
    telemetry, monitor, directory = govern(load_job(job_file), job_file.parent / "run")
    first, *_, last = read_records(directory.decisions)
    assert first["limits"]["extra"] == {"entropy_weight": 0.0}
    assert last["readings"]["entropy"]["evidence"] > last["readings"]["entropy"]["threshold"]
    assert 0 < last["limits"]["extra"]["entropy_weight"] <= 0.2
    assert any("entropy under its running level" in record["reason"] for record in read_records(directory.decisions))
    samples = OwnSource(telemetry).read()
    assert samples.gauge("opd_governor_entropy_weight") == last["limits"]["extra"]["entropy_weight"]
    assert samples.gauge("opd_governor_evidence_nats", signal="entropy") == last["readings"]["entropy"]["evidence"]
    declared = monitor.governor()["declared"]
    assert {"name": "entropy_weight", "title": "entropy weight", "unit": ""} in declared["actuators"]
    assert {"name": "entropy", "title": "entropy under its running level"} in declared["signals"]
    assert monitor.governor()["readings"]["entropy"] == last["readings"]["entropy"]
    assert "opd_governor_entropy_weight{" in json.dumps(dashboards()["governor.json"])


def test_the_dashboards_program_draws_the_actuator_of_a_file_in_the_environment(job_file: Path) -> None:
    program = "from deploy.grafana.dashboards import dashboards; import json; print(json.dumps(dashboards()['governor.json']))"
    environment = os.environ | {extensions.VARIABLE: str(job_file.parent / "actuator.py")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    panel = next(panel for panel in json.loads(done.stdout)["panels"] if panel["title"] == "Entropy weight")
    assert panel["description"] == "`opd_governor_entropy_weight`: Weight of the student's entropy in the loss."
    assert "opd_governor_entropy_weight{" in panel["targets"][0]["expr"]


def test_replay_knows_the_parts_of_the_run_in_a_process_of_its_own(job_file: Path) -> None:
    govern(load_job(job_file), job_file.parent / "run")
    environment = os.environ | {extensions.VARIABLE: ""}

    def replay(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "opd_governor", "replay", str(job_file.parent / "run"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    explained = replay("--explain", str(NUM_STEPS)).stdout
    assert "entropy under its running level, nats" in explained
    assert "\nentropy weight 0." in explained
    assert not any(row.differences for row in replay_here(job_file.parent / "run"))
    (job_file.parent / "signal.py").unlink()
    refused = replay()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "signal.py does not load (FileNotFoundError: no such file)" in refused.stderr


def test_a_file_that_is_gone_when_the_run_is_resumed_is_one_line(job_file: Path) -> None:
    load_job(job_file)
    (job_file.parent / "loss.py").unlink()
    command = [sys.executable, "-m", "opd_governor", "run", str(job_file), "--resume"]
    refused = subprocess.run(command, env=os.environ | {extensions.VARIABLE: ""}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"opd: {job_file}: extensions: {job_file.parent / 'loss.py'} does not load (FileNotFoundError: no such file); mend or remove it\n"
    )


def test_a_signal_that_the_job_names_no_more_is_forgotten_at_the_next_decision(job_file: Path) -> None:
    job = load_job(job_file)
    telemetry, _, _ = govern(job, job_file.parent / "run")
    governor = Governor(OwnSource(telemetry), job.governor, base_limits(job))
    governor.tick(1)
    state = governor.state()
    state["law"]["tracks"]["gone"] = state["law"]["tracks"]["entropy"]
    governor.restore(state)
    telemetry.inc("opd_rollouts_total", 32, finish_reason="stop")
    decision, record = governor.tick(2)
    assert "entropy" in decision.after.tracks
    assert "gone" not in decision.after.tracks
    assert "gone" not in record["readings"]


@pytest.mark.parametrize(
    ("body", "says"), [("1 / 0", "ZeroDivisionError: division by zero"), ("0.5", "TypeError: read returned float, not an Observation")]
)
def test_a_signal_that_raises_is_not_measured_and_the_decision_says_why(job_file: Path, body: str, says: str) -> None:
    signal = job_file.parent / "signal.py"
    signal.write_text(signal.read_text().replace('entropy_nats = growth.current.gauge("opd_student_entropy_nats")', f"return {body}"))
    _, _, directory = govern(load_job(job_file), job_file.parent / "run")
    last = read_records(directory.decisions)[-1]
    assert "entropy" not in last["signals"]["observations"]
    assert last["reason"].startswith(f"no signal has evidence over its threshold; entropy not read ({says})")


def test_metrics_of_an_actuator_that_the_job_names_no_more_are_left_out_at_a_resume(job_file: Path) -> None:
    telemetry, _, _ = govern(load_job(job_file), job_file.parent / "run")
    state = telemetry.state()
    assert any(name == "opd_governor_entropy_weight" for name, *_ in state)
    known = [[name.replace("entropy_weight", "gone"), labels, value] for name, labels, value in state]
    again = Telemetry("stranger")
    again.restore(known)
    assert OwnSource(again).read().total("opd_rollouts_total") == 32 * NUM_STEPS


def test_an_actuator_whose_gauge_another_metric_has_is_one_line(job_file: Path) -> None:
    actuator = job_file.parent / "actuator.py"
    actuator.write_text(actuator.read_text().replace("entropy_weight", "pressure"))
    job_file.write_text(job_file.read_text().replace("entropy_weight", "pressure"))
    load_job(job_file)
    with pytest.raises(
        JobError, match=r"^extensions: actuator 'pressure': metric opd_governor_pressure exists already; give it another name"
    ):
        Telemetry("a")
