"""The GPU stack, held without a GPU: what pip would install there, and every call into vLLM at both ends of the allowed range.

It reads a package registry: 340 MB a version the first time (kept under .cache), some seconds of metadata after that.
"""

import json
import os
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from gpu_wheels import ROOT, VERSIONS, source
from packaging.requirements import Requirement

pytestmark = pytest.mark.integration

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = ROOT / "requirements/gpu.txt"


def resolve(*requirements: str, constrained: bool) -> dict[str, str]:
    """Name -> version of everything that pip would install, on a machine that has nothing and knows one index."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"} | {"PIP_CONFIG_FILE": os.devnull}
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--only-binary",
        ":all:",
        "--report",
        "-",
    ]
    if constrained:
        command += ["-c", str(CONSTRAINTS)]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"], *requirements]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {package["metadata"]["name"].lower(): package["metadata"]["version"] for package in json.loads(done.stdout)["install"]}


def test_the_range_of_vllm_is_the_one_that_is_checked_here() -> None:
    (gpu,) = (Requirement(line) for line in PROJECT["optional-dependencies"]["gpu"])
    assert gpu.name == "vllm"
    assert all(gpu.specifier.contains(version) for version in VERSIONS)
    assert not gpu.specifier.contains("0.31.9")
    assert not gpu.specifier.contains("0.34.0")


def test_the_gpu_extra_resolves_to_the_newest_vllm_that_is_checked_here() -> None:
    resolved = resolve(constrained=False)
    assert resolved["vllm"] == VERSIONS[-1], "a newer one is allowed: add it to gpu_wheels.VERSIONS"
    assert "+cpu" not in resolved["torch"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_constraints_of_the_image_resolve(version: str) -> None:
    resolved = resolve(f"vllm=={version}", constrained=True)
    assert resolved["vllm"] == version
    assert "nvidia-nccl-cu13" in resolved


def test_every_call_into_vllm_binds_at_both_ends_and_fills_the_same_parameters() -> None:
    found = [calls(version) for version in VERSIONS]
    assert found[0].keys() == found[1].keys()
    different = {name: (found[0][name], found[1][name]) for name in found[0] if found[0][name] != found[1][name]}
    assert different == {}


def calls(version: str) -> dict[str, Any]:
    """What vllm_calls.py prints with this version's source before the installed vLLM."""
    folder = source(version)
    path = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, str(ROOT / "tests/deploy/vllm_calls.py")]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, where, printed = done.stdout.splitlines()
    assert where.startswith(str(folder)), where
    return dict(json.loads(printed))
