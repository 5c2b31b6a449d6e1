"""Both sources over a real registry: a Prometheus server, and the run's own /metrics."""

import dataclasses
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import compute
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.governor.sources import OwnMetrics, PrometheusServer, SourceDownError
from opd_governor.actors.trajectory import LengthLimits
from tests.governor.metrics_server import Prometheus, Run, wait_until

BASE = LengthLimits(cap_tokens=192, golden_weight=0.1)
HEALTHY = [38] * 31 + [52]
INFLATED = [38] * 20 + [192] * 12


@pytest.fixture
def a_run() -> Iterator[Run]:
    run = Run("sums")
    yield run
    run.close()


@pytest.fixture
def server(tmp_path: Path, a_run: Run) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("needs Prometheus: apt-get install --no-install-recommends prometheus")
    prometheus = Prometheus(tmp_path, a_run.port)
    yield prometheus
    prometheus.stop()


def scraped_all_of(server: PrometheusServer, own: OwnMetrics) -> bool:
    try:
        return server.read().series == own.read().series
    except SourceDownError:
        return False


def test_own_metrics_drive_the_governor_from_the_first_step(a_run):
    governor = Governor(OwnMetrics(a_run.url, run="sums"), Policy(), BASE)
    a_run.step(HEALTHY)
    assert governor.tick(1)[0].healthy
    for step in (2, 3, 4):
        a_run.step(INFLATED)
        decision, _ = governor.tick(step)
    assert decision.signal in ("tail", "loops")
    assert decision.limits.golden_weight > 0.5
    assert decision.signals.truncation_rate == decision.signals.loop_rate == 12 / 32


def test_metrics_of_another_run_are_not_its_own(a_run):
    with pytest.raises(SourceDownError, match="no metrics of run other"):
        OwnMetrics(a_run.url, run="other").read()


def test_a_closed_port_is_blindness_and_no_failure(a_run):
    governor = Governor(OwnMetrics(a_run.url.replace("/metrics", "/").replace(str(a_run.port), "1"), run="sums"), Policy(), BASE)
    decision, _ = governor.tick(1)
    assert decision.signals.blind
    assert decision.action == "hold"
    assert decision.limits == BASE


@pytest.mark.prometheus
def test_both_sources_give_the_same_numbers(a_run, server):
    own, scraped = OwnMetrics(a_run.url, "sums"), PrometheusServer(server.url, "sums")
    before: list[Snapshot] = []
    for lengths in (HEALTHY, INFLATED):
        a_run.step(lengths)
        wait_until(lambda: scraped_all_of(scraped, own))
        own_now, scraped_now = own.read(), scraped.read()
        own_before, scraped_before = before or (Snapshot(), Snapshot())
        signals = compute(own_before, own_now)
        assert signals == compute(scraped_before, scraped_now)
        assert signals.num_rollouts == 32
        unmeasured = {name for name, value in dataclasses.asdict(signals).items() if value is None}
        assert unmeasured == {"time_s", "eval_truncation"}
        assert time.time() - 5 < scraped_now.taken_s <= time.time()
        before = [own_now, scraped_now]


@pytest.mark.prometheus
def test_a_governor_whose_prometheus_stops_holds_falls_back_and_comes_back_without_loosening(a_run, server):
    own, source = OwnMetrics(a_run.url, "sums"), PrometheusServer(server.url, "sums")
    policy = Policy(blind_after_s=4.0, blind_pressure=1.0)
    governor = Governor(source, policy, BASE)

    def tick(lengths: list[int], scraped: bool = True):
        a_run.step(lengths)
        if scraped:
            wait_until(lambda: scraped_all_of(source, own))
        return governor.tick(1)[0]

    tick(HEALTHY)
    while not (pressed := tick([38] * 28 + [100] * 4)).after.pressure:
        assert governor.limits() == BASE
    assert pressed.after.pressure < 1
    server.stop()
    held = tick(HEALTHY, scraped=False)
    assert held.signals.blind
    assert held.limits == pressed.limits
    wait_until(lambda: governor.tick(2)[0].action == "fallback")
    fallen, _ = governor.tick(3)
    assert fallen.signals.data_age_s > 4
    assert fallen.after.pressure == policy.blind_pressure
    assert fallen.limits.lr_scale < pressed.limits.lr_scale
    server.start()
    back = tick(HEALTHY)
    assert not back.signals.blind
    assert back.signals.num_rollouts == 64
    assert back.signals.data_age_s < 4
    assert back.after.pressure == fallen.after.pressure  # two healthy steps are no stretch yet
    assert back.limits.cap_tokens == fallen.limits.cap_tokens < 192


@pytest.mark.prometheus
def test_a_server_that_lost_sight_of_the_run_is_blindness_too(a_run, server):
    source = PrometheusServer(server.url, "sums")
    a_run.step(HEALTHY)
    wait_until(lambda: scraped_all_of(source, OwnMetrics(a_run.url, "sums")))
    governor = Governor(source, Policy(), BASE)
    assert governor.tick(1)[0].healthy
    a_run.close()
    wait_until(lambda: governor.tick(2)[0].signals.blind)
    a_run.serve()
    actions = []
    for _ in range(3):
        a_run.step(INFLATED)
        wait_until(lambda: scraped_all_of(source, OwnMetrics(a_run.url, "sums")))
        actions.append(governor.tick(3)[0].action)
    assert "tighten" in actions
    assert governor.state()["law"]["pressure_long"] == 1.0


def test_sources_travel_to_another_process():
    for source in (OwnMetrics("http://127.0.0.1:1/metrics", "sums", token="secret"), PrometheusServer("http://127.0.0.1:1", "sums")):
        with pytest.raises(SourceDownError):
            pickle.loads(pickle.dumps(source)).read()
