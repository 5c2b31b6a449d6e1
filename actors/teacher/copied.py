"""Which tokens of a response are copied from what only the teacher sees (pure).

Shapes: T = tokens of one response.
"""

from collections.abc import Sequence

import numpy as np


def copied_tokens(token_ids: Sequence[int], privileged_ids: Sequence[int], prompt_ids: Sequence[int], length_tokens: int) -> np.ndarray:
    """[T] bool: part of a run of `length_tokens` that occurs in the privileged text and not in the student's own prompt.

    A student cannot know such a run; where answers are full of them the teacher dictates instead of judging, or the privileged text
    is the answer itself. A privileged text shorter than the run has none.

    >>> copied_tokens((1, 2, 3, 9), (7, 1, 2, 3), (5,), 3).tolist()
    [True, True, True, False]
    """
    assert length_tokens > 0, length_tokens

    def runs(ids: Sequence[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[start : start + length_tokens]) for start in range(len(ids) - length_tokens + 1)}

    secret = runs(privileged_ids) - runs(prompt_ids)
    copied_T = np.zeros(len(token_ids), bool)
    for start in range(len(token_ids) - length_tokens + 1):
        if tuple(token_ids[start : start + length_tokens]) in secret:
            copied_T[start : start + length_tokens] = True
    return copied_T
