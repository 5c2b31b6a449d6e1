"""Dashboards over a real run of the quickstart that a real Prometheus found by its announcement."""

import shutil
from pathlib import Path

import pytest

from tests.deploy.observed_run import Prometheus
from tests.deploy.test_grafana import unanswered
from tests.integration.test_run import SMALL
from tests.live_run import LiveRun

pytestmark = [pytest.mark.integration, pytest.mark.prometheus]
FLEET = frozenset({"fleet.json"})
"""A private local Ray has no dashboard process and so announces no metrics of its own."""


def test_every_query_about_runs_has_data_while_one_goes_and_its_target_goes_with_it(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: tests/install-packages.sh")
    (tmp_path / "prometheus").mkdir()
    server = Prometheus(tmp_path / "prometheus")
    live = LiveRun(
        tmp_path / "sums", *SMALL, "learner.total_steps=60", "data.unfinished_by_teacher=quota", f"service.file_sd_dir={server.targets}",
        "objective.reward={verifier: regex}", "rollout.samples_per_prompt=2",
        "teacher.model=../sums/pairs",  # with tokens of its own, which one panel is about
    )  # fmt: skip
    try:
        live.wait_for(lambda: server.value('opd_learner_steps_total{run="sums"}'))
        live.wait_for(lambda: unanswered(server, without=FLEET) == [], 120)
        assert server.query('{exported_run!=""}') == []
        assert live.finish() == 0
        assert list(server.targets.iterdir()) == []
        server.wait_for(lambda: server.query('up{run="sums"}') == [])
    finally:
        if live.process.poll() is None:
            live.process.kill()
        server.stop()
