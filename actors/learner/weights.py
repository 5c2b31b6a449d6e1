"""How much each token counts: masks, the reduction to one number, the stop tilt and the overlong penalty (pure numpy).

Shapes: T tokens of one response.
"""

from collections.abc import Sequence

import numpy as np

from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.trajectory import TokenScores, Trajectory


def token_mask(
    trajectory: Trajectory,
    settings: ObjectiveSettings,
    loop_tail_weight: float,
    stop_ids: Sequence[int] = (),
    excess_weight: float = 1.0,
) -> np.ndarray:
    """[T] how much each token counts: 1, or `loop_tail_weight` from one period after a loop's onset, or `excess_weight` beyond the
    teacher's longest answers to the same prompt; 0 beyond the horizon, and throughout where truncated rollouts are masked, and at a token
    that the engine forced. Neither the excess nor the horizon takes a stop."""
    mask_T = np.ones(len(trajectory.token_ids))
    if trajectory.truncated and settings.truncated == "mask":
        return np.zeros_like(mask_T)
    if trajectory.loop_onset is not None:
        mask_T[tail_start(trajectory) :] = loop_tail_weight
    if excess_weight < 1 and trajectory.prompt.longest_tokens is not None:
        inside_T = within_horizon(trajectory.token_ids, int(trajectory.prompt.longest_tokens), stop_ids)
        mask_T = np.minimum(mask_T, excess_weight + (1 - excess_weight) * inside_T)
    if trajectory.forced is not None:
        mask_T[trajectory.forced] = 0.0
    return mask_T * within_horizon(trajectory.token_ids, settings.horizon_tokens, stop_ids)


def tail_start(trajectory: Trajectory) -> int:
    """Index from which a loop's tokens are masked: one period after its onset. The response's length without a loop."""
    if trajectory.loop_onset is None:
        return len(trajectory.token_ids)
    return trajectory.loop_onset + (trajectory.loop_period or 0)


def within_horizon(token_ids: Sequence[int], horizon_tokens: int | None, stop_ids: Sequence[int]) -> np.ndarray:
    """[T] 1 for the first `horizon_tokens` tokens and for a stop id wherever it stands, else 0; all 1 without a horizon.

    Sources: arXiv 2605.27028, 2605.31490. Without the stop event a horizon shorter than the answers would leave stopping untaught.
    """
    if horizon_tokens is None:
        return np.ones(len(token_ids))
    kept_T = (np.arange(len(token_ids)) < horizon_tokens) | np.isin(np.asarray(token_ids, np.int64), list(stop_ids))
    return kept_T.astype(np.float64)


def position_weights(scores: TokenScores, trajectory: Trajectory, gamma: float) -> np.ndarray:
    """[T] 1 + gamma (1 - sum of |a_j| for j < t / sum of |a_j|), a_j the teacher's log-prob of token j less the engine's.

    Early tokens count up to 1 + gamma, those after most of the response's discrepancy about 1. A sampled stop late in the response
    keeps at least 1. Source: IW-OPD, arXiv 2606.22600.
    """
    gap_T = np.abs(scores.sampled_logp_T.astype(np.float64) - trajectory.logprobs_T)
    before_T = np.concatenate([[0.0], np.cumsum(gap_T)[:-1]]) if len(gap_T) else gap_T
    return 1 + gamma * (1 - before_T / max(float(gap_T.sum()), 1e-12))


def comparable(scores: TokenScores, settings: ObjectiveSettings) -> np.ndarray:
    """[T] 1 where the teacher has something to say on the token that the student can learn, else 0."""
    counts_T = np.ones(len(scores.sampled_logp_T))
    if scores.span_T is not None:
        counts_T[scores.span_T < 0] = 0.0
    if scores.copied_T is not None and settings.copied == "mask":
        counts_T[scores.copied_T] = 0.0
    return counts_T


def distillation_weight(trajectory: Trajectory, settings: ObjectiveSettings) -> float:
    """Factor on the teacher's signal: 0 on a rollout whose verdict keeps it from being distilled.

    It comes after the reduction: the fewer rollouts are distilled, the less the teacher moves the student.
    """
    if settings.reward is not None and not settings.reward.distils(trajectory.reward, trajectory.prompt.teacher_right):
        return 0.0
    return settings.distillation_weight


def token_weights(masks: Sequence[np.ndarray], reduction: str, normaliser_tokens: float) -> list[np.ndarray]:
    """Each token's weight in the loss of the whole batch, so that loss = sum of weight x token loss.

    `masks`: one [T] array in [0, 1] per sequence. token_mean: mean over all tokens, weighted by the mask; sequence_mean:
    mean over sequences (fully masked ones left out) of that mean; constant: sum / (number of sequences x normaliser).
    """
    sums = [float(mask_T.sum()) for mask_T in masks]
    match reduction:
        case "token_mean":
            divisors = [sum(sums)] * len(masks)
        case "sequence_mean":
            num_sequences = sum(total > 0 for total in sums)
            divisors = [total * num_sequences for total in sums]
        case "constant":
            divisors = [len(masks) * normaliser_tokens] * len(masks)
        case _:
            raise ValueError(f"reduction {reduction!r}: use token_mean, sequence_mean or constant")
    return [mask_T / divisor if divisor > 0 else np.zeros_like(mask_T) for mask_T, divisor in zip(masks, divisors, strict=True)]


def stop_tilt(num_tokens: int, strength_nats: float, target_tokens: float, width_tokens: float) -> np.ndarray:
    """[num_tokens] b(t) = strength x clip((t - target) / width, 0, 1), t the token's index in the response."""
    return strength_nats * np.clip((np.arange(num_tokens) - target_tokens) / width_tokens, 0, 1)


def overlong_penalty(length_tokens: int, cap_tokens: int, buffer_ratio: float) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476): 0 up to cap - buffer, linear to -1 at the cap, -1 beyond."""
    buffer_tokens = buffer_ratio * cap_tokens
    return -min(max((length_tokens - (cap_tokens - buffer_tokens)) / buffer_tokens, 0.0), 1.0)


def overlong_terms(
    trajectory: Trajectory, settings: ObjectiveSettings, weight_T: np.ndarray, whole_weight_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[T] the penalty in each token's advantage, nats, and [T] the weight of that penalty alone beside the token's own weight.

    `whole_weight_T`: the weights that the tokens would have if no loop were masked. A response that ends in a loop owes its length to
    the loop: only the loop's tokens carry the penalty, and they carry it whole even where their distillation is masked.
    """
    num_tokens, start = len(trajectory.token_ids), tail_start(trajectory)
    nats = settings.overlong_weight * overlong_penalty(num_tokens, trajectory.budget_tokens, settings.overlong_buffer_ratio)
    overlong_T, tail_weight_T = np.full(num_tokens, nats), np.zeros(num_tokens)
    if nats and start < num_tokens:
        overlong_T[:start] = 0.0
        tail_weight_T[start:] = np.maximum(whole_weight_T[start:] - weight_T[start:], 0.0)
    return overlong_T, tail_weight_T
