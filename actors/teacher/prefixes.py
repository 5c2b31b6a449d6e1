"""What a teacher thinks of each of the student's tokens, from its log-probs of its own tokens (pure).

A text's first o bytes have, under the teacher, the probability of every way to write them. Counted are its own tokenisation of the text as
far as it goes, then any one token that reaches byte o and agrees with the text:

    F(o) = log sum over q of p(own tokens before q) p(tokens at q that spell the text on to o or beyond)

Beyond o only where the student, writing the same bytes, would cut at o too: what the student writes in one token is no other way to
begin with a shorter one. Where both vocabularies are the same, nothing but the token itself is left.

A student's token from byte a to byte b has log p = F(b) - F(a): the teacher's conditional probability of its bytes. So a token is charged
for what it says, not for how the teacher would have gone on: where the student says "1;" in two tokens and the teacher in one, a wrong
"1" is charged to "1", and ";" is what follows from it. The sum over a finished response is the log-prob of its own tokenisation.
Source: cover encodings, "Exact byte-level probabilities from tokenized language models", arXiv 2410.09303.

Shapes: T = the student's tokens of one response, J = the teacher's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

REACH_TOKENS = 4
"""How many of its own tokens a teacher's longer token may stand in place of."""


class Other(NamedTuple):
    """A token that the teacher might have written instead."""

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
    pieces: Sequence[bytes]
    logp_J: np.ndarray
    others: Sequence[Sequence["Other"]]
    """For each token, the likeliest others in its place."""


def conditionals(end_T: np.ndarray, lost_T: np.ndarray, own: OwnTokens) -> tuple[np.ndarray, np.ndarray]:
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
            mass = _log_mass(last, end, total_J, own)
            logp_T[place], base = mass - base, mass
        start = end
    return logp_T, own_T


def _log_mass(last: int, end: int, total_J: np.ndarray, own: OwnTokens) -> float:
    """F at mark `end`, which lies in, or at the end of, the teacher's token `last`."""
    terms = [float(total_J[last + 1])]
    text = b""
    for place in range(last, max(-1, last - REACH_TOKENS), -1):
        if own.event_J[place]:
            break
        piece = own.pieces[place]
        text = piece[: end - int(own.start_J[place])] if place == last else piece + text
        terms += [
            float(total_J[place]) + other.logp for other in own.others[place] if len(text) in other.cuts and other.piece.startswith(text)
        ]
    highest = max(terms)
    return highest + math.log(sum(math.exp(term - highest) for term in terms))
