"""The environment of a run: its processes, and conversations over whoever samples turns (engines, or teachers in the golden pass)."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from opd_governor.actors.environment.handle import RayEnvironment
from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.job.settings import Job
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.conversations import Conversations, Sampler
from opd_governor.services.run.sources import Sources


def environments_of(job: Job, journal: Journal) -> EnvironmentPool | None:
    """Its processes, which start with the first conversation; None where the job has no environment."""
    if job.environment is None:
        return None
    restarted = partial(journal.restarted, "environment")
    return EnvironmentPool(job.environment, partial(RayEnvironment, job.environment), on_restart=restarted, say=journal.note)


def conversations(job: Job, sources: Sources, turns: Sampler, environments: EnvironmentPool | None) -> Sampler:
    """Whoever samples turns, as it is where there is no environment."""
    if environments is None or sources.bridge is None:
        return turns
    return Conversations(turns, environments, sources.bridge, sources.decode, sources.models.context_tokens, strict=job.strict)


@dataclass(frozen=True, slots=True)
class TeacherTurns:
    """Turns by the teachers, for the golden pass. A teacher sees its own prompt; nothing is scored here."""

    pool: TeacherPool
    stop_ids: tuple[int, ...]
    temperature: float
    seed: int

    async def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """All turns asked for, at once."""
        prompts = [prompt for prompt, _ in requests]
        seed = self.seed + prompts[0].turn
        budget_tokens = max(prompt.most_tokens or limits.cap_tokens for prompt in prompts)
        answers = await self.pool.golden(prompts, max_new_tokens=budget_tokens, temperature=self.temperature, seed=seed)
        yield [_turn(prompt, sample, ids, self.stop_ids, limits) for (prompt, sample), ids in zip(requests, answers, strict=True)]


def _turn(prompt: Prompt, sample: int, ids: tuple[int, ...] | None, stop_ids: tuple[int, ...], limits: LengthLimits) -> Trajectory:
    token_ids = ids or ()
    ended = "stop" if token_ids and token_ids[-1] in stop_ids else "length"
    turn = Trajectory(prompt, token_ids, np.zeros(len(token_ids), np.float32), "length", limits.cap_tokens, 0, 0, 0, sample)
    return replace(turn, finish_reason="error" if ids is None else ended)  # type: ignore[arg-type]


async def teacher_lengths(
    job: Job, sources: Sources, pool: TeacherPool, environments: EnvironmentPool, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[tuple[int, ...] | None]:
    """What the teachers say in whole conversations, their own tokens only, up to `max_new_tokens`; None where one failed."""
    turns = TeacherTurns(pool, sources.models.stop_ids, job.data.golden.temperature, job.seed)
    assert sources.bridge is not None
    played = Conversations(turns, environments, sources.bridge, sources.decode, sources.models.context_tokens, strict=True)
    found: dict[int, tuple[int, ...] | None] = {}
    limits = LengthLimits(max_new_tokens)
    async for group in played.rollout([(prompt, 0) for prompt in prompts], limits, 0, job.rollout):
        found |= {t.prompt.index: None if t.finish_reason == "error" else t.token_ids[:max_new_tokens] for t in group}
    return [found[prompt.index] for prompt in prompts]
