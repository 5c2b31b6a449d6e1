"""The Prometheus that a real run's governor reads is killed in the middle of the run and comes back later."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from opd_governor.services.record.rundir import Record, read_records
from tests.governor.metrics_server import Prometheus
from tests.integration.ray_head import free_ports
from tests.live_run import LiveRun

pytestmark = [pytest.mark.chaos, pytest.mark.prometheus]

SETTINGS = (
    "learner.total_steps=100000",  # it is stopped once the governor has loosened again, however fast this machine takes its steps
    "data.eval.path=null",
    "data.golden.num_prompts=32",
    "governor.blind_after_s=5",
    # Whatever the governor sees here is healthy, so that it loosens step by step: the cap grows.
    "governor.false_alarm_steps=1e9",
    "governor.initial_cap_tokens=90",
)
TIGHTER = {
    "cap_tokens": min, "golden_weight": max, "lr_scale": min, "reference_kl_weight": max, "stop_tilt_nats": max, "loop_tail_weight": min,
    "admission_quota": min, "unfinished_quota": min,
}  # fmt: skip
"""Which of two values of a limit is the tighter one."""


def test_a_governor_whose_prometheus_is_killed_loosens_nothing_until_it_is_back_and_the_run_ends_well(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: tests/install-packages.sh")
    (port,) = free_ports(1)
    server = Prometheus(tmp_path, port)
    live = LiveRun(tmp_path / "sums", *SETTINGS, f"service.port={port}", f"service.prometheus_url={server.url}")

    def decided(condition: Any) -> list[Record]:
        path = live.out / "decisions.jsonl"
        return [decision for decision in (read_records(path) if path.exists() else []) if condition(decision)]

    try:
        live.wait_for(lambda: decided(lambda d: d["limits"]["cap_tokens"] > 100))
        server.process.kill()
        server.process.wait()
        (fallen, *_) = live.wait_for(lambda: decided(lambda d: d["action"] == "fallback"))
        server.start()
        live.wait_for(lambda: decided(lambda d: d["step"] > fallen["step"] and not d["signals"]["blind"]))
        live.wait_for(lambda: decided(lambda d: d["limits"]["cap_tokens"] > fallen["limits"]["cap_tokens"]))
        with live.client() as client:
            client.post("/v1/run/stop").raise_for_status()
        assert live.finish() == 0
        assert live.left_over() == []
    finally:
        if live.process.poll() is None:
            live.process.kill()
        server.stop()

    decisions = read_records(live.out / "decisions.jsonl")
    steps = list(range(1, len(decisions) + 1))
    assert [decision["step"] for decision in decisions] == steps
    assert [record["step"] for record in read_records(live.out / "metrics.jsonl")] == steps
    pairs = list(itertools.pairwise(decisions))
    blind = [(before, after) for before, after in pairs if after["signals"]["blind"]]
    assert {after["action"] for _, after in blind} == {"hold", "fallback"}
    for before, after in blind:
        assert after["pressure"] >= before["pressure"]
        for name, tighter in TIGHTER.items():
            values = before["limits"][name], after["limits"][name]
            if name == "unfinished_quota":  # nothing to move here: prompts are not chosen by it
                assert values == (None, None)
                continue
            assert tighter(values) == values[1], (after["step"], name, values)
    grown = [after["step"] for before, after in pairs if after["limits"]["cap_tokens"] > before["limits"]["cap_tokens"]]
    assert grown[0] < fallen["step"] < grown[-1], "it loosened before and after, so it would have in between"
