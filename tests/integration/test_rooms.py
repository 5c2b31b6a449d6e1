"""Actors stand where the plan says, on a real Ray that pretends to have GPUs: 1, 2, 8, and four nodes of eight."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.run.rooms import Rooms, take_rooms

pytestmark = pytest.mark.integration

JOBS = Path(__file__).parents[2] / "deploy/jobs"


@contextmanager
def pretended(*gpus_of_nodes: int) -> Iterator[None]:
    """A cluster of nodes with so many GPUs each."""
    cluster = Cluster()
    try:
        for num_gpus in gpus_of_nodes:
            cluster.add_node(num_cpus=1, num_gpus=num_gpus, resources={"accelerator_type:H100": 1})
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def no_shared_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@ray.remote
class Where:
    """Stands in for an actor: only where Ray puts it is asked."""

    def ask(self) -> tuple[str, tuple[int, ...]]:
        return ray.get_runtime_context().get_node_id(), tuple(int(gpu) for gpu in ray.get_gpu_ids())


def job_of(name: str, **changes: Any) -> Job:
    return load_job(JOBS / f"{name}.yaml", tuple(f"{key}={value}" for key, value in changes.items()))


async def stand(job: Job, told: list[str]) -> tuple[Rooms, dict[tuple[str, int], tuple[str, tuple[int, ...]]]]:
    """Take rooms and put a stand-in into each: (role, index) -> (node, GPUs)."""
    models = Models(job.student.model, tuple(t.model for t in job.teacher), (1,), 1024)
    rooms = await take_rooms(job, models, told.append)
    places = {"learner": await rooms.learner(), "rollout": await rooms.rollout()}
    places |= {f"teacher {t.name}": await rooms.teacher(t) for t in rooms.job.teacher}
    actors = {(role, i): Where.options(**options).remote() for role, each in places.items() for i, options in enumerate(each)}
    return rooms, dict(zip(actors, await asyncio.gather(*(actor.ask.remote() for actor in actors.values())), strict=True))


def check_against_plan(rooms: Rooms, found: dict[tuple[str, int], tuple[str, tuple[int, ...]]]) -> None:
    """Every actor of a bundle on the same GPUs of one node; no GPU in two bundles; as many GPUs as the bundle has."""
    assert rooms.plan is not None
    taken: dict[tuple[str, int], int] = {}
    for index, bundle in enumerate(rooms.plan.bundles):
        (node, gpus), *others = [found[actor] for actor in bundle.actors]
        assert others == [(node, gpus)] * len(others), bundle
        assert len(gpus) == bundle.num_gpus
        for gpu in gpus:
            assert taken.setdefault((node, gpu), index) == index, f"GPU {gpu} is in two bundles"
    assert len(found) == sum(len(bundle.actors) for bundle in rooms.plan.bundles)


def test_one_gpu_holds_learner_engine_and_teacher() -> None:
    told: list[str] = []
    with pretended(1):
        rooms, found = asyncio.run(stand(job_of("qwen3-1-gpu"), told))
    check_against_plan(rooms, found)
    assert {gpus for _, gpus in found.values()} == {(0,)}
    assert rooms.shared
    assert rooms.transfer == "ipc"
    assert told[0].startswith("plan: colocated on 1 GPUs of 80 GiB on 1 node")


def test_one_gpu_that_cannot_hold_the_job_is_refused_at_once_in_words() -> None:
    with pretended(1), pytest.raises(JobError, match=r"does not fit 1 GPUs of 80 GiB.*largest term is moments.*raise learner.num_ranks"):
        asyncio.run(stand(job_of("qwen3-8-gpus"), []))


def test_two_gpus_are_shared_rank_by_rank() -> None:
    with pretended(2):
        rooms, found = asyncio.run(stand(job_of("qwen3-1-gpu"), []))
    check_against_plan(rooms, found)
    assert rooms.job.learner.num_ranks == rooms.job.rollout.num_actors == 2
    for index in (0, 1):
        assert found["learner", index] == found["rollout", index]


def test_eight_gpus_are_one_role_s_each() -> None:
    with pretended(8):
        rooms, found = asyncio.run(stand(job_of("qwen3-8-gpus"), []))
    check_against_plan(rooms, found)
    assert rooms.transfer == "nccl"
    assert sorted(gpu for _, gpus in found.values() for gpu in gpus) == list(range(8))


def test_four_nodes_of_eight_hold_engines_of_two_gpus_within_a_node() -> None:
    job = job_of("qwen3-32-gpus", **{"rollout.tensor_parallel_size": 2, "rollout.num_actors": 9, "learner.num_ranks": 8})
    with pretended(8, 8, 8, 8):
        rooms, found = asyncio.run(stand(job, []))
    check_against_plan(rooms, found)
    engines = [found["rollout", index] for index in range(9)]
    assert {len(gpus) for _, gpus in engines} == {2}
    assert len({node for node, _ in found.values()}) == 4


def test_a_cluster_that_is_promised_more_waits_and_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_governor.services.run.rooms.TELL_S", 0.5)
    told: list[str] = []

    async def run(cluster: Cluster) -> Rooms:
        waiting = asyncio.create_task(stand(job_of("qwen3-8-gpus", **{"cluster.gpus": "8x80"}), told))
        while not any(line.startswith("waiting") for line in told):
            await asyncio.sleep(0.1)
        cluster.add_node(num_cpus=1, num_gpus=8)  # in this thread: it sets signal handlers
        return (await waiting)[0]

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=1, num_gpus=0)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        rooms = asyncio.run(run(cluster))
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert rooms.plan is not None
    assert next(line for line in told if line.startswith("waiting")).endswith(
        "8 GPUs in 8 bundles are wanted, the cluster has 0, 0 of them free"
    )
