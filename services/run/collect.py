"""From prompts to a scored batch: rollouts scored as they finish, truncated ones admitted by quota first.

prompts --fleet.rollout--> finished trajectories --pool.score (at once)--> Batch
                                    |
                                    +-- truncated, under a quota: held until all have finished, then admitted or refused
"""

import asyncio
import time

import numpy as np

from opd_governor.actors.learner.batching import admit
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import ScoredRollout, TokenScores, Trajectory
from opd_governor.services.record.batch import Batch, Launch
from opd_governor.services.run.fleet import Fleet


async def collect(fleet: Fleet, pool: TeacherPool, launch: Launch) -> Batch:
    """Sample and score one step's batch. Rollouts that ended in an error are dropped from the batch and counted as unscored."""
    started = time.monotonic()
    requests = [(prompt, sample) for prompt in launch.prompts for sample in range(launch.settings.samples_per_prompt)]
    has_quota = launch.limits.admission_quota < 1
    trajectories: list[Trajectory] = []
    usable: list[Trajectory] = []
    nonfinite: list[Trajectory] = []
    held: set[int] = set()
    """Identities: comparing trajectories compares their arrays."""
    scoring: list[asyncio.Task[list[tuple[Trajectory, TokenScores | None]]]] = []

    async def score(group: list[Trajectory]) -> list[tuple[Trajectory, TokenScores | None]]:
        return list(zip(group, await pool.score(group), strict=True))

    try:
        async for group in fleet.rollout(requests, launch.limits, launch.step, launch.settings):
            ready = []
            sound = np.isfinite(np.concatenate([t.logprobs_T for t in group])).all()  # one look at all: most often it is enough
            for trajectory in group:
                if not (sound or np.isfinite(trajectory.logprobs_T).all()):
                    nonfinite.append(trajectory)
                elif trajectory.finish_reason != "error" and trajectory.token_ids:
                    usable.append(trajectory)
                    if has_quota and trajectory.truncated:
                        held.add(id(trajectory))
                    else:
                        ready.append(trajectory)
            trajectories += group
            if ready:
                scoring.append(asyncio.create_task(score(ready)))
        rollout_s = time.monotonic() - started
        admitted, refused = admit(usable, launch.limits.admission_quota)
        if late := [t for t in admitted if id(t) in held]:
            scoring.append(asyncio.create_task(score(late)))
        pairs = [pair for result in await asyncio.gather(*scoring) for pair in result]
    finally:
        for task in scoring:
            task.cancel()
    place = {(r[0].epoch, r[0].index, r[1]): i for i, r in enumerate(requests)}

    def order(trajectory: Trajectory) -> int:
        return place[trajectory.prompt.epoch, trajectory.prompt.index, trajectory.sample]

    scored = [ScoredRollout(t, scores) for t, scores in sorted(pairs, key=lambda pair: order(pair[0])) if scores is not None]
    return Batch(
        step=launch.step,
        trajectories=sorted(trajectories, key=order),
        scored=scored,
        nonfinite=nonfinite,
        num_over_quota=len(refused),
        num_unscored=len(trajectories) - len(refused) - len(scored),
        limits=launch.limits,
        max_new_tokens=launch.settings.max_new_tokens,
        config_generation=launch.config_generation,
        rollout_s=rollout_s,
        score_s=time.monotonic() - started - rollout_s,
    )
