"""A run loses the node with its rollout and teacher actors. Another node joins, as when a cluster replaces it."""

import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.harness import FLOOR_S, ChaosRun, Kill, check
from tests.integration.ray_head import ray_head, ray_worker

pytestmark = pytest.mark.chaos

STEPS = 40
ON_WORKER = ("rollout", "teacher")


def test_a_run_that_loses_a_node_goes_on_once_its_actors_find_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        f"learner.total_steps={STEPS}",
        "checkpoint.every_steps=10",
        "data.eval.path=null",
        "data.golden.num_prompts=32",
        "cluster.pin_roles=true",
        f"cluster.deadline_floor_s={FLOOR_S}",
    ]
    started = time.monotonic()
    with ray_head(auth=False, roles=("learner",)) as head, ray_worker(head, ON_WORKER) as lost:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        live = ChaosRun(tmp_path / "sums", *settings, f"cluster.address={head.gcs_address}")
        try:
            with live.client() as client:
                live.wait_for(lambda: live.step(client) >= 3)
                node = psutil.Process(lost.pid).children(recursive=True)
                live.processes |= {process.pid: process.create_time() for process in node}  # looked for at the end
                next(process for process in node if process.name() == "raylet").kill()
                step, killed = live.step(client), time.monotonic()
                with ray_worker(head, ON_WORKER):
                    live.wait_for(lambda: live.step(client) > step + 2)
                    recovered_s = round(time.monotonic() - killed, 1)
                    exit_code = live.finish()
                    kills = [Kill(role, "SIGKILL", step, "raylet", recovered_s) for role in ON_WORKER]
                    outcome = check(live, kills, exit_code, settings, 0, STEPS, 1, time.monotonic() - started)
        finally:
            if live.process.poll() is None:
                live.process.kill()
    # A replacement placed on the dead node before Ray notices never comes up, and one that does not come up is no restart.
    assert outcome.problems == [], (outcome, live.log.read_text()[-3000:])
