"""The governor as the loop sees it: asked with a deadline, and started again with its last state when it dies or hangs."""

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_governor.actors.deadlines import FLOOR_S, ActorLostError, Pace, Reason, Say, first_line, reason_of
from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.sources import MetricsSource, OwnMetrics, PrometheusServer
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.cluster import LOST
from opd_governor.services.run.service import RunService
from opd_governor.services.run.terms import base_limits

MAX_TRIES = 3
"""Starts per question; after that the limits in force hold, and the next question tries again."""


class GovernorKeeper:
    """Keeps the governor's state after every answer, so that a new governor goes on where the last one stopped.

    >>> keeper = GovernorKeeper(start, policy, base, generation)   # start(policy, base, generation) -> a Governor actor
    >>> decision, record = await keeper.tick(step)
    """

    def __init__(
        self,
        start: Callable[[Policy, LengthLimits, int], Any],
        policy: Policy,
        base: LengthLimits,
        generation: int,
        *,
        end: Callable[[Any], None] = ray.kill,
        floor_s: float = FLOOR_S,
        on_restart: Callable[[Reason], None] = lambda reason: None,
        say: Say = lambda line: None,
    ) -> None:
        self._start, self._end, self._terms = start, end, (policy, base, generation)
        self._on_restart, self._say = on_restart, say
        self._pace = Pace(floor_s)
        self._state: dict[str, Any] | None = None
        self._lost: Exception | None = None
        """What ended the actor before this one; None once this one has answered."""
        self._actor = start(*self._terms)

    async def set_policy(self, policy: Policy, base: LengthLimits, generation: int) -> None:
        """A person's change."""
        self._terms = (policy, base, generation)
        await self._ask("set_policy", *self._terms)

    async def tell(self, news: str) -> None:
        """A change that the tests must not take for sickness, in words."""
        await self._ask("tell", news)

    async def limits(self) -> LengthLimits:
        return await self._ask("limits")

    async def state(self) -> dict[str, Any]:
        return await self._ask("state")

    async def restore(self, state: dict[str, Any]) -> None:
        self._state = state
        await self._ask("restore", state)

    async def tick(self, step: int) -> tuple[Any, dict[str, Any]]:
        """Raises ActorLostError where no governor can be brought up: the limits in force hold then."""
        decision, record = await self._ask("tick", step)
        self._state = await self._ask("state")
        return decision, record

    async def _ask(self, method: str, *args: Any) -> Any:
        for _ in range(MAX_TRIES):
            try:
                if self._lost and self._state is not None:
                    await self._call("restore", self._state)
                answer = await self._call(method, *args)
            except LOST as error:
                self._lost = error
                self._say(f"governor lost ({reason_of(error)}): {first_line(error)}; the limits in force hold meanwhile")
                await asyncio.to_thread(self._end, self._actor)
                self._actor = self._start(*self._terms)
                continue
            if self._lost:
                self._say("governor is back with its state")
                self._on_restart(reason_of(self._lost))
                self._lost = None
            return answer
        assert self._lost is not None
        raise ActorLostError("governor", self._lost)

    async def _call(self, method: str, *args: Any) -> Any:
        return await self._pace.watch(getattr(self._actor, method).remote(*args), f"{method} of the governor", self._say)


def start_governor(job: Job, store: ConfigStore, service: RunService, journal: Journal) -> GovernorKeeper:
    """The governor on the driver's own node: it reads the run's /metrics over loopback, or a Prometheus server if the job names one."""
    source: MetricsSource
    if job.service.prometheus_url:
        source = PrometheusServer(job.service.prometheus_url, job.name)
    else:
        source = OwnMetrics(f"{service.url}/metrics", job.name, service.token if job.service.protect_metrics else None)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Governor).options(num_cpus=0, scheduling_strategy=here)
    generation, tunables = store.in_force()
    in_force = tunables.apply(job)
    return GovernorKeeper(
        lambda policy, base, generation: actor.remote(source, policy, base, generation),
        in_force.governor,
        base_limits(in_force),
        generation,
        floor_s=job.cluster.deadline_floor_s,
        on_restart=lambda reason: journal.restarted("governor", reason),
        say=journal.note,
    )
