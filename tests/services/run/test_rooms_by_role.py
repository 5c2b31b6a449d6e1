"""Rooms without a placement group, and what a cluster's GPUs are taken to be; where actors really land: tests/integration/test_rooms.py."""

import asyncio
from typing import Any

import pytest
import ray

from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import ClusterSettings, JobError
from opd_governor.services.plan.hardware import Hardware
from opd_governor.services.run.rooms import cluster_hardware, take_rooms
from tests.services.control.fake_run import make_job

MODELS = Models("student", ("teacher",), (1,), 64, ())  # type: ignore[arg-type]


def pretend(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources} for resources in nodes])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": sum(node.get("GPU", 0) for node in nodes)})


def places(job: Any) -> dict[str, list[dict[str, Any]]]:
    async def ask() -> dict[str, list[dict[str, Any]]]:
        rooms = await take_rooms(job, MODELS, lambda text: None)
        assert rooms.plan is None
        return {"learner": await rooms.learner(), "rollout": await rooms.rollout(), "teacher": await rooms.teacher(job.teacher[0])}

    return asyncio.run(ask())


def test_without_gpus_each_role_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"CPU": 2})
    job = make_job(rollout={"num_actors": 2})
    assert {role: [options["num_gpus"] for options in each] for role, each in places(job).items()} == {
        "learner": [0.0], "rollout": [0.0, 0.0], "teacher": [0.0]
    }  # fmt: skip


def test_shares_that_a_person_gives_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"CPU": 2, "GPU": 4})
    found = places(make_job(cluster={"gpus_per_rollout": 0.5, "gpus_per_learner": 1}))
    assert [options["num_gpus"] for options in found["rollout"]] == [0.5]
    assert [options["num_gpus"] for options in found["teacher"]] == [1.0]


def test_gpus_are_those_of_the_nodes_or_those_that_are_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    pretend(monkeypatch, {"CPU": 2}, {"GPU": 4, "accelerator_type:H200": 1}, {"GPU": 8, "accelerator_type:H100": 1})
    assert cluster_hardware(ClusterSettings(), told.append) == Hardware((8, 4), 80.0)
    assert cluster_hardware(ClusterSettings(gpus="2x8x141"), told.append) == Hardware((8, 8), 141.0)
    assert told == []
    pretend(monkeypatch, {"GPU": 2})
    assert cluster_hardware(ClusterSettings(), told.append) == Hardware((2,), 80.0)
    assert told[0].startswith("GPU memory is not known to Ray: the plan assumes 80 GiB")
    pretend(monkeypatch, {"CPU": 2})
    assert cluster_hardware(ClusterSettings(), told.append) is None


@pytest.mark.parametrize("gpus", ["8", "eight", "8x"])
def test_a_promise_that_cannot_be_read_is_refused(gpus: str) -> None:
    with pytest.raises((ValueError, JobError)):
        ClusterSettings(gpus=gpus)
