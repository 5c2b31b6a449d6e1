"""Scores of one response by several teachers: which are usable, and what they come to together."""

from collections.abc import Sequence

import numpy as np

from opd_governor.actors.trajectory import TokenScores


def odd_ones(scores: Sequence[TokenScores | None]) -> frozenset[int]:
    """Places of the scores that are not finite."""
    arrived = [(place, score) for place, score in enumerate(scores) if score is not None]
    rows = [score for _, score in arrived if score.support_ids_TK is None]
    plain = [array_T for score in rows for array_T in (score.sampled_logp_T, score.stop_logp_T)]
    # One look at all of them is most often enough.
    if len(rows) == len(arrived) and plain and np.isfinite(np.concatenate(plain)).all():
        return frozenset()
    return frozenset(place for place, score in arrived if not is_finite(score))


def is_finite(scores: TokenScores) -> bool:
    """Whether every value can enter a loss; padded support entries (id -1) are -inf by definition."""
    if (hidden_TH := scores.hidden_TH) is not None:
        exponent = np.uint16(0x7F80)  # of bfloat16: all its bits are set in infinities and NaN
        return bool((hidden_TH & exponent != exponent).all() if hidden_TH.dtype == np.uint16 else np.isfinite(hidden_TH).all())
    if not (np.isfinite(scores.sampled_logp_T).all() and np.isfinite(scores.stop_logp_T).all()):
        return False
    if scores.support_ids_TK is None or scores.support_logp_TK is None:
        return True
    return bool(np.isfinite(scores.support_logp_TK[scores.support_ids_TK >= 0]).all())


def blend_scores(scores: Sequence[TokenScores], weights: Sequence[float]) -> TokenScores:
    """The log-probs of the mixture sum_i w_i p_i, weights normalised; supports must stand on the same ids.

    An id that one teacher's vocabulary lacks (-1) has probability 0 there. What one teacher cannot compare, none does.
    """
    if len(scores) == 1:
        return scores[0]
    log_weights = np.log(np.asarray(weights, np.float32) / sum(weights))

    def mix(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.logaddexp.reduce([weight + array for weight, array in zip(log_weights, arrays, strict=True)]).astype(np.float32)

    supports = [(s.support_ids_TK, s.support_logp_TK) for s in scores if s.support_ids_TK is not None and s.support_logp_TK is not None]
    assert len(supports) in (0, len(scores)), "some teachers returned a support, others none"
    ids_TK = np.maximum.reduce([ids for ids, _ in supports]) if supports else None
    assert all(((ids == ids_TK) | (ids < 0)).all() for ids, _ in supports), "supports on different ids"
    return TokenScores(
        teacher="+".join(s.teacher for s in scores),
        sampled_logp_T=mix([s.sampled_logp_T for s in scores]),
        stop_logp_T=mix([s.stop_logp_T for s in scores]),
        support_ids_TK=ids_TK,
        support_logp_TK=mix([logp for _, logp in supports]) if supports else None,
        span_T=_common_spans([s.span_T for s in scores if s.span_T is not None]),
        sampled_only_T=_any([s.sampled_only_T for s in scores if s.sampled_only_T is not None]),
        canonical=all(s.canonical for s in scores),
        num_unaligned_bytes=max(s.num_unaligned_bytes for s in scores),
    )


def _any(flags: Sequence[np.ndarray]) -> np.ndarray | None:
    return np.logical_or.reduce(flags) if flags else None


def _common_spans(spans: Sequence[np.ndarray]) -> np.ndarray | None:
    """Those of the teacher that cuts coarsest, without what any of them cannot compare; None: all of them read the student's ids."""
    if not spans:
        return None
    coarsest = min(spans, key=lambda span_T: int(span_T.max(initial=-1)))
    return np.where(np.minimum.reduce(spans) < 0, -1, coarsest).astype(np.int32)


def union_of_supports(scores: Sequence[TokenScores]) -> np.ndarray:
    """[T, K] int32: in each row the ids of all supports, each once; -1 pads."""
    ids_TK = np.concatenate([s.support_ids_TK for s in scores if s.support_ids_TK is not None], axis=1)
    order_TK = np.argsort(ids_TK, axis=1, kind="stable")
    sorted_TK = np.take_along_axis(ids_TK, order_TK, axis=1)
    again_TK = np.zeros(ids_TK.shape, bool)
    np.put_along_axis(again_TK, order_TK[:, 1:], sorted_TK[:, 1:] == sorted_TK[:, :-1], axis=1)
    return np.where(again_TK, -1, ids_TK).astype(np.int32)
