"""Groups sequences by length so that batches need little padding (pure). Learner and teacher both use such batches."""

from collections.abc import Sequence

MAX_PADDING_RATIO = 0.1
"""A batch is closed rather than padded beyond this share."""


def like_lengths(lengths: Sequence[int], batch_tokens: int, max_padding_ratio: float = MAX_PADDING_RATIO) -> list[list[int]]:
    """Indices in batches of like length, longest first: each at most `batch_tokens` padded tokens, at most that share of them padding.

    A sequence longer than `batch_tokens` goes alone.

    >>> like_lengths([5, 9, 4, 9], batch_tokens=18)
    [[1, 3], [0], [2]]
    >>> like_lengths([5, 9, 4, 9], batch_tokens=18, max_padding_ratio=1)
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    used_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            padded_tokens = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            fits = padded_tokens <= batch_tokens
            dense = used_tokens + lengths[index] >= (1 - max_padding_ratio) * padded_tokens
        if batches and fits and dense:
            batches[-1].append(index)
            used_tokens += lengths[index]
        else:
            batches.append([index])
            used_tokens = lengths[index]
    return batches
