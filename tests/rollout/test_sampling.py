"""Budgets, stops and shaping of one request, as vLLM is asked for them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.rollout.sampling import budget_tokens, greedy_params, refuse_if_too_long, sampling_params
from opd_governor.actors.rollout.settings import LoopStop, RolloutSettings, StopRamp
from opd_governor.actors.trajectory import LengthLimits, Prompt


def params_for(settings: RolloutSettings, *, prompt_tokens: int = 10, cap_tokens: int = 100, **changes: Any) -> Any:
    given = {"stop_ids": (1, 3), "context_tokens": 256, "seed": 7, "reference_tokens": 40.0} | changes
    return sampling_params(Prompt(0, tuple(range(prompt_tokens))), LengthLimits(cap_tokens), settings, **given)


@given(prompt_tokens=st.integers(0, 300), cap_tokens=st.integers(1, 300), context_tokens=st.integers(1, 300))
def test_the_budget_is_the_cap_or_what_the_window_leaves_and_at_least_one_token(
    prompt_tokens: int, cap_tokens: int, context_tokens: int
) -> None:
    budget = budget_tokens(Prompt(0, (5,) * prompt_tokens), LengthLimits(cap_tokens), context_tokens)
    assert 1 <= budget <= cap_tokens
    if prompt_tokens < context_tokens:
        assert prompt_tokens + budget <= context_tokens
        assert budget == cap_tokens or prompt_tokens + budget == context_tokens


@given(prompt_tokens=st.integers(0, 300), context_tokens=st.integers(1, 300), min_new_tokens=st.integers(1, 50))
def test_a_prompt_is_refused_exactly_when_it_leaves_too_little(prompt_tokens: int, context_tokens: int, min_new_tokens: int) -> None:
    problem = refuse_if_too_long(prompt_tokens, context_tokens, min_new_tokens)
    assert (problem is None) == (context_tokens - prompt_tokens >= min_new_tokens)
    assert problem is None or all(str(value) in problem for value in (prompt_tokens, context_tokens, min_new_tokens))


def test_every_setting_reaches_the_engine() -> None:
    settings = RolloutSettings(
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.02,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        min_tokens=5,
        no_repeat_ngram=3,
        stop_ramp=StopRamp(strength_nats=2.0, target_tokens=30, width_tokens=16),
    )
    params = params_for(settings, top_k_logprobs=16)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 20, 0.02)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, -0.3)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (100, 5, 7, 16)
    assert params.stop_token_ids == [1, 3]
    assert params.ignore_eos
    assert not params.detokenize
    assert params.extra_args == {"stop_ramp": (2.0, 30, 16), "no_repeat_ngram": 3}


def test_plain_settings_ask_for_the_sampled_log_prob_and_no_shaping() -> None:
    params = params_for(RolloutSettings())
    assert params.logprobs == 0
    assert params.extra_args is None
    assert params.repetition_detection is None


def test_min_tokens_gives_way_to_the_budget() -> None:
    assert params_for(RolloutSettings(min_tokens=50), cap_tokens=20).min_tokens == 20


def test_the_ramp_starts_at_the_reference_length_unless_told() -> None:
    settings = RolloutSettings(stop_ramp=StopRamp(strength_nats=2.0))
    assert params_for(settings, reference_tokens=38.5).extra_args == {"stop_ramp": (2.0, 38.5, 32)}
    assert params_for(settings, reference_tokens=None).extra_args is None


@pytest.mark.parametrize("period", range(1, 20))
@pytest.mark.parametrize("max_period_tokens", [4, 16, 64])
def test_the_loop_stop_leaves_short_regions_alone_and_ends_every_loop(period: int, max_period_tokens: int) -> None:
    from vllm.v1.core.sched.utils import check_sequence_repetition

    loop_stop = LoopStop(enabled=True, max_period_tokens=max_period_tokens, min_repeats=4, min_tokens=32)
    detection = params_for(RolloutSettings(loop_stop=loop_stop)).repetition_detection
    unit = list(range(100, 100 + period))
    ended_at = next((n for n in range(1, 300) if check_sequence_repetition((unit * 300)[:n], detection)), None)
    if period <= max(max_period_tokens, 16):
        assert ended_at is not None
        assert 32 <= ended_at < max(2 * 32, 4 * period + 1)
    else:
        assert ended_at is None


def test_greedy_answers_have_the_same_budget_and_stops_and_no_shaping() -> None:
    shaped = RolloutSettings(
        temperature=1.3, top_p=0.5, repetition_penalty=1.5, min_tokens=9, no_repeat_ngram=2, stop_ramp=StopRamp(strength_nats=5.0)
    )
    greedy = greedy_params(Prompt(0, (5,) * 200), LengthLimits(100), shaped, stop_ids=(1, 3), context_tokens=256)
    assert (greedy.temperature, greedy.max_tokens, greedy.min_tokens) == (0.0, 56, 0)
    assert (greedy.top_p, greedy.repetition_penalty, greedy.extra_args) == (1.0, 1.0, None)
    assert greedy.stop_token_ids == [1, 3]


def test_a_teacher_that_sees_more_needs_room_for_the_answer_too() -> None:
    prompt = Prompt(0, (5,) * 10, teacher_token_ids=(5,) * 40)
    assert budget_tokens(prompt, LengthLimits(100), 128) == 88
    assert budget_tokens(prompt, LengthLimits(50), 128) == 50
