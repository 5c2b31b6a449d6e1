"""Requests that an engine refuses or cannot serve: each is an error of its own, told once, and the others go on."""

from collections.abc import Iterable

import numpy as np

from opd_governor.actors.deadlines import Say
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory


def unanswered(prompt: Prompt, sample: int, limits: LengthLimits, step: int, refusal: str = "") -> Trajectory:
    """The empty answer to a request that could not be served: counted, never learned from. `refusal`: the engine's words."""
    empty = np.zeros(0, np.float32)
    return Trajectory(prompt, (), empty, "error", limits.cap_tokens, step, -1, limits.generation, sample, refusal=refusal)


class Refusals:
    """Tells each reason once."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._told: set[str] = set()

    def tell(self, group: Iterable[Trajectory], step: int) -> None:
        """Say what is new among these."""
        for trajectory in group:
            if trajectory.refusal and trajectory.refusal not in self._told:
                self._told.add(trajectory.refusal)
                self._say(f"step {step}: the engine refuses prompt {trajectory.prompt.index}, counted as an error: {trajectory.refusal}")
