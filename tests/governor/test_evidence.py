"""The tests: their e-values hold at the edge of health, whatever the batch; what is seen late is still seen."""

import math

import numpy as np
import pytest

from opd_governor.actors.governor.evidence import MeanTest, Observation, ShareTest, Track, pressure_of, threshold_nats

FALSE_ALARM_STEPS = 200.0


def first_alarm(test: ShareTest | MeanTest, draw, steps: int) -> int:
    """Step of the first evidence over log(FALSE_ALARM_STEPS); `steps` where there is none."""
    track = Track()
    for step in range(steps):
        seen = draw(step)
        track = test.update(track, seen, 1.0, 100.0)
        if track.evidence >= math.log(FALSE_ALARM_STEPS):
            return step
    return steps


@pytest.mark.parametrize("num", [4, 32, 256, 4096])
@pytest.mark.parametrize("correlation", [0.0, 0.01])
def test_a_share_at_the_edge_of_health_alarms_no_more_often_than_was_promised(num, correlation):
    rng, test = np.random.default_rng(0), ShareTest(slack=0.05)

    def draw(_):
        share = 0.05 if not correlation else rng.beta(0.05 * (1 / correlation - 1), 0.95 * (1 / correlation - 1))
        return Observation(rng.binomial(num, share) / num, num)

    waits = [first_alarm(test, draw, 400) for _ in range(40)]
    # Censored at 400 steps: the mean of what is seen is a lower bound of the run length.
    assert np.mean(waits) >= FALSE_ALARM_STEPS


@pytest.mark.parametrize("num", [4, 32, 1024])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_a_mean_at_the_edge_of_health_alarms_no_more_often_than_was_promised(num, tails):
    rng, test = np.random.default_rng(1), MeanTest(sign=1.0, slack_spreads=0.12)

    def draw(_):
        values = rng.normal(0, 0.8, num) if tails == "normal" else np.clip(0.8 * rng.standard_t(3, num) / math.sqrt(3), -3.2, 3.2)
        return Observation(0.12 * 0.8 + values.mean(), num, spread=0.8, variance=float(values.var()))

    assert np.mean([first_alarm(test, draw, 400) for _ in range(40)]) >= FALSE_ALARM_STEPS


@pytest.mark.parametrize(("num", "within"), [(8, 12), (32, 5), (1024, 4)])
def test_twice_as_long_is_seen_in_a_few_steps(num, within):
    rng, test = np.random.default_rng(2), MeanTest(sign=1.0, slack_spreads=0.12)

    def draw(step):
        return Observation(math.log(2) * (step >= 10) + rng.normal(0, 0.5 / math.sqrt(num)), num, spread=0.5, variance=0.25)

    assert 10 <= first_alarm(test, draw, 100) <= 10 + within


def test_evidence_of_health_takes_evidence_back_and_never_goes_below_nothing():
    test, track = ShareTest(slack=0.02), Track()
    for share in (0.5, 0.5, *[0.0] * 60):
        track = test.update(track, Observation(share, 32.0), 1.0, 15.0)
        assert 0 <= track.evidence <= 15
    assert track.evidence == 0


def test_a_running_level_follows_a_slow_drift_and_shows_a_jump():
    test = MeanTest(sign=1.0, slack=math.log(2.5), half_life_steps=25.0, floor=0.15, alternatives=(0.3, 1.0))
    drift = first_alarm(test, lambda step: Observation(math.log(6) * min(1.0, step / 150), 1.0), 300)
    jump = first_alarm(test, lambda step: Observation(2.0 * (step >= 50), 1.0), 300)
    assert drift == 300
    assert 50 <= jump <= 54


@pytest.mark.parametrize(
    ("prompts", "steps"), [([3.0] * 5, 2), ([3.1] * 5, 2), ([3.4] * 8, 6), ([3.4, 3.1] * 4, 6), ([2.6] * 8, 6), ([None] * 8, 6)]
)
def test_a_jump_under_the_same_prompts_is_believed_at_once_one_under_other_prompts_once_it_stays(prompts, steps):
    test = MeanTest(sign=1.0, slack=math.log(2.5), half_life_steps=50.0, floor=0.15, alternatives=(0.3, 1.0), max_step_nats=6.0)
    track = Track()
    for _ in range(20):
        track = test.update(track, Observation(-3.0, 1.0, prompts=3.0), 1.0, 15.0)
    reached = []
    for each in prompts:
        track = test.update(track, Observation(-1.0, 1.0, prompts=each), 1.0, 15.0)
        reached.append(track.evidence)
    assert next(n for n, nats in enumerate(reached, 1) if nats > 10.5) == pytest.approx(steps, abs=1)


def test_one_knob_for_all_signals_together():
    assert threshold_nats(5000, 7) == pytest.approx(math.log(35_000))
    assert pressure_of(10.0, 10.0) == 0
    assert pressure_of(12.5, 10.0) == pytest.approx(0.5)
    assert pressure_of(15.0, 10.0) == 1


def test_where_nearly_every_rollout_of_a_healthy_run_is_cut_more_of_them_prove_nothing() -> None:
    """A cap that begins far below the teacher's lengths cuts nearly all rollouts, and a healthy run's no fewer than a sick one's."""
    test, track = ShareTest(slack=0.02), Track()
    for _ in range(1000):
        track = test.update(track, Observation(value=0.99, num=256, expected=0.98), 1.0, 100.0)
    assert track.evidence == 0.0
