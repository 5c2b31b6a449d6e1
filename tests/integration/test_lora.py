"""A LoRA student in a real engine: the addition alone travels, each version under its own name, and the probe tells it from the base."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.lora import LoraSettings
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.rollout.actor import RolloutActor
from opd_governor.actors.rollout.arguments import lora_arguments
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt
from tests.tiny import Architecture, build_tiny

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning")]
PROBE = [5, 6, 7, 9, 12, 40, 8, 30, 31, 32, 33, 34]
NUM_SYNCS = 20


def shift(learner: Learner, seed: int) -> None:
    """As a step would, but more: every version must be told from the one before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in learner._student.model.named_parameters():
            if "lora" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)


async def sync_often(folder: Path) -> dict[str, Any]:
    settings = RolloutSettings(max_new_tokens=24, max_model_len=128, max_num_seqs=8, samples_per_prompt=2)
    settings = settings.model_copy(update={"engine": lora_arguments(4, settings.max_staleness)})
    actor = RolloutActor(str(folder), settings, stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0)
    await actor.start()
    learner = Learner(
        LearnerModels(str(folder), lora=LoraSettings(rank=4)), LearnerSettings(), ObjectiveSettings(), stop_ids=(1,), max_new_tokens=24
    )
    gaps, moved, last = [], [], np.zeros(len(PROBE) - 1)
    for version in range(NUM_SYNCS):
        if version:
            shift(learner, version)
        expected = learner.probe(PROBE)
        moved.append(float(np.abs(expected - last).max()))
        last = expected
        probed = await actor.load_weights(learner.weights("float32")[1], version, PROBE)
        gaps.append(float(np.abs(probed - expected).max()))
    prompts = [(Prompt(i, tuple(range(5 + i, 40 + i))), sample) for i in range(3) for sample in range(2)]
    trajectories = [t async for group in actor.rollout(prompts, LengthLimits(24), 0, settings) for t in group]
    rollout_gap = 0.0
    for t in trajectories:
        own = learner.probe([*t.prompt.token_ids, *t.token_ids])[len(t.prompt.token_ids) - 1 :]
        rollout_gap = max(rollout_gap, float(np.abs(own - t.logprobs_T).max()))
    base = await actor._engine.probe(PROBE, base=True)
    kept = sorted(path.name for path in Path(actor._folder or "").iterdir())
    # The same files under the last one's name: what vLLM serves then is not what they hold.
    await actor._engine._llm.reset_prefix_cache()
    actor._engine.shutdown()
    return {
        "gaps": gaps,
        "moved": moved,
        "rollout_gap": rollout_gap,
        "base": base,
        "kept": kept,
        "versions": {t.weight_version for t in trajectories},
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_engine_and_learner_agree_after_each_of_many_syncs(tmp_path: Path, architecture: Architecture) -> None:
    folder = build_tiny(tmp_path / "student", architecture, seed=3)
    found = asyncio.run(sync_often(folder))
    assert max(found["gaps"]) < 1e-3
    assert found["rollout_gap"] < 1e-3
    assert min(found["moved"][2:]) > 1e-2, "versions that could not be mistaken for one another"
    assert found["versions"] == {NUM_SYNCS - 1}
    assert len(found["kept"]) == 3, "max_staleness + 2 of them"
    plain = Learner(LearnerModels(str(folder)), LearnerSettings(), ObjectiveSettings(), stop_ids=(1,), max_new_tokens=24)
    np.testing.assert_allclose(found["base"], plain.probe(PROBE), atol=1e-3)


async def lose_it(folder: Path) -> None:
    settings = RolloutSettings(max_new_tokens=8, max_model_len=128, max_num_seqs=4)
    settings = settings.model_copy(update={"engine": lora_arguments(4, 0)})
    actor = RolloutActor(str(folder), settings, stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0)
    await actor.start()
    learner = Learner(
        LearnerModels(str(folder), lora=LoraSettings(rank=4)), LearnerSettings(), ObjectiveSettings(), stop_ids=(1,), max_new_tokens=8
    )
    shift(learner, 1)

    async def lost(request_folder: str, version: int) -> list[str]:
        return []

    actor._engine.load_adapter = lost  # type: ignore[method-assign]
    try:
        await actor.load_weights(learner.weights("float32")[1], 1, PROBE)
    finally:
        actor._engine.shutdown()


def test_an_addition_that_does_not_arrive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="answers as the student's base"):
        asyncio.run(lose_it(build_tiny(tmp_path / "student", seed=3)))


def test_a_run_trains_an_addition_and_leaves_it_in_final(tmp_path: Path) -> None:
    """The quickstart with rank 8 over a few steps, through the command."""
    from opd_governor.services.cli.app import main

    out = tmp_path / "out"
    arguments = [
        "run", "deploy/jobs/sums.yaml", "--out", str(out), "--set", "student.lora={rank: 8, merge: true}", "--set", "learner.total_steps=4",
        "--set", "learner.learning_rate=0.003", "--set", "data.eval.path=null", "--set", "checkpoint.every_steps=2",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert json.loads((out / "final/adapter_config.json").read_text())["r"] == 8
    assert (out / "final/merged/model.safetensors").is_file()
    assert (out / "checkpoints/step-4/student/adapter_model.safetensors").is_file()
