"""Real runs with teachers that see more than the student, and with one that reads tokens of its own."""

from pathlib import Path
from statistics import mean

import pytest

from opd_governor.services.record.rundir import Record, read_records
from tests.live_run import ROOT, LiveRun

pytestmark = pytest.mark.integration

STEPS = 40
SHORT = (f"learner.total_steps={STEPS}", f"data.eval.every_steps={STEPS}", "data.eval.limit=128", "data.eval.sampled=false")


def records_of(folder: Path, job: str, *sets: str) -> list[Record]:
    live = LiveRun(folder / "run", *SHORT, *sets, job=ROOT / "deploy/jobs" / job)
    assert live.finish() == 0, live.log.read_text()[-3000:]
    return read_records(folder / "run/metrics.jsonl")


@pytest.fixture(scope="module")
def hinted(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """The run whose teacher sees the hint."""
    return records_of(tmp_path_factory.mktemp("hinted"), "sums-hinted.yaml")


def accuracies(records: list[Record]) -> tuple[float, float]:
    found = [record["eval_accuracy"] for record in records if "eval_accuracy" in record]
    return found[0], found[-1]


def test_a_hint_that_only_the_teacher_sees_raises_the_accuracy_of_a_student_without_it(hinted: list[Record]) -> None:
    before, after = accuracies(hinted)
    assert before < 0.4
    assert after > before + 0.3


def test_without_the_hint_the_student_is_its_own_teacher_and_nothing_rises(tmp_path: Path, hinted: list[Record]) -> None:
    records = records_of(tmp_path, "sums-hinted.yaml", "teacher.context=null")
    before, after = accuracies(records)
    assert abs(after - before) < 0.1
    steps = [record for record in records if record["num_rollouts"]]
    # The signal is zero: before its first update the student differs from its teacher by the rounding of engine and learner alone.
    assert abs(steps[0]["kl_nats"]) < 1e-6
    assert steps[0]["grad_norm"] < 1e-5
    # Adam divides a gradient by its own size, so that rounding moves the weights by the learning rate like any other gradient. What
    # the student differs by from then on is its own drift, which the loss takes back: small against what the hint has to teach.
    assert mean(abs(record["kl_nats"]) for record in steps) < 0.1 * hinted[1]["kl_nats"]


def test_a_teacher_with_another_tokenizer_teaches_the_quickstarts_student(tmp_path: Path) -> None:
    records = records_of(tmp_path, "sums-pairs.yaml")
    before, after = accuracies(records)
    assert after > before + 0.3
    steps = [record for record in records if record["num_rollouts"]]
    assert all(record["spans_per_token"] < 1 for record in steps)
    assert all(record["unaligned_bytes"] == 0 for record in steps)
    assert steps[-1]["kl_nats"] < steps[0]["kl_nats"]
