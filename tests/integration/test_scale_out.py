"""A fleet over several ranks and nodes places actors as asked, and copies weights once per node."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode
from tiny import build_tiny

from opd_governor.actors.trajectory import LengthLimits, Prompt
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.run.cluster import connect
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.placement import place

pytestmark = pytest.mark.integration

PROBE = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Two raylets on loopback, each with an object store of its own; the driver joins the first."""
    options = {"num_cpus": 4, "object_store_memory": 128 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    try:
        cluster.add_node(**options)
        cluster.wait_for_nodes()
        connect(cluster.address)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_engines_stand_on_two_nodes_and_take_the_weights_of_two_ranks(two_nodes: Cluster, tmp_path: Path) -> None:
    folder = str(build_tiny(tmp_path / "student", "llama", seed=0))
    job = Job.model_validate(
        {
            "name": "nodes",
            "student": {"model": folder},
            "teacher": {"model": folder},
            "data": {"prompts": {"path": "p"}},
            "rollout": {"num_actors": 2, "max_model_len": 128, "max_new_tokens": 8},
            "learner": {"num_ranks": 2},
            "cluster": {"cpus_per_actor": 1, "placement_rollout": "strict_spread", "placement_learner": "spread"},
        }
    )
    fleet = Fleet(job, Models(folder, (folder,), (1,), 128), PROBE)

    async def check() -> tuple[Any, list[Any]]:
        await fleet.start()
        sync = await fleet.sync_weights()
        requests = [(Prompt(index, (5, 6, 7)), 0) for index in range(4)]
        groups = [group async for group in fleet.rollout(requests, LengthLimits(8), 1, job.rollout)]
        return sync, [trajectory for group in groups for trajectory in group]

    try:
        sync, trajectories = asyncio.run(check())
        states = {actor["Address"]["NodeID"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"}
        assert len(states) == 2
    finally:
        fleet.end_actors()
    assert sync.gap_nats < 1e-3
    assert len(trajectories) == 4
    assert all(trajectory.weight_version == 0 for trajectory in trajectories)


def test_weights_travel_once_to_each_node_however_many_engines_it_has(two_nodes: Cluster) -> None:
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()

    class Reader:  # local, so that it travels by value: workers do not know this file
        """Plays an engine that takes weights."""

        def load_weights(self, weights: np.ndarray) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), int(weights.sum(dtype=np.int64))

    reader = ray.remote(Reader)
    readers = [
        reader.options(num_cpus=0, scheduling_strategy=OnNode(node, soft=False)).remote() for node in nodes for _ in range(3)
    ]  # three engines a node
    weights = ray.put(np.ones(8 * 2**20, np.uint8))
    answers = ray.get([actor.load_weights.remote(weights) for actor in readers])
    assert [total for _, total in answers] == [8 * 2**20] * 6
    assert sorted(node for node, _ in answers) == sorted(nodes * 3)
    locations = ray.experimental.get_object_locations([weights])[weights]["node_ids"]
    assert sorted(locations) == sorted(nodes)  # a copy for each node, not for each engine
    assert here in locations
    for actor in readers:
        ray.kill(actor)


def test_actors_that_reserve_nothing_cannot_be_placed_and_no_room_is_one_line(two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="cpus_per_actor"):
        asyncio.run(place("rollout", 2, "spread", num_cpus=0, num_gpus=0))
    monkeypatch.setattr("opd_governor.services.run.placement.RESERVE_TIMEOUT_S", 2.0)
    with pytest.raises(JobError, match=r"cluster\.placement_rollout: no room"):
        asyncio.run(place("rollout", 3, "strict_spread", num_cpus=1, num_gpus=0))
