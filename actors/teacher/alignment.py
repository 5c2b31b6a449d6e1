"""One answer in two tokenisations: where both have consumed the same bytes, and which tokens lie between (pure).

    student ids --bytes--> text runs, events --the teacher's own encoder--> teacher ids
        |                                                                      |
        +---------------- ends of tokens, in bytes, on both sides -------------+--> spans

Every token has an end on one common ruler, in bytes; a special token is an event of length one. A span ends where a token of either
side ends at the same mark: spans are the smallest pieces that both sides can express.

Shapes: T = the student's tokens of one response, J = the teacher's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from opd_governor.actors.teacher.byte_tokens import ByteTokenizer, utf8_runs

NO_STOP_LOGP = -1000.0
"""The teacher's stop inside a span: it has no position there. As good as log 0, and finite."""
UNALIGNED = -1
"""The span of a token whose bytes cannot be compared."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """A response in the teacher's tokens, and the span of each token on both sides."""

    token_ids: tuple[int, ...]
    """[J] the teacher's; events that it has no token for are left out."""
    span_T: np.ndarray = field(repr=False)
    """[T] int32, rising; UNALIGNED where there is nothing to compare."""
    span_J: np.ndarray = field(repr=False)
    end_T: np.ndarray = field(repr=False)
    """[T] int64: marks on the ruler, bytes."""
    start_J: np.ndarray = field(repr=False)
    end_J: np.ndarray = field(repr=False)
    event_J: np.ndarray = field(repr=False)
    """[J] bool: an event, or a token that does not spell the student's bytes."""
    canonical: bool
    """Whether the student sampled the very tokens that its own tokenizer makes of the text."""
    num_unaligned_bytes: int

    @property
    def num_spans(self) -> int:
        return int(np.unique(self.span_T[self.span_T >= 0]).size)


def spans_of(end_N: np.ndarray, common: np.ndarray) -> np.ndarray:
    """The span of each token, from the mark it ends at and the marks where both sides end; UNALIGNED beyond the last of these.

    >>> common = np.intersect1d([1, 2, 4], [2, 3, 4])
    >>> spans_of(np.array([1, 2, 4]), common), spans_of(np.array([2, 3, 4]), common)
    (array([0, 0, 1], dtype=int32), array([0, 1, 1], dtype=int32))
    """
    place_N = np.searchsorted(common, end_N, side="left")
    return np.where(place_N < len(common), place_N, UNALIGNED).astype(np.int32)


class Aligner:
    """Puts responses of one vocabulary into the tokens of another.

    `events`: ids of the student that are one event, whatever they spell (special tokens, stops) -> the teacher's id of that event.
    """

    def __init__(self, student: ByteTokenizer, teacher: ByteTokenizer, events: dict[int, int]) -> None:
        self.student, self.teacher, self.events = student, teacher, events

    def align(self, token_ids: Sequence[int]) -> Alignment:
        """A response, its stop included where there is one.

        Exact on bytes: where the teacher's tokens do not spell the text byte for byte, or the student's bytes are no text, the
        tokens that touch these bytes are UNALIGNED and counted; the teacher reads U+FFFD for what is no text. Half a character
        at the very end (a response cut by its cap) is left out.
        """
        ruler = _Ruler()
        run: list[int] = []
        canonical = True
        for token_id in token_ids:
            if token_id not in self.events and self.student.bytes_of(token_id) is not None:
                run.append(token_id)
                continue
            canonical &= self._add_run(ruler, run, last=False)
            run = []
            ruler.add_event(self.events.get(token_id))
        canonical &= self._add_run(ruler, run, last=True)
        end_T, end_J = np.array(ruler.end_T, np.int64), np.array(ruler.end_J, np.int64)
        common = np.intersect1d(end_T, np.concatenate([end_J, ruler.lost_ends()]))
        span_T, span_J = spans_of(end_T, common), spans_of(end_J, common)
        span_T[np.isin(span_T, span_T[ruler.is_lost(end_T)])] = UNALIGNED
        starts_J, events_J = np.array(ruler.start_J, np.int64), np.array(ruler.event_J, bool)
        return Alignment(
            tuple(ruler.ids_J), span_T, span_J, end_T, starts_J, end_J, events_J, canonical, ruler.num_lost_bytes
        )  # fmt: skip

    def _add_run(self, ruler: "_Ruler", run: list[int], last: bool) -> bool:
        """The student's tokens between two events; returns whether they are what its own tokenizer makes of their text."""
        pieces = [self.student.bytes_of(token_id) or b"" for token_id in run]
        data = b"".join(pieces)
        ruler.add_student(list(map(len, pieces)))
        runs = utf8_runs(data)
        for start, end, text in runs:
            if text is None:
                cut_off = last and end == len(data)
                ruler.add_lost(end - start, () if cut_off else self._encoded(self.teacher, "\ufffd"))
                continue
            ids = self._encoded(self.teacher, text)
            self._add_teacher(ruler, ids, data[start:end])
        whole = len(runs) <= 1 and (not runs or runs[0][2] is not None)
        return whole and (not runs or list(self._encoded(self.student, runs[0][2] or "")) == run)

    def _add_teacher(self, ruler: "_Ruler", ids: Sequence[int], data: bytes) -> None:
        """The teacher's tokens of a text. Where they spell something else, what is spelled right before and after it stays."""
        pieces = [self.teacher.bytes_of(token_id) or b"" for token_id in ids]
        lengths = list(map(len, pieces))
        if b"".join(pieces) == data:
            ruler.add_teacher(ids, lengths)
            return
        head = _num_matching(pieces, data)
        tail = _num_matching([piece[::-1] for piece in reversed(pieces[head:])], data[sum(lengths[:head]) :][::-1])
        rest = len(ids) - tail
        ruler.add_teacher(ids[:head], lengths[:head])
        ruler.add_lost(len(data) - sum(lengths[:head]) - sum(lengths[rest:]), ids[head:rest])
        ruler.add_teacher(ids[rest:], lengths[rest:])

    @staticmethod
    def _encoded(tokens: ByteTokenizer, text: str) -> Sequence[int]:
        try:
            return tokens.encode(text)
        except ValueError:  # a vocabulary without these characters: the run is counted as unaligned
            return ()


def _num_matching(pieces: Sequence[bytes], data: bytes) -> int:
    """How many pieces, in order, the data begins with. An empty piece (a token that is no text) matches nothing."""
    start = 0
    for place, piece in enumerate(pieces):
        if not piece or not data.startswith(piece, start):
            return place
        start += len(piece)
    return len(pieces)


class _Ruler:
    """Marks of both sides on one line of bytes, and the stretches where they cannot be compared."""

    def __init__(self) -> None:
        self.end_T: list[int] = []
        self.start_J: list[int] = []
        self.end_J: list[int] = []
        self.event_J: list[bool] = []
        self.ids_J: list[int] = []
        self._lost: list[tuple[int, int]] = []
        self._mark_T = self._mark_J = 0

    def add_student(self, lengths: Sequence[int]) -> None:
        self.end_T += list(accumulate(lengths, initial=self._mark_T))[1:]
        self._mark_T += sum(lengths)

    def add_teacher(self, ids: Sequence[int], lengths: Sequence[int], *, event: bool = False) -> None:
        marks = list(accumulate(lengths, initial=self._mark_J))
        self.ids_J += ids
        self.start_J += marks[:-1]
        self.end_J += marks[1:]
        self.event_J += [event] * len(ids)
        self._mark_J += sum(lengths)

    def add_lost(self, length: int, ids: Sequence[int]) -> None:
        """A stretch that the teacher spells in some other way, or not at all: its tokens all end where the stretch does."""
        self._lost.append((self._mark_J, self._mark_J + length))
        self.ids_J += ids
        self.start_J += [self._mark_J] * len(ids)
        self._mark_J += length
        self.end_J += [self._mark_J] * len(ids)
        self.event_J += [True] * len(ids)

    def add_event(self, twin: int | None) -> None:
        self.add_student([1])
        if twin is None:
            self.add_lost(1, ())
        else:
            self.add_teacher([twin], [1], event=True)

    @property
    def num_lost_bytes(self) -> int:
        return sum(end - start for start, end in self._lost)

    def lost_ends(self) -> np.ndarray:
        return np.array([end for _, end in self._lost], np.int64)

    def is_lost(self, end_T: np.ndarray) -> np.ndarray:
        """Which of the student's tokens touch a lost stretch."""
        start_T = np.concatenate([[0], end_T[:-1]])
        found_T = np.zeros(len(end_T), bool)
        for start, end in self._lost:
            found_T |= (start_T < end) & (end_T > start)
        return found_T
