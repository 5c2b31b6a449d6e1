"""The body of POST /v1/runs/{name}/steps, and how it is read into a StepSeen."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opd_governor.services.control.problem import MAX_INTEGER
from opd_governor.services.sidecar.seen import StepSeen

MAX_ITEMS = 65_536
REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn", "tool_calls", "function_call"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length"), "length"),
    "repetition": "repetition",
    **dict.fromkeys(("abort", "error", "cancelled", "content_filter"), "error"),
}
"""What engines call the end of an answer -> stop, length, repetition or error. Answers that ended in an error are left out."""

Tokens = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[int, Field(ge=0, le=1_000_000_000)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
Any64 = Annotated[float, Field(ge=-1e30, le=1e30)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LengthHistogram(_Strict):
    """Lengths as counts between edges."""

    edges: Annotated[list[Length], Field(min_length=1, max_length=4096)]
    """Upper edge of each bucket, tokens, rising."""
    counts: Annotated[list[Count], Field(min_length=1, max_length=4096)]
    """Answers in each bucket, not cumulative."""

    @model_validator(mode="after")
    def _fits(self) -> "LengthHistogram":
        if len(self.edges) != len(self.counts):
            raise ValueError(f"{len(self.edges)} edges and {len(self.counts)} counts: give one count for each edge")
        if any(left >= right for left, right in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError("edges must rise")
        if sum(self.counts) > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} answers in one step")
        return self

    def lengths(self) -> list[int]:
        """Each answer at its bucket's upper edge: at most a bucket too long."""
        return [edge for edge, count in zip(self.edges, self.counts, strict=True) for _ in range(count)]


class StepPost(_Strict):
    """What a trainer has after a step. Every field but `step` is optional; what is left out stays unknown."""

    step: Annotated[int, Field(ge=0, le=MAX_INTEGER)]
    """The trainer's own step. The same step with the same body is answered as before."""
    lengths: Annotated[list[Length], Field(max_length=MAX_ITEMS)] | None = None
    """Tokens of each answer."""
    finish_reasons: (
        Annotated[list[Annotated[str, Field(json_schema_extra={"enum": list(REASONS)})]], Field(max_length=MAX_ITEMS)] | None
    ) = None
    """Why each answer ended, in the order of `lengths`, as the engine calls it."""
    length_histogram: LengthHistogram | None = None
    """In place of `lengths`."""
    finish_counts: Annotated[dict[str, Count], Field(max_length=16)] | None = None
    """Reason -> answers, in place of `finish_reasons`."""
    reference_lengths: Annotated[list[Tokens], Field(max_length=MAX_ITEMS)] | None = None
    """How long answers to these prompts ought to be, tokens: the teacher's or golden ones."""
    reference_cut_lengths: Annotated[list[Tokens], Field(max_length=MAX_ITEMS)] | None = None
    """Of reference answers that did not end: where they were cut, tokens."""
    cap_tokens: Annotated[float, Field(ge=1, le=1e9)] | None = None
    """The cap that applied to these answers."""
    num_rollouts: Annotated[float, Field(ge=0, le=1e9)] | None = None
    length_mean_tokens: Tokens | None = None
    length_p95_tokens: Tokens | None = None
    length_max_tokens: Tokens | None = None
    truncation: Share | None = None
    """Share of answers that were cut."""
    loops: Share | None = None
    """Share of answers that end in a loop."""
    kl_nats: Any64 | None = None
    """Mean KL per token, student minus teacher."""
    entropy_nats: Any64 | None = None
    reward: Any64 | None = None
    loss: Any64 | None = None
    grad_norm: Any64 | None = None
    learning_rate: Any64 | None = None
    reference_mean_tokens: Tokens | None = None
    reference_p99_tokens: Tokens | None = None
    """In place of `reference_lengths`."""

    @model_validator(mode="after")
    def _consistent(self) -> "StepPost":
        if self.lengths is not None and self.length_histogram is not None:
            raise ValueError("lengths and length_histogram say the same: give one of them")
        if self.finish_reasons is not None:
            if len(self.finish_reasons) != len(self.lengths or ()):
                raise ValueError(f"{len(self.lengths or ())} lengths and {len(self.finish_reasons)} finish_reasons: give one for each")
            if unknown := set(self.finish_reasons) - REASONS.keys():
                raise ValueError(f"finish reason {min(unknown)[:40]!r} is not known; known: {', '.join(REASONS)}")
        if self.finish_counts is not None and (unknown := self.finish_counts.keys() - REASONS.keys()):
            raise ValueError(f"finish reason {min(unknown)[:40]!r} is not known; known: {', '.join(REASONS)}")
        return self

    def seen(self) -> StepSeen:
        """With everything that follows from lengths and ends; figures that were posted outright win over those worked out."""
        told: dict[str, Any] = {name: value for name in _OUTRIGHT if (value := getattr(self, name)) is not None}
        lengths = self.length_histogram.lengths() if self.length_histogram else list(self.lengths or ())
        reasons: list[str] = []
        if self.finish_reasons is not None:
            ends = [REASONS[reason] for reason in self.finish_reasons]
            reasons = [end for end in ends if end != "error"]
            lengths = [length for length, end in zip(lengths, ends, strict=True) if end != "error"]
        if self.finish_counts is not None:
            told |= _shares(self.finish_counts)
        from dataclasses import replace

        return replace(StepSeen.of_completions(self.step, lengths, reasons, cap_tokens=self.cap_tokens), **told)


_OUTRIGHT = (
    "num_rollouts", "length_mean_tokens", "length_p95_tokens", "length_max_tokens", "truncation", "loops", "kl_nats", "entropy_nats",
    "reward", "loss", "grad_norm", "learning_rate", "reference_mean_tokens", "reference_p99_tokens",
)  # fmt: skip


def _shares(counts: dict[str, int]) -> dict[str, float]:
    """Truncation and loops of finish counts."""
    total: dict[str, int] = {}
    for reason, count in counts.items():
        total[REASONS[reason]] = total.get(REASONS[reason], 0) + count
    answers = sum(count for end, count in total.items() if end != "error")
    if not answers:
        return {}
    cut = total.get("length", 0) + total.get("repetition", 0)
    shares = {"num_rollouts": float(answers), "truncation": cut / answers}
    return shares | ({"loops": total["repetition"] / answers} if "repetition" in total else {})
