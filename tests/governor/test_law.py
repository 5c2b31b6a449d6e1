"""The law: what holds for any input, and how it answers scenarios."""

import itertools
import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.governor.actuators import movable, value_of
from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.law import PATIENCE_STEPS, decide, start
from opd_governor.actors.governor.limits import propose, tightest
from opd_governor.actors.governor.policy import REMOVED, Policy
from opd_governor.actors.governor.signals import SIGNALS, Signals
from opd_governor.actors.governor.state import Decision, State
from tests.governor.readings import BASE, BLIND, HEALTHY, LOST_RUN, SHORT, TILTED, run, signals

NUMBERS = [f.name for f in fields(Signals) if f.name not in ("blind", "blind_reason", "observations", "faults")]

unit = st.floats(0, 1)
numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 300), unit, st.integers(0, 10**6))
loose = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(-5, 5), unit)
observed = st.builds(Observation, value=loose, num=loose, expected=loose, spread=loose, variance=st.one_of(st.none(), loose))
any_signals = st.builds(
    Signals,
    blind=st.booleans(),
    observations=st.dictionaries(st.sampled_from(["length", "tail", "truncation", "loops", "stop_mass", "short", "kl"]), observed),
    **dict.fromkeys(NUMBERS, numbers),
)
plausible = st.builds(
    signals,
    tail=unit,
    length=st.floats(-3, 3),
    loops=unit,
    kl=st.floats(-3, 2),
    cut=unit,
    num=st.integers(1, 4096),
    steps=st.integers(0, 5),
)
policies = st.builds(
    Policy,
    mode=st.sampled_from(["observe", "enforce"]),
    false_alarm_steps=st.floats(10, 1e6),
    max_golden_weight=st.floats(0, 10),
    min_lr_scale=st.floats(0.01, 1),
    max_stop_tilt_nats=st.floats(0, 20),
    min_loop_tail_weight=unit,
    min_admission_quota=unit,
    min_cap_tokens=st.integers(1, 64),
    initial_cap_tokens=st.one_of(st.none(), st.integers(64, 400)),
    max_rollbacks=st.integers(0, 2),
)
bases = st.sampled_from([BASE, TILTED])


def assert_not_looser(before: Decision, after: Decision) -> None:
    assert after.after.pressure >= before.after.pressure
    for name in movable():
        old, new = value_of(before.limits, name), value_of(after.limits, name)
        assert old is not None
        assert new is not None
        assert new == tightest(name, old, new), name


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers_in(inner)]
    if isinstance(value, list | tuple):
        return [n for inner in value for n in numbers_in(inner)]
    return [value] if isinstance(value, int | float) else []


@given(st.lists(any_signals, max_size=6), policies, bases)
@settings(deadline=None)
def test_whatever_the_signals_limits_stay_inside_the_bounds_and_every_recorded_number_is_finite(seen, policy, base):
    for decision in run(seen, policy, base):
        assert all(math.isfinite(number) for number in numbers_in(decision.to_json()))
        assert 0 <= decision.after.pressure <= 1
        for name in movable():
            resting, asked = value_of(base, name), value_of(decision.proposed, name)
            # A tilt that the job itself set is taken back from answers that are too short.
            resting_bounds = (0.0, resting) if name == "stop_tilt_nats" else (resting,)
            low, high = min(*resting_bounds, policy.bound(name), resting), max(*resting_bounds, policy.bound(name), resting)
            assert low - 1e-9 <= asked <= high + 1e-9, name
        if policy.mode == "observe":
            assert replace(decision.limits, generation=0) == base


@given(
    st.lists(plausible, max_size=5), st.lists(st.builds(replace, any_signals, blind=st.just(True)), min_size=1, max_size=5), policies, bases
)
@settings(deadline=None)
def test_a_blind_governor_never_loosens_anything(seen, unseen, policy, base):
    decisions = run([HEALTHY, *seen, *unseen], policy, base)
    for before, after in itertools.pairwise(decisions[len(seen) :]):
        assert_not_looser(before, after)


@given(st.lists(plausible, max_size=5), policies, st.floats(120.1, 1e9), bases)
@settings(deadline=None)
def test_data_older_than_the_limit_never_loosen_however_healthy_they_look(seen, policy, age_s, base):
    decisions = run([HEALTHY, *seen, *[replace(HEALTHY, data_age_s=age_s)] * 3], policy, base)
    for before, after in itertools.pairwise(decisions[-4:]):
        assert_not_looser(before, after)
    assert decisions[-1].after.pressure >= policy.blind_pressure


def test_a_fallback_after_short_answers_does_not_give_the_tilt_back_and_then_take_it_again():
    decisions = run([HEALTHY] * 5 + [SHORT] * 6 + [replace(BLIND, data_age_s=500.0)] * 2, Policy(), TILTED)
    assert decisions[-3].limits.stop_tilt_nats < 2
    assert_not_looser(decisions[-3], decisions[-2])


@given(st.lists(plausible, max_size=4), plausible, policies, st.sampled_from(["tail", "length"]))
@settings(deadline=None)
def test_a_required_signal_that_went_missing_never_releases(seen, last, policy, name):
    gone = replace(last, observations={n: each for n, each in last.observations.items() if n != name})
    before, after = run([HEALTHY, HEALTHY, *seen, gone], policy)[-2:]
    assert after.after.pressure >= before.after.pressure


@given(st.lists(plausible, max_size=4), plausible, policies, st.sampled_from(["tail", "length", "loops", "kl"]), st.floats(0, 3))
@settings(deadline=None)
def test_pressure_is_monotone_in_each_signal(seen, last, policy, name, more):
    state = run([*[replace(HEALTHY, num_rollouts=64)] * 5, *seen], policy)[-1].after
    was = last.observations[name]
    worse = replace(last, observations=last.observations | {name: replace(was, value=was.value + more)})
    assert decide(state, worse, policy, BASE, 9)[0].pressure >= decide(state, last, policy, BASE, 9)[0].pressure


@given(st.lists(st.one_of(plausible, any_signals), max_size=6), policies)
@settings(deadline=None)
def test_state_and_signals_survive_json_bit_for_bit_and_decide_the_same(seen, policy):
    for decision in run(seen, policy):
        assert State.from_json(json.loads(json.dumps(decision.after.to_json()))) == decision.after
        cleaned = Signals.from_json(json.loads(json.dumps(decision.signals.to_json())))
        assert decide(decision.before, cleaned, policy, BASE, decision.step)[2].after == decision.after


def test_a_state_that_another_version_wrote_goes_on():
    state = run([HEALTHY] * 5 + [LOST_RUN] * 2)[-1].after
    written = json.loads(json.dumps(state.to_json()))
    del written["settled"], written["limits"]["excess_weight"]
    read = State.from_json(written | {"releasing": True, "limits": written["limits"] | {"gone": 1.0}})
    assert read == replace(state, settled=False, limits=replace(state.limits, excess_weight=1.0))
    fewer = replace(read, tracks={name: replace(track, logs=track.logs[:1]) for name, track in read.tracks.items()})
    assert run([LOST_RUN], state=fewer)[-1].after.pressure >= state.pressure


def test_a_healthy_run_is_left_alone():
    decisions = run([HEALTHY] * 300)
    assert {d.after.pressure for d in decisions} == {0}
    assert all(d.healthy and replace(d.limits, generation=0) == BASE for d in decisions)


@pytest.mark.parametrize(("sick", "signal"), [(signals(tail=0.3), "tail"), (signals(length=0.8), "length"), (signals(loops=0.3), "loops")])
def test_inflation_is_met_within_three_steps_and_the_sentence_names_the_evidence(sick, signal):
    decisions = run([HEALTHY] * 20 + [sick] * 3)
    assert decisions[19].after.pressure == 0
    met = next(d for d in decisions[20:] if d.after.pressure_long > 0.05)
    assert met.signal == signal
    assert met.limits.golden_weight > BASE.golden_weight
    assert SIGNALS[signal].title in met.reason
    assert "a healthy run shows this once in" in met.reason


def test_kl_alone_brakes_and_calls_for_golden_answers_half_way_and_shortens_nothing():
    drifting = signals(kl=2.0)
    decisions = run([HEALTHY] * 20 + [drifting] * 25)
    last = decisions[-1]
    assert last.signal == "kl"
    assert last.limits.lr_scale == pytest.approx(0.55)
    assert last.limits.golden_weight == pytest.approx((BASE.golden_weight + Policy().max_golden_weight) / 2)
    rest = {"golden_weight": BASE.golden_weight, "unfinished_quota": BASE.unfinished_quota}
    assert replace(last.limits, lr_scale=1.0, generation=0, **rest) == BASE
    assert not any(d.after.pressure for d in decisions[:25]), "a jump may be new prompts; KL that stays up is not"


def test_short_answers_take_back_what_shortens():
    state = run([HEALTHY] * 20 + [SHORT] * 6, Policy(), TILTED)[-1]
    assert state.signal == "short"
    assert state.limits.stop_tilt_nats < 0.5
    assert state.limits.cap_tokens == 192
    assert state.limits.golden_weight > BASE.golden_weight


def test_signals_that_agree_count_more_than_one():
    alone = run([HEALTHY] * 20 + [signals(tail=0.12)] * 3)[-1].after.pressure
    both = run([HEALTHY] * 20 + [signals(tail=0.12, length=0.4)] * 3)[-1].after.pressure
    assert both > alone


def test_pressure_waits_for_a_healthy_stretch_and_longer_after_a_relapse():
    decisions = run([HEALTHY] * 20 + [LOST_RUN] * 3 + [HEALTHY] * 30 + [LOST_RUN] * 4 + [HEALTHY] * 60, Policy(actuators=("lr_scale",)))
    pressures = [d.after.pressure for d in decisions]
    top = pressures[22]
    assert pressures[22 + int(PATIENCE_STEPS)] == top
    assert pressures[52] < top
    assert decisions[58].after.patience_steps == 2 * PATIENCE_STEPS


def test_a_relapse_takes_back_what_was_released():
    policy = Policy(actuators=("lr_scale",))
    mild = [signals(tail=0.15)] * 6
    decisions = run([HEALTHY] * 20 + [LOST_RUN] * 3 + [HEALTHY] * 35 + mild + [HEALTHY] * 5, policy)
    pressures = [d.after.pressure for d in decisions]
    assert pressures[57] < 0.5 * pressures[22]
    assert pressures[-1] == pressures[22], "though the evidence alone asks for less"
    assert run([HEALTHY] * 20 + mild, policy)[-1].after.pressure < pressures[22]


@pytest.mark.parametrize("spanned", [1, 3, 7, 21])
def test_a_reading_that_spans_many_steps_releases_as_much_as_many_readings(spanned):
    state = replace(start(Policy(), BASE), pressure_long=1.0, limits=None)
    reading = replace(HEALTHY, steps_spanned=float(spanned), num_rollouts=32 * spanned)
    last = run([reading] * (21 // spanned), Policy(), BASE, state)[-1]
    assert last.after.pressure == pytest.approx(1.0 - 0.03 * (21 - PATIENCE_STEPS))


def test_a_change_known_beforehand_restarts_baselines_and_releases_nothing():
    policy = Policy()
    state = run([HEALTHY] * 20 + [signals(tail=0.3)] * 3, policy)[-1].after
    after, _, decision = decide(state, HEALTHY, policy, BASE, 99, news="settings changed (generation 2)")
    assert after.pressure == state.pressure
    assert decision.reason.startswith("settings changed (generation 2): baselines start again")
    assert decision.news == "settings changed (generation 2)"
    jumped = signals(kl=2.0)
    state = run([HEALTHY] * 20, policy)[-1].after
    told, *_ = decide(state, jumped, policy, BASE, 99, news="temperature changed")
    assert run([jumped] * 20, policy, BASE, told)[-1].after.pressure == 0


def test_observe_decides_but_commands_and_changes_nothing():
    decisions = run([HEALTHY] * 3 + [LOST_RUN] * 30, Policy(mode="observe"))
    assert {d.action for d in decisions} >= {"tighten", "rollback"}
    assert all(d.command is None and d.limits == BASE for d in decisions)
    assert decisions[-1].after.rollbacks == 0


def test_from_observe_to_enforce_the_limits_follow_in_without_a_jump():
    observed_state = run([HEALTHY] * 20 + [signals(tail=0.4)] * 4, Policy(mode="observe"))[-1].after
    assert observed_state.pressure == 1
    followed = run([signals(tail=0.4)] * 9, Policy(actuators=("lr_scale",)), BASE, observed_state)
    scales = [d.limits.lr_scale for d in followed]
    assert scales[0] >= 0.9
    assert all(0 <= a - b <= 0.1 for a, b in itertools.pairwise([1.0, *scales]))


def test_off_gives_the_jobs_own_settings():
    tight = run([LOST_RUN] * 4)[-1].after
    off, limits, decision = decide(tight, Signals(), Policy(mode="off"), BASE, 5)
    assert replace(limits, generation=0) == BASE
    assert decision.after.pressure == 0
    assert decide(off, HEALTHY, Policy(), BASE, 6)[1] == limits


def test_blindness_holds_then_falls_back_and_is_released_like_any_pressure():
    policy = Policy(blind_after_s=10, blind_pressure=0.6)
    decisions = run([HEALTHY] * 2 + [replace(BLIND, data_age_s=age) for age in (2.0, 9.0, 11.0, 20.0)] + [HEALTHY] * 60, policy)
    assert [d.action for d in decisions[2:6]] == ["hold", "hold", "fallback", "fallback"]
    assert [d.after.pressure for d in decisions[2:6]] == [0, 0, 0.6, 0.6]
    assert decisions[6 + int(PATIENCE_STEPS) - 1].after.pressure == 0.6
    assert decisions[-1].after.pressure == 0
    assert "blind, data 11 s old (down): conservative limits" in decisions[4].reason


def test_a_reference_that_grew_lifts_no_cap_under_pressure():
    pressed = run([HEALTHY] * 3 + [signals(tail=0.4)] * 5, Policy(actuators=("cap_tokens",)))[-1]
    assert pressed.limits.cap_tokens == 88
    grown = replace(signals(tail=0.4), reference_p99_tokens=160)
    assert run([grown] * 3, Policy(actuators=("cap_tokens",)), BASE, pressed.after)[-1].limits.cap_tokens == 88


@pytest.mark.parametrize("name", [name for name in movable() if name != "cap_tokens"])
def test_each_actuator_moves_alone(name):
    limits = propose(State(pressure_long=1.0, cap_tokens=192), Policy(actuators=(name,)), BASE)
    assert [other for other in movable() if value_of(limits, other) != value_of(BASE, other)] == [name]


def test_nothing_is_said_of_an_actuator_that_moves_nothing():
    base = replace(BASE, unfinished_quota=None)
    last = run([HEALTHY] * 3 + [LOST_RUN] * 4, Policy(), base)[-1]
    assert last.proposed.unfinished_quota is None
    assert "unfinished" not in " ".join(d.reason for d in run([LOST_RUN] * 4, Policy(), base))


def test_a_longer_cap_is_granted_only_after_a_healthy_stretch():
    caps = [d.limits.cap_tokens for d in run([HEALTHY] * 60, Policy(initial_cap_tokens=96))]
    assert caps[: int(PATIENCE_STEPS)] == [96] * int(PATIENCE_STEPS)
    assert caps == sorted(caps)
    assert all(after <= before * 1.05 + 1 for before, after in itertools.pairwise(caps))
    assert caps[-1] == 192


def test_a_person_raising_the_cap_is_followed_at_once_and_lowering_too():
    policy = Policy()
    state = run([HEALTHY] * 2, policy)[-1].after
    for cap, seen in ((256, HEALTHY), (128, HEALTHY), (100, BLIND)):
        state, limits, _ = decide(state, seen, policy, replace(BASE, cap_tokens=cap), 3)
        assert limits.cap_tokens == cap
    held, limits, _ = decide(state, BLIND, policy, BASE, 4)
    assert limits.cap_tokens == 100
    assert decide(held, HEALTHY, policy, BASE, 5)[1].cap_tokens == 192


def test_generation_rises_only_when_a_value_changes():
    decisions = run([HEALTHY] * 3 + [signals(tail=0.9)] * 3 + [BLIND])
    changes = [int(a.limits != replace(b.limits, generation=a.limits.generation)) for a, b in itertools.pairwise(decisions)]
    assert [d.limits.generation for d in decisions] == [0, *itertools.accumulate(changes)]


@pytest.mark.parametrize("key", REMOVED)
def test_a_key_of_an_earlier_version_names_what_took_its_place(key):
    with pytest.raises(ValueError, match=f"{key} is gone"):
        Policy.model_validate({key: 1})


def test_contradicting_bounds_are_refused_by_name():
    for values, words in (
        ({"initial_cap_tokens": 8}, "initial_cap_tokens 8 is below min_cap_tokens 16"),
        ({"actuators": ["lr_scale", "lr_scale"]}, "names one twice"),
        ({"actuators": ["lr_scal"]}, "did you mean lr_scale"),
        ({"bounds": {"lr_scale": 0.5}}, "set min_lr_scale instead"),
    ):
        with pytest.raises(ValueError, match=words):
            Policy.model_validate(values)
