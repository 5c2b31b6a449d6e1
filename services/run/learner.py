"""The learner as the run sees it: all ranks of it, one call at a time, each with a deadline.

learn, weights, probe, snapshot, save, restore --turn, deadline--> LearnerGroup --> every rank
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from opd_governor.actors.deadlines import ActorLostError, Pace, Say
from opd_governor.actors.learner.actor import Learner, StepReport
from opd_governor.actors.learner.group import LearnerGroup
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.run.cluster import LOST, NAME_FREE_S, NAMESPACE, learner_name


class RunLearner:
    """Holds the run's state. When it dies its calls raise ActorLostError: `restart`, then `restore` from a checkpoint."""

    def __init__(self, job: Job, models: Models, say: Say) -> None:
        self._job, self._models, self._say = job, models, say
        self._places: Sequence[dict[str, Any]] = ()
        self._group = LearnerGroup(())
        self._turn = asyncio.Lock()
        """One call at a time: a call's deadline must not run while another one is served."""
        self._paces: defaultdict[str, Pace] = defaultdict(lambda: Pace(job.cluster.deadline_floor_s))
        self.num_restores = 0
        """How often its weights were replaced by others than a step's."""

    @property
    def ranks(self) -> tuple[Any, ...]:
        """The actors."""
        return self._group.ranks

    async def start(self, places: Sequence[dict[str, Any]]) -> None:
        """Start one rank on each place (Ray options) and wait until all have the initial student."""
        first, *others = places
        self._places = [first | {"name": learner_name(self._job.name), "namespace": NAMESPACE}, *others]
        self._group = self._create()
        await self._ask("start")

    def _create(self) -> LearnerGroup:
        job, models = self._job, self._models
        parts = LearnerModels(
            models.student,
            with_reference=job.objective.reference_kl_weight > 0 or job.governor.may_move("reference_kl_weight"),
            teacher=models.teachers[0] if job.objective.needs.hidden else None,
            trust_remote_code=job.student.trust_remote_code,
            tokenizer=models.tokenizer,
            lora=job.student.lora,
            seed=job.seed,
            follow=job.follow,
            num_ids=models.cut_ids,
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
                for place in self._places
            ]
        )

    async def restart(self) -> None:
        """A new learner, all ranks of it, with the initial student: `restore` follows. Raises ActorLostError if it does not come up."""
        await asyncio.to_thread(lambda: [ray.kill(rank) for rank in self.ranks])
        deadline = time.monotonic() + NAME_FREE_S
        while True:
            try:
                self._group = self._create()
                break
            except ValueError as error:  # Ray's word for a name that is taken: it has not yet noted that the one before is dead
                if learner_name(self._job.name) not in str(error) or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        self.num_restores += 1
        await self._ask("start")

    async def learn(
        self,
        rollouts: Sequence[ScoredRollout],
        golden: Sequence[Prompt],
        limits: LengthLimits,
        reference_tokens: float,
        learning_rate: float,
    ) -> StepReport:
        """One optimiser step. Raises ActorLostError."""
        tokens = sum(len(r.trajectory.prompt.token_ids) + len(r.trajectory.conversation_ids) for r in rollouts)
        tokens += sum(len(prompt.token_ids) + len(prompt.golden_ids or ()) for prompt in golden)
        return await self._ask("step", rollouts, golden, limits, reference_tokens, learning_rate, tokens=tokens)

    async def probe(self, token_ids: Sequence[int], dtype: str | None = None, *, base: bool = False) -> np.ndarray:
        """[len(token_ids) - 1] log-probs of a sequence in the engines' precision: what rounding does to both sides is no gap. `base`:
        of a LoRA student without its addition."""
        return await self._ask("probe", token_ids, dtype or self._job.rollout.dtype, base=base)

    async def version(self) -> int:
        """Rises by one with every step taken."""
        return await self._ask("version")

    async def weights(self, *, trained_only: bool) -> tuple[int, Any]:
        """The version, and a reference to the weights in the engines' precision. `trained_only` leaves out what no step changes."""
        return await self._ask("weights", self._job.rollout.dtype, trained_only=trained_only)

    async def followed_version(self) -> int:
        """The student's version when the weights of a teacher that follows it last changed."""
        return await self._ask("followed_version")

    async def followed(self, dtype: str) -> tuple[int, Any]:
        """That version, and a reference to those weights."""
        return await self._ask("followed", dtype)

    async def send_weights(self, transfer: str, engines: list[Any]) -> None:
        """From GPU to GPU, to engines that expect them."""
        await self._ask("send_weights", transfer, self._job.rollout.dtype, engines, self._job.rollout.tensor_parallel_size)

    async def snapshot(self) -> None:
        """Copy the state as it is between these two steps, for `save`."""
        await self._ask("snapshot")

    async def save(self, folder: str) -> None:
        """The snapshot into a checkpoint's folder, which learner and driver share; steps go on meanwhile. Raises OSError."""
        try:
            await self._paces["save"].watch(self._group.save(folder), "save of the learner", self._say)
        except LOST as error:
            raise ActorLostError("learner", error) from error

    async def save_student(self, folder: str, card: str) -> None:
        """The student alone, in Hugging Face layout, with `card` as its README.md."""
        chosen = self._job.checkpoint.dtype
        dtype = chosen if chosen != "auto" else self._models.dtype or "float32"
        await self._ask("save_student", folder, card, dtype)

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Back to a checkpoint; `rollback`: its weights alone. Returns the weight version in force."""
        self.num_restores += 1
        return await self._ask("restore", folder, rollback=rollback)

    async def _ask(self, method: str, *args: Any, tokens: int = 1, **kwargs: Any) -> Any:
        async with self._turn:
            try:
                reply = getattr(self._group, method)(*args, **kwargs)
                return await self._paces[method].watch(reply, f"{method} of the learner", self._say, tokens=tokens)
            except LOST as error:
                raise ActorLostError("learner", error) from error
