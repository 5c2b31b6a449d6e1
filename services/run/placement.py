"""Where a role's actors stand: Ray's own choice, or a placement group that keeps them together or apart."""

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_governor.services.job.settings import JobError, Placement

RESERVE_TIMEOUT_S = 600.0
"""An autoscaler may have to bring nodes up first."""


async def place(
    role: str, num_actors: int, strategy: Placement | None, *, num_cpus: float, num_gpus: float, resources: Mapping[str, float] = {}
) -> list[dict[str, Any]]:
    """Ray options for each actor of a role: what it reserves, and where; with a strategy, reserved together or not at all.

    A group ends with its run. Raises JobError where the cluster has no such room, or the actors reserve nothing to place by.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources)}
    if strategy is None:
        return [options] * num_actors
    bundle = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus), *resources.items()) if amount > 0}
    if not bundle:
        raise JobError(f"cluster.placement_{role}: {strategy} needs actors that reserve something; set cluster.cpus_per_actor above 0")
    group = placement_group([bundle] * num_actors, strategy=strategy.upper())
    try:
        async with asyncio.timeout(RESERVE_TIMEOUT_S):
            await group.ready()
    except TimeoutError:
        wanted = f"{num_actors} x {bundle}"
        raise JobError(f"cluster.placement_{role}: no room for {strategy} of {wanted} on this cluster; add nodes or loosen it") from None
    return [options | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)} for index in range(num_actors)]
