"""The objective: student logits and the teacher's scores of each response token in, one differentiable number out. Pure torch.

    hidden --head--> logits of one chunk --> token_losses --> sum of weight x loss --> chunked_objective
                                                 ^
                         TokenFields: what the batch knows about each token

Everything is a sum over response tokens, each with its share of the whole batch as weight, so micro-batches,
accumulation and data parallelism add up to the whole-batch loss exactly. The formulas are in README.md beside this file.

Shapes: N tokens of a micro-batch, C of a chunk, V vocabulary, X classes of a dense loss, E stop ids, H hidden.
Log-probs are natural logarithms (nats) of the temperature-1 softmax.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_governor.actors.learner.divergences import LOSSES
from opd_governor.actors.learner.fields import LOWEST_LOGP, LazyLogits, TokenFields, TokenLosses, pick
from opd_governor.actors.learner.sampled import policy_gradient, reference_kl, stop_divergence, teacher_signal
from opd_governor.actors.learner.supports import SUPPORTS, Positions, close

if TYPE_CHECKING:
    from opd_governor.actors.learner.settings import ObjectiveSettings


def chunked_objective(
    student: LazyLogits,
    fields: TokenFields,
    settings: "ObjectiveSettings",
    stop_ids_E: Tensor,
    *,
    chunk_tokens: int,
    reference_kl_weight: float = 0.0,
    teacher: LazyLogits | None = None,
    reference: LazyLogits | None = None,
) -> tuple[Tensor, TokenLosses]:
    """The loss of one micro-batch: sum of weight_N (loss + reference_kl_weight KL_ref) + stop_weight_N KL of stopping
    + reward_weight_N reward's policy gradient
    + golden_weight_N cross-entropy.

    Logits exist for `chunk_tokens` positions at a time and are made once: a chunk's gradient is taken while its logits are
    there, so memory does not grow with N x V. `teacher` is needed by a support with `hidden`, `reference` whenever
    `reference_kl_weight` > 0; neither gets a gradient. Returns the scalar to call backward on and the detached per-token losses.

    >>> head = model.lm_head
    >>> logits = LazyLogits(hidden_NH, head, tuple(head.parameters()))
    >>> loss, losses = chunked_objective(logits, fields, settings, stop_ids, chunk_tokens=1024)
    >>> loss.backward()
    """
    hidden = SUPPORTS[settings.support].hidden
    if hidden and teacher is None:
        raise ValueError(f"support {settings.support} needs the teacher beside the learner")
    if reference_kl_weight > 0 and reference is None:
        raise ValueError("a reference KL needs the reference model")

    def weighted(hidden_CH: Tensor, index: slice) -> tuple[Tensor, TokenLosses]:
        with torch.no_grad():
            teacher_CV = teacher.head(teacher.hidden_NH[index]) if teacher and hidden else None
            reference_CV = reference.head(reference.hidden_NH[index]) if reference and reference_kl_weight > 0 else None
        chunk = fields.select(index)
        losses = token_losses(student.head(hidden_CH), chunk, settings, stop_ids_E, teacher_CV, reference_CV)
        total = (chunk.weight_N * (losses.loss_N + reference_kl_weight * losses.reference_kl_N)).sum()
        if chunk.stop_weight_N is not None and chunk.stop_weight_N.any():
            total = total + (chunk.stop_weight_N * losses.stop_loss_N).sum()
        if chunk.tail_weight_N is not None and chunk.tail_weight_N.any():
            alone, _ = policy_gradient(chunk.overlong_N, losses.logp_N, losses.action_logp_N, chunk, settings)
            total = total + (chunk.tail_weight_N * alone).sum()
        if chunk.reward_N is not None and chunk.reward_weight_N is not None:
            gain, _ = policy_gradient(chunk.reward_N, losses.logp_N, losses.action_logp_N, chunk, settings)
            total = total + (chunk.reward_weight_N * gain).sum()
        if chunk.golden_weight_N.any():
            # On a golden token -log p of the action is the cross-entropy with the stop as one event.
            total = total - (chunk.golden_weight_N * losses.action_logp_N).sum()
        return total, losses.detach()

    parts: list[TokenLosses] = []

    def run(hidden_CH: Tensor, index: slice) -> Tensor:
        total, losses = weighted(hidden_CH, index)
        parts.append(losses)
        return total

    slices = [slice(start, start + chunk_tokens) for start in range(0, max(len(fields), 1), chunk_tokens)]
    total = _EagerGradient.apply(run, slices, student.hidden_NH, *student.weights)
    return total, TokenLosses.cat(parts)


class _EagerGradient(torch.autograd.Function):
    """Sum of run(hidden[index], index) over slices, each slice's gradient taken at once so that nothing of it need be kept."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor, slice], Tensor], slices: Sequence[slice], hidden_NH: Tensor, *weights: Tensor) -> Tensor:
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        inputs = [hidden_NH.detach(), *weights]
        # In float32 at least: a head in bfloat16 would lose what late chunks add to it.
        summing = [torch.promote_types(tensor.dtype, torch.float32) for tensor in inputs]
        ctx.gradients = [torch.zeros_like(t, dtype=summing[i]) if i in wanted else None for i, t in enumerate(inputs)]
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        totals = []
        for index in slices:
            chunk_CH = hidden_NH[index].detach().requires_grad_(0 in wanted)
            with torch.set_grad_enabled(bool(wanted)):
                total = run(chunk_CH, index)
                leaves = [chunk_CH if i == 0 else inputs[i] for i in wanted]
                parts = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(wanted)
            for i, part in zip(wanted, parts, strict=True):
                if part is not None:
                    (ctx.gradients[i][index] if i == 0 else ctx.gradients[i]).add_(part)
            totals.append(total.detach())
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        scaled = (None if gradient is None else gradient * upstream for gradient in ctx.gradients)
        return None, None, *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True))


def token_losses(
    student_logits_CV: Tensor,
    fields: TokenFields,
    settings: "ObjectiveSettings",
    stop_ids_E: Tensor,
    teacher_logits_CV: Tensor | None = None,
    reference_logits_CV: Tensor | None = None,
) -> TokenLosses:
    """Every per-token term of the objective, for one chunk, in float32 (float64 when the logits are).

    Vocabularies of different padded sizes are compared on their common prefix; ids outside the student's are ignored.
    """
    support = SUPPORTS[settings.support]
    logp_CV = _log_softmax(student_logits_CV)
    at, logp_C = _positions(logp_CV, fields, stop_ids_E, teacher_logits_CV if support.hidden else None)
    at_stop_C = torch.isin(fields.sampled_ids_N, at.stop_ids_E)
    one_action_C = at_stop_C if settings.stop_event == "class" else torch.zeros_like(at_stop_C)
    action_logp_C = torch.where(one_action_C, at.stop_logp_C, logp_C)
    gap_C = torch.where(one_action_C, at.teacher_stop_logp_C, at.teacher_logp_C) - action_logp_C.detach()
    outlier_C = gap_C < -(settings.trust_region_nats or math.inf)
    tilt_C = fields.tilt_N.to(logp_CV.dtype)
    # log(1 + P_T(E|s)(e^b - 1)): what the tilt takes from every action; exactly 0 where b = 0
    log_tilt_sum_C = torch.log1p(at.teacher_stop_logp_C.exp() * torch.expm1(tilt_C))

    loss_C, clipped_C = torch.zeros_like(gap_C), torch.zeros_like(gap_C)
    if support.classes is not None:
        student_CX, teacher_CX, p_CX = close(at, support.classes(at, settings), settings, log_tilt_sum_C)
        loss_C = LOSSES[settings.loss](student_CX, teacher_CX, p_CX, settings)
        if outlier_C.any():
            instead_C = LOSSES["forward_kl"](student_CX, teacher_CX, p_CX, settings) if settings.outliers == "forward" else 0.0
            loss_C = torch.where(outlier_C, instead_C, loss_C)
        loss_C = loss_C if fields.distil_N is None else fields.distil_N * loss_C
    sampled_C = torch.ones_like(at_stop_C) if support.classes is None else fields.sampled_only_N
    signal_C = teacher_signal(gap_C + tilt_C * at_stop_C - log_tilt_sum_C, outlier_C, fields, settings)
    if sampled_C is not None and sampled_C.any():
        estimate_C, estimate_clipped_C = policy_gradient(signal_C + fields.overlong_N, logp_C, action_logp_C, fields, settings)
        loss_C, clipped_C = torch.where(sampled_C, estimate_C, loss_C), torch.where(sampled_C, estimate_clipped_C, clipped_C)

    with torch.no_grad():
        reference_CV = None if reference_logits_CV is None else _log_softmax(reference_logits_CV)
    reference_kl_C = reference_kl(logp_CV, at.p_CV, logp_C, reference_CV, fields, settings)
    stop_loss_C = torch.zeros_like(gap_C)
    if fields.stop_weight_N is not None and fields.stop_weight_N.any():
        stop_loss_C = stop_divergence(at.stop_logp_C, at.teacher_stop_logp_C + tilt_C - log_tilt_sum_C)
    entropy_C = -at.p_CV.mul_(logp_CV.detach()).sum(-1)  # overwrites the probabilities; must stay last
    return TokenLosses(
        loss_N=loss_C,
        reference_kl_N=reference_kl_C,
        stop_loss_N=stop_loss_C,
        action_logp_N=action_logp_C,
        logp_N=logp_C,
        kl_N=-gap_C,
        clipped_N=clipped_C,
        outlier_N=outlier_C.to(gap_C.dtype),
        signal_N=signal_C,
        entropy_N=entropy_C,
        student_stop_logp_N=at.stop_logp_C,
        teacher_logp_N=at.teacher_logp_C,
        teacher_stop_logp_N=at.teacher_stop_logp_C,
    )


def _positions(logp_CV: Tensor, fields: TokenFields, stop_ids_E: Tensor, teacher_logits_CV: Tensor | None) -> tuple[Positions, Tensor]:
    """What both models say at each position, and the student's log-prob of the sampled id."""
    stop_ids_E = stop_ids_E[stop_ids_E < logp_CV.shape[-1]].unique()  # one that is named twice counts once
    assert stop_ids_E.numel() > 0, "no stop id inside the student's vocabulary"
    # Picked at once: the gradient of each gather is a tensor as large as the logits.
    picked_ids_CX = torch.cat([fields.sampled_ids_N[:, None], stop_ids_E.expand(len(fields), -1)], -1)
    picked_CX = pick(logp_CV, picked_ids_CX)
    logp_C, stop_logp_C = picked_CX[:, 0], picked_CX[:, 1:].logsumexp(-1)
    teacher_CV = None
    if teacher_logits_CV is not None:
        with torch.no_grad():
            num_ids = min(logp_CV.shape[-1], teacher_logits_CV.shape[-1])
            teacher_CV = _log_softmax(teacher_logits_CV[:, :num_ids]).clamp_(min=LOWEST_LOGP)
            theirs_CX = pick(teacher_CV, picked_ids_CX)
            teacher_logp_C, teacher_stop_logp_C = theirs_CX[:, 0], theirs_CX[:, 1:].logsumexp(-1)
    else:
        teacher_logp_C = fields.teacher_logp_N.to(logp_CV.dtype).clamp(min=LOWEST_LOGP)
        teacher_stop_logp_C = fields.teacher_stop_logp_N.to(logp_CV.dtype).clamp(min=LOWEST_LOGP)
    at = Positions(
        fields, logp_CV, logp_CV.detach().exp(), teacher_CV, stop_ids_E, stop_logp_C, teacher_logp_C, teacher_stop_logp_C
    )  # fmt: skip
    return at, logp_C


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
