"""Held-out evaluation: on the settings in force, whatever the job file said at the start."""

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.inputs.verdicts import Verdict
from opd_governor.services.run.held_out import HeldOut
from tests.services.control.fake_run import make_job


class FakeFleet:
    """Answers every problem with its index, and remembers on which settings it was asked."""

    def __init__(self) -> None:
        self.asked: set[tuple[bool, float, int]] = set()

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any, *, greedy: bool
    ) -> AsyncIterator[list[Trajectory]]:
        self.asked.add((greedy, settings.temperature, limits.cap_tokens))
        for prompt, sample in requests:
            ids = (prompt.index, 1)
            yield [Trajectory(prompt, ids, np.zeros(2, np.float32), "stop", limits.cap_tokens, step, 0, 0, sample)]


async def test_both_decodings_are_asked_on_the_settings_in_force() -> None:
    fleet = FakeFleet()
    problems = tuple(Prompt(index, (5,), answer=str(index % 2)) for index in range(4))
    sources: Any = SimpleNamespace(problems=problems, decode=lambda ids: str(ids[0]))

    async def judge(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [Verdict(float(response == answer)) for response, answer in pairs]

    evaluate = HeldOut(sources, judge, fleet)  # type: ignore[arg-type]
    job = make_job(rollout={"temperature": 0.7, "max_new_tokens": 99})
    found = await evaluate(job, 3)
    assert fleet.asked == {(True, 0.7, 99), (False, 0.7, 99)}
    assert {name: evaluation.accuracy_ratio for name, evaluation in found.items()} == {"greedy": 0.5, "sampled": 0.5}
