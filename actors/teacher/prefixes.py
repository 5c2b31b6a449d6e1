"""What a teacher thinks of each of the student's tokens, from its log-probs of its own tokens (pure).

Let F(o) be the log-probability, under the teacher, that a response begins with the text's first o bytes. A student's token from byte a to
byte b has log p = F(b) - F(a). Two things make that a fair charge:

- F(o) sees the first o bytes alone. A tokenisation of the whole response looks ahead: whether the teacher writes "4;" in one token or ends
  one after "4" depends on what follows. With it a token would pay for, or be spared, what the student only chooses later, and a
  choice would go without its price. So F(o) goes by the teacher's tokenisation of the first o bytes.
- That a text begins so does not mean that a token ends there. F(o) adds every token that reaches byte o and agrees with the text (beyond
  o only where the student, writing the same bytes, would cut at o too: what it writes in one token does not begin with a shorter one).
  A right first half of a token costs nothing, and a wrong one is charged to the half that is wrong.

    F(o) = log sum over q of p(tokens of the first o bytes before q) p(tokens at q that spell these bytes to their end or beyond)

The tokens of a finished response add up to the log-prob of the teacher's own tokenisation. Where both vocabularies are the same, each
token has its own log-prob. Related: cover encodings, "Exact byte-level probabilities from tokenized language models", arXiv 2410.09303.

Shapes: T = the student's tokens of one response, J = the teacher's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REACH_TOKENS = 4
"""How far back, in the teacher's tokens, what follows may change where it cuts."""
LEAST_LOGP = -20.0
"""Of a token that is not even among the likeliest."""


class Other(NamedTuple):
    """A token that the teacher might have written instead."""

    token_id: int
    piece: bytes
    logp: float
    cuts: frozenset[int]
    """Where the student would cut these bytes, the end included."""


@dataclass(frozen=True, slots=True)
class OwnTokens:
    """The teacher's tokens of a response on the ruler of bytes, and what it thought of others in their place."""

    start_J: np.ndarray
    end_J: np.ndarray
    event_J: np.ndarray
    """[J] bool: no text: a special token, a stop, or what the student's bytes cannot be compared with."""
    token_ids: Sequence[int]
    pieces: Sequence[bytes]
    logp_J: np.ndarray
    others: Sequence[Sequence["Other"]]
    """For each token, the likeliest others in its place."""
    cuts: Sequence[frozenset[int]]
    """For each token, as in Other."""


Encode = Callable[[bytes], Sequence[int] | None]
"""The teacher's ids of some bytes; None: they are no text."""


def conditionals(end_T: np.ndarray, lost_T: np.ndarray, own: OwnTokens, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """[T] float64 twice: log-prob of each token given the bytes before it; and of the teacher's own tokenisation given these bytes.

    The second is what scales anything known at the teacher's position where the token begins; it is NaN where none begins. After a
    stretch that cannot be compared (`lost_T`, log-prob 0) its own tokens are taken as given.
    """
    logp_T, own_T = np.zeros(len(end_T)), np.full(len(end_T), np.nan)
    total_J = np.concatenate([[0.0], np.cumsum(own.logp_J, dtype=np.float64)])
    start, last, base = 0, 0, 0.0
    for place, end in enumerate(end_T.tolist()):
        first = int(np.searchsorted(own.start_J, start))
        begins = first < len(own.start_J) and own.start_J[first] == start
        if lost_T[place]:
            base = math.nan
        else:
            base = total_J[first] if math.isnan(base) else base
            if begins:
                own_T[place] = total_J[first] - base
            while own.end_J[last] < end:
                last += 1
            mass = _log_mass(last, end, total_J, own, encode)
            logp_T[place], base = mass - base, mass
        start = end
    return logp_T, own_T


def _log_mass(last: int, end: int, total_J: np.ndarray, own: OwnTokens, encode: Encode) -> float:
    """F at mark `end`, which lies in, or at the end of, the teacher's token `last` of the whole response."""
    if own.event_J[last]:
        return float(total_J[last + 1])
    first = last
    while first > max(0, last - REACH_TOKENS) and not own.event_J[first - 1] and own.end_J[first - 1] == own.start_J[first]:
        first -= 1
    begin = int(own.start_J[first])
    data = b"".join(own.pieces[first : last + 1])[: end - begin]
    ids = encode(data) or own.token_ids[first : last + 1]
    shared = _num_shared(ids, own.token_ids[first : last + 1])
    parts = first + shared
    """Where the tokens of these bytes and those of the whole response part."""
    if shared == len(ids):
        terms = [float(total_J[parts])]
        last = parts - 1
    else:
        terms = [float(total_J[parts]) + _logp_of(ids[shared], own.others[parts])]
        last = parts
    for place in range(first, last + 1):
        text = data[int(own.start_J[place]) - begin :]
        for other in own.others[place]:
            if len(text) in other.cuts and other.piece.startswith(text) and not (place == parts and other.token_id == ids[shared]):
                terms.append(float(total_J[place]) + other.logp)
        if place == parts and len(text) in own.cuts[place] and own.pieces[place].startswith(text):
            terms.append(float(total_J[place + 1]))
    highest = max(terms)
    return highest + math.log(sum(math.exp(term - highest) for term in terms))


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


def _logp_of(token_id: int, others: Sequence[Other]) -> float:
    """At most that of the least likely one that is known, where it is not among them."""
    known = {other.token_id: other.logp for other in others}
    return known[token_id] if token_id in known else min([LEAST_LOGP, *known.values()])
