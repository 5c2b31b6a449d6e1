"""What one request may do: limits in force, settings and prompt -> vLLM SamplingParams.

vLLM is imported inside the functions that need it: it costs seconds, and refuse_if_too_long is asked before anything starts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd_governor.actors.rollout.settings import LoopStop, RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

STOP_RAMP = "stop_ramp"
"""extra_args key of logits.StopRamp: (strength_nats, target_tokens, width_tokens)."""
NO_REPEAT_NGRAM = "no_repeat_ngram"
"""extra_args key of logits.NoRepeatNgram: n."""
THINKING_BUDGET = "thinking_budget"
"""extra_args key of logits.ThinkingBudget: (id that begins thinking, id that ends it, most tokens)."""


def sampling_params(
    prompt: Prompt,
    limits: LengthLimits,
    settings: RolloutSettings,
    *,
    stop_ids: Sequence[int],
    context_tokens: int,
    seed: int,
    reference_tokens: float | None,
    top_k_logprobs: int = 0,
) -> "SamplingParams":
    """One sampled rollout.

    It ends on any of `stop_ids` and on no other id: the model's own eos counts only where it is listed. Log-probs come for the
    sampled token and the `top_k_logprobs` likeliest. The stop ramp starts at its own target or, without one, at
    `reference_tokens`; while neither is known there is no ramp.
    """
    from vllm import SamplingParams

    max_tokens = budget_tokens(prompt, limits, context_tokens)
    return SamplingParams(
        **_stops(stop_ids, max_tokens, settings),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        min_tokens=min(settings.min_tokens, max_tokens),
        seed=seed,
        logprobs=top_k_logprobs,
        extra_args=_processor_args(settings, reference_tokens) or None,
    )


def greedy_params(
    prompt: Prompt, limits: LengthLimits, settings: RolloutSettings, *, stop_ids: Sequence[int], context_tokens: int
) -> "SamplingParams":
    """The student's likeliest answer, for evaluation: same budgets and stops, and nothing else that reshapes its distribution."""
    from vllm import SamplingParams

    stops = _stops(stop_ids, budget_tokens(prompt, limits, context_tokens), settings)
    return SamplingParams(**stops, temperature=0.0, logprobs=0, extra_args=_thinking_args(settings) or None)


def budget_tokens(prompt: Prompt, limits: LengthLimits, context_tokens: int) -> int:
    """Most new tokens for this prompt: the cap, or less where the context window leaves less.

    A teacher that sees more than the student needs room for the answer behind its own, longer view.
    """
    view_tokens = max(len(prompt.token_ids), len(prompt.teacher_token_ids or ()))
    cap_tokens = limits.cap_tokens if prompt.most_tokens is None else min(limits.cap_tokens, prompt.most_tokens)
    return max(1, min(cap_tokens, context_tokens - view_tokens))


def refuse_if_too_long(prompt_tokens: int, context_tokens: int, min_new_tokens: int) -> str | None:
    """The problem in words when a prompt leaves too little room for an answer, else None.

    >>> refuse_if_too_long(prompt_tokens=250, context_tokens=256, min_new_tokens=16)
    'the prompt is 250 tokens and leaves 6 of the 256-token context window, fewer than rollout.min_new_tokens = 16'
    """
    left_tokens = max(0, context_tokens - prompt_tokens)
    if left_tokens >= min_new_tokens:
        return None
    return (
        f"the prompt is {prompt_tokens} tokens and leaves {left_tokens} of the {context_tokens}-token context window, "
        f"fewer than rollout.min_new_tokens = {min_new_tokens}"
    )


def _stops(stop_ids: Sequence[int], max_tokens: int, settings: RolloutSettings) -> dict[str, Any]:
    from vllm.sampling_params import RequestOutputKind

    return {
        "max_tokens": max_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,  # else vLLM adds the model's own eos to the stop ids
        "repetition_detection": _repetition_detection(settings.loop_stop) if settings.loop_stop.enabled else None,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "flat_logprobs": True,  # no object for each of K log-probs of each token: 2 ms of a quickstart batch, not 13
    }


def _repetition_detection(loop_stop: LoopStop) -> "RepetitionDetectionParams":
    """vLLM knows no least length, but a region of period p has every multiple of p as a period too: a least pattern of
    min_tokens / min_repeats tokens leaves shorter regions alone, and a multiple of every shorter period lies below twice that."""
    from vllm.sampling_params import RepetitionDetectionParams

    min_pattern = -(-loop_stop.min_tokens // loop_stop.min_repeats)
    return RepetitionDetectionParams(
        max_pattern_size=max(loop_stop.max_period_tokens, 2 * min_pattern),
        min_pattern_size=min_pattern,
        min_count=loop_stop.min_repeats,
    )


def _thinking_args(settings: RolloutSettings) -> dict[str, Any]:
    if settings.thinking_ids is None or settings.thinking_budget_tokens is None:
        return {}
    return {THINKING_BUDGET: (*settings.thinking_ids, settings.thinking_budget_tokens)}


def _processor_args(settings: RolloutSettings, reference_tokens: float | None) -> dict[str, Any]:
    arguments = _thinking_args(settings)
    ramp = settings.stop_ramp
    target_tokens = ramp.target_tokens or reference_tokens
    if ramp.strength_nats > 0 and target_tokens is not None:
        arguments[STOP_RAMP] = (ramp.strength_nats, target_tokens, ramp.width_tokens)
    if settings.no_repeat_ngram > 0:
        arguments[NO_REPEAT_NGRAM] = settings.no_repeat_ngram
    return arguments
