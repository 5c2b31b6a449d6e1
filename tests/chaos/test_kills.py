"""The short chaos suite: every role of one real run is killed, and one of its engines is frozen."""

import signal
from pathlib import Path

import pytest

from tests.chaos.harness import run_with_kills

pytestmark = pytest.mark.chaos

KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def test_a_run_whose_every_role_is_killed_loses_nothing(tmp_path: Path) -> None:
    plan = [("governor", KILL), ("learner", KILL), ("rollout", KILL), ("teacher", KILL), ("engine", STOP)]
    outcome = run_with_kills(tmp_path / "sums", plan, seed=0, steps=70, staleness=1)
    assert len(outcome.kills) == len(plan)
    assert outcome.problems == [], (outcome, (tmp_path / "sums.log").read_text()[-3000:])
