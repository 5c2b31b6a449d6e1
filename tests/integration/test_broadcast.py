"""vLLM's nccl transfer engines at both ends, over gloo: two ranks, two engines, and a death in the middle of a broadcast.

Real: the fleet on Ray, the learner's ranks, the sync and its probe, vLLM's trainer engine, its receiving engine, packing. Instead of
vLLM's model an engine holds the student by transformers, so that it starts in seconds and its log-probs are the weights' own.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

import opd_governor.services.run.fleet
from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.rollout.actor import Deliveries, RolloutActor
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.record.batch import Sync
from opd_governor.services.run.cluster import connect
from opd_governor.services.run.fleet import Fleet
from tests.made_up import random_batch
from tests.tiny import build_tiny

pytestmark = pytest.mark.integration

NUM_SYNCS = 20
TOLERANCE_NATS = 1e-3
LIMITS = LengthLimits(32)
PROBE = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]


class TransformersEngine(RolloutActor):
    """A rollout actor around vLLM's receiving engine and a model of transformers."""

    def __init__(self, model: str, settings: Any, **_: Any) -> None:
        self._path, self._stops, self._deliveries = model, False, Deliveries()
        self.chunks: list[int] = []

    async def start(self) -> int:
        from transformers import AutoConfig, AutoModelForCausalLM

        from opd_governor.actors.rollout.broadcast import GlooEngine

        class Receiver(GlooEngine):
            """Layers are loaded as they come: the layer-wise reload belongs to vLLM's models."""

            def start_weight_update(self) -> None: ...

            def finish_weight_update(self) -> None: ...

        self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._path)).eval()
        named = dict(self._model.named_parameters())

        def load_weights(weights: list[tuple[str, torch.Tensor]]) -> None:
            self.chunks.append(len(weights))
            with torch.no_grad():
                for name, weight in weights:
                    named[name].copy_(weight)
            if self._stops:
                self._stops = False
                os.kill(os.getpid(), signal.SIGSTOP)

        parallel: Any = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        self._receiver = Receiver(None, config, torch.device("cpu"), SimpleNamespace(load_weights=load_weights))  # type: ignore[arg-type]
        return 256

    async def stop_in_the_next_update(self) -> int:
        """The process stops itself (SIGSTOP) when a first part of the weights has come. Returns its id."""
        self._stops = True
        return os.getpid()

    async def take_chunks(self) -> list[int]:
        chunks, self.chunks = self.chunks, []
        return chunks

    async def announce_version(self, weight_version: int) -> None:
        self.version = weight_version

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await asyncio.to_thread(self._receiver.init_transfer_engine, self._receiver.parse_init_info(request.init_info))

    async def start_weight_update(self) -> None:
        self._receiver.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        await asyncio.to_thread(self._receiver.update_weights, request.update_info)

    async def finish_weight_update(self) -> None:
        self._receiver.finish_weight_update()

    async def probe(self, token_ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            ids_BL = torch.tensor([list(token_ids)])
            logp_LV = self._model(ids_BL).logits[0, :-1].log_softmax(-1)
        return logp_LV.gather(1, ids_BL[0, 1:, None])[:, 0].numpy()

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        for prompt, sample in requests:
            yield [Trajectory(prompt, (7, 1), np.zeros(2, np.float32), "stop", 8, step, self.version, 0, sample)]

    async def shutdown(self) -> None: ...


class Live:
    """A fleet of two ranks and two engines whose weights go by gloo."""

    def __init__(self, folder: Path) -> None:
        model = str(build_tiny(folder / "student", "llama", seed=1, tied=False))
        job = Job.model_validate(
            {
                "name": "broadcast",
                "student": {"model": model},
                "teacher": {"model": model},
                "data": {"prompts": {"path": "none.jsonl"}},
                "rollout": {"num_actors": 2},
                "learner": {"num_ranks": 2, "learning_rate": 3e-3},
                "cluster": {"weight_transfer": "gloo", "deadline_floor_s": 30},
            }
        )
        self.lines: list[str] = []
        self.restarts: list[tuple[str, str]] = []
        self.fleet = Fleet(
            job, Models(model, (model,), (1,), 256), PROBE,
            on_restart=lambda role, reason: self.restarts.append((role, reason)), say=self.lines.append,
        )  # fmt: skip

    async def learn(self, seed: int) -> None:
        report = await self.fleet.learner.learn(random_batch(seed), [], LIMITS, 10.0, 3e-3)
        assert not report.skipped

    async def ranks(self) -> list[int]:
        return [await rank.ping.remote() for rank in self.fleet.learner.ranks]

    async def sync_and_stop_engine(self, index: int) -> tuple[asyncio.Task[Sync], psutil.Process]:
        """A sync in the middle of which this engine's process stands still."""
        process = psutil.Process(await self.fleet.engines.handles[index].actor.stop_in_the_next_update.remote())
        syncing = asyncio.create_task(self.fleet.sync_weights())
        async with asyncio.timeout(20):
            while process.status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0.05)
        return syncing, process


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    monkeypatch.setattr(opd_governor.services.run.fleet, "RolloutActor", TransformersEngine)
    connect(None)
    yield
    ray.shutdown()


async def test_twenty_syncs_in_packed_parts_and_the_right_one_is_replaced_when_one_dies_in_the_middle(
    ray_here: None, tmp_path: Path
) -> None:
    live = Live(tmp_path)
    fleet = live.fleet
    await fleet.start()
    try:
        await twenty_syncs(live)
        await an_engine_dies(live)
        await fleet.learner.snapshot()
        await fleet.learner.save(str(tmp_path / "saved"))
        await the_sending_rank_dies(live, str(tmp_path / "saved"))
    finally:
        await fleet.close()
        await asyncio.to_thread(fleet.end_actors)


async def twenty_syncs(live: Live) -> None:
    gaps = [(await live.fleet.sync_weights()).gap_nats]
    first = await live.fleet.learner.probe(PROBE)
    engines = [engine.actor for engine in live.fleet.engines.handles]
    parts = [await engine.take_chunks.remote() for engine in engines]
    assert parts[0] == parts[1]
    assert len(parts[0]) > 3, "all in one part: packing is not shown"
    for version in range(1, NUM_SYNCS + 1):
        await live.learn(version)
        sync = await live.fleet.sync_weights()
        assert sync.weight_version == version
        gaps.append(sync.gap_nats)
    print(f"{len(gaps)} syncs over gloo, {len(parts[0])} parts each, largest gap {max(gaps):.2e} nats")
    assert max(gaps) < TOLERANCE_NATS, gaps
    assert np.abs(await live.fleet.learner.probe(PROBE) - first).max() > 100 * TOLERANCE_NATS, "the weights hardly changed"


async def an_engine_dies(live: Live) -> None:
    """The other engine gets the weights whole, the learner stays, a replacement joins."""
    ranks = await live.ranks()
    await live.learn(30)
    syncing, process = await live.sync_and_stop_engine(0)
    process.kill()
    sync = await syncing
    assert sync.gap_nats < TOLERANCE_NATS
    async with asyncio.timeout(40):
        while live.restarts != [("rollout", "crash")]:
            await asyncio.sleep(0.1)
    assert await live.ranks() == ranks
    await live.learn(31)
    assert (await live.fleet.sync_weights()).gap_nats < TOLERANCE_NATS
    assert len(live.fleet.engines.handles) == 2


async def the_sending_rank_dies(live: Live, checkpoint: str) -> None:
    """The learner is restarted, the engines are not, though one stood in the middle of a broadcast."""
    engines, restarts = list(live.fleet.engines.handles), list(live.restarts)
    await live.learn(40)
    pids = await live.ranks()
    syncing, process = await live.sync_and_stop_engine(1)
    os.kill(pids[0], signal.SIGKILL)
    process.resume()
    with pytest.raises(ActorLostError) as lost:
        await syncing
    assert lost.value.role == "learner"
    await live.fleet.restart_learner()
    await live.fleet.learner.restore(checkpoint)
    live.fleet.learner_is_back()
    assert (await live.fleet.sync_weights()).gap_nats < TOLERANCE_NATS
    assert live.fleet.engines.handles == engines
    assert live.restarts == restarts
