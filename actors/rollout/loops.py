"""Finds the loop a response ends in, on token ids. Knows no tokenizer, no text, no engine."""

from collections.abc import Sequence
from dataclasses import dataclass

PLAIN_UNIT_TOKENS = 3
"""A unit of at most this many different tokens is plain: a ruler (`=====`), a table's separator row (`|---|---|`), a row of zeros."""
PLAIN_FACTOR = 2
"""Plain units repeat in sound text for a line's width, so they count as a loop only at this multiple of `min_tokens`."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A response's end that repeats one unit: `token_ids[i] == token_ids[i + period]` for every i from `onset` on.

    >>> find_loop([7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], min_repeats=3, min_tokens=4)
    Loop(onset=1, period=3)
    """

    onset: int
    """Index of the region's first token. The first unit, up to `onset + period`, may well be sound text."""
    period: int
    """Tokens in the unit."""


def find_loop(token_ids: Sequence[int], *, min_repeats: int, min_tokens: int) -> Loop | None:
    """The terminal loop of a response, or None.

    It is the longest suffix that repeats a unit at least `min_repeats` times and holds at least `min_tokens` tokens (twice as
    many when the unit is plain, see PLAIN_UNIT_TOKENS), with the shortest unit that explains it. Every period is tried, in time
    linear in the response's length. A sampled stop id is not part of a loop: pass the response without it.
    """
    num_tokens = len(token_ids)
    best = Loop(onset=num_tokens, period=0)
    for period, agreement in enumerate(_border_agreement(token_ids[::-1], num_tokens // min_repeats), start=1):
        region_tokens = period + agreement
        if region_tokens >= max(min_repeats * period, min_tokens) and num_tokens - region_tokens < best.onset:
            best = Loop(onset=num_tokens - region_tokens, period=period)
    if not best.period:
        return None
    unit = token_ids[best.onset : best.onset + best.period]
    if len(set(unit)) <= PLAIN_UNIT_TOKENS and num_tokens - best.onset < PLAIN_FACTOR * min_tokens:
        return None
    return best


def _border_agreement(ids: Sequence[int], max_shift: int) -> list[int]:
    """For each shift 1..max_shift: how many leading ids agree with the ids at that shift (the Z-function, Gusfield 1997).

    On a reversed response, `shift + agreement` is the length of its longest suffix with period `shift`.
    """
    num_ids = len(ids)
    z = [0] * (max_shift + 1)
    left = right = 0  # the match found so far that reaches farthest: ids[left:right] == ids[:right - left]
    for shift in range(1, max_shift + 1):
        agreement = min(right - shift, z[shift - left]) if shift < right else 0
        while shift + agreement < num_ids and ids[agreement] == ids[shift + agreement]:
            agreement += 1
        z[shift] = agreement
        if shift + agreement > right:
            left, right = shift, shift + agreement
    return z[1:]
