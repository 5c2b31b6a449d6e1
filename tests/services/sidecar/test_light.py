"""What the light distribution holds pulls neither ray nor vllm nor torch, and the client pulls nothing."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIGHT = tomllib.loads((ROOT / "deploy/client/pyproject.toml").read_text())
HEAVY = {"ray", "vllm", "torch", "transformers", "datasets", "matplotlib"}


def loaded(*modules: str) -> set[str]:
    program = f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_commands_and_the_service_load_nothing_heavy() -> None:
    modules = ["opd_governor.services.cli.others"]
    modules += [f"opd_governor.services.sidecar.{name}" for name in ("diagnosing", "serving", "proxy", "scrape", "governing", "golden")]
    found = loaded(*modules)
    assert not found & HEAVY
    packages = set(LIGHT["tool"]["setuptools"]["packages"])
    for name in found:
        if name.startswith("opd_governor.") and name != "opd_governor.client":
            assert name in packages or name.rpartition(".")[0] in packages, f"{name} is not in the light distribution"


def test_the_command_line_loads_nothing_heavy_until_a_command_needs_it() -> None:
    assert not loaded("opd_governor.services.cli.app") & HEAVY


def test_the_client_is_one_file_of_the_standard_library() -> None:
    ours = {name for name in loaded("opd_governor.client") if name.partition(".")[0] == "opd_governor"}
    assert ours == {"opd_governor", "opd_governor.client"}
    others = {name.partition(".")[0] for name in loaded("opd_governor.client") - loaded("json")} - set(sys.stdlib_module_names)
    assert others == {"opd_governor"}
