"""The signals of the law before: what it decided on."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LARGEST = 1e15
"""No length, count or rate of a run comes near this: beyond it a number is a fault of the source."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Lengths of golden or teacher answers, tokens."""

    mean_tokens: float | None = None
    p99_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Signals:
    """What the law decides on. None: not measured. Rates and means are over the rollouts since the reading before."""

    time_s: float | None = None
    """When it was read, seconds since the epoch."""
    data_age_s: float | None = 0.0
    """How long before that the run itself was last seen; None: unknown, which counts as too old."""
    blind: bool = False
    """The source gave nothing that can be trusted."""
    blind_reason: str = ""
    steps_spanned: float | None = None
    """Learner steps between the two readings."""
    num_rollouts: float | None = None
    """Rollouts that came to an end other than an error."""
    tail_share: float | None = None
    """Share longer than a multiple of the reference p99, rollouts cut by a lowered cap included."""
    length_mean_tokens: float | None = None
    length_p95_tokens: float | None = None
    length_max_tokens: float | None = None
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    truncation_rate: float | None = None
    """Cut by the job's own cap or by the in-engine loop stop, before any filter."""
    governor_cut_rate: float | None = None
    """Cut by a cap that the governor had lowered."""
    loop_rate: float | None = None
    kl_nats: float | None = None
    stop_mass_student: float | None = None
    """Mean over positions of the student's summed probability of all stop ids."""
    stop_mass_teacher: float | None = None
    """The teacher's, at the same positions."""
    stop_density_per_token: float | None = None
    """Stop supervision: (1 - share cut by any cap) / mean length."""
    teacher_stop_logprob_nats: float | None = None
    """Median log-prob of the teacher's stop class at sampled stops."""
    eval_accuracy: float | None = None
    eval_truncation: float | None = None
    staleness_steps: float | None = None

    def cleaned(self) -> "Signals":
        """What is not finite, absurdly large, or negative where it cannot be, becomes None."""

        def clean(name: str, value: Any) -> Any:
            if not isinstance(value, int | float) or isinstance(value, bool):
                return value
            signed = name in ("kl_nats", "teacher_stop_logprob_nats")
            return value if math.isfinite(value) and abs(value) <= LARGEST and (signed or value >= 0) else None

        return Signals(**{name: clean(name, value) for name, value in asdict(self).items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Signals":
        return cls(**values)
