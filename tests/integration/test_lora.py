"""A LoRA student in a real engine: the addition alone travels, each version under its own name, and the probe tells it from the base.

    OPD_SYNCS=20 OPD_ARCHITECTURES=llama,qwen3,gemma3 python -m pytest -s tests/integration/test_lora.py     # the long form

One engine a model takes every part of the test. CI runs few syncs on the family that vLLM treats most apart.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import build_tiny
from vllm.lora.request import LoRARequest

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.lora import WEIGHTS
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.rollout.actor import RolloutActor
from opd_governor.actors.rollout.arguments import lora_arguments
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt
from opd_governor.services.record.rundir import read_records
from opd_governor.services.run.weights import FLOAT32_TOLERANCE_NATS, addition_lost, largest_gap
from tests.live_run import LiveRun

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*torch.distributed.reduce_op.*:FutureWarning")]
NUM_SYNCS = int(os.environ.get("OPD_SYNCS", "5"))
ARCHITECTURES = os.environ.get("OPD_ARCHITECTURES", "gemma3").split(",")
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLERANCE_NATS, APART_NATS = 1e-3, 0.1
PROBE = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]
PROMPT = [int(i) for i in np.random.default_rng(1).integers(4, 80, 200)]
"""Longer than a block of the prefix cache."""


class Pair:
    """A learner and the engine that samples its student."""

    def __init__(self, folder: Path) -> None:
        settings = RolloutSettings(max_new_tokens=8, max_num_seqs=8, samples_per_prompt=2)
        self.settings = settings.model_copy(update={"engine": lora_arguments(4, LAYERS, settings.max_staleness)})
        self.actor = RolloutActor(str(folder), self.settings, stop_ids=(1,), reference_tokens=None, weight_transfer="file", seed=0)
        self.learner = self.new_learner(folder, LoraSettings(rank=4, merge=True))

    @staticmethod
    def new_learner(folder: Path, lora: LoraSettings | None) -> Learner:
        return Learner(LearnerModels(str(folder), lora=lora), LearnerSettings(), ObjectiveSettings(), stop_ids=(1,), max_new_tokens=8)

    @torch.no_grad()
    def shift(self, seed: int) -> None:
        """As a step would, but more: no version may be mistaken for the one before."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.learner._student.model.named_parameters():
            if "lora" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)

    async def sync(self, version: int) -> tuple[float, float]:
        """How far the engine is from the learner on the probe afterwards, and how far it moved from its base, nats."""
        probed, base = await self.actor.load_weights(self.learner.weights("float32")[1], version, PROBE)
        return self.probe_gap(probed), largest_gap(probed, base)

    async def rollout_gap(self) -> float:
        """How far the log-probs of rollouts are from the learner's, nats. Their prompt is in the prefix cache from the second time on."""
        requests = [(Prompt(0, tuple(PROMPT)), sample) for sample in range(2)]
        groups = [group async for group in self.actor.rollout(requests, LengthLimits(8), 0, self.settings)]
        gaps = [self.gap(t.logprobs_T, [*PROMPT, *t.token_ids], len(t.token_ids)) for group in groups for t in group]
        return max(gaps)

    def gap(self, logprobs: np.ndarray, token_ids: list[int], num_last: int) -> float:
        return float(np.abs(self.learner.probe(token_ids)[-num_last:] - logprobs[-num_last:]).max())

    def probe_gap(self, probed: np.ndarray) -> float:
        return self.gap(probed, PROBE, len(PROBE) - 1)


async def sync_often(pair: Pair) -> dict[str, list[float]]:
    """After each sync: gaps of the probe and of rollouts whose prompt older versions left in the cache, distance from the base."""
    found: dict[str, list[float]] = {"probe": [], "rollouts": [], "base": [], "moved": []}
    for version in range(1, NUM_SYNCS + 1):
        before = pair.learner.probe(PROBE)
        pair.shift(version)
        rollouts = asyncio.create_task(pair.rollout_gap())  # in flight while the weights come and the probe is scored
        await asyncio.sleep(0)
        gap, moved = await pair.sync(version)
        await rollouts
        found["probe"].append(gap)
        found["base"].append(moved)
        own = largest_gap(pair.learner.probe(PROBE), pair.learner.probe(PROBE, base=True))
        assert not addition_lost(own, moved, FLOAT32_TOLERANCE_NATS)
        found["rollouts"].append(await pair.rollout_gap())
        found["moved"].append(float(np.abs(pair.learner.probe(PROBE) - before).max()))
    return found


async def reload_same_path(pair: Pair) -> dict[str, float]:
    """New weights in the files of the version in force. The engine takes no folder twice; past it, straight at vLLM, gaps show."""
    engine, request = pair.actor._engine, pair.actor._engine._adapters[-1]
    with pytest.raises(ValueError, match="serves what it held before"):
        await engine.load_adapter(request.lora_path, NUM_SYNCS)
    await pair.rollout_gap()  # its prompt is in the cache now, under this name
    pair.shift(NUM_SYNCS + 1)
    save_file(dict(pair.learner._files.weights()), Path(request.lora_path) / WEIGHTS)
    await engine._llm.add_lora(request)
    overwritten = pair.probe_gap(await pair.actor.probe(PROBE))
    await engine._llm.add_lora(LoRARequest(request.lora_name, request.lora_int_id, request.lora_path, load_inplace=True))
    in_place = pair.probe_gap(await pair.actor.probe(PROBE))
    return {"overwritten": overwritten, "in place, probe": in_place, "in place, rollouts": await pair.rollout_gap()}


async def serve(pair: Pair, folder: Path) -> float:
    """The gap of an adapter's folder, given to vLLM as it is."""
    engine = pair.actor._engine
    engine._adapters.append(LoRARequest("final", 10_000, str(folder)))
    engine._num_updates += 1
    return max(pair.probe_gap(await pair.actor.probe(PROBE)), await pair.rollout_gap())


async def lose(pair: Pair) -> float:
    """A sync whose addition does not get to the engine, which has none. Returns the engine's move from its base."""

    async def lost(folder: str, version: int) -> list[str]:
        return []

    pair.actor._engine._adapters.clear()
    pair.actor._engine.load_adapter = lost  # type: ignore[method-assign]
    _, moved = await pair.sync(NUM_SYNCS + 1)
    return moved


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_and_learner_agree_after_every_sync_and_what_goes_wrong_is_seen(tmp_path: Path, architecture: Any) -> None:
    folder = build_tiny(tmp_path / "student", architecture, seed=3)
    pair = Pair(folder)

    async def all_of_it() -> dict[str, Any]:
        await pair.actor.start()
        try:
            found: dict[str, Any] = await sync_often(pair)
            found["kept"] = sorted(int(path.name) for path in Path(pair.actor._folder or "").iterdir())
            found["base of the engine"] = await pair.actor._engine.probe(PROBE, base=True)
            pair.learner.save_student(str(tmp_path / "final"), "# card\n")
            found["served"] = await serve(pair, tmp_path / "final")
            pair.actor._engine._adapters.pop()
            found |= await reload_same_path(pair)
            found["lost"] = await lose(pair)
            return found
        finally:
            await pair.actor.shutdown()

    found = asyncio.run(all_of_it())
    worst = {name: max(found[name]) for name in ("probe", "rollouts")} | {name: min(found[name]) for name in ("base", "moved")}
    told = worst | {name: found[name] for name in ("served", "overwritten", "in place, probe", "in place, rollouts")}
    print(f"{architecture}, {NUM_SYNCS} syncs, nats: " + ", ".join(f"{name} {nats:.1e}" for name, nats in told.items()))
    assert worst["probe"] < TOLERANCE_NATS
    assert worst["rollouts"] < TOLERANCE_NATS
    assert worst["base"] > APART_NATS, "the base must be told from every version"
    assert worst["moved"] > APART_NATS, "versions that could not be mistaken for one another"
    assert found["kept"] == list(range(NUM_SYNCS - 3, NUM_SYNCS)), "max_staleness + 2 of them"
    plain = pair.new_learner(folder, None)
    np.testing.assert_allclose(found["base of the engine"], plain.probe(PROBE), atol=TOLERANCE_NATS)
    assert found["served"] < TOLERANCE_NATS, "the adapter in final/, as anyone would serve it"
    assert found["overwritten"] > APART_NATS, "what the sync's probe reports"
    assert found["in place, probe"] < TOLERANCE_NATS
    moved = largest_gap(pair.learner.probe(PROBE), pair.learner.probe(PROBE, base=True))
    assert addition_lost(moved, found["lost"], FLOAT32_TOLERANCE_NATS)


def test_a_run_trains_an_addition_and_leaves_it_in_final(tmp_path: Path) -> None:
    """The quickstart with rank 8 over a few steps, through the command."""
    out = tmp_path / "out"
    live = LiveRun(
        out, "student.lora={rank: 8, merge: true}", "learner.total_steps=4", "learner.learning_rate=0.01", "checkpoint.every_steps=2",
        "data.golden.num_prompts=64", "data.eval.limit=8",
    )  # fmt: skip
    assert live.finish() == 0, live.log.read_text()[-3000:]
    assert [record["step"] for record in read_records(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert json.loads((out / "final/adapter_config.json").read_text())["r"] == 8
    assert (out / "final/merged/model.safetensors").is_file()
    assert "nats away in the mean" in (out / "final/README.md").read_text()
    state = json.loads((out / "checkpoints/step-4/state.json").read_text())
    (gap,) = [series for series in state["telemetry"] if series[0] == "opd_weight_sync_gap_nats"]
    assert 0 < gap[-1] < TOLERANCE_NATS
    assert not any(series[0] == "opd_actor_restarts_total" and series[-1] for series in state["telemetry"]), live.log.read_text()
