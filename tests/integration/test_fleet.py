"""The fleet on a real Ray, with a real learner and engines without vLLM: what it does when a process dies or hangs."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

import opd_governor.services.run.fleet
from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.rollout.actor import Deliveries, RolloutActor
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.run.cluster import connect
from opd_governor.services.run.fleet import Fleet
from tests.tiny import build_tiny

pytestmark = [pytest.mark.integration, pytest.mark.alone]

LIMITS = LengthLimits(8)
PROBE = tuple(range(4, 40))
PER_ROLLOUT_S = 0.1


class StandInEngine(RolloutActor):
    """RolloutActor's methods without an engine: an answer every PER_ROLLOUT_S; the probe is the weights' size."""

    def __init__(self, model: str, settings: Any, **_: Any) -> None:
        self.version, self.size = -1, 0
        self._deliveries = Deliveries()

    async def start(self) -> int:
        return 256

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        for prompt, sample in requests:
            await asyncio.sleep(PER_ROLLOUT_S)
            yield [Trajectory(prompt, (7, 1), np.zeros(2, np.float32), "stop", 8, step, self.version, 0, sample)]

    async def load_weights(self, weights: np.ndarray, version: int, probe: Sequence[int]) -> np.ndarray:
        self.version, self.size = version, len(weights)
        return await self.probe(probe)

    async def probe(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.full(len(token_ids) - 1, float(self.size))

    async def set_reference(self, reference_tokens: float) -> None: ...

    async def shutdown(self) -> None: ...

    async def pid(self) -> int:
        return os.getpid()


class Live:
    """A started fleet, its lines and restarts."""

    def __init__(self, folder: Path, num_ranks: int = 1) -> None:
        model = str(build_tiny(folder / "student", seed=1))
        job = Job.model_validate(
            {
                "name": "fleet",
                "student": {"model": model},
                "teacher": {"model": model},
                "data": {"prompts": {"path": "none.jsonl"}},
                "rollout": {"max_new_tokens": 8, "num_actors": 2},
                "learner": {"num_ranks": num_ranks},
                "cluster": {"probe_tolerance_nats": 1e12, "deadline_floor_s": 1.5},
            }
        )
        self.lines: list[str] = []
        self.restarts: list[tuple[str, str]] = []
        self.fleet = Fleet(
            job, Models(model, (model,), (1,), 256), PROBE,
            on_restart=lambda role, reason: self.restarts.append((role, reason)), say=self.lines.append,
        )  # fmt: skip

    async def rollout(self, num: int = 12) -> list[Trajectory]:
        requests = [(Prompt(index, (5, 6)), 0) for index in range(num)]
        found = [t async for group in self.fleet.rollout(requests, LIMITS, 1, None) for t in group]  # type: ignore[arg-type]
        assert sorted(t.prompt.index for t in found) == list(range(num))
        return found

    async def pid_of_engine(self, index: int) -> int:
        return int(await self.fleet.engines.every_handle[index].actor.pid.remote())

    async def pids_of_learner(self) -> list[int]:
        return [await rank.ping.remote() for rank in self.fleet.learner.ranks]

    async def learn(self) -> int:
        scores = np.full(2, -1.0, np.float32)
        batch = [ScoredRollout(t, TokenScores("t", scores, scores - 1)) for t in await self.rollout(4)]
        return (await self.fleet.learner.learn(batch, [], LIMITS, 4.0, 1e-3)).weight_version

    async def checkpoint(self, folder: Path) -> None:
        await self.fleet.learner.snapshot()
        await self.fleet.learner.save(str(folder))


async def _gone(pid: int) -> None:
    """Ray ends a stopped process by force after five seconds."""
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.2)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    connect(None)
    yield
    ray.shutdown()


async def test_dead_and_silent_processes_are_replaced_and_nothing_is_lost(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd_governor.services.run.fleet, "RolloutActor", StandInEngine)
    live = Live(tmp_path)
    fleet = live.fleet
    await fleet.start()
    try:
        await fleet.sync_weights()
        await live.rollout()
        for number, reason in ((signal.SIGKILL, "crash"), (signal.SIGSTOP, "hang")):
            pid = await live.pid_of_engine(1)
            rollouts = asyncio.create_task(live.rollout())
            await asyncio.sleep(2 * PER_ROLLOUT_S)
            os.kill(pid, number)
            await rollouts  # what it left went to the other engine
            while not live.restarts or live.restarts[-1] != ("rollout", reason):
                await asyncio.sleep(0.1)
            assert {t.weight_version for t in await live.rollout()} == {0}, "the replacement has the learner's weights"
            await _gone(pid)
        assert any("rollouts of step 1 from rollout actor 1, which are issued again" in line for line in live.lines), live.lines

        assert await live.learn() == 1
        await live.checkpoint(tmp_path / "step-1")
        assert await live.learn() == 2
        for number, reason in ((signal.SIGKILL, "crash"), (signal.SIGSTOP, "hang")):
            (pid,) = await live.pids_of_learner()
            os.kill(pid, number)
            started = time.monotonic()
            with pytest.raises(ActorLostError) as lost:
                await live.learn()
            assert (lost.value.role, lost.value.reason) == ("learner", reason)
            assert time.monotonic() - started < 30
            await fleet.restart_learner()
            assert await fleet.learner.restore(str(tmp_path / "step-1")) == 1
            fleet.learner_is_back()
            assert (await fleet.sync_weights()).weight_version == 1
            assert {t.weight_version for t in await live.rollout()} == {1}
            await _gone(pid)
    finally:
        await fleet.close()
        await asyncio.to_thread(fleet.end_actors)


async def test_a_learner_of_two_ranks_is_started_anew_as_a_whole_whichever_rank_goes(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opd_governor.services.run.fleet, "RolloutActor", StandInEngine)
    live = Live(tmp_path, num_ranks=2)
    fleet = live.fleet
    await fleet.start()
    try:
        await fleet.sync_weights()
        assert await live.learn() == 1
        await live.checkpoint(tmp_path / "step-1")
        for rank, number, reason in ((1, signal.SIGKILL, "crash"), (0, signal.SIGKILL, "crash"), (1, signal.SIGSTOP, "hang")):
            before = await live.pids_of_learner()
            os.kill(before[rank], number)
            with pytest.raises(ActorLostError) as lost:
                await live.learn()
            assert (lost.value.role, lost.value.reason) == ("learner", reason)
            await fleet.restart_learner()
            assert await fleet.learner.restore(str(tmp_path / "step-1")) == 1
            fleet.learner_is_back()
            assert not set(before) & set(await live.pids_of_learner())
            assert (await fleet.sync_weights()).weight_version == 1
            assert await live.learn() == 2
            for pid in before:
                await _gone(pid)
        await live.checkpoint(tmp_path / "step-2")
        assert await fleet.learner.restore(str(tmp_path / "step-2")) == 2
    finally:
        await fleet.close()
        await asyncio.to_thread(fleet.end_actors)
