"""When a sync counts as wrong: the tolerance comes from the model, and one miss is no proof."""

import asyncio
from typing import Any

import numpy as np
import pytest

from opd_governor.services.record.batch import Sync
from opd_governor.services.run.weights import BFLOAT16_TOLERANCE_NATS, FLOAT32_TOLERANCE_NATS, ROUNDINGS, WeightSync
from tests.services.control.fake_run import make_job

EXACT = np.linspace(-3, -1, 8).astype(np.float32)


class FakeLearner:
    """Log-probs that bfloat16 moves by `rounding`."""

    num_restores = 0

    def __init__(self, rounding: float) -> None:
        self.rounding = rounding

    async def weights(self, *, trained_only: bool) -> tuple[int, None]:
        return 1, None

    async def probe(self, token_ids: list[int], dtype: str | None = None) -> np.ndarray:
        return EXACT + (self.rounding if dtype == "bfloat16" else 0.0)


class FakeEngines:
    """One engine whose log-probs are this far away, sync by sync."""

    def __init__(self, gaps: list[float]) -> None:
        self.gaps, self.asked = gaps, 0

    async def on_each(self, what: str, call: Any) -> list[np.ndarray]:
        self.asked += 1
        return [EXACT + self.gaps[self.asked - 1]]


def sync(gaps: list[float], rounding: float = 0.0, **cluster: Any) -> tuple[Sync, FakeEngines, list[str]]:
    dtype = "bfloat16" if rounding else "float32"
    job = make_job(rollout={"dtype": dtype}, learner={"dtype": dtype}, cluster=cluster)
    engines, told = FakeEngines(gaps), []
    weights = WeightSync(job, [1, 2], FakeLearner(rounding), engines, told.append)  # type: ignore[arg-type]
    return asyncio.run(weights.to_all()), engines, told


def test_in_bfloat16_the_tolerance_is_the_model_s_own_rounding() -> None:
    """A student with a vocabulary of 262,000 was .985 nats away, and refused at .5, though its weights were right."""
    found, engines, _ = sync([0.985], rounding=0.4)
    assert found.tolerance_nats == pytest.approx(ROUNDINGS * 0.4)
    assert found.sound
    assert engines.asked == 1


def test_a_model_that_rounds_little_keeps_the_least_tolerance() -> None:
    assert sync([0.2], rounding=0.01)[0].tolerance_nats == BFLOAT16_TOLERANCE_NATS
    assert sync([0.001])[0].tolerance_nats == FLOAT32_TOLERANCE_NATS


def test_what_the_job_says_wins() -> None:
    assert sync([0.2], rounding=0.4, probe_tolerance_nats=0.3)[0].tolerance_nats == 0.3


def test_one_miss_is_told_and_tried_again_and_two_are_wrong() -> None:
    found, engines, told = sync([3.0, 0.0])
    assert found.sound
    assert engines.asked == 2
    assert told == ["engine and learner differ by 3 nats on the probe, tolerance 0.01"]
    assert not sync([3.0, 2.0])[0].sound


class MovedLearner(FakeLearner):
    """A LoRA student that its steps have brought `moved` nats away from its base."""

    moved = 0.0

    async def probe(self, token_ids: list[int], dtype: str | None = None, *, base: bool = False) -> np.ndarray:
        return await super().probe(token_ids, dtype) - (self.moved if base else 0.0)


class LoraEngines(FakeEngines):
    """Its base is the learner's to `rounding`; `gaps` are what it is away from the learner."""

    moved, rounding = 0.0, 1e-5

    async def on_each(self, what: str, call: Any) -> list[np.ndarray]:
        (probed,) = await super().on_each(what, call)
        return [np.stack([probed, EXACT - self.moved + self.rounding])]


@pytest.mark.parametrize(
    ("moved", "gap", "lost"),
    [
        (0.0, 0.0, False),  # before the first step
        (2e-4, 2e-4, False),  # as much as rounding: nothing can be said yet
        (5e-3, 0.0, False),
        (5e-3, -5e-3, True),  # within the tolerance, but where the base is
        (0.4, 1e-3, False),
        (0.4, -0.4, True),
    ],
)
def test_an_engine_that_stays_at_its_base_has_lost_the_addition(moved: float, gap: float, lost: bool) -> None:
    job = make_job(student={"model": "m", "lora": {"rank": 4}})
    learner, engines, told = MovedLearner(0.0), LoraEngines([gap, gap]), []
    learner.moved = engines.moved = moved
    found = asyncio.run(WeightSync(job, [1, 2], learner, engines, told.append).to_all())  # type: ignore[arg-type]
    assert found.lost == lost
    assert found.sound != lost
    assert told == (["the engine answers as the student's base on the probe: the addition did not reach it"] if lost else [])
    assert engines.asked == 1 + lost
