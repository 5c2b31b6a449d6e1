"""A teacher with another tokenizer behind the interface of one with the student's own: ids in and out are the student's.

    student ids --Aligner--> teacher ids --the teacher's own scorer--> its log-probs --conditionals--> the student's tokens

Where it is exact and where it approximates stands in this folder's README.

Shapes: T = the student's tokens of one response, J = the teacher's, K = support size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from transformers import AutoTokenizer

from opd_governor.actors.teacher.alignment import NO_STOP_LOGP, UNALIGNED, Aligner, Alignment
from opd_governor.actors.teacher.byte_tokens import ByteTokenizer
from opd_governor.actors.teacher.prefixes import LEAST_LOGP, Other, OwnTokens, conditionals
from opd_governor.actors.teacher.scorers import GenerateOptions, Scorer, ScoreRequest
from opd_governor.actors.teacher.scoring import PAD_ID
from opd_governor.actors.trajectory import TokenScores

PREFIX_TOP_K = 16
"""Of a teacher's likeliest tokens at each position; vLLM servers give up to 20 unless told otherwise."""


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

    A token's log-prob is the teacher's conditional probability of its bytes (`prefixes.py`); over a finished response they add up to
    the log-prob of the teacher's own tokenisation. The stop is one event: at a sampled stop, and wherever a token of the teacher
    begins too, it is the mass of all the teacher's stop ids. A support stands where a span is one token on both sides, on the ids
    whose bytes are equal; elsewhere its ids are padding.
    """

    def __init__(self, inner: Scorer, terms: Vocabularies, *, prefix_top_k: int = PREFIX_TOP_K) -> None:
        """`prefix_top_k`: of the teacher's own likeliest tokens, those that are looked at for other ways to write the text."""
        self._prefix_top_k = prefix_top_k
        load = AutoTokenizer.from_pretrained
        self._student = ByteTokenizer(load(terms.student, trust_remote_code=terms.trust_student))
        self._teacher = ByteTokenizer(load(terms.teacher, trust_remote_code=terms.trust_teacher))
        self._inner, self._terms = inner, terms
        self._known_cuts: dict[int, frozenset[int]] = {}
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
        room = slice(room_tokens)
        return replace(
            alignment,
            token_ids=alignment.token_ids[room],
            span_T=span_T,
            span_J=alignment.span_J[room],
            start_J=alignment.start_J[room],
            end_J=alignment.end_J[room],
            event_J=alignment.event_J[room],
        )

    def _asked(self, request: ScoreRequest, alignment: Alignment) -> ScoreRequest:
        """The same question in the teacher's tokens."""
        given_JK = None
        if request.support_ids_TK is not None:
            at_T, at_J = singles(alignment)
            given_JK = np.full((len(alignment.token_ids), request.support_ids_TK.shape[1]), PAD_ID, np.int64)
            given_JK[at_J] = look_up(self.twins.teacher_of, request.support_ids_TK[at_T])
        top_k = max(request.top_k, self._prefix_top_k)
        return replace(request, token_ids=alignment.token_ids, support_ids_TK=given_JK, top_k=top_k)

    def _in_students_tokens(self, request: ScoreRequest, alignment: Alignment, scored: TokenScores) -> TokenScores:
        lost_T = alignment.span_T < 0
        logp_T, own_T = conditionals(alignment.end_T, lost_T, self._own_tokens(request, alignment, scored), self._encode)
        # Wherever a token of the teacher begins too, what it says there counts as far as it would have cut the text so far there.
        stop_T = np.full(len(lost_T), NO_STOP_LOGP, np.float32)
        begins_T = np.flatnonzero(~np.isnan(own_T))
        starts_T = np.concatenate([[0], alignment.end_T[:-1]])
        stop_T[begins_T] = scored.stop_logp_T[np.searchsorted(alignment.start_J, starts_T[begins_T])] + own_T[begins_T]
        at_T, at_J = singles(alignment)
        sampled_only_T = np.ones(len(lost_T), bool)
        sampled_only_T[at_T] = False
        ids_TK = logps_TK = None
        if scored.support_ids_TK is not None and scored.support_logp_TK is not None and _columns(request):
            columns = slice(_columns(request))
            shape = (len(lost_T), scored.support_ids_TK[:, columns].shape[1])
            ids_TK, logps_TK = np.full(shape, PAD_ID, np.int32), np.full(shape, -np.inf, np.float32)
            ids_TK[at_T] = look_up(self.twins.student_of, scored.support_ids_TK[at_J, columns])
            theirs = scored.support_logp_TK[at_J, columns] + own_T[at_T][:, None]
            logps_TK[at_T] = np.where(ids_TK[at_T] >= 0, theirs, -np.inf)
        return TokenScores(
            teacher=scored.teacher,
            sampled_logp_T=logp_T.astype(np.float32),
            stop_logp_T=stop_T,
            support_ids_TK=ids_TK,
            support_logp_TK=logps_TK,
            span_T=alignment.span_T,
            sampled_only_T=sampled_only_T,
            canonical=alignment.canonical,
            num_unaligned_bytes=alignment.num_unaligned_bytes,
        )

    def _own_tokens(self, request: ScoreRequest, alignment: Alignment, scored: TokenScores) -> OwnTokens:
        logp_J = scored.sampled_logp_T.astype(np.float64)
        if request.token_ids and request.token_ids[-1] in self._terms.student_stop_ids and alignment.span_T[-1] >= 0:
            logp_J[-1] = scored.stop_logp_T[-1]
        others: list[list[Other]] = [[] for _ in alignment.token_ids]
        if scored.support_ids_TK is not None and scored.support_logp_TK is not None:
            likely_JK = (scored.support_ids_TK >= 0) & (scored.support_logp_TK > LEAST_LOGP)
            likely_JK &= scored.support_ids_TK != np.array(alignment.token_ids, np.int64)[:, None]
            for place, column in zip(*np.nonzero(likely_JK), strict=True):
                token_id = int(scored.support_ids_TK[place, column])
                if piece := self._teacher.bytes_of(token_id):
                    others[place].append(Other(token_id, piece, float(scored.support_logp_TK[place, column]), self._cuts(token_id, piece)))
        pieces = [self._teacher.bytes_of(token_id) or b"" for token_id in alignment.token_ids]
        cuts = [self._cuts(token_id, piece) for token_id, piece in zip(alignment.token_ids, pieces, strict=True)]
        marks = alignment.start_J, alignment.end_J, alignment.event_J
        return OwnTokens(*marks, alignment.token_ids, pieces, logp_J, others, cuts)

    def _encode(self, data: bytes) -> Sequence[int] | None:
        try:
            return self._teacher.encode(data.decode())
        except ValueError:  # half a character
            return None

    def _cuts(self, token_id: int, piece: bytes) -> frozenset[int]:
        if token_id not in self._known_cuts:
            try:
                ids = self._student.encode(piece.decode())
            except ValueError:  # half a character, or one that the student cannot spell
                ids = []
            ends = accumulate(len(self._student.bytes_of(one) or b"") for one in ids)
            self._known_cuts[token_id] = frozenset({*ends, len(piece)})
        return self._known_cuts[token_id]

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


def _columns(request: ScoreRequest) -> int:
    """Of the support that was asked for: the given ids, then the top ones."""
    return request.top_k + (0 if request.support_ids_TK is None else request.support_ids_TK.shape[1])


def singles(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the spans that are one token on both sides: the student's, and the teacher's beside them."""
    num_spans = int(max(alignment.span_T.max(initial=-1), alignment.span_J.max(initial=-1))) + 1
    counts_T = np.bincount(alignment.span_T[alignment.span_T >= 0], minlength=num_spans)
    counts_J = np.bincount(alignment.span_J[alignment.span_J >= 0], minlength=num_spans)
    spans = np.flatnonzero((counts_T == 1) & (counts_J == 1))
    at_T = np.flatnonzero(np.isin(alignment.span_T, spans))
    at_J = np.flatnonzero(np.isin(alignment.span_J, spans))
    return at_T, at_J
