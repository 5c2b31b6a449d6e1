"""What a batch says about the student: sums and counts, so that means over batches are ratios (pure torch).

Shapes: N response tokens of a micro-batch, E stop ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.learner.objective import TokenFields, TokenLosses

POSITION_EDGES = (16, 32, 64, 128, 256, 512, 1024)
POSITIONS = ("0-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512-1023", "1024+")
"""Buckets of a token's index in its response."""


@dataclass(frozen=True, slots=True)
class BatchMetrics:
    """Sums over the student's own tokens (golden ones left out), before any mask; nats."""

    num_tokens: int = 0
    kl_nats: dict[str, float] = field(default_factory=dict)
    """Reverse KL estimate log pS - log pT of the action, by position bucket."""
    kl_tokens: dict[str, int] = field(default_factory=dict)
    entropy_nats: float = 0.0
    clipped_tokens: float = 0.0
    masked_tokens: int = 0
    """Tokens with weight 0 in the loss."""
    student_stop_mass: float = 0.0
    """Sum of the probability of the stop event."""
    teacher_stop_mass: float = 0.0
    stop_logprobs_raw: tuple[float, ...] = ()
    """Teacher's log-prob of the very id, at each sampled stop."""
    stop_logprobs_class: tuple[float, ...] = ()
    """Teacher's log-prob of stopping by any id, at each sampled stop."""

    @property
    def kl_mean_nats(self) -> float:
        """Mean over tokens; 0 without any."""
        return sum(self.kl_nats.values()) / max(1, sum(self.kl_tokens.values()))


def measure(parts: Sequence[tuple[TokenFields, TokenLosses]], stop_ids_E: Tensor) -> BatchMetrics:
    """Metrics of a whole batch from its micro-batches."""

    def cat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().cpu() for tensor in tensors])

    mine = cat([fields.rollout_N for fields, _ in parts])
    if not bool(mine.any()):
        return BatchMetrics()
    position = cat([fields.position_N for fields, _ in parts])[mine]
    kl = cat([losses.kl_N for _, losses in parts])[mine].double()
    bucket = torch.bucketize(position, torch.tensor(POSITION_EDGES), right=True)
    at_stop = torch.isin(cat([fields.sampled_ids_N for fields, _ in parts])[mine], stop_ids_E.cpu())
    teacher_stop = cat([losses.teacher_stop_logp_N for _, losses in parts])[mine].double()
    teacher_raw = cat([losses.teacher_logp_N for _, losses in parts])[mine]
    sums, counts = torch.zeros(len(POSITIONS)).double(), torch.bincount(bucket, minlength=len(POSITIONS))
    sums.index_add_(0, bucket, kl)
    present = [(name, float(total), int(count)) for name, total, count in zip(POSITIONS, sums, counts, strict=True) if count]
    return BatchMetrics(
        num_tokens=len(kl),
        kl_nats={name: total for name, total, _ in present},
        kl_tokens={name: count for name, _, count in present},
        entropy_nats=float(cat([losses.entropy_N for _, losses in parts])[mine].double().sum()),
        clipped_tokens=float(cat([losses.clipped_N for _, losses in parts])[mine].sum()),
        masked_tokens=int((cat([fields.weight_N for fields, _ in parts])[mine] == 0).sum()),
        student_stop_mass=float(cat([losses.student_stop_logp_N for _, losses in parts])[mine].double().exp().sum()),
        teacher_stop_mass=float(teacher_stop.exp().sum()),
        stop_logprobs_raw=tuple(teacher_raw[at_stop].tolist()),
        stop_logprobs_class=tuple(teacher_stop[at_stop].tolist()),
    )
