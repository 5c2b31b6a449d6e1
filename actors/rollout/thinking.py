"""The thinking part of a response: where it ends, and the end that a used-up budget forces. Pure.

prompt ... <think> | thinking ... </think> | answer ... stop
                   +-- at most `budget` tokens, then the end mark is forced --+
"""

from collections.abc import Sequence
from dataclasses import dataclass

Marks = tuple[int, int]
"""Ids that begin and end the thinking part."""


class Watch:
    """Follows a response that grows; a token is read once. `output_ids` is the list that grows.

    >>> watch = Watch((7, 8), 2, prompt_ids=[1, 7], output_ids=[5, 5]); watch.is_used_up()
    True
    """

    def __init__(self, marks: Marks, budget_tokens: int | None, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        self._marks, self._budget_tokens, self._output_ids = marks, budget_tokens, output_ids
        marks_before = [token for token in prompt_ids if token in marks]
        self._start: int | None = 0 if marks_before and marks_before[-1] == marks[0] else None
        """Index of the first token of thought: the prompt may have begun it."""
        self._num_read = 0
        self.end: int | None = None
        """Index of the end mark."""

    def read(self) -> None:
        begin_id, end_id = self._marks
        for index in range(self._num_read, len(self._output_ids)):
            if self.end is not None:
                break
            if self._output_ids[index] == end_id:
                self.end = index  # also where none had begun: some templates leave the first mark to the model, which forgets it
            elif self._output_ids[index] == begin_id and self._start is None:
                self._start = index + 1
        self._num_read = len(self._output_ids)

    def is_used_up(self) -> bool:
        """The next token has to be the end mark."""
        self.read()
        if self._start is None or self.end is not None or self._budget_tokens is None:
            return False
        return len(self._output_ids) - self._start >= self._budget_tokens

    @property
    def is_open(self) -> bool:
        return self._start is not None and self.end is None

    @property
    def forced(self) -> int | None:
        """Index of an end mark that stands where the budget was used up: the student had no choice."""
        if self._start is None or self.end is None or self._budget_tokens is None:
            return None
        return self.end if self.end - self._start >= self._budget_tokens else None


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one response."""

    num_thinking: int | None
    """Tokens up to the end mark, which is one of them; all where it never came; None: no thinking part."""
    forced: int | None = None


def parts_of(marks: Marks | None, budget_tokens: int | None, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Parts:
    """`marks` None: the student has none.

    >>> parts_of((7, 8), None, [1, 7], [5, 5, 8, 9])
    Parts(num_thinking=3, forced=None)
    """
    if marks is None:
        return Parts(None)
    watch = Watch(marks, budget_tokens, prompt_ids, token_ids)
    watch.read()
    if watch.end is not None:
        return Parts(watch.end + 1, watch.forced)
    return Parts(len(token_ids) if watch.is_open else None)
