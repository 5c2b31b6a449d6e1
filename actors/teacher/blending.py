"""Scores of one response by several teachers: which are usable, and what they come to together."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_governor.actors.teacher.alignment import NO_STOP_LOGP
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

    An id that one teacher's vocabulary lacks (-1) has probability 0 there. Teachers with tokenizers of their own are mixed on the
    spans that all of them have: the smallest pieces of text that each of them gives a probability.
    """
    if len(scores) == 1:
        return scores[0]
    if any(score.span_T is not None for score in scores):
        scores = on_common_spans(scores)
    size_T = span_sizes(scores[0])
    log_weights = np.log(np.asarray(weights, np.float32) / sum(weights))

    def mix(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.logaddexp.reduce([weight + array for weight, array in zip(log_weights, arrays, strict=True)]).astype(np.float32)

    supports = [(s.support_ids_TK, s.support_logp_TK) for s in scores if s.support_ids_TK is not None and s.support_logp_TK is not None]
    assert len(supports) in (0, len(scores)), "some teachers returned a support, others none"
    ids_TK = np.maximum.reduce([ids for ids, _ in supports]) if supports else None
    assert all(((ids == ids_TK) | (ids < 0)).all() for ids, _ in supports), "supports on different ids"
    return TokenScores(
        teacher="+".join(s.teacher for s in scores),
        sampled_logp_T=mix([s.sampled_logp_T * size_T for s in scores]) / size_T,
        stop_logp_T=mix([s.stop_logp_T for s in scores]),
        support_ids_TK=ids_TK,
        support_logp_TK=mix([logp for _, logp in supports]) if supports else None,
        span_T=scores[0].span_T,
        sampled_only_T=None if scores[0].span_T is None else np.logical_or.reduce([_sampled_only(s) for s in scores]),
        canonical=all(s.canonical for s in scores),
        num_unaligned_bytes=max(s.num_unaligned_bytes for s in scores),
    )


def on_common_spans(scores: Sequence[TokenScores]) -> list[TokenScores]:
    """The same scores on the spans whose ends all of them have; a span that one of them cannot compare is compared by none.

    Log-probs of a joined span are summed and shared out evenly to its tokens. Between two of a teacher's own spans the chain rule
    holds, so the sum is its log-prob of the joined piece.
    """
    num_tokens = len(scores[0].sampled_logp_T)
    spans = [np.arange(num_tokens) if s.span_T is None else s.span_T for s in scores]
    ends_T = np.logical_and.reduce([np.append(span_T[1:] != span_T[:-1], True) | (span_T < 0) for span_T in spans])
    joined_T = np.concatenate([[0], np.cumsum(ends_T)[:-1]]).astype(np.int32) if num_tokens else np.zeros(0, np.int32)
    lost = np.unique(joined_T[np.logical_or.reduce([span_T < 0 for span_T in spans])])
    sizes = np.bincount(joined_T)
    starts_T = np.diff(joined_T, prepend=-1) != 0
    single_T = sizes[joined_T] == 1
    common_T = np.where(np.isin(joined_T, lost), -1, joined_T).astype(np.int32)
    moved = []
    for score in scores:
        shared_T = (np.bincount(joined_T, weights=score.sampled_logp_T.astype(np.float64)) / np.maximum(sizes, 1))[joined_T]
        moved.append(
            replace(
                score,
                sampled_logp_T=shared_T.astype(np.float32),
                stop_logp_T=np.where(starts_T, score.stop_logp_T, NO_STOP_LOGP).astype(np.float32),
                span_T=common_T,
                sampled_only_T=_sampled_only(score) | ~single_T,
            )
        )
    return moved


def span_sizes(scores: TokenScores) -> np.ndarray:
    """[T] float32: the number of tokens in each token's span; 1 without spans and where nothing is compared."""
    size_T = np.ones(len(scores.sampled_logp_T), np.float32)
    if scores.span_T is not None and (scores.span_T >= 0).any():
        compared_T = scores.span_T >= 0
        size_T[compared_T] = np.bincount(scores.span_T[compared_T])[scores.span_T[compared_T]]
    return size_T


def _sampled_only(scores: TokenScores) -> np.ndarray:
    return np.zeros(len(scores.sampled_logp_T), bool) if scores.sampled_only_T is None else scores.sampled_only_T


def union_of_supports(scores: Sequence[TokenScores]) -> np.ndarray:
    """[T, K] int32: in each row the ids of all supports, each once; -1 pads."""
    ids_TK = np.concatenate([s.support_ids_TK for s in scores if s.support_ids_TK is not None], axis=1)
    order_TK = np.argsort(ids_TK, axis=1, kind="stable")
    sorted_TK = np.take_along_axis(ids_TK, order_TK, axis=1)
    again_TK = np.zeros(ids_TK.shape, bool)
    np.put_along_axis(again_TK, order_TK[:, 1:], sorted_TK[:, 1:] == sorted_TK[:, :-1], axis=1)
    return np.where(again_TK, -1, ids_TK).astype(np.int32)
