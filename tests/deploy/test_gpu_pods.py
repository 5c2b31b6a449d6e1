"""The Kubernetes object for whole nodes of eight GPUs: what it asks for, and that its job fits what it brings."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_governor.services.inputs.fit import check_dry
from opd_governor.services.job.load import load_job
from opd_governor.services.plan.hardware import parse_gpus
from opd_governor.services.plan.layout import plan
from opd_governor.services.plan.memory import GIB

ROOT = Path(__file__).parents[2]
RAYJOB: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kuberay/rayjob-8-gpu-pods.yaml").read_text())
(GROUP,) = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
POD: dict[str, Any] = GROUP["template"]["spec"]
(CONTAINER,) = POD["containers"]
LIMITS: dict[str, str] = CONTAINER["resources"]["limits"]


def gib(text: str) -> int:
    assert text.endswith("Gi")
    return int(text.removesuffix("Gi"))


def test_a_pod_is_a_whole_node_with_shared_memory_and_rdma() -> None:
    assert LIMITS["nvidia.com/gpu"] == GROUP["rayStartParams"]["num-gpus"] == "8"
    assert {"IPC_LOCK"} <= set(CONTAINER["securityContext"]["capabilities"]["add"])
    assert any(name.startswith("rdma/") for name in LIMITS)
    assert {name: LIMITS[name] for name in LIMITS} == {name: CONTAINER["resources"]["requests"][name] for name in LIMITS}
    shm = next(volume["emptyDir"] for volume in POD["volumes"] if volume["name"] == "shm")
    assert shm["medium"] == "Memory"
    assert 64 <= gib(shm["sizeLimit"]) < gib(LIMITS["memory"])
    assert {"name": "shm", "mountPath": "/dev/shm"} in CONTAINER["volumeMounts"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_its_job_fits_the_gpus_that_it_promises_and_the_host_memory_of_a_pod() -> None:
    words = RAYJOB["spec"]["entrypoint"].split()
    sets = tuple(word for before, word in itertools.pairwise(words) if before == "--set")
    promised = next(word.removeprefix("cluster.gpus=") for word in sets if word.startswith("cluster.gpus="))
    hardware = parse_gpus(promised)
    assert hardware.nodes == (8,) * GROUP["replicas"]
    job = load_job(ROOT / words[2].removeprefix("/app/"), sets)
    assert {check.status for check in check_dry(job, hardware)} == {"pass"}
    needs = {need.role: need.host_bytes / GIB for need in plan(job, hardware).needs}
    assert 8 * max(needs.values()) < gib(LIMITS["memory"])


@pytest.mark.parametrize(("name", "gpus"), [("qwen3-1-gpu", "1x80"), ("qwen3-8-gpus", "8x80"), ("qwen3-32-gpus", "32x80")])
def test_the_example_jobs_pass_the_check_on_what_they_are_named_for(name: str, gpus: str) -> None:
    found = check_dry(load_job(ROOT / f"deploy/jobs/{name}.yaml", ()), parse_gpus(gpus))
    assert {check.status for check in found} == {"pass"}
