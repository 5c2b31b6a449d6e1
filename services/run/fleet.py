"""The actors of one run on a Ray cluster: where they stand, engines replaced when they die, everything ended.

Fleet.start --> learner (RunLearner), rollout actors (RolloutPool), weights between them (WeightSync)
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import ray

from opd_governor.actors.deadlines import Say
from opd_governor.actors.rollout.actor import RayEngine, RolloutActor
from opd_governor.actors.rollout.pool import RolloutPool
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request
from opd_governor.actors.trajectory import LengthLimits, Trajectory
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.record.batch import Sync
from opd_governor.services.run.cluster import descendants, leave
from opd_governor.services.run.learner import RunLearner
from opd_governor.services.run.rooms import Rooms
from opd_governor.services.run.weights import OnTaken, WeightSync, choose_transfer, engine_settings

logger = logging.getLogger(__name__)
OnRestart = Callable[[str, str], None]
"""Called with (role, reason) when an actor is back."""


class Fleet:
    """Rollout actors and learner of a run; teachers and governor have handles of their own.

    Engines that die are replaced here. A learner that dies is not: its state is the run's, see RunLearner.
    """

    def __init__(
        self, job: Job, models: Models, probe: Sequence[int], *, on_restart: OnRestart = lambda role, reason: None, say: Say = logger.info
    ) -> None:
        """`probe`: ids of ordinary text on which engine and learner are compared after each sync."""
        self._job, self._models = job, models
        self.learner = RunLearner(job, models, say)
        self.engines = RolloutPool(
            job.rollout.num_actors,
            self._create_engine,
            self._equip,
            strict=job.strict,
            floor_s=job.cluster.deadline_floor_s,
            on_restart=lambda reason: on_restart("rollout", reason),
            say=say,
        )
        self._weights = WeightSync(job, probe, self.learner, self.engines, say)
        self._engine_places: Sequence[dict[str, Any]] = ()
        """Ray options of each engine, in order; its replacement takes them over, with the room they hold."""
        self._reference_tokens: float | None = None
        self._descendants: dict[int, float] = {}
        """Every process that a run's actor has started, those that are gone too."""

    async def start(self, rooms: Rooms | None = None) -> None:
        """Bring learner and engines up side by side; returns when all of them answer. `rooms` None: placed role by role."""
        rooms = rooms or Rooms(self._job)
        await asyncio.gather(self.start_learner(rooms), self.start_engines(rooms))

    async def start_learner(self, rooms: Rooms) -> None:
        """The learner alone, all ranks of it."""
        await self.learner.start(await rooms.learner())
        self._remember_processes()

    async def start_engines(self, rooms: Rooms) -> None:
        """The engines alone."""
        has_gpus = bool(ray.cluster_resources().get("GPU", 0))
        self._weights.transfer = choose_transfer(self._job, has_gpus=has_gpus, planned=rooms.transfer)
        self._engine_places = await rooms.rollout()
        await self.engines.start()
        self._remember_processes()

    def _create_engine(self, index: int) -> RayEngine:
        job, settings = self._job, engine_settings(self._job, self._models.student, self._models.cut_ids)
        if job.student.trust_remote_code:
            settings = settings.model_copy(update={"engine": {"trust_remote_code": True} | settings.engine})
        rollout_type = ray.remote(RolloutActor).options(max_concurrency=10_000, **self._engine_places[index])
        return RayEngine(
            rollout_type.remote(
                self._models.student,
                settings,
                stop_ids=self._models.stop_ids,
                reference_tokens=self._reference_tokens,
                weight_transfer=self._weights.transfer,
                seed=job.seed,
                top_k=job.objective.needs.student_top_k,
                strict=job.strict,
            )
        )

    async def _equip(self, engine: RayEngine) -> None:
        """A replacement gets the learner's weights before its first rollout."""
        await self._weights.to_newcomer(engine)
        self._remember_processes()

    async def sync_weights(self, on_taken: OnTaken = lambda: None) -> Sync:
        """The learner's weights into every engine. `on_taken` is called when the learner may change them again."""
        return await self._weights.to_all(on_taken)

    def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """Sample a response for each (prompt, sample number), handed on in groups as they finish."""
        return self.engines.rollout(requests, limits, step, settings, greedy=greedy)

    async def set_reference(self, reference_tokens: float) -> None:
        """Tell the engines the reference length, which a stop ramp may start from."""
        self._reference_tokens = reference_tokens
        await self.engines.on_each("the reference length", lambda engine: engine.actor.set_reference.remote(reference_tokens))

    async def restart_learner(self) -> None:
        """A new learner with the initial student; `learner.restore` and `learner_is_back` follow. Raises ActorLostError."""
        await self.learner.restart()
        self._remember_processes()

    def learner_is_back(self) -> None:
        """Its weights are a checkpoint's again: engines that could not be replaced without it can be now."""
        self.engines.retry()

    # ---- the end

    def _remember_processes(self) -> None:
        """Engines start processes of their own: every descendant of this process is ended with the run."""
        self._descendants |= descendants()

    async def close(self) -> None:
        """Start no more replacements."""
        await self.engines.close()

    def stop(self) -> None:
        """End every actor and, if it is private, the cluster; afterwards no process of the run is left."""
        self._remember_processes()
        if ray.is_initialized():
            self.end_actors()
        leave(self._descendants)

    def end_actors(self) -> None:
        """Engines first, so that they end their own processes."""
        actors = [engine.actor for engine in self.engines.handles]
        with contextlib.suppress(Exception):  # an engine that is already gone has nothing to shut down
            ray.get([actor.shutdown.remote() for actor in actors], timeout=10)
        for actor in (*(engine.actor for engine in self.engines.every_handle), *self.learner.ranks):
            ray.kill(actor)
