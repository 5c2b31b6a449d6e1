"""Every sync brings the learner's weights into the engine: four architectures, tied and untied, twenty learner steps each."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from tiny import Architecture, build_tiny

from actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from services.cluster import connect
from services.fleet import Fleet, Models
from services.job import Job

pytestmark = pytest.mark.integration

NUM_SYNCS = 20
TOLERANCE_NATS = 1e-3
PROBE = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]


@pytest.fixture(scope="module", autouse=True)
def private_ray() -> Any:
    connect(None)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen3", None), ("gemma3", None), ("gpt2", None)])
def test_engine_and_learner_agree_after_each_of_twenty_steps(tmp_path: Path, architecture: Architecture, tied: bool | None) -> None:
    folder = build_tiny(tmp_path / "student", architecture, seed=0, tied=tied)
    gaps, moved = asyncio.run(_learn_and_sync(str(folder)))
    assert max(gaps) < TOLERANCE_NATS, gaps
    assert moved > 100 * TOLERANCE_NATS, "the weights hardly changed: the comparison would prove nothing"


async def _learn_and_sync(folder: str) -> tuple[list[float], float]:
    """The gap after each sync, and how far the probe's log-probs moved from the first to the last."""
    job = Job.model_validate(
        {
            "name": "sync",
            "student": {"model": folder},
            "teacher": {"model": folder},
            "data": {"prompts": {"path": "none.jsonl"}},
            "rollout": {"max_num_seqs": 8, "max_new_tokens": 32},
            "learner": {"learning_rate": 3e-3},
        }
    )
    fleet = Fleet(job, Models(folder, (folder,), (1,), 256), PROBE)
    await fleet.start()
    try:
        gaps = [(await fleet.sync_weights()).gap_nats]
        first = await fleet.learner_probe()
        for version in range(1, NUM_SYNCS + 1):
            report = await fleet.learn(_random_batch(version), [], LengthLimits(32), 10.0, 3e-3)
            assert not report.skipped
            gaps.append((await fleet.sync_weights()).gap_nats)
        return gaps, float(np.abs(await fleet.learner_probe() - first).max())
    finally:
        fleet.end_actors()


def _random_batch(seed: int) -> list[ScoredRollout]:
    """Responses and teacher scores out of the air: they need not be true to move every weight."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for index in range(4):
        token_ids = tuple(int(i) for i in rng.integers(4, 80, 16))
        behaviour, teacher = (rng.uniform(-6, -1, 16).astype(np.float32) for _ in range(2))
        trajectory = Trajectory(Prompt(index, (5, 6, 7)), token_ids, behaviour, "stop", 32, seed, seed - 1, 0)
        rollouts.append(ScoredRollout(trajectory, TokenScores("t", teacher, teacher - 1)))
    return rollouts
