"""Learning rates and decay groups."""

import itertools

import pytest
import torch

from opd_governor.actors.learner.optimizer import build_optimizer, learning_rate_at
from opd_governor.actors.learner.settings import LearnerSettings


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_to_the_rate_and_the_end_is_the_minimum(schedule: str) -> None:
    settings = LearnerSettings(learning_rate=2.0, warmup_steps=4, total_steps=20, schedule=schedule, min_lr_ratio=0.25)  # type: ignore[arg-type]
    rates = [learning_rate_at(step, settings) for step in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_decay_spares_vectors() -> None:
    optimizer = build_optimizer(list(torch.nn.Linear(3, 2).parameters()), LearnerSettings(weight_decay=0.1))
    assert [(group["weight_decay"], group["params"][0].ndim) for group in optimizer.param_groups] == [(0.1, 2), (0.0, 1)]
