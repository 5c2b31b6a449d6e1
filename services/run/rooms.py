"""Where a run's actors stand on its cluster: on GPUs by a plan and one placement group, elsewhere role by role.

job, GPUs of the cluster --plan--> bundles --one placement group--> Ray options of each learner rank, engine and teacher actor
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd_governor.actors.deadlines import Say
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import ClusterSettings, Job
from opd_governor.services.plan.defaults import on_gpus
from opd_governor.services.plan.hardware import Hardware, parse_gpus
from opd_governor.services.plan.layout import Plan, plan
from opd_governor.services.run.cluster import Role, role_resources
from opd_governor.services.run.placement import place

BY_HAND = frozenset({f"{what}_{role}" for what in ("gpus_per", "placement") for role in ("rollout", "teacher", "learner")})
"""Keys of `cluster` that place each role by itself."""
TELL_S = 30.0
"""How often a wait for room is told again."""
ASSUMED_GIB = 80.0
ACCELERATOR_GIB = {"T4": 16, "V100": 32, "A10G": 24, "L4": 24, "A100": 40, "A100-40G": 40, "L40S": 48, "A100-80G": 80, "H100": 80}
ACCELERATOR_GIB |= {"H200": 141, "B200": 180}
"""Memory of a card by Ray's name of it."""


@dataclass(frozen=True)
class Rooms:
    """Ray options for every actor of a run, in order. A replacement takes over its predecessor's."""

    job: Job
    """With the numbers that the plan chose."""
    plan: Plan | None = None
    group: PlacementGroup | None = None

    @property
    def shared(self) -> bool:
        """Roles share GPUs: they must start one after the other, since each measures what is free."""
        return self.plan is not None and self.plan.layout == "colocated"

    @property
    def transfer(self) -> str | None:
        """How weights travel by the plan; None without one."""
        return self.plan.transfer if self.plan else None

    async def learner(self) -> list[dict[str, Any]]:
        """One a rank."""
        return self._planned("learner", self.job.learner.num_ranks) or await self._by_role("learner", self.job.learner.num_ranks, 1)

    async def rollout(self) -> list[dict[str, Any]]:
        """One an engine."""
        settings = self.job.rollout
        return self._planned("rollout", settings.num_actors) or await self._by_role(
            "rollout", settings.num_actors, settings.tensor_parallel_size
        )

    async def teacher(self, settings: TeacherSettings) -> list[dict[str, Any]]:
        """One an actor. An actor that asks a server elsewhere holds no GPU and no teacher node."""
        if not settings.means.local:
            strategy, num_cpus = self.job.cluster.placement_teacher, self.job.cluster.cpus_per_actor
            return await place("teacher", settings.num_actors, strategy, num_cpus=num_cpus, num_gpus=0.0)
        planned = self._planned(f"teacher {settings.name}", settings.num_actors)
        return planned or await self._by_role("teacher", settings.num_actors, settings.tensor_parallel_size)

    def _planned(self, role: str, num: int) -> list[dict[str, Any]]:
        if self.plan is None or self.group is None:
            return []
        resources = role_resources(self.job, _kind(role))
        return [
            {
                "num_cpus": self.job.cluster.cpus_per_actor,
                "num_gpus": self.plan.share(role),
                "resources": resources,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.plan.place_of(role, index)),
            }
            for index in range(num)
        ]

    async def _by_role(self, role: Role, num: int, gpus_each: int) -> list[dict[str, Any]]:
        cluster = self.job.cluster
        share = getattr(cluster, f"gpus_per_{role}")
        has_gpus = bool(ray.cluster_resources().get("GPU", 0))
        num_gpus = (float(has_gpus) if share is None else share) * gpus_each
        strategy, resources = getattr(cluster, f"placement_{role}"), role_resources(self.job, role)
        return await place(role, num, strategy, num_cpus=cluster.cpus_per_actor, num_gpus=num_gpus, resources=resources)


async def take_rooms(job: Job, models: Models, say: Say) -> Rooms:
    """Plan and reserve. Waits while an autoscaler brings what `cluster.gpus` promises, and says what is missing.

    Raises JobError where the job fits neither what the cluster has nor what is promised. A group ends with its run.
    """
    hardware = await asyncio.to_thread(cluster_hardware, job.cluster, say)
    if hardware is None:
        return Rooms(job)
    if job.cluster.model_fields_set & BY_HAND:
        return Rooms(on_gpus(job))
    found = await asyncio.to_thread(plan, _with_models(job, models), hardware)
    for line in found.lines():
        say(f"plan: {line}")
    bundles = [_bundle(job, found, index) for index in range(len(found.bundles))]
    group = placement_group(bundles, strategy="PACK")
    await _until_ready(group, bundles, say)
    return Rooms(_with_numbers(job, found.job), found, group)


def cluster_hardware(cluster: ClusterSettings, say: Say) -> Hardware | None:
    """The GPUs that `cluster.gpus` promises, or those of the nodes that are up; None without any."""
    if cluster.gpus:
        return parse_gpus(cluster.gpus)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = sorted((int(resources["GPU"]) for resources in alive if resources.get("GPU")), reverse=True)
    if not nodes:
        return None
    names = {key.partition(":")[2] for resources in alive for key in resources if key.startswith("accelerator_type:")}
    known = [ACCELERATOR_GIB[name] for name in names if name in ACCELERATOR_GIB]
    if not known:
        say(f"GPU memory is not known to Ray: the plan assumes {ASSUMED_GIB:g} GiB; cluster.gpus: {sum(nodes)}x24 would say otherwise")
    return Hardware(tuple(nodes), float(min(known, default=ASSUMED_GIB)))


async def _until_ready(group: PlacementGroup, bundles: list[dict[str, float]], say: Say) -> None:
    """No deadline: nodes come when the autoscaler brings them, and a start's own clock begins when its actor runs."""
    started, ready = time.monotonic(), asyncio.ensure_future(_as_coroutine(group.ready()))
    try:
        while not (await asyncio.wait([ready], timeout=TELL_S))[0]:
            wanted = sum(bundle["GPU"] for bundle in bundles)
            have, free = (source().get("GPU", 0) for source in (ray.cluster_resources, ray.available_resources))
            say(
                f"waiting {time.monotonic() - started:.0f} s for room: {wanted:g} GPUs in {len(bundles)} bundles are wanted, "
                f"the cluster has {have:g}, {free:g} of them free"
            )
        await ready
    finally:
        ready.cancel()


async def _as_coroutine(reference: Any) -> Any:
    return await reference


def _bundle(job: Job, found: Plan, index: int) -> dict[str, float]:
    bundle = found.bundles[index]
    wanted = {"GPU": float(bundle.num_gpus), "CPU": job.cluster.cpus_per_actor * len(bundle.actors)}
    for role, _ in bundle.actors:
        wanted |= role_resources(job, _kind(role))
    return {name: amount for name, amount in wanted.items() if amount}


def _kind(role: str) -> Role:
    return "learner" if role == "learner" else "rollout" if role == "rollout" else "teacher"


def _with_models(job: Job, models: Models) -> Job:
    """Models as folders whose configs can be read."""
    teachers = tuple(t.model_copy(update={"model": model}) for t, model in zip(job.teacher, models.teachers, strict=True))
    return job.model_copy(update={"student": job.student.model_copy(update={"model": models.student}), "teacher": teachers})


def _with_numbers(job: Job, planned: Job) -> Job:
    """The job with the plan's numbers, under the models' names as the person wrote them."""
    teachers = tuple(new.model_copy(update={"model": old.model}) for old, new in zip(job.teacher, planned.teacher, strict=True))
    return job.model_copy(update={"learner": planned.learner, "rollout": planned.rollout, "teacher": teachers})
