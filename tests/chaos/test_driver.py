"""The driver of a submitted run is killed on a real cluster: the run goes on by itself."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from services.rundir import read_records
from tests.integration.ray_head import ray_head
from tests.integration.test_submitted_runs import facts, home, make_job_file, said, wait_for, wait_for_steps  # noqa: F401

pytestmark = pytest.mark.chaos


def driver_of(out: Path) -> int | None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(out) in words and "run" in words:
            return process.pid
    return None


def test_a_submitted_run_whose_driver_is_killed_goes_on_by_itself(home: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "runs/one"
    with ray_head(auth=False) as head:
        said(head.opd("submit", make_job_file(home, "one", 400), "--set", "checkpoint.every_steps=10", "--out", out))
        wait_for_steps(head, "one", 12)
        killed = driver_of(out)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: driver_of(out) not in (None, killed), "another driver")
        ended = wait_for(lambda: (now := facts(head, "one"))["ended_s"] and now, "the end")
        assert (ended["status"], ended["exit_code"]) == ("SUCCEEDED", 0), head.opd("logs", "one").stdout[-3000:]
    records = read_records(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 401))
    for epoch in range(records[-1]["prompts"][-1][0]):
        used = [index for record in records for at, index in record["prompts"] if at == epoch]
        assert sorted(used) == list(range(32)), json.dumps(used)
