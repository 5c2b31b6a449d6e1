"""The benchmarks still run: their smallest form, for the harness and not for figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = (("driver_cost.py", "--smoke", "--only", "curve", "long"), ("gpu.py", "--smoke"))


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda command: command[0])
def test_the_smallest_form_of_a_benchmark_runs_and_writes_nothing(command: tuple[str, ...]) -> None:
    before = {path: path.stat().st_mtime_ns for path in HERE.iterdir()}
    run = subprocess.run(
        [sys.executable, HERE / command[0], *command[1:]], env=os.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout
    assert {path: path.stat().st_mtime_ns for path in HERE.iterdir() if path.suffix in (".json", ".png")}.items() <= before.items()
