"""The code of the speed benchmarks, not their figures."""

import pytest

from tests.bench.speed import bench, guard
from tests.bench.speed.scaling import exponent


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power: float) -> None:
    assert exponent([64, 128, 256], [3 * number**power for number in (64, 128, 256)]) == pytest.approx(power)


def test_the_guard_tells_what_every_round_finds_worse_from_a_disturbed_one() -> None:
    slow, fast = {"step, s": 1.3, "start-up, s": 9.0}, {"step, s": 1.0, "start-up, s": 10.0, "CPU of driver, s a step": 0.1}
    disturbed = fast | {"step, s": 1.4}
    assert guard.worse(guard.ratios([(slow, fast), (slow, fast)])) == ["step, s"]
    assert guard.worse(guard.ratios([(slow, fast), (slow, disturbed)])) == []


@pytest.mark.integration
@pytest.mark.alone
def test_a_pair_is_measured_alone_and_in_a_run_and_pads_less_than_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PAIRS, "sums", ("deploy/jobs/sums.yaml", 6, 1))
    found = bench.measure("sums", None)
    assert found["steps"] == 6 - bench.WARM_UP_STEPS
    assert set(found["alone"]["seconds"]) == {"rollout", "score", "learn", "sync"}
    assert 0 < found["efficiency"] < 1.5
    assert found["start_up_s"] > 0
    for role in ("learner", "teacher"):
        assert 0 <= found["alone"][f"{role}_padding_ratio"] < 0.1


@pytest.mark.integration
@pytest.mark.alone
def test_the_guard_runs_both_sides() -> None:
    found = guard.compare(guard.ROOT, rounds=1, steps=6)
    assert {"step, s", "token, ms", "start-up, s"} <= set(found)
    assert all(0.1 < ratio < 10 for (ratio,) in found.values())
