"""The short form of the collapse bench: one seed, plain and governed. The whole of it is tests/bench/collapse/."""

from pathlib import Path

import pytest

from opd_governor.services.record.rundir import read_records
from tests.live_run import ROOT, LiveRun

pytestmark = pytest.mark.integration

JOB = ROOT / "deploy/jobs/sums-collapse.yaml"
PROMPTS = ROOT / "deploy/sums/prompts_curriculum.jsonl"
NUM_EASY, FIRST_HARD = 640, 1600
"""The curriculum with twenty steps of easy prompts instead of fifty."""
STEPS = 60


def truncations(out: Path, *sets: str) -> list[float]:
    live = LiveRun(out, f"learner.total_steps={STEPS}", "data.eval.path=null", *sets, job=JOB)
    assert live.finish(400) == 0, live.log.read_text()[-3000:]
    return [record["truncation"] for record in read_records(out / "metrics.jsonl") if record["num_rollouts"]]


def test_the_governed_run_holds_where_the_plain_one_collapses(tmp_path: Path) -> None:
    rows = PROMPTS.read_text().splitlines(keepends=True)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((rows[:NUM_EASY] + rows[FIRST_HARD:])[: STEPS * 32]))
    shared = (f"data.prompts.path={path}", f"data.golden.cache_dir={tmp_path / 'golden'}", "checkpoint.every_steps=10")
    plain = truncations(tmp_path / "plain", *shared)
    governed = truncations(tmp_path / "governed", *shared, "governor.mode=enforce", "data.unfinished_by_teacher=quota")
    assert max(plain) > 0.5
    # A cap that the governor lowered counts as well.
    assert max(governed[20:]) < 0.1
