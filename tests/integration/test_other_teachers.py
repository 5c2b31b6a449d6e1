"""Real runs with teachers that see more than the student, and with one that reads tokens of its own."""

from pathlib import Path

import pytest

from opd_governor.services.record.rundir import Record, read_records
from tests.live_run import ROOT, LiveRun

pytestmark = pytest.mark.integration

STEPS = 40
SHORT = (f"learner.total_steps={STEPS}", f"data.eval.every_steps={STEPS}", "data.eval.limit=128", "data.eval.sampled=false")


def records_of(tmp_path: Path, job: str, *sets: str) -> list[Record]:
    live = LiveRun(tmp_path / "run", *SHORT, *sets, job=ROOT / "deploy/jobs" / job)
    assert live.finish() == 0, live.log.read_text()[-3000:]
    return read_records(tmp_path / "run/metrics.jsonl")


def accuracies(records: list[Record]) -> tuple[float, float]:
    found = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
    return found[0], found[-1]


def test_a_hint_that_only_the_teacher_sees_raises_the_accuracy_of_a_student_without_it(tmp_path: Path) -> None:
    before, after = accuracies(records_of(tmp_path, "sums-hinted.yaml"))
    assert before < 0.4
    assert after > before + 0.3


def test_without_the_hint_the_student_is_its_own_teacher_and_nothing_rises(tmp_path: Path) -> None:
    records = records_of(tmp_path, "sums-hinted.yaml", "teacher.context=null")
    before, after = accuracies(records)
    assert abs(after - before) < 0.1
    # Not exactly 0: rounding between engine and learner is a gradient too, and Adam scales it up.
    assert max(abs(record["kl_nats"]) for record in records if record["num_rollouts"]) < 0.05


def test_a_teacher_with_another_tokenizer_teaches_the_quickstarts_student(tmp_path: Path) -> None:
    records = records_of(tmp_path, "sums-pairs.yaml")
    before, after = accuracies(records)
    assert after > before + 0.3
    steps = [record for record in records if record["num_rollouts"]]
    assert all(record["spans_per_token"] < 1 for record in steps)
    assert all(record["unaligned_bytes"] == 0 for record in steps)
    assert steps[-1]["kl_nats"] < steps[0]["kl_nats"]
