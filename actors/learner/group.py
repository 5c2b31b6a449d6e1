"""The ranks of one learner as one: services talk to this and need not know how many ranks there are.

step: one batch in the object store --> every rank takes its share --> summed gradients, one update, one report
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import ray

from actors.learner.actor import StepReport
from actors.trajectory import LengthLimits, Prompt, ScoredRollout


class LearnerGroup:
    """Each verb runs on all ranks at once, for they meet in collectives inside it; one rank's answer stands for all.

    >>> group = LearnerGroup([learner.remote(...) for _ in range(2)]); await group.start()   # doctest: +SKIP
    """

    def __init__(self, ranks: Sequence[Any]) -> None:
        self.ranks = tuple(ranks)

    async def start(self) -> None:
        """Wait until every rank has its models, and make them one group where there are several."""
        await asyncio.gather(*(rank.ping.remote() for rank in self.ranks))
        if len(self.ranks) > 1:
            host, port = await self.ranks[0].open_rendezvous.remote()
            await asyncio.gather(*(actor.join.remote(rank, host, port) for rank, actor in enumerate(self.ranks)))

    async def step(
        self, rollouts: Sequence[ScoredRollout], golden: Sequence[Prompt], limits: LengthLimits, reference_tokens: float, rate: float
    ) -> StepReport:
        """One optimiser step on all ranks; the metrics are the whole batch's."""
        batch = ray.put(list(rollouts))
        reports = await asyncio.gather(*(rank.step.remote(batch, golden, limits, reference_tokens, rate) for rank in self.ranks))
        return replace(reports[0], metrics=reduce(add, (report.metrics for report in reports)))

    def weights(self, dtype: str) -> Any:
        """Reference to all weights (see `Learner.weights`): they lie in the object store once and are read from there."""
        first, *_ = [rank.weights.remote(dtype) for rank in self.ranks]
        return first

    async def send_weights(self, backend: str, dtype: str, actors: list[Any], workers_per_engine: int) -> None:
        await asyncio.gather(*(rank.send_weights.remote(backend, dtype, actors, workers_per_engine) for rank in self.ranks))

    async def probe(self, token_ids: Sequence[int]) -> np.ndarray:
        return (await asyncio.gather(*(rank.probe.remote(token_ids) for rank in self.ranks)))[0]

    async def save(self, folder: str) -> None:
        await asyncio.gather(*(rank.save.remote(folder) for rank in self.ranks))

    async def save_student(self, folder: str, card: str) -> None:
        await asyncio.gather(*(rank.save_student.remote(folder, card) for rank in self.ranks))

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Every rank reads the checkpoint's folder: it has to be shared where ranks are on several nodes."""
        return (await asyncio.gather(*(rank.restore.remote(folder, rollback=rollback) for rank in self.ranks)))[0]
