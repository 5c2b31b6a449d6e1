"""What a batch tells about itself, as sums and counts: means are ratios, so micro-batches and ranks simply add.

Shapes: P position buckets, M sampled stops.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_governor.actors.learner.fields import TokenFields, TokenLosses

POSITION_EDGES = (16, 32, 64, 128, 256, 512, 1024)
POSITION_BUCKETS = ("0-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512-1023", "1024+")
"""Buckets of a token's index in its response; length inflation shows late in the response first."""


@dataclass(frozen=True, slots=True)
class SignalSums:
    """Sums over the tokens that one of the signals moves, of its advantage on each, nats. Their mean and spread are ratios of these."""

    num_tokens: int = 0
    nats: float = 0.0
    squares: float = 0.0
    pull: float = 0.0
    """Sum of (weight x advantage) squared: the square of the signal's gradient by log-probs, before clip and importance weight."""

    def __add__(self, other: "SignalSums") -> "SignalSums":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return SignalSums(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @property
    def mean(self) -> float:
        return self.nats / self.num_tokens

    @property
    def spread(self) -> float:
        """Standard deviation."""
        return max(0.0, self.squares / self.num_tokens - self.mean**2) ** 0.5


@dataclass(frozen=True, slots=True)
class BatchMetrics:
    """Sums over rollout tokens, masked ones included: a mask must not flatter a metric. Golden tokens are apart.

    >>> total = summarise(losses_a, micro_a.fields, stop_ids) + summarise(losses_b, micro_b.fields, stop_ids)
    >>> mean_kl_nats = total.kl_nats_P.sum() / total.num_tokens_P.sum()
    """

    loss: float
    """The distillation term of the batch's loss: sum of weight x loss."""
    num_tokens_P: np.ndarray
    kl_nats_P: np.ndarray
    """Sum of log pS - log pT at the sampled tokens. Its mean is reverse KL where rollouts are sampled at temperature 1 without filters, and
    the log-ratio of what was sampled elsewhere (see `TokenLosses.kl_N`)."""
    num_masked_tokens: int
    """Rollout tokens of weight 0."""
    num_clipped_tokens: int
    entropy_nats: float
    reference_kl_nats: float
    student_stop_mass: float
    """Summed probability of a stop, over all rollout tokens."""
    teacher_stop_mass: float
    num_golden_tokens: int
    golden_nats: float
    """Cross-entropy summed over golden tokens."""
    teacher_stop_logp_raw_M: np.ndarray
    """The teacher's log-prob of the very id the student stopped on."""
    teacher_stop_logp_class_M: np.ndarray
    """The same of any stop id: a gap between the two is a stop-token mismatch."""
    teacher_signal: "SignalSums" = field(default_factory=lambda: SignalSums())
    """What the teacher asks of the sampled tokens; under a dense loss, what it would ask of them alone."""
    reward_signal: "SignalSums" = field(default_factory=lambda: SignalSums())
    """What the verifier asks of them; all 0 without a reward."""
    num_outlier_tokens: int = 0
    """Outside the trust region."""

    def __add__(self, other: "BatchMetrics") -> "BatchMetrics":
        def add(name: str) -> Any:
            mine, theirs = getattr(self, name), getattr(other, name)
            return np.concatenate([mine, theirs]) if name.endswith("_M") else mine + theirs

        return BatchMetrics(**{f.name: add(f.name) for f in dataclasses.fields(self)})


@torch.no_grad()
def summarise(losses: TokenLosses, fields: TokenFields, stop_ids_E: Tensor) -> BatchMetrics:
    """The metrics of one micro-batch, on the CPU."""
    rollout_N, golden_N = fields.rollout_N, fields.golden_weight_N > 0
    stop_N = rollout_N & torch.isin(fields.sampled_ids_N, stop_ids_E)
    bucket_N = torch.bucketize(fields.position_N[rollout_N].cpu(), torch.tensor(POSITION_EDGES), right=True)

    def total(values_N: Tensor, where_N: Tensor = rollout_N) -> float:
        return float(values_N[where_N].double().sum())

    return BatchMetrics(
        loss=float((fields.weight_N * losses.loss_N).double().sum()),
        num_tokens_P=torch.bincount(bucket_N, minlength=len(POSITION_BUCKETS)).numpy(),
        kl_nats_P=torch.bincount(bucket_N, losses.kl_N[rollout_N].double().cpu(), minlength=len(POSITION_BUCKETS)).numpy(),
        num_masked_tokens=int(total(fields.weight_N == 0)),
        num_clipped_tokens=int(total(losses.clipped_N)),
        num_outlier_tokens=int(total(losses.outlier_N)),
        entropy_nats=total(losses.entropy_N),
        reference_kl_nats=total(losses.reference_kl_N),
        student_stop_mass=total(losses.student_stop_logp_N.exp()),
        teacher_stop_mass=total(losses.teacher_stop_logp_N.exp()),
        num_golden_tokens=int(golden_N.sum()),
        golden_nats=-total(losses.action_logp_N, golden_N),
        teacher_stop_logp_raw_M=losses.teacher_logp_N[stop_N].float().cpu().numpy(),
        teacher_stop_logp_class_M=losses.teacher_stop_logp_N[stop_N].float().cpu().numpy(),
        teacher_signal=_sums(losses.signal_N, fields.weight_N),
        reward_signal=_sums(fields.reward_N, fields.reward_weight_N),
    )


def _sums(signal_N: Tensor | None, weight_N: Tensor | None) -> SignalSums:
    if signal_N is None or weight_N is None:
        return SignalSums()
    signal_N, weight_N = signal_N[weight_N > 0].double(), weight_N[weight_N > 0].double()
    return SignalSums(len(signal_N), float(signal_N.sum()), float(signal_N.square().sum()), float((weight_N * signal_N).square().sum()))
