"""Rollouts that no model made."""

import numpy as np

from opd_governor.actors.trajectory import Prompt, ScoredRollout, TokenScores, Trajectory


def random_batch(seed: int) -> list[ScoredRollout]:
    """Made-up responses and teacher scores: any values move every weight."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for index in range(4):
        token_ids = tuple(int(i) for i in rng.integers(4, 80, 16))
        behaviour, teacher = (rng.uniform(-6, -1, 16).astype(np.float32) for _ in range(2))
        trajectory = Trajectory(Prompt(index, (5, 6, 7)), token_ids, behaviour, "stop", 32, seed, seed - 1, 0)
        rollouts.append(ScoredRollout(trajectory, TokenScores("t", teacher, teacher - 1)))
    return rollouts
