"""What lies outside a support: the tail bucket keeps its digits in float32, and a stop id that is named twice counts once."""

import dataclasses

import pytest
import torch

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.teacher.scoring import score_positions
from opd_governor.actors.trajectory import REST_ID

STOP_IDS = (3, 11)


def peaked(rest: float, dtype: torch.dtype, num: int = 64) -> tuple[torch.Tensor, TokenFields]:
    """Logits of a student and its teacher's top 32 of 512 ids; a share of about `rest` lies outside, in both. Scores come in float32."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.zeros(32), torch.full((480,), torch.log(torch.tensor(rest / 15)).item())])
    student, teacher = (scale + torch.randn(num, 512, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    sampled, ids, zero = torch.arange(num) % 32, torch.arange(32).expand(num, -1), torch.zeros(num, dtype=dtype)
    scores = score_positions(teacher.to(dtype), lambda x: x, sampled, STOP_IDS, given_ids_NK=ids, rest="without_stops")
    if dtype == torch.float64:  # scores are float32 whatever the logits
        exact = teacher.log_softmax(-1)
        outside = exact[:, 32:].logsumexp(-1, keepdim=True)
        logp, stop = torch.cat([exact[:, :32], outside], -1), exact[:, list(STOP_IDS)].logsumexp(-1)
    else:
        logp, stop = scores.support_logp_NK, scores.stop_logp_N
    fields = TokenFields(
        sampled, torch.arange(num), zero == 0, zero + 1, zero, zero, logp[torch.arange(num), sampled], stop, zero, zero,
        support_ids_NK=scores.support_ids_NK, support_logp_NK=logp,
    )  # fmt: skip
    return student.to(dtype), fields


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("rest", "most"), [(1e-2, 1e-5), (1e-4, 1e-5), (1e-6, 1e-4)])
def test_a_small_rest_has_its_gradient_in_float32(loss, rest, most):
    settings = ObjectiveSettings(loss=loss, support="teacher", tail_bucket=True)

    def gradient(dtype):
        logits, fields = peaked(rest, dtype)
        logits.requires_grad_()
        token_losses(logits, fields, settings, torch.tensor(STOP_IDS)).loss_N.sum().backward()
        return logits.grad.double()

    exact, rounded = gradient(torch.float64), gradient(torch.float32)
    outside = slice(32, None)
    error = ((rounded - exact)[:, outside].norm(dim=-1) / exact[:, outside].norm(dim=-1)).median()
    assert error < most


def test_the_rest_of_the_student_is_the_sum_of_its_ids_to_the_last_digits():
    logits, fields = peaked(1e-5, torch.float64)
    settings = ObjectiveSettings(loss="forward_kl", support="teacher", tail_bucket=True)
    x = logits[:4].clone().requires_grad_()
    few = fields.select(slice(0, 4))
    token_losses(x, few, settings, torch.tensor(STOP_IDS)).loss_N.sum().backward()
    p = logits[:4].softmax(-1)
    # forward KL over 32 ids and one rest: d/dlogit of an id outside is its own p times (1 - q_rest / p_rest)
    q_rest, p_rest = few.support_logp_NK[:, 32].exp(), p[:, 32:].sum(-1)
    expected = p[:, 32:] * (1 - q_rest / p_rest)[:, None]
    torch.testing.assert_close(x.grad[:, 32:], expected, rtol=1e-6, atol=1e-12)


def test_a_stop_id_that_is_named_twice_counts_once():
    logits, fields = peaked(1e-2, torch.float64)
    fields = dataclasses.replace(fields, sampled_ids_N=torch.full_like(fields.sampled_ids_N, 3))
    for settings in (ObjectiveSettings(), ObjectiveSettings(support="teacher")):
        once, twice = (token_losses(logits, fields, settings, torch.tensor(ids)) for ids in ([3, 11], [11, 3, 3, 11]))
        for field in dataclasses.fields(once):
            torch.testing.assert_close(getattr(once, field.name), getattr(twice, field.name))
    once, twice = (score_positions(logits, lambda x: x, fields.sampled_ids_N, ids).stop_logp_N for ids in ((3, 11), (3, 3, 11)))
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "mixed_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize(("stop_event", "rest"), [("class", "without_stops"), ("raw", "with_stops")])
def test_equal_models_have_equal_rests_to_the_last_bit(loss, stop_event, rest):
    logits, fields = peaked(1e-4, torch.float32)
    logits = logits + 3  # no distribution yet: both sides have to normalise alike
    ids = fields.support_ids_NK[:, :32]
    scores = score_positions(logits, lambda x: x, fields.sampled_ids_N, STOP_IDS, given_ids_NK=ids, rest=rest)
    fields = dataclasses.replace(
        fields,
        teacher_logp_N=scores.sampled_logp_N, teacher_stop_logp_N=scores.stop_logp_N,
        support_ids_NK=scores.support_ids_NK, support_logp_NK=scores.support_logp_NK,
    )  # fmt: skip
    settings = ObjectiveSettings(loss=loss, support="teacher", tail_bucket=True, stop_event=stop_event)
    logits.requires_grad_()
    losses = token_losses(logits, fields, settings, torch.tensor(STOP_IDS)).loss_N
    losses.sum().backward()
    assert not losses.any()
    assert not logits.grad.any()


@pytest.mark.parametrize("rest", ["without_stops", "with_stops"])
def test_the_rest_column_is_the_mass_of_all_that_is_not_listed(rest):
    logits = torch.randn(9, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
    sampled, given = torch.arange(9), torch.tensor([[5, -1, 99]] * 9)
    scores = score_positions(logits, lambda x: x, sampled, STOP_IDS, top_k=4, given_ids_NK=given, rest=rest, chunk_tokens=2)
    assert (scores.support_ids_NK[:, -1] == REST_ID).all()
    for row, ids, logp, token in zip(logits.double(), scores.support_ids_NK, scores.support_logp_NK, sampled, strict=True):
        listed = {int(i) for i in ids if i >= 0} | {int(token)} | (set(STOP_IDS) if rest == "without_stops" else set())
        p = row.softmax(-1)
        assert float(logp[-1].exp()) == pytest.approx(sum(float(p[i]) for i in range(40) if i not in listed), rel=1e-5)
