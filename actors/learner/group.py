"""The ranks of one learner as one: services talk to this and need not know how many ranks there are.

step: one batch in the object store --> every rank takes its share --> summed gradients, one update, one report
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayTaskError

from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout
from opd_governor.actors.wire import pack, tabulate

T = TypeVar("T")

PEER_DEATH_S = 30.0
"""A rank whose peer dies raises at once, out of a broken collective; Ray tells of the death itself some seconds later."""


class LearnerGroup:
    """Each verb runs on all ranks at once, for they meet in collectives inside it; one rank's answer stands for all.

    A rank that dies takes the others' state with it: the verb raises that death, and the whole group has to be ended.

    >>> group = LearnerGroup([learner.remote(...) for _ in range(2)]); await group.start()   # doctest: +SKIP
    """

    def __init__(self, ranks: Sequence[Any]) -> None:
        self.ranks = tuple(ranks)

    async def start(self) -> None:
        """Wait until every rank has its models, and make them one group where there are several."""
        await together(rank.start.remote() for rank in self.ranks)
        if len(self.ranks) > 1:
            host, port = await self.ranks[0].open_rendezvous.remote()
            await together(actor.join.remote(rank, host, port) for rank, actor in enumerate(self.ranks))

    async def step(
        self, rollouts: Sequence[ScoredRollout], golden: Sequence[Prompt], limits: LengthLimits, reference_tokens: float, rate: float
    ) -> StepReport:
        """One optimiser step on all ranks; the metrics are the whole batch's."""
        batch = ray.put(pack(tabulate(rollouts)))
        reports = await together(rank.step_packed.remote(batch, golden, limits, reference_tokens, rate) for rank in self.ranks)
        return replace(reports[0], metrics=reduce(add, (report.metrics for report in reports)))

    async def weights(self, dtype: str, *, trained_only: bool) -> tuple[int, Any]:
        """The weight version, and a reference to the weights (see `Learner.weights`): they lie in the object store once and are read
        from there."""
        replies = [rank.weights.options(num_returns=2).remote(dtype, trained_only=trained_only) for rank in self.ranks]
        version, *_ = await together(version for version, _ in replies)
        return version, replies[0][1]

    async def followed_version(self) -> int:
        return await self.ranks[0].followed_version.remote()

    async def followed(self, dtype: str) -> tuple[int, Any]:
        """As `weights`: the version, and a reference to the weights of a teacher that follows."""
        replies = [rank.followed.options(num_returns=2).remote(dtype) for rank in self.ranks]
        version, *_ = await together(version for version, _ in replies)
        return version, replies[0][1]

    async def send_weights(self, backend: str, dtype: str, actors: list[Any], workers_per_engine: int) -> None:
        await together(rank.send_weights.remote(backend, dtype, actors, workers_per_engine) for rank in self.ranks)

    async def probe(self, token_ids: Sequence[int], dtype: str, *, base: bool = False) -> np.ndarray:
        return (await together(rank.probe.remote(token_ids, dtype, base=base) for rank in self.ranks))[0]

    async def snapshot(self) -> None:
        await together(rank.snapshot.remote() for rank in self.ranks)

    async def save(self, folder: str) -> None:
        """The first rank writes its snapshot, beside whatever else the ranks do. Raises OSError."""
        await self.ranks[0].save.options(concurrency_group="disk").remote(folder)

    async def save_student(self, folder: str, card: str, dtype: str) -> None:
        await together(rank.save_student.remote(folder, card, dtype) for rank in self.ranks)

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Every rank reads the checkpoint's folder: it has to be shared where ranks are on several nodes."""
        return (await together(rank.restore.remote(folder, rollback=rollback) for rank in self.ranks))[0]

    async def version(self) -> int:
        return await self.ranks[0].version.remote()


async def together(replies: Iterable[Awaitable[T]]) -> list[T]:
    """All ranks' answers. Raises as soon as one rank does, for the others may wait for it for ever; of several errors a death."""
    tasks = [asyncio.ensure_future(reply) for reply in replies]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        errors = _errors(tasks)
        if errors and all(isinstance(error, RayTaskError) for error in errors):
            await asyncio.wait(tasks, timeout=PEER_DEATH_S)
            errors = _errors(tasks)
        if errors:
            raise next((error for error in errors if not isinstance(error, RayTaskError)), errors[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _errors(tasks: Iterable[asyncio.Future[Any]]) -> list[BaseException]:
    return [error for task in tasks if task.done() and (error := task.exception()) is not None]
