"""The actors of one run on a Ray cluster: start them, hand work to them, bring new weights over, end them.

Fleet.start --> rollout actors, teacher pools, learner, governor
learner.weights --one object--> every rollout actor --> probe held against the learner's
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import psutil
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from opd_governor.actors.deadlines import ActorLostError, HungError, Pace, Say
from opd_governor.actors.learner.actor import Learner, StepReport
from opd_governor.actors.learner.group import LearnerGroup
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.rollout.actor import RayEngine, RolloutActor
from opd_governor.actors.rollout.pool import Request, RolloutPool
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, Trajectory
from opd_governor.services.job.settings import Job, Placement
from opd_governor.services.record.batch import Sync
from opd_governor.services.run.cluster import NAME_FREE_S, NAMESPACE, Role, end_processes, learner_name, role_resources
from opd_governor.services.run.placement import place

logger = logging.getLogger(__name__)
T = TypeVar("T")
OnRestart = Callable[[str, str], None]
"""Called with (role, reason) when an actor is back."""
OnEach = Callable[[str, Callable[[RayEngine], Awaitable[Any]]], Awaitable[list[Any]]]
"""(what is asked, the call) -> answers of the engines that gave one."""

LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, HungError)
"""What a call to an actor raises when the actor, or the node it ran on, is gone or silent."""
PROBE_TOKENS = 48
"""Length of the probe sequence: long enough to touch every weight, short enough to cost nothing."""
FLOAT32_TOLERANCE_NATS = 1e-2
"""Rounding in float32 stays a tenth of this on models of 30 layers; wrong weights differ by whole nats."""
BFLOAT16_TOLERANCE_NATS = 0.5
"""Rounding in bfloat16 was at .18 to .22 on SmolLM2, both sides computing in it."""


@dataclass(frozen=True, slots=True)
class Models:
    """The job's models, resolved to folders or ids, and the stop event of student and teachers together."""

    student: str
    teachers: tuple[str, ...]
    stop_ids: tuple[int, ...]
    context_tokens: int


class Fleet:
    """Rollout actors and learner of a run (teacher pool and governor have handles of their own).

    Engines that die are replaced here. The learner's state is the run's: its calls raise ActorLostError when it dies, and whoever
    keeps the checkpoints calls `restart_learner` and goes back to one.
    """

    def __init__(
        self, job: Job, models: Models, probe: Sequence[int], *, on_restart: OnRestart = lambda role, reason: None, say: Say = logger.info
    ) -> None:
        """`probe`: ids of ordinary text, PROBE_TOKENS or so, on which engine and learner are compared after each sync."""
        self._job, self._models, self._probe, self._say = job, models, list(probe), say
        floor_s = job.cluster.deadline_floor_s
        self._engines = RolloutPool(
            job.rollout.num_actors,
            self._create_engine,
            self._equip,
            repeatable=job.repeatable,
            floor_s=floor_s,
            on_restart=lambda reason: on_restart("rollout", reason),
            say=say,
        )
        self._places: dict[Role, list[dict[str, Any]]] = {}
        """Ray options of each actor, in order; its replacement takes them over, with the room they hold."""
        self._learner = LearnerGroup(())
        self._learner_turn = asyncio.Lock()
        """One call at a time: a call's deadline must not run while another one is served."""
        self._paces: defaultdict[str, Pace] = defaultdict(lambda: Pace(floor_s))
        self._exchange = asyncio.Lock()
        """One transfer of weights at a time: an engine that comes back waits for a sync, and the other way round."""
        self._sync = Sync()
        self._begun = False
        """The engines have had all weights; a replacement gets them before it takes part."""
        self._reference_tokens: float | None = None
        self._descendants: dict[int, float] = {}

    async def start(self) -> None:
        """Bring learner and engines up side by side; returns when all of them answer."""
        has_gpus = bool(ray.cluster_resources().get("GPU", 0))
        self._transfer = self._choose_transfer(has_gpus)
        await self._reserve(1.0 if has_gpus else 0.0)
        self._learner = self._create_learner()
        await asyncio.gather(self._ask_learner("start"), self._engines.start())
        self._remember_processes()

    async def _reserve(self, gpu: float) -> None:
        """Room for learner and engines, once: what is started again later stands where the one before it stood."""
        job, cluster = self._job, self._job.cluster
        learner_gpus = gpu if cluster.gpus_per_learner is None else cluster.gpus_per_learner
        rollout_gpus = gpu if cluster.gpus_per_rollout is None else cluster.gpus_per_rollout
        roles: tuple[tuple[Role, int, Placement | None, float], ...] = (
            ("learner", job.learner.num_ranks, cluster.placement_learner, learner_gpus),
            ("rollout", job.rollout.num_actors, cluster.placement_rollout, rollout_gpus * job.rollout.tensor_parallel_size),
        )
        for role, num_actors, strategy, num_gpus in roles:
            resources = role_resources(job, role)
            self._places[role] = await place(
                role, num_actors, strategy, num_cpus=cluster.cpus_per_actor, num_gpus=num_gpus, resources=resources
            )
        self._places["learner"][0] = self._places["learner"][0] | {"name": learner_name(job.name), "namespace": NAMESPACE}

    def _create_learner(self) -> LearnerGroup:
        job, models = self._job, self._models
        parts = LearnerModels(
            models.student,
            with_reference=job.objective.reference_kl_weight > 0 or "reference_kl_weight" in job.governor.actuators,
            teacher=models.teachers[0] if job.objective.needs.hidden else None,
            trust_remote_code=job.student.trust_remote_code,
        )
        # A checkpoint is written while the next step runs. Ray takes the groups here only, not as an option.
        learner_type = ray.remote(concurrency_groups={"disk": 1})(Learner)
        return LearnerGroup(
            [
                learner_type.options(**place).remote(
                    parts,
                    job.learner,
                    job.objective,
                    stop_ids=models.stop_ids,
                    max_new_tokens=job.rollout.max_new_tokens,
                    seed=job.seed,
                )
                for place in self._places["learner"]
            ]
        )

    def _create_engine(self, index: int) -> RayEngine:
        job = self._job
        rollout_type = ray.remote(RolloutActor).options(max_concurrency=10_000, **self._places["rollout"][index])
        return RayEngine(
            rollout_type.remote(
                self._models.student,
                job.rollout,
                stop_ids=self._models.stop_ids,
                reference_tokens=self._reference_tokens,
                weight_transfer=self._transfer,
                seed=job.seed,
                top_k=job.objective.needs.student_top_k,
                repeatable=job.repeatable,
            )
        )

    def _choose_transfer(self, has_gpus: bool) -> str:
        choice = self._job.cluster.weight_transfer
        if choice != "auto":
            return choice
        if not has_gpus:
            return "file"
        share = self._job.cluster.gpus_per_rollout
        return "ipc" if share is not None and 0 < share < 1 else "nccl"

    # ---- weights

    async def sync_weights(self, on_taken: Callable[[], None] = lambda: None) -> Sync:
        """Bring the learner's weights into every engine, requests kept in flight, and measure on the probe what arrived.

        `on_taken` is called when the learner has given what it had to give and may change its weights again.
        """
        async with self._exchange:
            syncs = await self._bring_weights(self._engines.on_each, on_taken=on_taken)
        if syncs:
            self._sync = max(syncs, key=lambda sync: (not sync.sound, sync.gap_nats))
        else:  # every engine died over it: their replacements bring the weights themselves
            await self._engines.any_live()
        return self._sync

    async def _equip(self, engine: RayEngine) -> None:
        """A replacement gets what the learner has now; sound or not at all."""

        async def only(what: str, call: Callable[[RayEngine], Awaitable[T]]) -> list[T]:
            return [await self._paces[what].watch(call(engine), f"{what} by a new rollout actor", self._say)]

        async with self._exchange:
            (sync,) = await self._bring_weights(only, [engine])
        if not sync.sound:
            raise RuntimeError(f"engine and learner differ by {sync.gap_nats:.3g} nats on the probe, tolerance {sync.tolerance_nats:g}")
        self._sync = sync
        self._remember_processes()

    async def _bring_weights(
        self, on_each: OnEach, newcomers: Sequence[RayEngine] = (), on_taken: Callable[[], None] = lambda: None
    ) -> list[Sync]:
        """One Sync per engine that `on_each` reaches."""
        started = time.monotonic()
        rollout = self._job.rollout
        if self._transfer == "file":
            # The object store moves the weights once per node; each actor on it reads the same copy. What no step changes is sent to
            # each engine once.
            trained_only = self._begun and not newcomers
            version, weights = await self._ask_learner("weights", rollout.dtype, trained_only=trained_only)
            probing = asyncio.create_task(self.learner_probe())
            probing.add_done_callback(lambda _: on_taken())
            try:
                probes = await on_each("loading weights", lambda engine: engine.actor.load_weights.remote(weights, version, self._probe))
                expected = await probing
            finally:
                probing.cancel()
            self._begun = True
        else:
            # A group of GPUs is formed of all engines: beside a newcomer the others get the same weights again.
            version = await self._ask_learner("version")
            await self._engines.on_each("a version to come", lambda engine: engine.actor.announce_version.remote(version))
            await asyncio.gather(*(engine.actor.announce_version.remote(version) for engine in newcomers))
            actors = [engine.actor for engine in (*self._engines.handles, *newcomers)]
            await self._ask_learner("send_weights", self._transfer, rollout.dtype, actors, rollout.tensor_parallel_size)
            expected = await self.learner_probe()
            on_taken()
            probes = await on_each("the weight probe", lambda engine: engine.actor.probe.remote(self._probe))
        seconds = time.monotonic() - started
        tolerance = self._job.cluster.probe_tolerance_nats or (FLOAT32_TOLERANCE_NATS if self._all_float32() else BFLOAT16_TOLERANCE_NATS)
        return [Sync(seconds, float(np.abs(probe - expected).max()), tolerance, version) for probe in probes]

    def _all_float32(self) -> bool:
        return self._job.rollout.dtype == self._job.learner.dtype == "float32"

    # ---- engines

    def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """Sample a response for each (prompt, sample number), handed on in groups as they finish."""
        return self._engines.rollout(requests, limits, step, settings, greedy=greedy)

    async def set_reference(self, reference_tokens: float) -> None:
        """Tell the engines the reference length, which a stop ramp may start from."""
        self._reference_tokens = reference_tokens
        await self._engines.on_each("the reference length", lambda engine: engine.actor.set_reference.remote(reference_tokens))

    # ---- the learner

    async def learn(
        self,
        rollouts: Sequence[ScoredRollout],
        golden: Sequence[Prompt],
        limits: LengthLimits,
        reference_tokens: float,
        learning_rate: float,
    ) -> StepReport:
        """One optimiser step."""
        tokens = sum(len(r.trajectory.prompt.token_ids) + len(r.trajectory.token_ids) for r in rollouts)
        tokens += sum(len(prompt.token_ids) + len(prompt.golden_ids or ()) for prompt in golden)
        return await self._ask_learner("step", rollouts, golden, limits, reference_tokens, learning_rate, tokens=tokens)

    async def learner_probe(self) -> np.ndarray:
        """The learner's log-probs on the probe sequence, in the engines' precision: what rounding does to both is no gap."""
        return await self._ask_learner("probe", self._probe, self._job.rollout.dtype)

    async def snapshot(self) -> None:
        """Have the learner copy its state as it is between these two steps, for `save`."""
        await self._ask_learner("snapshot")

    async def save(self, folder: str) -> None:
        """The snapshot into a checkpoint's folder, which learner and driver share; steps go on meanwhile. Raises OSError."""
        try:
            await self._paces["save"].watch(self._learner.save(folder), "save of the learner", self._say)
        except LOST as error:
            raise ActorLostError("learner", error) from error

    async def save_student(self, folder: str, card: str) -> None:
        """The student alone, in Hugging Face layout."""
        await self._ask_learner("save_student", folder, card)

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Bring the learner back to a checkpoint; returns the weight version in force."""
        self._begun = False  # a checkpoint may hold others even of the weights that no step of this run changes
        return await self._ask_learner("restore", folder, rollback=rollback)

    async def restart_learner(self) -> None:
        """A new learner, all ranks of it, with the initial student: `restore` follows. Raises ActorLostError where it does not come up."""
        await asyncio.to_thread(lambda: [ray.kill(rank) for rank in self._learner.ranks])
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                self._learner = self._create_learner()
                break
            except ValueError:  # the cluster has not yet noted that the one before is dead
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        await self._ask_learner("start")
        self._remember_processes()

    def learner_is_back(self) -> None:
        """Its weights are a checkpoint's again: engines that could not be replaced without it can be now."""
        self._engines.retry()

    async def _ask_learner(self, method: str, *args: Any, tokens: int = 1, **kwargs: Any) -> Any:
        async with self._learner_turn:
            try:
                reply = getattr(self._learner, method)(*args, **kwargs)
                return await self._paces[method].watch(reply, f"{method} of the learner", self._say, tokens=tokens)
            except LOST as error:
                raise ActorLostError("learner", error) from error

    # ---- the end

    def _remember_processes(self) -> None:
        """Engines start processes of their own: what descends from this one is ours to end."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants[process.pid] = process.create_time()

    async def close(self) -> None:
        """Replace nothing any more."""
        await self._engines.close()

    def stop(self) -> None:
        """End every actor and, where it is private, the cluster; afterwards no process of the run is left."""
        self._remember_processes()
        if ray.is_initialized():
            self.end_actors()
            ray.shutdown()
        end_processes(self._descendants.items())

    def end_actors(self) -> None:
        """Engines first, so that they end their own processes."""
        actors = [engine.actor for engine in self._engines.handles]
        with contextlib.suppress(Exception):  # an engine that is already gone has nothing to shut down
            ray.get([actor.shutdown.remote() for actor in actors], timeout=10)
        for actor in (*(engine.actor for engine in self._engines.every_handle), *self._learner.ranks):
            ray.kill(actor)
