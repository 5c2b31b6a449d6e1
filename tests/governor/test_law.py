"""The law: what holds for any input, and how it answers scenarios."""

import itertools
import json
import math
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.limits import propose
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Signals
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits

BASE = LengthLimits(cap_tokens=192, golden_weight=0.1, reference_kl_weight=0.01, unfinished_quota=1.0)
HEALTHY = Signals(
    steps_spanned=1,
    num_rollouts=32,
    tail_share=0.0,
    length_mean_tokens=38,
    length_p95_tokens=50,
    length_max_tokens=52,
    reference_mean_tokens=40,
    reference_p99_tokens=60,
    truncation_rate=0.0,
    governor_cut_rate=0.0,
    loop_rate=0.0,
    kl_nats=0.4,
    stop_mass_student=0.025,
    stop_mass_teacher=0.025,
    stop_density_per_token=1 / 38,
)
BLIND = Signals(blind=True, blind_reason="down", data_age_s=1.0)
NUMBERS = [f.name for f in fields(Signals) if f.name not in ("blind", "blind_reason")]
LOOSER_WHEN_HIGHER = ("cap_tokens", "lr_scale", "loop_tail_weight", "admission_quota", "unfinished_quota")
LOOSER_WHEN_LOWER = ("golden_weight", "reference_kl_weight", "stop_tilt_nats")

unit = st.floats(0, 1)
numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 300), unit, st.integers(0, 10**6))
any_signals = st.builds(Signals, blind=st.booleans(), **dict.fromkeys(NUMBERS, numbers))
plausible = st.builds(
    replace,
    st.just(HEALTHY),
    tail_share=unit,
    truncation_rate=st.floats(0, 0.5),
    governor_cut_rate=st.floats(0, 0.5),
    loop_rate=unit,
    kl_nats=st.floats(-0.1, 5),
    length_mean_tokens=st.floats(1, 192),
    length_max_tokens=st.floats(1, 192),
    stop_mass_student=st.floats(0, 0.1),
    stop_density_per_token=st.floats(0, 1),
    steps_spanned=st.integers(0, 5),
    num_rollouts=st.integers(1, 500),
)
policies = st.builds(
    Policy,
    mode=st.sampled_from(["observe", "enforce"]),
    max_golden_weight=st.floats(0, 10),
    min_lr_scale=st.floats(0.01, 1),
    max_stop_tilt_nats=st.floats(0, 20),
    min_loop_tail_weight=unit,
    min_admission_quota=unit,
    min_cap_tokens=st.integers(1, 64),
    initial_cap_tokens=st.one_of(st.none(), st.integers(64, 400)),
    release_per_step=unit,
    healthy_steps=st.integers(0, 5),
    pressure_floor=st.floats(0, 0.9),
    proportional_gain=st.floats(0, 5),
    early_rollback=st.booleans(),
    max_rollbacks=st.integers(0, 2),
)


def run(signals: list[Signals], policy: Policy, base: LengthLimits = BASE, state: State | None = None) -> list[Decision]:
    state = state or start(policy, base)
    decisions = []
    for step, each in enumerate(signals):
        state, _, decision = decide(state, each, policy, base, step)
        decisions.append(decision)
    return decisions


def assert_not_looser(before: Decision, after: Decision) -> None:
    assert after.after.pressure >= before.after.pressure
    for name in LOOSER_WHEN_HIGHER:
        assert getattr(after.limits, name) <= getattr(before.limits, name), name
    if before.after.side == after.after.side == "long":
        for name in LOOSER_WHEN_LOWER:
            assert getattr(after.limits, name) >= getattr(before.limits, name), name


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers_in(inner)]
    if isinstance(value, list | tuple):
        return [n for inner in value for n in numbers_in(inner)]
    return [value] if isinstance(value, int | float) else []


@given(st.lists(any_signals, max_size=6), policies)
@settings(deadline=None)
def test_whatever_the_signals_limits_stay_inside_the_bounds_and_every_recorded_number_is_finite(signals, policy):
    for decision in run(signals, policy):
        limits, asked = decision.limits, decision.proposed
        assert all(math.isfinite(number) for number in numbers_in(decision.to_json()))
        assert policy.pressure_floor <= decision.after.pressure <= 1
        assert min(policy.min_cap_tokens, BASE.cap_tokens) <= asked.cap_tokens <= BASE.cap_tokens
        assert BASE.golden_weight <= asked.golden_weight <= max(BASE.golden_weight, policy.max_golden_weight)
        assert policy.min_lr_scale - 1e-12 <= asked.lr_scale <= 1
        assert 0 <= asked.reference_kl_weight <= max(BASE.reference_kl_weight, policy.max_reference_kl_weight)
        assert 0 <= asked.stop_tilt_nats <= policy.max_stop_tilt_nats
        assert policy.min_loop_tail_weight - 1e-12 <= asked.loop_tail_weight <= 1
        assert policy.min_admission_quota - 1e-12 <= asked.admission_quota <= 1
        assert policy.min_unfinished_quota <= asked.unfinished_quota <= 1
        if policy.mode == "observe":
            assert replace(limits, generation=0) == BASE


@given(
    st.lists(plausible, max_size=5),
    st.lists(st.builds(replace, any_signals, blind=st.just(True)), min_size=1, max_size=5),
    policies,
)
@settings(deadline=None)
def test_a_blind_governor_never_loosens_anything(seen, unseen, policy):
    decisions = run([HEALTHY, *seen, *unseen], policy)
    for before, after in zip(decisions[len(seen) :], decisions[len(seen) + 1 :], strict=False):
        assert_not_looser(before, after)


@given(st.lists(plausible, max_size=5), policies, st.floats(120.1, 1e9))
@settings(deadline=None)
def test_data_older_than_the_limit_never_loosen_however_healthy_they_look(seen, policy, age_s):
    decisions = run([HEALTHY, *seen, *[replace(HEALTHY, data_age_s=age_s)] * 3], policy)
    for before, after in zip(decisions[-4:], decisions[-3:], strict=False):
        assert_not_looser(before, after)
    assert decisions[-1].after.pressure >= policy.blind_pressure


@given(
    st.lists(plausible, max_size=4),
    plausible,
    policies,
    st.sampled_from(
        [
            "tail_share",
            "truncation_rate",
            "loop_rate",
            "kl_nats",
            "stop_mass_student",
            "stop_density_per_token",
            "length_mean_tokens",
            "length_max_tokens",
        ]
    ),
)
@settings(deadline=None)
def test_a_signal_that_went_missing_never_releases(seen, last, policy, name):
    decisions = run([HEALTHY, HEALTHY, *seen, replace(last, **{name: None})], policy)
    before, after = decisions[-2:]
    assert after.after.pressure >= before.after.pressure
    assert after.after.cap_tokens <= max(before.after.cap_tokens, math.ceil(policy.cap_floor_ratio * 60))


@given(
    st.lists(plausible, max_size=4),
    plausible,
    policies,
    st.sampled_from(["tail_share", "truncation_rate", "loop_rate", "kl_nats", "length_max_tokens"]),
    st.floats(0, 3),
)
@settings(deadline=None)
def test_pressure_is_monotone_in_each_error_of_inflation(seen, last, policy, name, more):
    state = run([HEALTHY, *seen], policy)[-1].after
    worse = replace(last, **{name: getattr(last, name) + more})
    assert decide(state, worse, policy, BASE, 9)[0].pressure >= decide(state, last, policy, BASE, 9)[0].pressure


@given(
    st.lists(plausible, max_size=4),
    plausible,
    policies,
    st.sampled_from(["stop_mass_student", "stop_density_per_token", "length_mean_tokens"]),
    unit,
)
@settings(deadline=None)
def test_pressure_is_monotone_where_low_is_bad(seen, last, policy, name, factor):
    state = run([HEALTHY, *seen], policy)[-1].after
    worse = replace(last, **{name: getattr(last, name) * factor})
    assert decide(state, worse, policy, BASE, 9)[0].pressure >= decide(state, last, policy, BASE, 9)[0].pressure


@given(st.lists(st.one_of(plausible, any_signals), max_size=6), policies)
@settings(deadline=None)
def test_state_survives_json_bit_for_bit(signals, policy):
    for decision in run(signals, policy):
        assert State.from_json(json.loads(json.dumps(decision.after.to_json()))) == decision.after


def test_the_law_of_the_trials_is_met_with_a_fast_attack():
    policy = Policy(window_rollouts=1e-6, proportional_gain=0, actuators=("golden_weight", "lr_scale"))
    decision = run([replace(HEALTHY, tail_share=0.12)], policy)[0]
    assert decision.after.pressure == pytest.approx(6 * (0.12 - 0.03))
    assert decision.limits.golden_weight == pytest.approx(0.1 + 0.54 * 0.9)
    assert decision.reason == "tail share 0.12 over 0.03: pressure 0.00 -> 0.54; golden weight 0.1 -> 0.586, learning rate x 1 -> 0.514"


def test_inflation_takes_pressure_to_the_top_within_three_steps():
    decisions = run([HEALTHY] * 5 + [replace(HEALTHY, tail_share=0.3)] * 3, Policy())
    assert decisions[4].after.pressure == 0
    assert decisions[5].action == "tighten"
    assert decisions[7].after.pressure == 1


def test_release_waits_for_a_healthy_stretch_and_is_slow():
    decisions = run([replace(HEALTHY, tail_share=0.3)] * 3 + [HEALTHY] * 100, Policy())
    peak = decisions[2].after.pressure
    while_waiting = [d.after.pressure for d in decisions[3:22]]
    assert min(while_waiting) >= peak
    first = next(i for i, d in enumerate(decisions) if d.action == "release")
    assert first >= 22
    assert decisions[first + 10].after.pressure == pytest.approx(max(while_waiting) - 11 * 0.02)
    assert decisions[-1].after.pressure == 0


def test_one_odd_answer_in_a_small_batch_is_no_trend():
    odd = replace(HEALTHY, num_rollouts=8, tail_share=1 / 8, length_max_tokens=100)
    assert all(d.after.pressure == 0 for d in run([HEALTHY, odd, HEALTHY, HEALTHY], Policy()))


def falling_kl(steps: int) -> list[Signals]:
    """From half a nat to hundredths, as a student that learns."""
    return [replace(HEALTHY, kl_nats=0.5 * 0.9**step + 0.01) for step in range(steps)]


def test_a_teacher_that_changed_is_noticed_in_kl_within_three_steps_though_kl_was_higher_before():
    decisions = run(falling_kl(60) + [replace(HEALTHY, kl_nats=0.12)] * 3, Policy())
    assert decisions[59].after.pressure == 0
    assert decisions[62].signal == "kl"
    assert decisions[62].after.pressure > 0.5


def test_kl_of_a_single_noisy_step_is_no_alarm():
    spike = replace(HEALTHY, kl_nats=0.12)
    assert all(d.after.pressure == 0 for d in run([*falling_kl(60), spike, *falling_kl(60)[50:]], Policy()))


def test_answers_of_one_or_two_tokens_raise_pressure_without_shortening_anything():
    tiny = replace(HEALTHY, length_mean_tokens=1.5, length_max_tokens=2, stop_density_per_token=0.66)
    base = replace(BASE, stop_tilt_nats=1.0)
    decision = run([HEALTHY] * 3 + [tiny] * 3, Policy(), base)[-1]
    assert decision.signal == "short"
    assert decision.after.side == "short"
    assert decision.after.pressure > 0.9
    assert decision.limits.cap_tokens == base.cap_tokens
    assert decision.limits.golden_weight > 0.9
    assert decision.limits.stop_tilt_nats == 0
    assert decision.limits.admission_quota == decision.limits.loop_tail_weight == 1


def test_answers_that_are_too_short_are_not_shortened_when_kl_cries_louder():
    terse = replace(HEALTHY, length_mean_tokens=8.0, length_max_tokens=12, kl_nats=10.0)
    decision = run([HEALTHY] * 3 + [terse] * 3, Policy(), replace(BASE, stop_tilt_nats=16.0))[-1]
    assert decision.signal == "kl"
    assert decision.after.side == "short"
    assert decision.limits.stop_tilt_nats == 0


def test_answers_on_their_way_to_too_short_are_met_when_kl_cries_alone():
    shrinking = replace(HEALTHY, length_mean_tokens=24.0, length_max_tokens=45, kl_nats=10.0)
    decision = run([HEALTHY] * 3 + [shrinking] * 2, Policy(), replace(BASE, stop_tilt_nats=16.0))[-1]
    assert decision.readings["short"].error < 0, "not yet too short"
    assert decision.after.side == "short"
    assert decision.limits.stop_tilt_nats == 0


def test_kl_alone_keeps_the_side_that_lengths_had_shown():
    terse = replace(HEALTHY, length_mean_tokens=1.5, length_max_tokens=2)
    strange = replace(HEALTHY, kl_nats=10.0)
    decisions = run([HEALTHY] * 3 + [terse] * 3 + [strange] * 2, Policy())
    assert decisions[-1].signal == "kl"
    assert decisions[-1].after.side == "short"


def test_the_cap_never_goes_below_the_reference_however_high_the_pressure():
    decision = run([replace(HEALTHY, tail_share=1.0, truncation_rate=0.2)] * 6, Policy(actuators=("cap_tokens",)))[-1]
    assert decision.after.pressure == 1
    assert decision.limits.cap_tokens == 90  # 1.5 x the reference p99
    assert replace(decision.limits, cap_tokens=192, generation=0) == BASE


def test_each_actuator_moves_alone():
    for name in (
        "golden_weight",
        "lr_scale",
        "reference_kl_weight",
        "stop_tilt_nats",
        "loop_tail_weight",
        "unfinished_quota",
        "admission_quota",
    ):
        policy = Policy(actuators=(name,))
        limits = propose(State(pressure=1.0, cap_tokens=192), policy, BASE)
        assert {key for key, value in asdict(limits).items() if value != getattr(BASE, key)} == {name}


def test_a_longer_cap_is_granted_only_after_a_healthy_stretch():
    policy = Policy(initial_cap_tokens=96, healthy_steps=10)
    decisions = run([HEALTHY] * 60, policy)
    caps = [d.limits.cap_tokens for d in decisions]
    assert caps[:10] == [96] * 10
    assert caps == sorted(caps)
    assert all(after <= before * 1.05 + 1 for before, after in itertools.pairwise(caps))
    assert caps[-1] == 192


def test_a_person_raising_the_cap_is_followed_at_once_and_lowering_too():
    policy = Policy()
    state = run([HEALTHY] * 2, policy)[-1].after
    for cap, signals in ((256, HEALTHY), (128, HEALTHY), (100, BLIND)):
        state, limits, _ = decide(state, signals, policy, replace(BASE, cap_tokens=cap), 3)
        assert limits.cap_tokens == cap
    held, limits, _ = decide(state, BLIND, policy, BASE, 4)
    assert limits.cap_tokens == 100
    assert decide(held, HEALTHY, policy, BASE, 5)[1].cap_tokens == 192


def test_generation_rises_only_when_a_value_changes():
    decisions = run([HEALTHY] * 3 + [replace(HEALTHY, tail_share=0.12)] * 2 + [BLIND], Policy())
    assert [d.limits.generation for d in decisions] == [0, 0, 0, 1, 2, 2]


def test_confirmed_inflation_rolls_back_after_the_other_actuators_had_their_time_and_stops_in_the_end():
    policy = Policy(max_rollbacks=2, rollback_patience_steps=5, rollback_cooldown_steps=4)
    lost = replace(HEALTHY, tail_share=0.9, truncation_rate=0.8, loop_rate=0.5)
    decisions = run([HEALTHY] * 3 + [lost] * 60, policy)
    commands = [d.command for d in decisions if d.command]
    assert commands[:3] == ["rollback", "rollback", "stop"]
    first = next(i for i, d in enumerate(decisions) if d.command)
    assert 5 <= first - 3 <= 10
    assert decisions[first].reason.endswith("roll back to the last healthy checkpoint")
    assert decisions[first].after.pressure == 1


def test_early_rollback_needs_no_truncation():
    policy = Policy(early_rollback=True)
    leading = replace(HEALTHY, tail_share=0.4)
    commands = [d.command for d in run([HEALTHY] * 3 + [leading] * 4, policy)]
    assert "rollback" in commands[3:6]
    assert not any(d.command for d in run([HEALTHY] * 3 + [leading] * 30, Policy()))


def test_without_the_rollback_actuator_nothing_is_rolled_back_or_stopped():
    policy = Policy(actuators=("golden_weight",), early_rollback=True, max_rollbacks=0)
    lost = replace(HEALTHY, tail_share=0.9, truncation_rate=0.8)
    assert not any(d.command for d in run([lost] * 40, policy))


def test_observe_decides_but_commands_and_changes_nothing():
    lost = replace(HEALTHY, tail_share=0.9, truncation_rate=0.8)
    decisions = run([HEALTHY] * 3 + [lost] * 30, Policy(mode="observe"))
    assert {d.action for d in decisions} >= {"tighten", "rollback"}
    assert all(d.command is None for d in decisions)
    assert all(d.limits == BASE for d in decisions)
    assert decisions[-1].after.rollbacks == 0


def test_off_gives_the_jobs_own_settings():
    tight = run([replace(HEALTHY, tail_share=0.5)] * 4, Policy())[-1].after
    off, limits, decision = decide(tight, Signals(), Policy(mode="off"), BASE, 5)
    assert replace(limits, generation=0) == BASE
    assert limits.generation == tight.limits.generation + 1
    assert decision.after.pressure == 0
    assert decide(off, HEALTHY, Policy(), BASE, 6)[1] == limits


def test_blindness_holds_then_falls_back_and_is_released_like_any_pressure():
    policy = Policy(blind_after_s=10, blind_pressure=0.6)
    decisions = run([HEALTHY] * 2 + [replace(BLIND, data_age_s=age) for age in (2.0, 9.0, 11.0, 20.0)] + [HEALTHY] * 60, policy)
    assert [d.action for d in decisions[2:6]] == ["hold", "hold", "fallback", "fallback"]
    assert [d.after.pressure for d in decisions[2:6]] == [0, 0, 0.6, 0.6]
    assert decisions[6 + 19].after.pressure == 0.6
    assert decisions[-1].after.pressure == 0
    assert "blind, data 11 s old (down): conservative limits" in decisions[4].reason


def test_data_that_span_more_steps_press_more():
    late = replace(HEALTHY, tail_share=0.06, num_rollouts=128, steps_spanned=4)
    policy = Policy(proportional_gain=0)
    assert run([late], policy)[0].after.pressure == pytest.approx(4 * run([replace(late, steps_spanned=1)], policy)[0].after.pressure)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_step_change_is_met_within_ten_steps_and_without_oscillation(delay):
    """A plant as in the trials: a tail that feeds on itself, held back by golden weight and learning-rate brake."""
    policy = Policy()
    state, tail, growth = start(policy, BASE), 0.005, 0.0
    tails, pressures, measured = [], [], [0.0] * delay
    for step in range(260):
        if step == 60:
            growth = 0.45  # the teacher is replaced by one that loops more
        limits = state.limits
        rate = limits.lr_scale * growth - 0.6 * (limits.golden_weight - 0.1) - 0.05
        tail = min(1.0, max(0.005, tail * math.exp(rate)))
        measured.append(tail)
        share = measured[-1 - delay]
        state, _, _ = decide(state, replace(HEALTHY, tail_share=share, length_max_tokens=55 + 60 * share), policy, BASE, step)
        tails.append(tail)
        pressures.append(state.pressure)
    over = [step for step, share in enumerate(tails) if share > 0.05]
    first = [step for step in over if step < over[0] + 30]
    assert max(tails) < 0.2
    assert first[-1] - first[0] < 10
    # Pressure tries once how low it can go, and comes to rest above where that failed.
    ways = [b - a for a, b in itertools.pairwise(pressures) if a != b]
    assert sum(a * b < 0 for a, b in itertools.pairwise(ways)) <= 3
    assert max(tails[160:]) < 0.05
    assert 0.3 < pressures[-1] < 0.6


def test_contradicting_bounds_are_refused_by_name():
    for values, words in (
        ({"cap_floor_ratio": 1.1}, "cap_floor_ratio 1.1 is below tail_multiple 1.25"),
        ({"initial_cap_tokens": 8}, "initial_cap_tokens 8 is below min_cap_tokens 16"),
        ({"pressure_floor": 0.97}, "pressure_floor 0.97 reaches rollback_pressure"),
        ({"stages": {"lr_scale": [0.5, 0.5]}}, "a stage starts below"),
        ({"actuators": ["lr_scale", "lr_scale"]}, "names one twice"),
    ):
        with pytest.raises(ValueError, match=words):
            Policy.model_validate(values)
