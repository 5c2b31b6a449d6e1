"""What one step is made of, as its record describes it: the terms of a batch, the batch, the weight sync after it."""

from collections.abc import Sequence
from dataclasses import dataclass

from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, Trajectory
from opd_governor.services.inputs.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from, and what it was launched under."""

    step: int
    trajectories: list[Trajectory]
    """Every rollout, before any filter."""
    scored: list[ScoredRollout]
    """Those admitted and scored, in the order of their prompts."""
    nonfinite: list[Trajectory]
    """Rollouts with non-finite log-probs from their engine: not scored, not learned from, counted as unscored."""
    num_over_quota: int
    num_unscored: int
    limits: LengthLimits
    """Those it was launched under."""
    max_new_tokens: int
    """The job's own cap when it was launched."""
    config_generation: int
    rollout_s: float
    score_s: float
    """Wait for scores after the last rollout: the scoring that rollouts did not hide."""
    num_undemonstrated: int = 0
    """Rollouts left out because no other one of their prompt was right (teacher.demonstration)."""
    unjudged: tuple[Verdict, ...] = ()
    """Verdicts without a score."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The terms a batch is sampled on."""

    step: int
    prompts: Sequence[Prompt]
    limits: LengthLimits
    settings: RolloutSettings
    config_generation: int


@dataclass(frozen=True, slots=True)
class Sync:
    """One weight sync."""

    seconds: float = 0.0
    gap_nats: float = 0.0
    """Largest engine-learner difference on the probe."""
    tolerance_nats: float = 0.0
    weight_version: int = 0
    """What the engines sample with afterwards."""
    lost: bool = False
    """Of a LoRA student: the engine answers as the base, though the learner has moved away from it."""

    @property
    def sound(self) -> bool:
        """False for a NaN gap, too."""
        return self.gap_nats <= self.tolerance_nats and not self.lost

    @property
    def words(self) -> str:
        """What is wrong with one that is not sound."""
        if self.lost:
            return "the engine answers as the student's base on the probe: the addition did not reach it"
        return f"engine and learner differ by {self.gap_nats:.3g} nats on the probe, tolerance {self.tolerance_nats:.3g}"
