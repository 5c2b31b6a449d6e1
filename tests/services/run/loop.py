"""The main loop over fakes with the same methods as what it runs on."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.metrics import POSITION_BUCKETS, BatchMetrics
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.batch import Sync
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.mirror import Mirror
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory, read_records
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.data import TrainingData
from opd_governor.services.run.distill import Actors, Distillation
from opd_governor.services.run.terms import base_limits


class FakeStream:
    """Prompts numbered from 0; the cursor is the next number."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, n: int, unfinished_quota: float) -> list[Prompt]:
        self.position += n
        return [Prompt(index, (1, 2)) for index in range(self.position - n, self.position)]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class FakeFleet:
    """Rollouts of four tokens or the cap, whichever is less; remembers what it was asked."""

    def __init__(self) -> None:
        self.learner = self
        self.version, self.restored, self.prompts, self.skips = 0, [], [], False
        self.deaths: set[tuple[str, int]] = set()
        """The learner dies during this call, counted from 1."""
        self.calls: Counter[str] = Counter()
        self.dead, self.saved, self.num_back, self.learned = False, False, 0, []
        self.disk_s = 0.0
        """How long a checkpoint takes to write."""
        self.sync = Sync(0.01, 1e-5, 1e-2)
        self.engine_version, self.load_s, self.loading = 0, 0.0, False
        """What the engines sample with, and how long they take to load; meanwhile they have the version before."""
        self.learned_while_loading = 0

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any
    ) -> AsyncIterator[list[Trajectory]]:
        self.prompts += [prompt.index for prompt, _ in requests]
        length = min(4, limits.cap_tokens)
        version = self.engine_version
        for prompt, sample in requests:
            logprobs_T = np.zeros(length, np.float32)
            yield [Trajectory(prompt, (7,) * length, logprobs_T, "stop", limits.cap_tokens, step, version, 0, sample)]

    async def learn(self, rollouts: Any, golden: Any, limits: LengthLimits, reference: float, rate: float) -> StepReport:
        while ("learn", self.calls["learn"] + 1) in self.deaths and self.calls["save"] < self.calls["snapshot"]:
            await asyncio.sleep(0.001)  # it dies amid the step: a checkpoint's writing has begun, however busy the machine
        await self._ask("learn")
        await asyncio.sleep(0.005)  # as a real one: what was launched begins meanwhile, on the weights before
        self.learned_while_loading += self.loading
        self.learned.append([rollout.trajectory.prompt.index for rollout in rollouts])
        self.version += 1
        zeros, none = np.zeros(len(POSITION_BUCKETS)), np.zeros(0, np.float32)
        metrics = BatchMetrics(0.1, zeros.astype(int), zeros, 0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, none, none)
        return StepReport(0.1, 1.0, rate, self.skips, self.version, metrics)

    async def _ask(self, call: str) -> None:
        """Every call to the learner: once it has died, only a new one answers."""
        self.calls[call] += 1
        self.dead |= (call, self.calls[call]) in self.deaths
        if self.dead:
            raise ActorLostError("learner", RuntimeError("gone"))

    async def restart_learner(self) -> None:
        self.dead, self.version = False, -1 if self.saved else 0  # nothing may come of it before a restore
        await self._ask("restart")

    def learner_is_back(self) -> None:
        self.num_back += 1

    async def sync_weights(self, on_taken: Callable[[], None] = lambda: None) -> Sync:
        await self._ask("sync")
        assert self.version >= 0, "the weights of a learner that was not restored"
        assert not self.loading, "an update begins before the one before has ended"
        version, self.loading = self.version, True
        on_taken()
        await asyncio.sleep(self.load_s)
        self.engine_version, self.loading = version, False
        return replace(self.sync, weight_version=version)

    async def snapshot(self) -> None:
        await self._ask("snapshot")
        self.taken = self.version

    async def save(self, folder: str) -> None:
        await self._ask("save")
        self.saved = True
        await asyncio.sleep(self.disk_s)
        (Path(folder) / "weights").write_text(str(self.taken))

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        await self._ask("restore")
        self.restored.append((Path(folder).name, rollback))
        if not rollback:
            self.version = int((Path(folder) / "weights").read_text())
        return self.version


class FakePool:
    """Scores at once; with `down` set no actor is live and no score arrives."""

    def __init__(self) -> None:
        self.down, self.pace_s = False, 0.0

    def num_live(self) -> dict[str, int]:
        return {"t": 0 if self.down else 1}

    async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        await asyncio.sleep(self.pace_s)
        if self.down:
            return [None] * len(trajectories)
        zeros = [np.zeros(len(t.token_ids), np.float32) for t in trajectories]
        return [TokenScores("t", zero, zero) for zero in zeros]


class FakeGovernor:
    """Follows a script of step -> command; unhealthy from `sick_from` on; out of reach at the steps in `lost_at`."""

    def __init__(self, base: LengthLimits, commands: dict[int, str], sick_from: int = 10**6) -> None:
        self.base, self.commands, self.sick_from = base, commands, sick_from
        self.lost_at = ()

    async def limits(self) -> LengthLimits:
        return self.base

    async def state(self) -> dict[str, Any]:
        return {}

    async def restore(self, state: dict[str, Any]) -> None: ...

    async def set_policy(self, policy: Any, base: LengthLimits, generation: int) -> None:
        self.base = replace(base, generation=self.base.generation + 1)

    async def tell(self, news: str) -> None: ...

    async def tick(self, step: int) -> tuple[Any, Record]:
        if step in self.lost_at:
            raise ActorLostError("governor", RuntimeError("gone"))
        command = self.commands.get(step)
        decision = SimpleNamespace(
            limits=self.base, after=SimpleNamespace(pressure=0.0), healthy=step < self.sick_from, signals=SimpleNamespace(data_age_s=0.0),
            action=command or "hold", signal="", readings={}, mode="enforce", command=command, reason="because",
        )  # fmt: skip
        return decision, {"step": step, "mode": "enforce", "pressure": 0.0, "signals": {}, "limits": {}}


class Loop:
    """A loop of ten steps over the fakes, in a directory."""

    def __init__(
        self,
        tmp_path: Path,
        commands: dict[int, str] | None = None,
        sick_from: int = 10**6,
        staleness: int = 0,
        mirror_url: str | None = None,
        golden_key: str = "g",
    ) -> None:
        self.job = Job.model_validate(
            {
                "name": "x",
                "student": {"model": "a"},
                "teacher": {"model": "b", "timeout_s": 0.3},
                "data": {"prompts": {"path": "p"}},
                "rollout": {"prompts_per_step": 3, "max_new_tokens": 8, "max_staleness": staleness},
                "learner": {"total_steps": 10, "max_skipped_steps": 3},
                "checkpoint": {"every_steps": 2, "keep": 1},
            }
        )
        self.directory = RunDirectory(tmp_path, resume=True)
        self.store = ConfigStore(self.job, self.directory.config)
        self.telemetry, self.monitor = Telemetry("x"), RunMonitor("x", 10, base_limits(self.job))
        self.fleet, self.stream, self.warnings = FakeFleet(), FakeStream(), []
        self.on_step: Any = lambda record: None
        self.pool, self.governor = FakePool(), FakeGovernor(base_limits(self.job), commands or {}, sick_from)
        self.num_finished = 0
        self.journal = Journal(
            self.directory, self.telemetry, self.monitor, samples_per_step=self.job.service.samples_per_step,
            decode=lambda ids: "", on_step=lambda record: self.on_step(record), say=self.warnings.append,
        )  # fmt: skip
        checkpoints = Checkpoints(
            self.directory.checkpoints, self.fleet, keep=1, note=self.journal.note,
            mirror=Mirror(mirror_url, self.directory).push if mirror_url else None,
        )  # fmt: skip
        data = TrainingData(self.stream, [], golden_key, 4.0)  # type: ignore[arg-type]
        actors = Actors(self.fleet, self.pool, self.governor)  # type: ignore[arg-type]
        self.distillation = Distillation(self.job, self.store, data, actors, self.journal, checkpoints, None, self._finish)

    @property
    def restarts(self) -> list[tuple[str, str]]:
        """(role, reason), as a person was told."""
        told = [re.fullmatch(r"restarted: (\w+) \((\w+)\)", line) for line in self.warnings]
        return [(match[1], match[2]) for match in told if match]

    @property
    def nonfinite(self) -> list[tuple[str, int]]:
        """(stage that found it, prompt), as kept for inspection."""
        return [(record["source"], record["prompt"]) for record in read_records(self.directory.nonfinite)]

    async def _finish(self) -> None:
        await self.fleet._ask("finish")
        self.num_finished += 1

    def run(self, resume: bool = False) -> list[Record]:
        asyncio.run(self.distillation.run(resume))
        return read_records(self.directory.metrics)
