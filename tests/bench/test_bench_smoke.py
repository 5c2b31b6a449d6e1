"""The benchmarks run in their smallest form. This tests their code, not their figures."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opd_governor.services.job.load import load_job
from opd_governor.services.record.rundir import RunDirectory

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_small(*command: object) -> str:
    before = {path: path.stat().st_mtime_ns for path in HERE.iterdir() if path.is_file()}
    words = [sys.executable, *map(str, command)]
    run = subprocess.run(words, env=os.environ, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in HERE.iterdir() if path.is_file()} == before, "a small run keeps nothing"
    return run.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("driver_cost.py", "--only", "curve", "long"),
        pytest.param(("driver_cost.py", "--only", "ray"), marks=pytest.mark.integration),
        ("gpu.py",),
    ],
    ids=lambda command: " ".join(command),
)
def test_the_smallest_form_of_a_benchmark_runs_and_writes_nothing(command: tuple[str, ...]) -> None:
    assert run_small(HERE / command[0], "--smoke", *command[1:])


def test_the_roofline_has_a_row_for_each_phase_of_a_run(tmp_path: Path) -> None:
    RunDirectory(tmp_path, resume=False).write_job(load_job(ROOT / "deploy/jobs/sums.yaml"))
    shutil.copy(HERE / "quickstart/metrics.jsonl", tmp_path / "metrics.jsonl")
    page = run_small(HERE / "roofline.py", "--smoke", tmp_path)
    for phase in ("rollout", "score", "learn"):
        assert f"| {phase} (float32) |" in page
