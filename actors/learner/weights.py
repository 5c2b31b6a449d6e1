"""How much each token counts: masks, the reduction to one number, the stop tilt and the overlong penalty (pure numpy).

Shapes: T tokens of one response.
"""

from collections.abc import Sequence

import numpy as np

from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.trajectory import TokenScores, Trajectory


def token_mask(trajectory: Trajectory, settings: ObjectiveSettings, loop_tail_weight: float) -> np.ndarray:
    """[T] how much each token counts: 1, or `loop_tail_weight` from one period after a loop's onset; 0 throughout where masked."""
    mask_T = np.ones(len(trajectory.token_ids))
    if trajectory.truncated and settings.truncated == "mask":
        return np.zeros_like(mask_T)
    if trajectory.loop_onset is not None:
        mask_T[trajectory.loop_onset + (trajectory.loop_period or 0) :] = loop_tail_weight
    return mask_T


def comparable(scores: TokenScores) -> np.ndarray:
    """[T] 1 where the teacher has something to compare the token with, else 0."""
    counts_T = np.ones(len(scores.sampled_logp_T))
    if scores.span_T is not None:
        counts_T[scores.span_T < 0] = 0.0
    return counts_T


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
