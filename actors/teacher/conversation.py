"""Conversations before a teacher: it reads all of one in a single pass, and what is kept are its scores on sampled tokens (pure).

Shapes: T = sampled tokens, C = all tokens of the conversation, K = support size.
"""

from dataclasses import fields, replace

import numpy as np

from opd_governor.actors.teacher.scoring import PAD_ID
from opd_governor.actors.trajectory import TokenScores, Trajectory


def spread_support(trajectory: Trajectory) -> np.ndarray | None:
    """[C, K] the student's own top ids, nothing where the environment spoke; [T, K] as they are where it never did."""
    ids_TK, mask_C = trajectory.support_ids_TK, trajectory.mask_T
    if ids_TK is None or mask_C is None:
        return ids_TK
    ids_CK = np.full((len(mask_C), ids_TK.shape[1]), PAD_ID, ids_TK.dtype)
    ids_CK[mask_C] = ids_TK
    return ids_CK


def of_sampled(scores: TokenScores, mask_C: np.ndarray | None) -> TokenScores:
    """The scores of sampled tokens alone.

    A span (of a teacher with another tokenizer) that reaches into what the environment said can be compared with nothing.
    """
    if mask_C is None:
        return scores
    if scores.span_T is not None:
        shared = np.isin(scores.span_T, scores.span_T[~mask_C])
        scores = replace(scores, span_T=np.where(shared, -1, scores.span_T).astype(scores.span_T.dtype))
    arrays = {field.name: value for field in fields(scores) if isinstance(value := getattr(scores, field.name), np.ndarray)}
    return replace(scores, **{name: array[mask_C] for name, array in arrays.items()})
