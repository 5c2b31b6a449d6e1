"""The driver of a submitted run is killed on a real cluster. The run continues by itself."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from opd_governor.services.record.rundir import read_records
from tests.integration.ray_head import ray_head
from tests.integration.test_submitted_runs import home, make_job_file, said, wait_for, wait_for_steps  # noqa: F401

pytestmark = pytest.mark.chaos

STEPS = 120


def driver_of(out: Path) -> int | None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(out) in words and "run" in words:
            return process.pid
    return None


def test_a_submitted_run_whose_driver_is_killed_goes_on_by_itself(home: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "runs/one"
    with ray_head(auth=False) as head:
        said(head.opd("submit", make_job_file(home, "one", STEPS), "--set", "checkpoint.every_steps=10", "--out", out))
        wait_for_steps(head, "one", out, 12)
        killed = driver_of(out)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: driver_of(out) not in (None, killed), "another driver")

        def over() -> dict[str, Any] | None:
            asked = head.opd("status", "one", "--json")  # fails while the address of the dead driver is the last one known
            now = json.loads(asked.stdout) if asked.returncode == 0 else {}
            return now if now.get("ended_s") else None

        ended = wait_for(over, "the end", 300)
        assert (ended["status"], ended["exit_code"]) == ("SUCCEEDED", 0), head.opd("logs", "one").stdout[-3000:]
    records = read_records(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for epoch in range(records[-1]["prompts"][-1][0]):
        used = [index for record in records for at, index in record["prompts"] if at == epoch]
        assert sorted(used) == list(range(32)), json.dumps(used)
