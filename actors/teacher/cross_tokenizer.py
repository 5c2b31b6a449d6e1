"""A teacher with another tokenizer behind the interface of one with the student's own: ids in and out are the student's.

    student ids --Aligner--> teacher ids, spans --the teacher's own scorer--> log-probs --> sums by span --> student tokens

Where it is exact and where it approximates stands in this folder's README.

Shapes: T = the student's tokens of one response, J = the teacher's, K = support size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import AutoTokenizer

from opd_governor.actors.teacher.alignment import NO_STOP_LOGP, UNALIGNED, Aligner, Alignment
from opd_governor.actors.teacher.byte_tokens import ByteTokenizer
from opd_governor.actors.teacher.scorers import GenerateOptions, Scorer, ScoreRequest
from opd_governor.actors.teacher.scoring import PAD_ID
from opd_governor.actors.trajectory import TokenScores


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """The two tokenizers, by folder or id, and what ends an answer in each."""

    student: str
    teacher: str
    student_stop_ids: tuple[int, ...]
    teacher_stop_ids: tuple[int, ...]
    answer_stop_id: int
    """The student's stop that ends a golden answer."""
    context_tokens: int | None
    """The teacher's window, in its own tokens; None: unknown."""
    trust_student: bool = False
    trust_teacher: bool = False


class Twins:
    """Which ids of two vocabularies are the same thing: equal bytes, or special tokens of one name. Stop ids are one event apart."""

    def __init__(self, student: ByteTokenizer, teacher: ByteTokenizer, terms: Vocabularies) -> None:
        """Raises ValueError where there is no stop on either side."""
        if not terms.student_stop_ids or not terms.teacher_stop_ids:
            raise ValueError("a teacher with another tokenizer needs a stop id on both sides; set rollout.stop_token_ids")
        pairs = [(token_id, teacher.id_of_bytes.get(data)) for data, token_id in student.id_of_bytes.items()]
        specials = {token_id: teacher.specials.get(name) for name, token_id in student.specials.items()}
        stops = {*terms.student_stop_ids}, {*terms.teacher_stop_ids}
        same = [(ours, theirs) for ours, theirs in [*pairs, *specials.items()] if theirs is not None]
        same = [(ours, theirs) for ours, theirs in same if ours not in stops[0] and theirs not in stops[1]]
        self.teacher_of = _table(same, student.size)
        """[student's vocabulary] int32: the teacher's id, or -1."""
        self.student_of = _table([(theirs, ours) for ours, theirs in same], teacher.size)
        named = {ours: theirs for ours, theirs in same if ours in specials}
        self.events = named | dict.fromkeys(terms.student_stop_ids, terms.teacher_stop_ids[0])
        """Student's special id -> the teacher's; every stop -> one of the teacher's."""


def _table(pairs: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    table = np.full(max([size, *(source + 1 for source, _ in pairs)]), PAD_ID, np.int32)
    for source, target in pairs:
        table[source] = target
    return table


def look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Ids through a table; -1, and ids beyond it, stay -1."""
    known = (ids >= 0) & (ids < len(table))
    return np.where(known, table[np.where(known, ids, 0)], PAD_ID)


class CrossTokenizerScorer:
    """A `Scorer` in the student's ids around one in the teacher's. Prompts are the teacher's own ids on both sides.

    A span's log-prob is the sum over the teacher's tokens of it (chain rule), shared out evenly to the student's tokens of it. The
    stop is one event: at a sampled stop, and wherever a span begins, it is the mass of all the teacher's stop ids. A support stands
    where a span is one token on both sides, on the ids whose bytes are equal; elsewhere its ids are padding.
    """

    def __init__(self, inner: Scorer, terms: Vocabularies) -> None:
        load = AutoTokenizer.from_pretrained
        self._student = ByteTokenizer(load(terms.student, trust_remote_code=terms.trust_student))
        self._teacher = ByteTokenizer(load(terms.teacher, trust_remote_code=terms.trust_teacher))
        self._inner, self._terms = inner, terms
        self.twins = Twins(self._student, self._teacher, terms)
        self._aligner = Aligner(self._student, self._teacher, self.twins.events)

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        alignments = [self._aligned(request) for request in requests]
        asked = [self._asked(request, alignment) for request, alignment in zip(requests, alignments, strict=True)]
        return [
            None if scored is None else self._in_students_tokens(request, alignment, scored)
            for request, alignment, scored in zip(requests, alignments, self._inner.score(asked), strict=True)
        ]

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        """The teacher's answers in the student's tokens, at most `options.max_new_tokens` of them; one without a stop was cut, or
        has bytes that the student cannot spell."""
        return [self._translated(answer, options.max_new_tokens) for answer in self._inner.generate(prompts, options)]

    def _aligned(self, request: ScoreRequest) -> Alignment:
        """Cut where the teacher's window ends: what lies beyond is not aligned."""
        alignment = self._aligner.align(request.token_ids)
        if self._terms.context_tokens is None:
            return alignment
        room_tokens = max(0, self._terms.context_tokens - len(request.prompt_token_ids))
        if len(alignment.token_ids) <= room_tokens:
            return alignment
        first_cut = alignment.span_J[room_tokens]
        span_T = np.where(alignment.span_T >= first_cut, UNALIGNED, alignment.span_T).astype(np.int32)
        return replace(alignment, token_ids=alignment.token_ids[:room_tokens], span_T=span_T, span_J=alignment.span_J[:room_tokens])

    def _asked(self, request: ScoreRequest, alignment: Alignment) -> ScoreRequest:
        """The same question in the teacher's tokens."""
        given_JK = None
        if request.support_ids_TK is not None:
            at_T, at_J = singles(alignment)
            given_JK = np.full((len(alignment.token_ids), request.support_ids_TK.shape[1]), PAD_ID, np.int64)
            given_JK[at_J] = look_up(self.twins.teacher_of, request.support_ids_TK[at_T])
        return replace(request, token_ids=alignment.token_ids, support_ids_TK=given_JK)

    def _in_students_tokens(self, request: ScoreRequest, alignment: Alignment, scored: TokenScores) -> TokenScores:
        logp_J = scored.sampled_logp_T.copy()
        if request.token_ids and request.token_ids[-1] in self._terms.student_stop_ids and alignment.span_T[-1] >= 0:
            logp_J[-1] = scored.stop_logp_T[-1]
        sampled_logp_T, stop_logp_T = by_span(alignment, logp_J, scored.stop_logp_T)
        at_T, at_J = singles(alignment)
        sampled_only_T = np.ones(len(request.token_ids), bool)
        sampled_only_T[at_T] = False
        ids_TK = logps_TK = None
        if scored.support_ids_TK is not None and scored.support_logp_TK is not None:
            shape = (len(request.token_ids), scored.support_ids_TK.shape[1])
            ids_TK, logps_TK = np.full(shape, PAD_ID, np.int32), np.full(shape, -np.inf, np.float32)
            ids_TK[at_T] = look_up(self.twins.student_of, scored.support_ids_TK[at_J])
            logps_TK[at_T] = np.where(ids_TK[at_T] >= 0, scored.support_logp_TK[at_J], -np.inf)
        return TokenScores(
            teacher=scored.teacher,
            sampled_logp_T=sampled_logp_T,
            stop_logp_T=stop_logp_T,
            support_ids_TK=ids_TK,
            support_logp_TK=logps_TK,
            span_T=alignment.span_T,
            sampled_only_T=sampled_only_T,
            canonical=alignment.canonical,
            num_unaligned_bytes=alignment.num_unaligned_bytes,
        )

    def _translated(self, answer: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        finished = bool(answer) and answer[-1] in self._terms.teacher_stop_ids
        ids: list[int] = []
        run = b""
        try:
            for token_id in answer[:-1] if finished else answer:
                data = self._teacher.bytes_of(token_id)
                if data is not None:
                    run += data
                    continue
                twin = int(look_up(self.twins.student_of, np.array(token_id)))
                finished &= twin >= 0
                ids += [*self._student.encode(run.decode()), *([twin] if twin >= 0 else [])]
                run = b""
            ids += self._student.encode(run.decode())
        except ValueError:  # bytes that are no text, or that the student cannot spell: not an answer to learn from
            finished = False
        if finished and len(ids) < max_new_tokens:
            return (*ids, self._terms.answer_stop_id)
        return tuple(ids[:max_new_tokens])


def singles(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the spans that are one token on both sides: the student's, and the teacher's beside them."""
    num_spans = int(max(alignment.span_T.max(initial=-1), alignment.span_J.max(initial=-1))) + 1
    counts_T = np.bincount(alignment.span_T[alignment.span_T >= 0], minlength=num_spans)
    counts_J = np.bincount(alignment.span_J[alignment.span_J >= 0], minlength=num_spans)
    spans = np.flatnonzero((counts_T == 1) & (counts_J == 1))
    at_T = np.flatnonzero(np.isin(alignment.span_T, spans))
    at_J = np.flatnonzero(np.isin(alignment.span_J, spans))
    return at_T, at_J


def by_span(alignment: Alignment, logp_J: np.ndarray, stop_logp_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T] float32 twice: the log-prob of each token's span, shared out evenly; the stop's, where a span begins.

    Where nothing is aligned the first is 0; the second is NO_STOP_LOGP there and inside spans.
    """
    span_T, span_J = alignment.span_T, alignment.span_J
    assert (span_J >= 0).all(), "a token of the teacher past the student's end"
    num_spans = int(max(span_T.max(initial=-1), span_J.max(initial=-1))) + 1
    aligned_T, aligned_J = span_T >= 0, span_J >= 0
    logp_S = np.bincount(span_J[aligned_J], weights=logp_J[aligned_J].astype(np.float64), minlength=num_spans)
    counts_S = np.bincount(span_T[aligned_T], minlength=num_spans)
    shared_T, stop_T = np.zeros(len(span_T), np.float32), np.full(len(span_T), NO_STOP_LOGP, np.float32)
    shared_T[aligned_T] = (logp_S / np.maximum(counts_S, 1))[span_T[aligned_T]]
    first_J = np.searchsorted(span_J, np.arange(num_spans))
    begins_T = aligned_T & (np.diff(span_T, prepend=-2) != 0)
    stop_T[begins_T] = stop_logp_J[first_J[span_T[begins_T]]]
    return shared_T, stop_T
