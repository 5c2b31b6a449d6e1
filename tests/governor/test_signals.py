"""Signals from two readings: against counting by hand, and what a broken source does to them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.signals import Signals, compute
from opd_governor.actors.governor.snapshot import Snapshot

EDGES = [float(edge) for edge in range(1, 193)]
"""As dense as lengths themselves: shares and quantiles are exact."""


def snapshot(lengths: list[int], cap: int = 192, cut: int = 0, steps: int = 1, **more: float) -> Snapshot:
    """Metrics of a run that has produced these rollouts; those of the cap's length were truncated."""
    samples = [
        ("opd_rollouts_total", {"run": "a", "finish_reason": "stop"}, sum(n < cap for n in lengths)),
        ("opd_rollouts_total", {"run": "a", "finish_reason": "length"}, sum(n >= cap for n in lengths)),
        ("opd_rollout_tokens_total", {"run": "a"}, sum(lengths)),
        ("opd_rollout_length_tokens_count", {"run": "a"}, len(lengths)),
        ("opd_rollout_length_max_tokens", {"run": "a"}, max(lengths, default=0)),
        ("opd_learner_steps_total", {"run": "a"}, steps),
        ("opd_governor_cut_rollouts_total", {"run": "a"}, cut),
        *(("opd_rollout_length_tokens_bucket", {"run": "a", "le": str(e)}, sum(n <= e for n in lengths)) for e in [*EDGES, math.inf]),
        *((name, {"run": "a"}, value) for name, value in more.items()),
    ]
    return Snapshot.of([(name, labels, float(value)) for name, labels, value in samples])


@given(st.lists(st.integers(1, 192), max_size=40), st.lists(st.integers(1, 192), min_size=1, max_size=40))
def test_rates_and_lengths_are_those_of_the_rollouts_between_two_readings(earlier, new):
    signals = compute(snapshot(earlier), snapshot(earlier + new, steps=4))
    assert signals.num_rollouts == len(new)
    assert signals.steps_spanned == 3
    assert signals.length_mean_tokens == pytest.approx(sum(new) / len(new))
    assert signals.truncation_rate == pytest.approx(sum(n >= 192 for n in new) / len(new))
    assert signals.stop_density_per_token == pytest.approx((1 - signals.truncation_rate) / signals.length_mean_tokens)
    assert signals.length_max_tokens >= max(new) - 1
    assert abs(signals.length_p95_tokens - sorted(new)[math.ceil(0.95 * len(new)) - 1]) <= 1


def test_excesses_tails_and_what_was_expected_are_means_over_the_rollouts_that_have_a_reference():
    counters = {
        "opd_length_scored_total": 8.0,
        "opd_length_expected_nats_total": 28.0,
        "opd_kl_nats_total": 6.0,
        "opd_kl_tokens_total": 12.0,
        "opd_length_over_nats_total": 3.0,
        "opd_length_under_nats_total": 1.0,
        "opd_length_squares_total": 2.0,
        "opd_length_tail_total": 2.0,
        "opd_length_tail_expected_total": 0.4,
        "opd_length_reference_spread_nats": 0.5,
    }
    seen = compute(Snapshot(), snapshot([40] * 8, **counters)).observations
    assert seen["length"] == Observation(0.25, 8.0, spread=0.5, variance=0.25 - 0.0625)
    assert seen["short"] == seen["length"]
    assert seen["tail"] == Observation(0.25, 8.0, 0.05)
    assert seen["kl"] == Observation(math.log(0.5), 1.0, prompts=3.5)
    assert "truncation" not in seen


def test_without_a_reference_truncation_takes_the_place_of_the_tail():
    seen = compute(Snapshot(), snapshot([30] * 12 + [75] * 4, cap=75)).observations
    assert seen["truncation"] == Observation(0.25, 16.0)
    assert not {"length", "tail", "short"} & seen.keys()


def test_rollouts_cut_by_a_lowered_cap_are_no_truncation():
    signals = compute(Snapshot(), snapshot([30] * 12 + [75] * 4, cap=75, cut=4))
    assert signals.truncation_rate == 0
    assert signals.governor_cut_rate == 0.25


def test_a_counter_that_went_back_is_read_from_zero():
    signals = compute(snapshot([100] * 50, steps=9), snapshot([40] * 8, steps=1))
    assert (signals.num_rollouts, signals.length_mean_tokens, signals.steps_spanned) == (8, 40, 1)


def test_means_over_tokens_and_labels():
    now = Snapshot.of(
        [
            ("opd_rollouts_total", {"finish_reason": "stop"}, 4.0),
            ("opd_rollouts_total", {"finish_reason": "error"}, 9.0),
            ("opd_rollouts_total", {"finish_reason": "repetition"}, 1.0),
            ("opd_rollout_loops_total", {}, 2.0),
            ("opd_kl_nats_total", {"position": "0-15"}, 3.0),
            ("opd_kl_nats_total", {"position": "16-31"}, 5.0),
            ("opd_kl_tokens_total", {"position": "0-15"}, 10.0),
            ("opd_kl_tokens_total", {"position": "16-31"}, 10.0),
            ("opd_stop_mass_student_total", {}, 1.0),
            ("opd_stop_mass_teacher_total", {}, 2.0),
            ("opd_stop_mass_tokens_total", {}, 40.0),
            ("opd_sample_staleness_steps_sum", {}, 5.0),
            ("opd_sample_staleness_steps_count", {}, 10.0),
            ("opd_eval_accuracy_ratio", {"decoding": "sampled"}, 0.5),
            ("opd_eval_accuracy_ratio", {"decoding": "greedy"}, 0.7),
            *(("opd_stop_teacher_logprob_bucket", {"form": "class", "le": e}, n) for e, n in (("-1", 2.0), ("0", 4.0), ("+Inf", 4.0))),
        ]
    )
    signals = compute(Snapshot(), now)
    assert signals.num_rollouts == 5
    assert (signals.truncation_rate, signals.loop_rate) == (0.2, 0.4)
    assert signals.kl_nats == 0.4
    assert (signals.stop_mass_student, signals.stop_mass_teacher) == (0.025, 0.05)
    assert signals.staleness_steps == 0.5
    assert signals.eval_accuracy == 0.7
    assert signals.teacher_stop_logprob_nats == -1


def test_nothing_measured_is_none_and_never_zero():
    signals = compute(Snapshot(), Snapshot())
    measured = {name: value for name, value in signals.to_json().items() if name not in ("data_age_s", "blind", "blind_reason")}
    assert measured.pop("observations") == {}
    assert measured.pop("faults") == {}
    assert set(measured.values()) == {None}


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_a_number_that_is_none_never_gets_through(broken, data):
    healthy = snapshot([40] * 32)
    keys = data.draw(st.sets(st.sampled_from(sorted(healthy.series))))
    signals = compute(Snapshot(), Snapshot({k: broken if k in keys else v for k, v in healthy.series.items()}))
    assert all(value is None or math.isfinite(value) for value in signals.to_json().values() if not isinstance(value, str | dict))
    assert all(math.isfinite(each.value) for each in signals.cleaned().observations.values())


def test_signals_survive_json():
    signals = compute(Snapshot(), snapshot([40] * 32))
    assert Signals.from_json(signals.to_json()) == signals
