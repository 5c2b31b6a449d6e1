"""Rollouts under way: batches launched ahead of the learner, taken in order, dropped when the run goes back.

launch(step 5, step 6) --> [5, 6] --> first: the one to wait for --> take
                              |
                              +-- drop: their prompts are drawn again
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from opd_governor.services.inputs.prompts import PromptStream
from opd_governor.services.record.batch import Batch, Launch
from opd_governor.services.run.terms import Terms


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A batch being sampled and scored."""

    launch: Launch
    batch: asyncio.Task[Batch]
    cursor: dict[str, int]
    """Where the prompt stream stood before this batch's prompts were drawn."""


class Ahead:
    """The batches under way, oldest first."""

    def __init__(self, stream: PromptStream, sample: Callable[[Launch], Coroutine[Any, Any, Batch]]) -> None:
        """`sample` samples and scores one batch."""
        self._stream, self._sample = stream, sample
        self._under_way: deque[UnderWay] = deque()
        self._next_step = 1

    def launch(self, last_step: int, terms: Terms) -> None:
        """Launch every step up to `last_step` that is not yet under way, on the terms in force now."""
        while self._next_step <= last_step:
            cursor, limits = self._stream.state(), terms.ruling.limits
            prompts = self._stream.next(terms.job.rollout.prompts_per_step, limits.unfinished_quota)
            launch = Launch(self._next_step, prompts, limits, terms.job.rollout, terms.generation)
            self._under_way.append(UnderWay(launch, asyncio.create_task(self._sample(launch)), cursor))
            self._next_step += 1
            terms.observed()

    @property
    def first(self) -> asyncio.Task[Batch]:
        """The oldest batch, which stays under way until it is taken."""
        return self._under_way[0].batch

    def take(self) -> None:
        """The oldest batch is learned from: it is no longer under way."""
        self._under_way.popleft()

    def cursor(self) -> dict[str, int]:
        """Where the prompts of batches that are not taken begin: what a checkpoint holds of the stream."""
        return self._under_way[0].cursor if self._under_way else self._stream.state()

    async def drop(self) -> None:
        """Abandon all batches under way; their prompts are drawn again."""
        if not self._under_way:
            return
        dropped, self._under_way = list(self._under_way), deque()
        self.restore(dropped[0].launch.step - 1, dropped[0].cursor)
        for one in dropped:
            one.batch.cancel()
        await asyncio.gather(*(one.batch for one in dropped), return_exceptions=True)

    def restore(self, step: int, cursor: dict[str, int]) -> None:
        """Go on after `step`, with nothing under way."""
        self._next_step = step + 1
        self._stream.restore(cursor)
