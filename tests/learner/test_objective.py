"""Every loss against its formula: values, gradients, expectations, and what equal models leave alone."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from opd_governor.actors.learner.fields import LazyLogits, TokenFields
from opd_governor.actors.learner.objective import chunked_objective, token_losses
from opd_governor.actors.learner.sampled import policy_gradient
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.weights import token_weights
from tests.learner import brute_force

DENSE_LOSSES = ("reverse_kl", "forward_kl", "mixed_kl", "jsd", "skew_kl")
SUPPORTS = [("union", False), ("union", True), ("full", False)]
REDUCTIONS = ("token_mean", "sequence_mean", "constant")


def identity(logits):
    return logits


def compute(case, settings, *, chunk_tokens=1000, dtype=torch.float64):
    """Loss and gradient by the code under test, from a brute-force case."""
    ends = np.cumsum(case.lengths[:-1])
    masks = np.split(np.array(case.masks[: ends[-1]]), ends[:-1])
    weights = np.concatenate(
        [*token_weights(masks, settings.reduction, settings.constant_normaliser_tokens or 1.0), np.zeros(case.lengths[-1])]
    )
    logits = case.student_logits.clone().to(dtype).requires_grad_()
    loss, losses = chunked_objective(
        LazyLogits(logits, identity, ()),
        brute_force.fields_of(case, settings, weights.tolist()),
        settings,
        torch.tensor(case.stop_ids),
        chunk_tokens=chunk_tokens,
        reference_kl_weight=case.reference_kl_weight,
        teacher=LazyLogits(case.teacher_probs.log().to(dtype), identity, ()),
        reference=LazyLogits(case.reference_logits.to(dtype), identity, ()),
    )
    loss.backward()
    return loss.detach(), logits.grad, losses


def assert_matches_formula(case, settings):
    logits = case.student_logits.clone().requires_grad_()
    value, differentiable = brute_force.objective(case, settings, logits)
    differentiable.backward()
    loss, grad, _ = compute(case, settings)
    assert float(loss) == pytest.approx(value, rel=1e-5)
    assert (grad - logits.grad).norm() < 1e-5 * logits.grad.norm()
    assert logits.grad.norm() > 1e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("stop_event", ["class", "raw"])
@pytest.mark.parametrize(("support", "tail_bucket"), SUPPORTS)
@pytest.mark.parametrize("loss", DENSE_LOSSES)
def test_dense_loss_and_gradient_follow_the_formula(loss, support, tail_bucket, stop_event, reduction):
    settings = ObjectiveSettings(
        loss=loss,
        support=support,
        tail_bucket=tail_bucket,
        stop_event=stop_event,
        reduction=reduction,
        constant_normaliser_tokens=7.0,
        rkl_share=0.3,
        jsd_beta=0.2,
        skew_alpha=0.15,
    )
    assert_matches_formula(brute_force.random_case(1), settings)


SAMPLED_OPTIONS = {
    "plain": {},
    "no importance weight": {"importance_cap": None},
    "tight importance cap": {"importance_cap": 1.1},
    "clipped advantage": {"advantage_clip_nats": 0.5},
    "overlong penalty": {"overlong_weight": 0.7},
    "k3": {"reference_kl": "k3"},
    "narrow ratio clip": {"clip_low": 0.05, "clip_high": 0.1},
    "outliers clipped": {"trust_region_nats": 0.4},
    "outliers masked": {"trust_region_nats": 0.4, "outliers": "mask"},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("stop_event", ["class", "raw"])
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("option", SAMPLED_OPTIONS)
def test_sampled_loss_and_gradient_follow_the_formula(option, proximal, stop_event, reduction):
    settings = ObjectiveSettings(stop_event=stop_event, reduction=reduction, constant_normaliser_tokens=7.0, **SAMPLED_OPTIONS[option])
    assert_matches_formula(brute_force.random_case(2, proximal=proximal), settings)


@pytest.mark.parametrize("outliers", ["mask", "forward"])
@pytest.mark.parametrize("support", ["union", "full"])
@pytest.mark.parametrize("loss", ["reverse_kl", "jsd"])
def test_a_dense_loss_outside_the_trust_region_follows_the_formula(loss, support, outliers):
    case, settings = brute_force.random_case(1), ObjectiveSettings(loss=loss, support=support, trust_region_nats=0.4, outliers=outliers)
    assert_matches_formula(case, settings)
    assert 0 < compute(case, settings)[2].outlier_N.mean() < 1


def test_a_trust_region_that_nothing_obeys_is_refused():
    with pytest.raises(ValueError, match="outliers forward does not act on support sampled: set it to clip or mask"):
        ObjectiveSettings(trust_region_nats=1.0, outliers="forward")
    with pytest.raises(ValueError, match="outliers clip does not act on support full: set it to mask or forward"):
        ObjectiveSettings(trust_region_nats=1.0, support="full")


@pytest.mark.parametrize("loss", DENSE_LOSSES)
@pytest.mark.parametrize("teacher_vocabulary", [8, 9, 12])
def test_vocabularies_padded_differently_meet_on_their_common_prefix(loss, teacher_vocabulary):
    case = brute_force.random_case(3, teacher_vocabulary=teacher_vocabulary)
    assert_matches_formula(case, ObjectiveSettings(loss=loss, support="full"))


def test_the_case_is_as_nasty_as_it_claims():
    case = brute_force.random_case(2, proximal=True)
    assert any(len(set(support)) < len(support) for support in case.supports)
    assert [-1] * 8 in case.supports
    assert any(max(support) >= case.student_logits.shape[1] for support in case.supports)
    assert 0 in case.lengths
    _, _, losses = compute(case, ObjectiveSettings())
    assert 0 < losses.clipped_N.mean() < 1


@pytest.mark.parametrize(("support", "loss"), [("sampled", "reverse_kl")] + [(s, loss) for s in ("union", "full") for loss in DENSE_LOSSES])
def test_chunks_change_nothing(support, loss):
    case, settings = brute_force.random_case(4), ObjectiveSettings(support=support, loss=loss)
    whole, whole_grad, whole_losses = compute(case, settings)
    for chunk_tokens in (1, 7):
        loss, grad, losses = compute(case, settings, chunk_tokens=chunk_tokens)
        assert torch.allclose(loss, whole, rtol=1e-12)
        assert torch.allclose(grad, whole_grad, rtol=1e-10, atol=1e-14)
        assert torch.allclose(losses.kl_N, whole_losses.kl_N)


@pytest.mark.parametrize(("support", "tail_bucket"), SUPPORTS)
@pytest.mark.parametrize("loss", DENSE_LOSSES)
def test_gradcheck_of_dense_losses(loss, support, tail_bucket):
    case, settings = brute_force.random_case(5), ObjectiveSettings(loss=loss, support=support, tail_bucket=tail_bucket)
    fields = brute_force.fields_of(case, settings, [1.0] * len(case.sampled)).select(slice(0, 6))
    stop_ids, teacher, reference = torch.tensor(case.stop_ids), case.teacher_probs[:6].log(), case.reference_logits[:6]

    def terms(logits):
        losses = token_losses(logits, fields, settings, stop_ids, teacher, reference)
        return losses.loss_N, losses.reference_kl_N, losses.action_logp_N

    assert torch.autograd.gradcheck(terms, case.student_logits[:6].clone().requires_grad_())


def test_gradcheck_of_the_clipped_policy_gradient():
    case, settings = brute_force.random_case(6, proximal=True), ObjectiveSettings()
    fields = brute_force.fields_of(case, settings, [1.0] * len(case.sampled))
    rows = range(len(case.sampled))
    gap = case.teacher_probs[rows, case.sampled].log() - case.student_logits.log_softmax(-1)[rows, case.sampled]

    def loss(logits):
        logp = logits.log_softmax(-1)[rows, case.sampled]
        return policy_gradient(gap, logp.detach(), logp, fields, settings)[0]

    assert torch.autograd.gradcheck(loss, case.student_logits.clone().requires_grad_())


def one_state(num_draws, seed=0):
    """Student and teacher at one prefix; `num_draws` student samples there. Stop ids 4 and 5; the teacher prefers 5, the student 4."""
    student = torch.tensor([1.0, 0.2, -0.5, 0.3, 1.2, -1.0], dtype=torch.float64)
    teacher = torch.tensor([0.1, 0.9, -0.2, 0.6, -1.5, 1.4], dtype=torch.float64)
    sampled = torch.multinomial(student.softmax(-1), num_draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    return student, teacher, sampled, torch.tensor([4, 5])


def fields_at_one_state(student, teacher, sampled, stop_ids, tilt=0.0):
    teacher_logp, blank = teacher.log_softmax(-1), torch.zeros(len(sampled), dtype=torch.float64)
    return TokenFields(
        sampled_ids_N=sampled,
        position_N=torch.arange(len(sampled)),
        rollout_N=blank == 0,
        weight_N=blank + 1,
        golden_weight_N=blank,
        behaviour_logp_N=student.log_softmax(-1)[sampled],
        teacher_logp_N=teacher_logp[sampled],
        teacher_stop_logp_N=blank + teacher_logp[stop_ids].logsumexp(-1),
        tilt_N=blank + tilt,
        overlong_N=blank,
    )


def merge_stops(probs, stop_ids):
    keep = [token for token in range(len(probs)) if token not in stop_ids.tolist()]
    return torch.cat([probs[keep], probs[stop_ids].sum()[None]])


def exact_gradient(student, teacher, stop_ids, stop_event):
    logits = student.clone().requires_grad_()
    p, q = logits.softmax(-1), teacher.softmax(-1)
    if stop_event == "class":
        p, q = merge_stops(p, stop_ids), merge_stops(q, stop_ids)
    (p * (p.log() - q.log())).sum().backward()
    return logits.grad


def sampled_gradients(student, teacher, sampled, stop_ids, settings):
    """[num_draws, V] the gradient each draw alone would give."""
    rows = student.expand(len(sampled), -1).clone().requires_grad_()
    token_losses(rows, fields_at_one_state(student, teacher, sampled, stop_ids), settings, stop_ids).loss_N.sum().backward()
    return rows.grad


@pytest.mark.parametrize("stop_event", ["class", "raw"])
def test_the_sampled_estimator_has_the_gradient_of_the_exact_kl(stop_event):
    settings = ObjectiveSettings(stop_event=stop_event)
    student, teacher, sampled, stop_ids = one_state(40_000)
    exact = exact_gradient(student, teacher, stop_ids, stop_event)
    grads = sampled_gradients(student, teacher, sampled, stop_ids, settings)
    error = grads.std(0) / len(sampled) ** 0.5
    assert ((grads.mean(0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 8 * error).any(), "enough draws to tell the gradient from zero"

    every = sampled_gradients(student, teacher, torch.arange(6), stop_ids, settings)
    assert torch.allclose(student.softmax(-1) @ every, exact, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_rollouts_sampled_at_another_temperature_are_weighed_back(temperature):
    student, teacher, _, stop_ids = one_state(1)
    every, behaviour = torch.arange(6), (student / temperature).softmax(-1)
    fields = dataclasses.replace(fields_at_one_state(student, teacher, every, stop_ids), behaviour_logp_N=behaviour.log())
    rows = student.expand(6, -1).clone().requires_grad_()
    token_losses(rows, fields, ObjectiveSettings(importance_cap=1e6), stop_ids).loss_N.sum().backward()
    assert torch.allclose(behaviour @ rows.grad, exact_gradient(student, teacher, stop_ids, "class"), atol=1e-12)


def test_a_student_that_samples_no_stop_learns_to_stop_all_the_same():
    settings = ObjectiveSettings(importance_cap=None)
    student, teacher, sampled, stop_ids = one_state(400)
    sampled = sampled[~torch.isin(sampled, stop_ids)]

    def slope_of_the_stop(stop_weight):
        logits = student.clone().requires_grad_()
        fields = fields_at_one_state(student, teacher, sampled, stop_ids, tilt=4.0)
        fields = dataclasses.replace(fields, weight_N=fields.weight_N * 0, stop_weight_N=fields.weight_N * stop_weight / len(sampled))
        loss, _ = chunked_objective(
            LazyLogits(logits.expand(len(sampled), -1), lambda hidden: hidden, ()), fields, settings, stop_ids, chunk_tokens=64
        )
        loss.backward()
        return logits.grad

    p, q = student.softmax(-1)[stop_ids].sum(), teacher.softmax(-1)[stop_ids].sum()
    tilted = q * math.exp(4) / (1 + q * math.expm1(4))
    slope = slope_of_the_stop(0.5)
    assert slope[stop_ids].sum() == pytest.approx(0.5 * float(p - tilted))
    assert slope.sum() == pytest.approx(0, abs=1e-12)
    assert slope[stop_ids][0] / slope[stop_ids][1] == pytest.approx(float(student.softmax(-1)[4] / student.softmax(-1)[5]))


def test_a_topk_reward_as_advantage_does_not():
    student, teacher, sampled, stop_ids = one_state(40_000)
    p, q = student.softmax(-1), teacher.softmax(-1)
    top = p.topk(4).indices
    reward = -(p[top] / p[top].sum() * ((p[top] / p[top].sum()).log() - (q[top] / q[top].sum()).log())).sum()
    rows = student.expand(len(sampled), -1).clone().requires_grad_()
    (-reward * rows.log_softmax(-1).gather(-1, sampled[:, None])).sum().backward()
    error = rows.grad.std(0) / len(sampled) ** 0.5
    assert (rows.grad.mean(0).abs() < 4 * error).all(), "the same reward for every action: no gradient in expectation"
    exact = exact_gradient(student, teacher, stop_ids, "raw")
    assert ((rows.grad.mean(0) - exact).abs() > 8 * error).any()


def test_k3_has_the_gradient_of_kl_student_to_reference():
    student, reference, _, stop_ids = one_state(1)
    every = torch.arange(6)
    rows = student.expand(6, -1).clone().requires_grad_()
    fields = fields_at_one_state(student, reference, every, stop_ids)
    k3 = token_losses(rows, fields, ObjectiveSettings(reference_kl="k3"), stop_ids, None, reference.expand(6, -1)).reference_kl_N
    k3.sum().backward()
    p, ref = student.softmax(-1), reference.softmax(-1)
    assert torch.allclose(p @ k3.detach(), (p * (p.log() - ref.log())).sum())
    assert torch.allclose(p @ rows.grad, exact_gradient(student, reference, stop_ids, "raw"), atol=1e-12)


class TinyStudent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.head = torch.nn.Linear(8, 20)

    def forward(self, ids):
        return LazyLogits(self.body(ids), self.head, tuple(self.head.parameters()))


@pytest.mark.parametrize("reference_kl", ["exact", "k3"])
@pytest.mark.parametrize("stop_event", ["class", "raw"])
@pytest.mark.parametrize(
    ("support", "tail_bucket", "loss"), [("sampled", False, "reverse_kl")] + [(*s, loss) for s in SUPPORTS for loss in DENSE_LOSSES]
)
def test_equal_models_have_nothing_to_learn(support, tail_bucket, loss, stop_event, reference_kl):
    torch.manual_seed(0)
    student = TinyStudent()
    teacher = copy.deepcopy(student)
    settings = ObjectiveSettings(support=support, tail_bucket=tail_bucket, loss=loss, stop_event=stop_event, reference_kl=reference_kl)
    prefix, sampled, stop_ids = torch.arange(19), torch.arange(1, 20), torch.tensor([3, 11])
    with torch.no_grad():
        hidden, head, _ = teacher(prefix)
        logp = head(hidden).log_softmax(-1)
    top = logp.topk(6, -1)
    zero = torch.zeros(19)
    fields = TokenFields(
        sampled_ids_N=sampled,
        position_N=prefix,
        rollout_N=zero == 0,
        weight_N=zero + 1 / 19,
        golden_weight_N=zero,
        behaviour_logp_N=logp[prefix, sampled],
        teacher_logp_N=logp[prefix, sampled],
        teacher_stop_logp_N=logp[:, stop_ids].logsumexp(-1),
        tilt_N=zero,
        overlong_N=zero,
        support_ids_NK=top.indices.int(),
        support_logp_NK=top.values,
    )
    loss_value, _ = chunked_objective(
        student(prefix),
        fields,
        settings,
        stop_ids,
        chunk_tokens=19,
        reference_kl_weight=0.1,
        teacher=teacher(prefix),
        reference=teacher(prefix),
    )
    loss_value.backward()
    assert loss_value == 0
    assert all((parameter.grad == 0).all() for parameter in student.parameters())
    torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0).step()
    for after, before in zip(student.parameters(), teacher.parameters(), strict=True):
        assert (after - before).abs().max() <= 1e-7


@pytest.mark.parametrize(("support", "loss"), [("sampled", "reverse_kl")] + [("union", loss) for loss in DENSE_LOSSES])
def test_rounding_noise_between_equal_models_stays_noise(support, loss):
    case, settings = brute_force.random_case(7), ObjectiveSettings(support=support, loss=loss, importance_cap=None)
    case.teacher_probs = case.student_logits.softmax(-1)
    case.supports = [[min(token, 8) for token in support] for support in case.supports]
    case.tilts, case.reference_kl_weight, case.golden_weight = [0.0] * len(case.tilts), 0.0, 0.0
    value, grad, _ = compute(case, settings, dtype=torch.float32)
    assert abs(value) < 1e-6
    assert grad.abs().max() < 1e-6


def test_bfloat16_logits_are_worked_on_in_float32():
    case, settings = brute_force.random_case(8), ObjectiveSettings(support="full")
    case.student_logits = case.student_logits.bfloat16().double()
    whole, _, _ = compute(case, settings)
    rounded, grad, losses = compute(case, settings, dtype=torch.bfloat16)
    assert grad.dtype == torch.bfloat16
    assert losses.entropy_N.dtype == torch.float32
    assert rounded == pytest.approx(float(whole), rel=0.02)


def test_a_second_epoch_is_clipped_to_the_policy_of_the_first():
    case, settings = brute_force.random_case(9), ObjectiveSettings()
    fields = brute_force.fields_of(case, settings, [1.0] * len(case.sampled))
    first = token_losses(case.student_logits, fields, settings, torch.tensor(case.stop_ids))
    assert first.clipped_N.sum() == 0
    moved = token_losses(-case.student_logits, fields.with_proximal(first), settings, torch.tensor(case.stop_ids))
    assert moved.clipped_N.sum() > 0
    assert dataclasses.replace(moved).detach().loss_N.requires_grad is False
