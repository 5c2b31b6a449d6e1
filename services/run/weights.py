"""New weights for the engines, and the proof that they arrived.

learner --one object, or GPU to GPU--> every engine --> log-probs on a probe, held against the learner's own
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from opd_governor.actors.deadlines import ActorLostError, Pace, Say, TransferError
from opd_governor.actors.rollout.actor import RayEngine
from opd_governor.actors.rollout.arguments import HEAD_APART, lora_arguments
from opd_governor.actors.rollout.pool import RolloutPool
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.services.inputs.lora import lora_targets
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.record.batch import Sync
from opd_governor.services.run.learner import RunLearner

OnEach = Callable[[str, Callable[[RayEngine], Awaitable[Any]]], Awaitable[list[Any]]]
"""(what is asked, the call) -> answers of the engines that gave one."""
OnTaken = Callable[[], None]
"""Called when the learner has given its weights and may change them again."""

PROBE_TOKENS = 48
"""Length of the probe sequence: long enough to touch every weight, short enough to cost nothing."""
FLOAT32_TOLERANCE_NATS = 1e-2
"""Rounding in float32 stays a tenth of this on models of 30 layers; wrong weights differ by whole nats."""
BFLOAT16_TOLERANCE_NATS = 0.5
"""The least in bfloat16: its rounding was at .18 to .22 on SmolLM2, both sides computing in it."""
LEAST_MOVE, LEAST_MOVED_SHARE = 0.1, 0.25
"""Of the tolerance, and of the learner's own move (see `addition_lost`)."""
ROUNDINGS = 3.0
"""Engine and learner each round on their own: so often the learner's own rounding is allowed between them."""
MAX_SENDS = 3
"""Broadcasts of one sync; each that fails leaves out the engines that turned out dead."""


class WeightSync:
    """One transfer of weights at a time: an engine that comes back waits for a sync, and the other way round."""

    def __init__(self, job: Job, probe: Sequence[int], learner: RunLearner, engines: RolloutPool, say: Say) -> None:
        """`probe`: ids of ordinary text, PROBE_TOKENS or so."""
        self._job, self._probe, self._learner, self._engines, self._say = job, list(probe), learner, engines, say
        self._turn = asyncio.Lock()
        self._newcomer_pace = Pace(job.cluster.deadline_floor_s)
        self._last = Sync()
        self._complete_at: int | None = None
        """The learner's `num_restores` when the engines last got all its weights: until it changes they need only the trained ones."""
        self._rounding_nats: float | None = None
        """What bfloat16 does to the learner's own log-probs on the probe, when the run began: models differ by ten times in it."""
        self._base: np.ndarray | None = None
        """The learner's probe without a LoRA student's addition; it never changes."""
        self.transfer = "file"
        """How they travel: file (Ray's object store), nccl, ipc or gloo."""

    async def to_all(self, on_taken: OnTaken = lambda: None) -> Sync:
        """Bring the weights into every live engine; requests stay in flight. Returns the worst of the engines' gaps."""
        async with self._turn:
            syncs = await self._bring(self._engines.on_each, on_taken=on_taken)
            if bad := [sync for sync in syncs if not sync.sound]:
                # Once more before it counts: a single miss is no proof.
                self._say(bad[0].words)
                syncs = await self._bring(self._engines.on_each)
        if syncs:
            self._last = max(syncs, key=lambda sync: (not sync.sound, sync.gap_nats))
        else:  # every engine died over it: their replacements bring the weights themselves
            await self._engines.any_live()
        return self._last

    async def to_newcomer(self, engine: RayEngine) -> None:
        """A replacement gets what the learner has now. Raises RuntimeError if it does not hold them afterwards."""

        async def only(what: str, call: Callable[[RayEngine], Awaitable[Any]]) -> list[Any]:
            return [await self._newcomer_pace.watch(call(engine), f"{what} by a new rollout actor", self._say)]

        async with self._turn:
            (sync,) = await self._bring(only, [engine])
        if not sync.sound:
            raise RuntimeError(sync.words)
        self._last = sync

    async def _bring(self, on_each: OnEach, newcomers: Sequence[RayEngine] = (), on_taken: OnTaken = lambda: None) -> list[Sync]:
        """One Sync per engine that `on_each` reaches."""
        started = time.monotonic()
        by_transfer = self._by_file if self.transfer == "file" else self._by_broadcast
        version, expected, probes = await by_transfer(on_each, newcomers, on_taken)
        seconds, tolerance = time.monotonic() - started, await self._tolerance_nats()
        if self._job.student.lora is None:
            return [Sync(seconds, largest_gap(probe, expected), tolerance, version) for probe in probes]
        if self._base is None:
            self._base = await self._learner.probe(self._probe, base=True)
        moved = largest_gap(expected, self._base)
        return [
            Sync(seconds, largest_gap(probe, expected), tolerance, version, addition_lost(moved, largest_gap(probe, base), tolerance))
            for probe, base in probes
        ]

    async def _by_file(
        self, on_each: OnEach, newcomers: Sequence[RayEngine], on_taken: OnTaken
    ) -> tuple[int, np.ndarray, list[np.ndarray]]:
        """The object store moves the weights once per node; each actor on it reads the same copy."""
        num_restores = self._learner.num_restores
        version, weights = await self._learner.weights(trained_only=self._complete_at == num_restores and not newcomers)
        probing = asyncio.create_task(self._learner.probe(self._probe))
        probing.add_done_callback(lambda _: on_taken())
        try:
            probes = await on_each("loading weights", lambda engine: engine.actor.load_weights.remote(weights, version, self._probe))
            expected = await probing
        finally:
            probing.cancel()
        self._complete_at = num_restores
        return version, expected, probes

    async def _by_broadcast(
        self, on_each: OnEach, newcomers: Sequence[RayEngine], on_taken: OnTaken
    ) -> tuple[int, np.ndarray, list[np.ndarray]]:
        """A group is formed of all engines: beside a newcomer the others get the same weights again."""
        version = await self._learner.version()
        for _ in range(MAX_SENDS):
            # An engine that is dead shows here, and is replaced; one that dies later costs the broadcast, and shows in the next round.
            await self._engines.on_each("a version to come", lambda engine: engine.actor.announce_version.remote(version))
            await asyncio.gather(*(engine.actor.announce_version.remote(version) for engine in newcomers))
            engines = [engine.actor for engine in (*self._engines.handles, *newcomers)]
            try:
                if engines:
                    await self._learner.send_weights(self.transfer, engines)
                break
            except TransferError as error:
                failure = error
                self._say(f"weights of version {version} did not reach every engine: {error}")
        else:  # all engines answer, so what fails is the learner's own end
            raise ActorLostError("learner", failure)
        expected = await self._learner.probe(self._probe)
        on_taken()
        probes = await on_each("the weight probe", lambda engine: engine.actor.probe.remote(self._probe))
        return version, expected, probes

    async def _tolerance_nats(self) -> float:
        """cluster.probe_tolerance_nats, or by the dtypes and, in bfloat16, by the model."""
        if self._job.cluster.probe_tolerance_nats:
            return self._job.cluster.probe_tolerance_nats
        if self._job.rollout.dtype == self._job.learner.dtype == "float32":
            return FLOAT32_TOLERANCE_NATS
        if self._rounding_nats is None:
            rounded, exact = [await self._learner.probe(self._probe, dtype) for dtype in ("bfloat16", "float32")]
            self._rounding_nats = float(np.abs(rounded - exact).max())
        return max(BFLOAT16_TOLERANCE_NATS, ROUNDINGS * self._rounding_nats)


def largest_gap(one_L: np.ndarray, other_L: np.ndarray) -> float:
    """Nats; NaN where one of them has a NaN."""
    return float(np.abs(one_L - other_L).max())


def addition_lost(learner_moved: float, engine_moved: float, tolerance: float) -> bool:
    """Whether an engine stayed at its base while the learner moved away from it, both in nats on the probe.

    Engines lose adapters on the way without an error, long before that shows as a gap beyond the tolerance. Below a tenth of it rounding
    may hide an addition in the engine.
    """
    return learner_moved > LEAST_MOVE * tolerance and engine_moved < LEAST_MOVED_SHARE * learner_moved


def engine_settings(job: Job, student: str, cut_ids: int | None = None) -> RolloutSettings:
    """What engines are started with: those of a LoRA student have its base, and room for additions.

    `cut_ids`: as many ids as are tokens, fewer than the student's embedding has rows, so that no other can be sampled.
    """
    if job.student.lora is None:
        own = job.rollout.engine
        overrides = ({"vocab_size": cut_ids} if cut_ids else {}) | own.get("hf_overrides", {})
        return job.rollout.model_copy(update={"engine": own | {"hf_overrides": HEAD_APART | overrides}}) if overrides else job.rollout
    targets = lora_targets(student, job.student.lora, job.student.trust_remote_code)
    more = lora_arguments(job.student.lora.rank, targets, job.rollout.max_staleness)
    return job.rollout.model_copy(update={"engine": more | job.rollout.engine})


def choose_transfer(job: Job, *, has_gpus: bool, planned: str | None = None) -> str:
    """How weights travel: cluster.weight_transfer, or what fits the machines. A LoRA student's addition is small: always as a file.
    Raises JobError where the choice cannot be had."""
    if job.student.lora is not None:
        return "file"
    choice = job.cluster.weight_transfer
    if choice in ("nccl", "ipc") and not has_gpus:
        raise JobError(
            f"cluster.weight_transfer: {choice} needs GPUs and the cluster has none; leave it at auto, or set gloo: nccl on CPUs"
        )
    if choice == "gloo" and has_gpus:
        raise JobError("cluster.weight_transfer: gloo carries CPU tensors and the cluster has GPUs; leave it at auto")
    if choice != "auto":
        return choice
    if planned:
        return planned
    if not has_gpus:
        return "file"
    share = job.cluster.gpus_per_rollout
    return "ipc" if share is not None and 0 < share < 1 else "nccl"
