"""The student's own top-k under filters: a real engine, against transformers, and what the objective's gradient makes of it."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from opd_governor.actors.rollout.actor import RolloutActor
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from tests.tiny import build_tiny

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning")]
TOP_K = 8
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.05},
    "cold": {"temperature": 0.7, "top_p": 0.9},
}


async def rollouts(folder: Path, strict: bool) -> dict[str, list[Trajectory]]:
    """By the prompts' order; those of `again` once more, in an engine that has done other things since."""
    settings = RolloutSettings(max_new_tokens=40, max_model_len=64, max_num_seqs=8)
    actor = RolloutActor(
        str(folder), settings, stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0, top_k=TOP_K, strict=strict
    )
    await actor.start()
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    await actor.load_weights(np.frombuffer(save(weights), np.uint8), 0, [5, 6])
    draw = np.random.default_rng(0)
    requests = [(Prompt(i, tuple(draw.integers(4, 80, 2 + 3 * i).tolist())), 0) for i in range(9)]  # the last leaves 38 of the window
    found = {}
    for name, filters in [*FILTERS.items(), ("again", FILTERS["cold"])]:
        groups = actor.rollout(requests, LengthLimits(40), 0, settings.model_copy(update=filters))
        found[name] = sorted([t async for group in groups for t in group], key=lambda trajectory: trajectory.prompt.index)
    actor._engine.shutdown()
    return found


@pytest.mark.parametrize("strict", [False, True])
def test_the_ids_are_the_students_likeliest_whatever_it_was_sampled_through(tmp_path: Path, strict: bool) -> None:
    folder = build_tiny(tmp_path / "student", seed=3, tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = asyncio.run(rollouts(folder, strict))
    for name, trajectories in found.items():
        assert len(trajectories) == 9, name
        for trajectory in trajectories:
            ids = [*trajectory.prompt.token_ids, *trajectory.token_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(trajectory.prompt.token_ids) - 1 : -1]
            own, sampled = trajectory.support_ids_TK, np.array(trajectory.token_ids)
            assert own is not None
            for row, mine, token in zip(logits, own, sampled, strict=True):
                least = row.topk(TOP_K).values[-1]
                listed = {int(i) for i in mine if i >= 0} - {int(token)}
                assert len(listed) >= TOP_K - 1, name
                assert (row[list(listed)] >= least - 1e-4).all(), name
    if strict:
        for first, second in zip(found["cold"], found["again"], strict=True):
            assert first.token_ids == second.token_ids
            np.testing.assert_array_equal(first.support_ids_TK, second.support_ids_TK)
