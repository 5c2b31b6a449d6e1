"""What a step's scores say of themselves, where teachers see more than the student or read tokens of their own."""

from collections.abc import Sequence

import numpy as np

from opd_governor.actors.trajectory import ScoredRollout
from opd_governor.services.record.rundir import Record

SCORE_FIELDS = ("copied", "spans_per_token", "unaligned", "unaligned_bytes", "noncanonical")


def score_fields(scored: Sequence[ScoredRollout]) -> Record:
    """Fields of a step's record; none where every teacher sees what the student sees, in its tokens.

    copied: share of tokens copied from what only the teacher sees. spans_per_token: 1 where both tokenizers cut alike, less where
    tokens had to be compared together. unaligned: share of tokens with nothing to compare. unaligned_bytes: per response.
    noncanonical: share of responses whose tokens the student's own tokenizer would not have chosen.
    """
    scores = [one.scores for one in scored]
    fields: Record = {}
    copied = [s.copied_T for s in scores if s.copied_T is not None]
    if copied:
        fields["copied"] = _mean(np.concatenate(copied))
    spans = [s.span_T for s in scores if s.span_T is not None]
    if spans:
        num_tokens = max(1, sum(map(len, spans)))
        fields["spans_per_token"] = sum(np.unique(span_T[span_T >= 0]).size for span_T in spans) / num_tokens
        fields["unaligned"] = _mean(np.concatenate(spans) < 0)
        crossed = [s for s in scores if s.span_T is not None]
        fields["unaligned_bytes"] = _mean(np.array([s.num_unaligned_bytes for s in crossed]))
        fields["noncanonical"] = _mean(np.array([not s.canonical for s in crossed]))
    return fields


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
