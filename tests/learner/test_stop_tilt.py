"""The stop tilt moves the optimum where the formula says, and with it the length of samples."""

import math

import pytest
import torch

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.weights import stop_tilt

VOCABULARY, NUM_STATES, STOP_IDS = 5, 24, torch.tensor([1, 4])
EVERY_ID = torch.arange(VOCABULARY)
LOSSES = {
    "sampled": ObjectiveSettings(importance_cap=None),
    "sampled, raw": ObjectiveSettings(importance_cap=None, stop_event="raw"),
    "full reverse": ObjectiveSettings(support="full"),
    "full reverse, raw": ObjectiveSettings(support="full", stop_event="raw"),
    "full jsd": ObjectiveSettings(support="full", loss="jsd"),
    "top-k forward, tail": ObjectiveSettings(support="union", loss="forward_kl", tail_bucket=True),
    "top-k mixed": ObjectiveSettings(support="union", loss="mixed_kl"),
}


def teacher_logits():
    """A teacher that stops at each of 24 positions with probability about 1/10, split over two stop ids."""
    logits = torch.randn(NUM_STATES, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits - torch.tensor([0.0, 2.0, 0.0, 0.0, 2.5], dtype=torch.float64)


def expected_loss(logits, teacher, tilt, settings):
    """The loss a student with these logits meets on average: every id at every state, as often as the student draws it."""
    rows, sampled = logits.repeat_interleave(VOCABULARY, 0), EVERY_ID.repeat(NUM_STATES)
    teacher_logp = teacher.repeat_interleave(VOCABULARY, 0).log_softmax(-1)
    zero = torch.zeros(len(sampled), dtype=torch.float64)
    support = EVERY_ID.expand(len(sampled), -1)
    fields = TokenFields(
        sampled_ids_N=sampled,
        position_N=torch.arange(NUM_STATES).repeat_interleave(VOCABULARY),
        rollout_N=zero == 0,
        weight_N=rows.detach().softmax(-1)[torch.arange(len(sampled)), sampled],
        golden_weight_N=zero,
        behaviour_logp_N=zero,
        teacher_logp_N=teacher_logp[torch.arange(len(sampled)), sampled],
        teacher_stop_logp_N=teacher_logp[:, STOP_IDS].logsumexp(-1),
        tilt_N=tilt.repeat_interleave(VOCABULARY),
        overlong_N=zero,
        support_ids_NK=support,
        support_logp_NK=teacher_logp,
    )
    return (fields.weight_N * token_losses(rows, fields, settings, STOP_IDS, teacher_logp).loss_N).sum()


def descend(teacher, tilt, settings):
    """Where gradient descent ends: [states, ids] probabilities."""
    logits = torch.zeros(NUM_STATES, VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(400):
        optimizer.zero_grad()
        expected_loss(logits, teacher, tilt, settings).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)


def tilt_of(strength):
    return torch.from_numpy(stop_tilt(NUM_STATES, strength, target_tokens=6, width_tokens=8))


def tilted_teacher(teacher, strength):
    """From the formula: p(v) e^b on stops, renormalised; b rises over positions 6 to 14."""
    rows = []
    for position, row in enumerate(teacher.softmax(-1)):
        b = strength * min(max((position - 6) / 8, 0), 1)
        lifted = [mass * math.exp(b) if token in STOP_IDS.tolist() else mass for token, mass in enumerate(row.tolist())]
        rows.append([mass / sum(lifted) for mass in lifted])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_optimum_is_the_tilted_teacher(loss):
    settings, teacher = LOSSES[loss], teacher_logits()
    found, wanted = descend(teacher, tilt_of(2.0), settings), tilted_teacher(teacher, 2.0)
    if settings.stop_event == "class":
        words = [token for token in range(VOCABULARY) if token not in STOP_IDS.tolist()]
        found, wanted = (torch.cat([p[:, words], p[:, STOP_IDS].sum(-1, keepdim=True)], -1) for p in (found, wanted))
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tilt_is_the_untilted_loss_to_the_last_bit(loss):
    settings, teacher = LOSSES[loss], teacher_logits()
    student = teacher.flip(0)
    at_rest = expected_loss(student, teacher, tilt_of(0.0), settings)
    out_of_reach = expected_loss(student, teacher, torch.from_numpy(stop_tilt(NUM_STATES, 5.0, NUM_STATES, 8)), settings)
    assert at_rest == out_of_reach
    assert at_rest != expected_loss(student, teacher, tilt_of(0.5), settings)


@pytest.mark.parametrize("loss", ["sampled", "full reverse"])
def test_samples_get_shorter_as_the_tilt_grows(loss):
    teacher = teacher_logits()
    means = []
    for strength in (0.0, 1.0, 2.0, 4.0):
        probs = descend(teacher, tilt_of(strength), LOSSES[loss])
        tokens = torch.multinomial(probs, 4000, replacement=True, generator=torch.Generator().manual_seed(1))
        ended = torch.isin(tokens, STOP_IDS).cumsum(0) > 0
        means.append(float((~ended).sum(0).double().mean()) + 1)
    assert means[0] > means[1] > means[2] > means[3]
    assert means[0] - means[3] > 1
