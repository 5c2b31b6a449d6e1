"""AdamW over the trainable weights and the learning rate of each step (pure torch)."""

import math

import torch

from opd_governor.actors.learner.settings import LearnerSettings


def build_optimizer(parameters: list[torch.nn.Parameter], settings: LearnerSettings) -> torch.optim.AdamW:
    """Fused AdamW; weight decay spares vectors (norms, biases)."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas, fused=True)


def learning_rate_at(step: int, settings: LearnerSettings, base: float | None = None) -> float:
    """Linear warm-up, then constant, cosine or linear to min_lr_ratio at total_steps. Steps count from 0.

    `base` replaces `settings.learning_rate` where a person tuned it.

    >>> learning_rate_at(0, LearnerSettings(learning_rate=1.0, warmup_steps=4))
    0.25
    """
    base = settings.learning_rate if base is None else base
    if step < settings.warmup_steps:
        return base * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return base
    progress = min(1.0, (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps))
    share = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return base * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share)
