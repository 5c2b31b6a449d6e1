"""From prompts to a scored batch: rollouts scored as they finish, truncated ones admitted by quota first.

prompts --fleet.rollout--> finished trajectories --pool.score, verifier (at once)--> Batch
                                    |
                                    +-- truncated, under a quota: held until all have finished, then admitted or refused
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opd_governor.actors.learner.batching import admit
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.verdicts import Verdict
from opd_governor.services.record.batch import Batch, Launch
from opd_governor.services.run.conversations import Sampler
from opd_governor.services.run.demonstrations import Demonstrations

JudgeRollouts = Callable[[Sequence[Trajectory]], Awaitable[list[Verdict]]]


async def collect(
    fleet: Sampler, pool: TeacherPool, launch: Launch, *, demonstrations: Demonstrations | None = None, judge: JudgeRollouts | None = None
) -> Batch:
    """Sample, score and judge one step's batch. Rollouts that ended in an error are dropped from it and counted as unscored.

    With `demonstrations` scoring waits until all have finished, since each is shown to the teacher beside another one.
    The first error of engines or teachers ends it, whatever else is under way.
    """
    started, quota = time.monotonic(), launch.limits.admission_quota
    sampled = _Sampled(has_quota=quota < 1, together=demonstrations is not None)
    num_undemonstrated, verdicts = 0, dict[int, Verdict]()
    requests = [(prompt, sample) for prompt in launch.prompts for sample in range(launch.settings.samples_per_prompt)]
    scores: dict[int, TokenScores | None] = {}
    """Identity of a trajectory -> its scores: comparing trajectories compares their arrays."""

    async def score(group: Sequence[Trajectory], seen: Sequence[Trajectory] | None = None) -> None:
        """`seen`: as the teacher sees them, where that is otherwise."""
        scores.update(zip(map(id, group), await pool.score(group if seen is None else seen), strict=True))

    async def find_verdicts(group: Sequence[Trajectory], judge: JudgeRollouts) -> None:
        verdicts.update(zip(map(id, group), await judge(group), strict=True))

    try:
        async with asyncio.TaskGroup() as scoring:
            async for group in fleet.rollout(requests, launch.limits, launch.step, launch.settings):
                num_usable = len(sampled.usable)
                if ready := sampled.add(group):
                    scoring.create_task(score(ready))
                if judge is not None:
                    scoring.create_task(find_verdicts(sampled.usable[num_usable:], judge))
            rollout_s = time.monotonic() - started
            admitted, refused = _admit(sampled.usable, quota)
            late = [t for t in admitted if id(t) in sampled.held]
            if demonstrations is not None:
                prompts = demonstrations.prompts(late)
                num_undemonstrated = len(late) - len(prompts)
                late = [t for t in late if id(t) in prompts]
                scoring.create_task(score(late, [replace(t, prompt=prompts[id(t)]) for t in late]))
            elif late:
                scoring.create_task(score(late))
    except* Exception as errors:
        raise first_of(errors) from None
    trajectories = _in_order(sampled.trajectories, requests)
    judged, unjudged = _with_verdicts(trajectories, verdicts)
    scored = [ScoredRollout(j, one) for t, j in zip(trajectories, judged, strict=True) if (one := scores.get(id(t))) is not None]
    return Batch(
        step=launch.step,
        trajectories=judged,
        scored=scored,
        nonfinite=sampled.nonfinite,
        num_over_quota=len(refused),
        num_unscored=len(trajectories) - len(refused) - len(scored) - num_undemonstrated,
        limits=launch.limits,
        max_new_tokens=launch.settings.max_new_tokens,
        config_generation=launch.config_generation,
        rollout_s=rollout_s,
        score_s=time.monotonic() - started - rollout_s,
        num_undemonstrated=num_undemonstrated,
        unjudged=unjudged,
    )


def _in_order(trajectories: Sequence[Trajectory], requests: Sequence[tuple[Prompt, int]]) -> list[Trajectory]:
    place = {(prompt.epoch, prompt.index, sample): i for i, (prompt, sample) in enumerate(requests)}
    return sorted(trajectories, key=lambda t: place[t.prompt.epoch, t.prompt.index, t.sample])


def _with_verdicts(trajectories: list[Trajectory], verdicts: Mapping[int, Verdict]) -> tuple[list[Trajectory], tuple[Verdict, ...]]:
    """The trajectories with their scores, and the verdicts without one. `verdicts`: by identity of the trajectory."""
    if not verdicts:
        return trajectories, ()
    unjudged = tuple(verdicts[id(t)] for t in trajectories if id(t) in verdicts and verdicts[id(t)].score is None)
    return [replace(t, reward=verdicts[id(t)].score) if id(t) in verdicts else t for t in trajectories], unjudged


class _Sampled:
    """Rollouts as they come in, sorted into what may be scored at once, what waits for the quota, what is spoiled."""

    def __init__(self, *, has_quota: bool, together: bool) -> None:
        """`together`: all of them wait."""
        self._has_quota, self._together = has_quota, together
        self.trajectories: list[Trajectory] = []
        self.usable: list[Trajectory] = []
        self.nonfinite: list[Trajectory] = []
        self.held: set[int] = set()
        """Identities of those that wait until all have finished."""

    def add(self, group: Sequence[Trajectory]) -> list[Trajectory]:
        """Take a group in; returns those that may be scored now."""
        ready = []
        sound = np.isfinite(np.concatenate([t.logprobs_T for t in group])).all()  # one look at all is most often enough
        for trajectory in group:
            if not (sound or np.isfinite(trajectory.logprobs_T).all()):
                self.nonfinite.append(trajectory)
            elif trajectory.finish_reason != "error" and trajectory.token_ids:
                self.usable.append(trajectory)
                if self._together or (self._has_quota and trajectory.truncated):
                    self.held.add(id(trajectory))
                else:
                    ready.append(trajectory)
        self.trajectories += group
        return ready


def first_of(errors: BaseExceptionGroup) -> BaseException:
    """The first error of a group, itself no group."""
    error = errors.exceptions[0]
    return first_of(error) if isinstance(error, BaseExceptionGroup) else error


def _admit(usable: Sequence[Trajectory], quota: float) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """(admitted, refused). Where all are truncated the quota's share of them is admitted: from an empty batch nothing is learned."""
    admitted, refused = admit(usable, quota)
    if admitted or not refused:
        return admitted, refused
    num = math.ceil(quota * len(usable))
    return usable[:num], usable[num:]
