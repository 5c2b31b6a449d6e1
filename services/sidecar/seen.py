"""What one step of any trainer tells about length: the one form that logs, posted steps, callbacks and the proxy are read into. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from opd_governor.actors.rollout.loops import find_loop

Trust = Literal["engine", "trainer", "derived"]
"""Who counted: the engine's own finish reasons, the trainer's figures, or a figure worked out from others."""

LOOP_MIN_REPEATS, LOOP_MIN_TOKENS = 3, 32
"""A completion whose end repeats one unit this often, over at least this many tokens, ends in a loop."""


@dataclass(frozen=True, slots=True)
class StepSeen:
    """One step. None: not logged, which is never the same as 0.

    >>> StepSeen.of_completions(3, [12, 40, 64], ["stop", "stop", "length"], cap_tokens=64).truncation
    0.3333333333333333
    """

    step: int
    num_rollouts: float | None = None
    length_mean_tokens: float | None = None
    length_p95_tokens: float | None = None
    length_max_tokens: float | None = None
    length_min_tokens: float | None = None
    terminated_mean_tokens: float | None = None
    """Mean length of the answers that stopped by themselves."""
    truncation: float | None = None
    """Share of answers that were cut, in [0, 1]."""
    loops: float | None = None
    """Share of answers that end in a loop, in [0, 1]."""
    kl_nats: float | None = None
    """Student minus teacher, or student minus reference where the trainer has no teacher."""
    entropy_nats: float | None = None
    reward: float | None = None
    """Reward or accuracy: higher is better."""
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    cap_tokens: float | None = None
    """The cap that applied to these answers."""
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    lengths: tuple[int, ...] = ()
    """Of every answer, where the trainer tells."""
    truncation_trust: Trust = "trainer"

    @classmethod
    def of_completions(
        cls,
        step: int,
        lengths: Sequence[int],
        finish_reasons: Sequence[str] = (),
        *,
        cap_tokens: float | None = None,
        loops: float | None = None,
        **others: Any,
    ) -> "StepSeen":
        """From each answer's length (tokens) and, where known, why it ended: `stop`, `length` or `repetition`.

        Without finish reasons an answer as long as the cap counts as cut. Raises ValueError where the two lists differ in length.
        """
        if finish_reasons and len(finish_reasons) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths and {len(finish_reasons)} finish_reasons: give one reason for each length")
        seen = cls(step=step, cap_tokens=cap_tokens, loops=loops, **others)
        if not lengths:
            return seen
        ordered = sorted(lengths)
        cut: float | None = None
        ended: list[int] = []
        trust: Trust = "engine"
        if finish_reasons:
            cut = sum(reason in ("length", "repetition") for reason in finish_reasons) / len(lengths)
            ended = [length for length, reason in zip(lengths, finish_reasons, strict=True) if reason == "stop"]
            if loops is None and "repetition" in finish_reasons:
                loops = sum(reason == "repetition" for reason in finish_reasons) / len(lengths)
        elif cap_tokens is not None:
            cut, trust = sum(length >= cap_tokens for length in lengths) / len(lengths), "derived"
            ended = [length for length in lengths if length < cap_tokens]
        return replace(
            seen,
            num_rollouts=float(len(lengths)),
            length_mean_tokens=sum(lengths) / len(lengths),
            length_p95_tokens=float(quantile(ordered, 0.95)),
            length_max_tokens=float(ordered[-1]),
            length_min_tokens=float(ordered[0]),
            terminated_mean_tokens=sum(ended) / len(ended) if ended else None,
            truncation=cut,
            loops=loops,
            lengths=tuple(lengths),
            truncation_trust=trust,
        )

    def numbers(self) -> dict[str, float]:
        """The fields that hold a number, `step` apart."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if name != "step" and isinstance(value, int | float)}


NUMBERS = tuple(field.name for field in fields(StepSeen) if field.name not in ("step", "lengths", "truncation_trust"))
"""Names of the fields that are single numbers."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in rising order: the smallest one that at least this share does not exceed."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def ends_in_loop(token_ids: Sequence[int], stop_ids: frozenset[int] = frozenset()) -> bool:
    """Whether an answer's end repeats one unit; a sampled stop id at its end is left out of the search."""
    ids = list(token_ids)
    while ids and ids[-1] in stop_ids:
        ids.pop()
    return find_loop(ids, min_repeats=LOOP_MIN_REPEATS, min_tokens=LOOP_MIN_TOKENS) is not None


def text_ends_in_loop(text: str) -> bool:
    """The same for text, on its characters: about four to a token, so the loop must be four times as long."""
    return find_loop([ord(char) for char in text], min_repeats=LOOP_MIN_REPEATS, min_tokens=4 * LOOP_MIN_TOKENS) is not None
