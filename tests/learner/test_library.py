"""The losses as a library: their formulas, what importing them loads, and the table that stands beside them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opd_governor
from opd_governor import divergence, forward_kl, jsd, mixed_kl, reverse_kl, sampled_reverse_kl, skew_kl, top_k_divergence
from opd_governor.actors.extensions import load_extensions
from tests.bench.formulas import pairs, table

README = Path("actors/learner/README.md")
STOPS = [2, 7]


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def one_stop(probs: torch.Tensor) -> torch.Tensor:
    keep = [i for i in range(probs.shape[-1]) if i not in STOPS]
    return torch.cat([probs[..., keep], probs[..., STOPS].sum(-1, keepdim=True)], -1)


FORMULAS = {
    "reverse": (reverse_kl, {}, lambda p, q: kl(p, q)),
    "forward": (forward_kl, {}, lambda p, q: kl(q, p)),
    "mixed": (mixed_kl, {"reverse_share": 0.3}, lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "jsd": (jsd, {"beta": 0.2}, lambda p, q: 0.2 * kl(q, 0.2 * q + 0.8 * p) + 0.8 * kl(p, 0.2 * q + 0.8 * p)),
    "skew": (skew_kl, {"alpha": 0.15}, lambda p, q: kl(q, 0.15 * q + 0.85 * p)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("stop_ids", [None, STOPS])
@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)])
def test_value_and_gradient_follow_the_formula(name, stop_ids, shape):
    loss, options, formula = FORMULAS[name]
    ours, plain = logits(1, *shape).requires_grad_(), logits(1, *shape).requires_grad_()
    teacher = logits(2, *shape)
    value = loss(ours, teacher, stop_ids=stop_ids, **options)
    p, q = plain.softmax(-1), teacher.softmax(-1)
    expected = formula(p, q) if stop_ids is None else formula(one_stop(p), one_stop(q))
    assert value.shape == shape[:-1]
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-6, atol=1e-10)


def test_a_tilt_raises_the_teachers_stop_event_and_needs_one():
    student, teacher = logits(1, 5, 9), logits(2, 5, 9)
    tilted = teacher.clone()
    tilted[:, STOPS] += 1.5
    torch.testing.assert_close(reverse_kl(student, teacher, stop_ids=STOPS, tilt_nats=1.5), reverse_kl(student, tilted, stop_ids=STOPS))
    by_position = torch.tensor([0.0, 0.0, 1.5, 1.5, 1.5], dtype=torch.float64)
    both = torch.where(by_position[:, None] > 0, tilted, teacher)
    torch.testing.assert_close(
        reverse_kl(student, teacher, stop_ids=STOPS, tilt_nats=by_position), reverse_kl(student, both, stop_ids=STOPS)
    )
    with pytest.raises(ValueError, match="tilt_nats needs stop_ids"):
        reverse_kl(student, teacher, tilt_nats=1.0)


def test_the_sampled_estimator_has_the_expected_gradient_of_reverse_kl():
    student, teacher = logits(1, 9), logits(2, 9)
    logq = teacher.log_softmax(-1)
    rows = student.expand(9, -1).clone().requires_grad_()
    stop_logq = logq[STOPS].logsumexp(-1).expand(9)
    every = torch.arange(9)
    losses = sampled_reverse_kl(rows, every, logq, behaviour_logp=student.log_softmax(-1), stop_ids=STOPS, teacher_stop_logp=stop_logq)
    losses.sum().backward()
    exact = student.clone().requires_grad_()
    kl(one_stop(exact.softmax(-1)), one_stop(teacher.softmax(-1))).backward()
    torch.testing.assert_close(student.softmax(-1) @ rows.grad, exact.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="stop_ids need teacher_stop_logp"):
        sampled_reverse_kl(rows, every, logq, stop_ids=STOPS)


def test_a_top_k_loss_over_every_id_is_the_loss_over_the_vocabulary():
    student, teacher = logits(1, 2, 3, 9), logits(2, 2, 3, 9)
    logq = teacher.log_softmax(-1)
    ids = torch.arange(9).expand(2, 3, -1)
    sampled = torch.full((2, 3), 4)
    for loss in ("reverse_kl", "forward_kl", "jsd"):
        ours = top_k_divergence(loss, student, sampled, logq[..., 4], ids, logq)
        torch.testing.assert_close(ours, divergence(loss, student, teacher))


def test_importing_the_losses_loads_neither_ray_nor_vllm_nor_transformers():
    code = "import sys; from opd_governor import reverse_kl; print([m for m in ('ray', 'vllm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "reverse_kl" in dir(opd_governor)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        opd_governor.nothing  # noqa: B018


def test_the_table_beside_the_other_projects_formulas_is_what_the_program_prints():
    load_extensions()
    assert table() in README.read_text(), "python -m tests.bench.formulas, into actors/learner/README.md"
    for pair in pairs():
        if pair.remark.startswith("equal;") or pair.remark in ("equal", "equal, likewise"):
            assert pair.value[0] == pytest.approx(pair.value[1], abs=1e-9) or "k1" in pair.theirs
            assert pair.gradient_cosine == pytest.approx(1, abs=1e-9)
        if "exact" in pair.theirs:
            assert pair.gradient_cosine == pytest.approx(1, abs=1e-9)
