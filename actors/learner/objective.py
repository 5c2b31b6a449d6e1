"""The losses: student logits and a teacher's word on each response token in, one differentiable number out.

    hidden --head--> logits of one chunk --> token_losses --> sum of weight x loss --> chunked_objective
                                                 ^
                         TokenFields: what the batch knows about each token

Everything is a sum over response tokens, each with its share of the whole batch as weight, so micro-batches,
accumulation and data parallelism add up to the whole-batch loss exactly.

Shapes: N tokens of a micro-batch, C of a chunk, V vocabulary, K support, X classes of a dense loss, E stop ids, H hidden.
Log-probs are natural logarithms (nats) of the temperature-1 softmax.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from opd_governor.actors.learner.settings import ObjectiveSettings

LOWEST_LOGP = -1000.0
"""Stands in for log 0 of a teacher: exp of it is 0, and its distance from any log-prob is finite."""


@dataclass(frozen=True, slots=True)
class TokenFields:
    """What a batch knows about each of N response tokens; golden tokens carry zeros where a teacher would speak.

    >>> chunk = fields.select(slice(0, 1024)); fields = fields.to("cuda")
    """

    sampled_ids_N: Tensor
    position_N: Tensor
    """Index of the token in its response."""
    rollout_N: Tensor
    """True: sampled by the student; False: of a golden answer."""
    weight_N: Tensor
    """Share of the token's loss in the batch's loss (see `batching.token_weights`); 0 masks it."""
    golden_weight_N: Tensor
    """The same for the golden cross-entropy; 0 on rollouts."""
    behaviour_logp_N: Tensor
    """The engine's processed log-prob of the sampled id."""
    teacher_logp_N: Tensor
    """Log-prob of the sampled id, raw."""
    teacher_stop_logp_N: Tensor
    """Log of the summed probability of all stop ids."""
    tilt_N: Tensor
    """Stop tilt b(t), nats."""
    overlong_N: Tensor
    """Soft overlong penalty of the token's response, times its weight, nats."""
    support_ids_NK: Tensor | None = None
    """Ids of a top-k support; repeats count once, -1 is padding."""
    support_logp_NK: Tensor | None = None
    """The teacher's raw log-probs at them."""
    teacher_hidden_NH: Tensor | None = None
    """The teacher's hidden states, for support `full`; zeros on golden tokens."""
    proximal_logp_N: Tensor | None = None
    """Log-prob of the sampled id under the policy at the batch's start; None: the current policy is that policy."""
    proximal_action_logp_N: Tensor | None = None
    """The same of the action: the stop class at a sampled stop."""

    def __len__(self) -> int:
        return len(self.sampled_ids_N)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenFields":
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TokenFields(**{name: None if value is None else change(value) for name, value in values.items()})

    def select(self, index: slice) -> "TokenFields":
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> "TokenFields":
        return self._map(lambda value: value.to(device))

    def with_proximal(self, losses: "TokenLosses") -> "TokenFields":
        """Fix the current policy, as seen by a first pass over the batch, as the one later epochs are clipped to."""
        return dataclasses.replace(self, proximal_logp_N=losses.logp_N, proximal_action_logp_N=losses.action_logp_N)


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Per token, before weighting. The first three carry a gradient, the rest is for metrics."""

    loss_N: Tensor
    """The distillation loss."""
    reference_kl_N: Tensor
    """KL to the reference; zeros without one."""
    action_logp_N: Tensor
    """The student's log-prob of the action: the stop class at a sampled stop, else the sampled id."""
    logp_N: Tensor
    """The student's log-prob of the sampled id."""
    kl_N: Tensor
    """log pS - log pT of the action, no tilt, no clip: on student samples an unbiased estimate of reverse KL, whatever the loss."""
    clipped_N: Tensor
    """1 where the PPO clip cut the gradient off."""
    entropy_N: Tensor
    student_stop_logp_N: Tensor
    teacher_logp_N: Tensor
    teacher_stop_logp_N: Tensor

    def detach(self) -> "TokenLosses":
        return TokenLosses(*(getattr(self, f.name).detach() for f in dataclasses.fields(self)))

    @staticmethod
    def cat(parts: "list[TokenLosses]") -> "TokenLosses":
        return TokenLosses(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(TokenLosses)))


class LazyLogits(NamedTuple):
    """Logits not made yet: the hidden state that predicts each token, and the head that turns hidden states into logits."""

    hidden_NH: Tensor
    head: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    """The head's parameters: the ones whose gradient is wanted beside that of the hidden states."""


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
    """The loss of one micro-batch: sum of weight_N (loss + reference_kl_weight KL_ref) + golden_weight_N cross-entropy.

    Logits exist for `chunk_tokens` positions at a time and are made once: a chunk's gradient is taken while its logits are
    there, so memory does not grow with N x V. `teacher` is needed by support `full`, `reference` whenever
    `reference_kl_weight` > 0; neither gets a gradient. Returns the scalar to call backward on and the detached per-token losses.

    >>> head = model.lm_head
    >>> logits = LazyLogits(hidden_NH, head, tuple(head.parameters()))
    >>> loss, losses = chunked_objective(logits, fields, settings, stop_ids, chunk_tokens=1024)
    >>> loss.backward()
    """
    assert (settings.support == "full") <= (teacher is not None), "support full needs the teacher beside the learner"
    assert (reference_kl_weight > 0) <= (reference is not None), "a reference KL needs the reference model"

    def weighted(hidden_CH: Tensor, index: slice) -> tuple[Tensor, TokenLosses]:
        with torch.no_grad():
            teacher_CV = teacher.head(teacher.hidden_NH[index]) if teacher and settings.support == "full" else None
            reference_CV = reference.head(reference.hidden_NH[index]) if reference and reference_kl_weight > 0 else None
        chunk = fields.select(index)
        losses = token_losses(student.head(hidden_CH), chunk, settings, stop_ids_E, teacher_CV, reference_CV)
        total = (chunk.weight_N * (losses.loss_N + reference_kl_weight * losses.reference_kl_N)).sum()
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
        ctx.gradients = [torch.zeros_like(tensor) if index in wanted else None for index, tensor in enumerate(inputs)]
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
        return None, None, *(None if gradient is None else gradient * upstream for gradient in ctx.gradients)


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
    logp_CV = _log_softmax(student_logits_CV)
    p_CV = logp_CV.detach().exp()
    stop_ids_E = stop_ids_E[stop_ids_E < logp_CV.shape[-1]]
    assert stop_ids_E.numel() > 0, "no stop id inside the student's vocabulary"
    # Picked at once: the gradient of each gather is a tensor as large as the logits.
    picked_ids_CX = torch.cat([fields.sampled_ids_N[:, None], stop_ids_E.expand(len(fields), -1)], -1)
    picked_CX = _gather(logp_CV, picked_ids_CX)
    logp_C, stop_logp_C = picked_CX[:, 0], picked_CX[:, 1:].logsumexp(-1)

    if settings.support == "full":
        assert teacher_logits_CV is not None
        num_ids = min(student_logits_CV.shape[-1], teacher_logits_CV.shape[-1])
        with torch.no_grad():
            teacher_CX = _log_softmax(teacher_logits_CV[:, :num_ids]).clamp_(min=LOWEST_LOGP)
            picked_CX = _gather(teacher_CX, picked_ids_CX)
            teacher_logp_C, teacher_stop_logp_C = picked_CX[:, 0], picked_CX[:, 1:].logsumexp(-1)
    else:
        teacher_logp_C = fields.teacher_logp_N.to(logp_CV.dtype).clamp(min=LOWEST_LOGP)
        teacher_stop_logp_C = fields.teacher_stop_logp_N.to(logp_CV.dtype).clamp(min=LOWEST_LOGP)

    at_stop_C = torch.isin(fields.sampled_ids_N, stop_ids_E)
    one_action_C = at_stop_C if settings.stop_event == "class" else torch.zeros_like(at_stop_C)
    action_logp_C = torch.where(one_action_C, stop_logp_C, logp_C)
    gap_C = torch.where(one_action_C, teacher_stop_logp_C, teacher_logp_C) - action_logp_C.detach()
    tilt_C = fields.tilt_N.to(logp_CV.dtype)
    # log(1 + P_T(E|s)(e^b - 1)): what the tilt takes from every action; exactly 0 where b = 0
    log_tilt_sum_C = torch.log1p(teacher_stop_logp_C.exp() * torch.expm1(tilt_C))

    if settings.support == "sampled":
        tilted_gap_C = gap_C + tilt_C * at_stop_C - log_tilt_sum_C
        loss_C, clipped_C = _policy_gradient(tilted_gap_C, logp_C, action_logp_C, fields, settings)
    else:
        if settings.support == "full":
            student_CX = logp_CV[:, :num_ids]
            ids_CX = torch.arange(num_ids, device=logp_CV.device)[None]
            valid_CX = torch.ones_like(ids_CX, dtype=torch.bool)
        else:
            ids_CX, student_CX, teacher_CX, valid_CX = _support(logp_CV, teacher_logp_C, fields)
        stop_CX = torch.isin(ids_CX, stop_ids_E)
        whole = teacher_logits_CV is not None and settings.support == "full" and student_logits_CV.shape == teacher_logits_CV.shape
        if settings.stop_event == "class" and not (whole and len(stop_ids_E) == 1):
            # All stop ids give way to one last class.
            student_CX = torch.cat([student_CX, stop_logp_C[:, None]], -1)
            teacher_CX = torch.cat([teacher_CX, teacher_stop_logp_C[:, None]], -1)
            valid_CX, stop_CX = F.pad(valid_CX & ~stop_CX, (0, 1), value=True), F.pad(torch.zeros_like(stop_CX), (0, 1), value=True)
        if tilt_C.any():
            teacher_CX = teacher_CX + tilt_C[:, None] * stop_CX - log_tilt_sum_C[:, None]
        if not whole or not valid_CX.all():  # else both are distributions as they are
            tail = settings.tail_bucket and settings.support != "full"
            student_CX, teacher_CX = _normalise(student_CX, valid_CX, tail), _normalise(teacher_CX, valid_CX, tail)
            p_CX = student_CX.detach().exp()
        else:
            p_CX = p_CV
        loss_C, clipped_C = _divergence(student_CX, p_CX, teacher_CX, settings), torch.zeros_like(gap_C)

    reference_kl_C = _reference_kl(logp_CV, p_CV, logp_C, reference_logits_CV, fields, settings)
    entropy_C = -p_CV.mul_(logp_CV.detach()).sum(-1)  # in place, and so the last to use p
    return TokenLosses(
        loss_N=loss_C,
        reference_kl_N=reference_kl_C,
        action_logp_N=action_logp_C,
        logp_N=logp_C,
        kl_N=-gap_C,
        clipped_N=clipped_C,
        entropy_N=entropy_C,
        student_stop_logp_N=stop_logp_C,
        teacher_logp_N=teacher_logp_C,
        teacher_stop_logp_N=teacher_stop_logp_C,
    )


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _gather(logp_CV: Tensor, ids_CX: Tensor) -> Tensor:
    """Log-probs of some ids per row; an id outside the vocabulary has none."""
    inside_CX = ids_CX < logp_CV.shape[-1]
    return logp_CV.gather(-1, torch.where(inside_CX, ids_CX, 0)).masked_fill(~inside_CX, LOWEST_LOGP)


def _importance_weight(logp_C: Tensor, fields: TokenFields, settings: "ObjectiveSettings") -> Tensor:
    """min(pi_proximal / pi_behaviour, cap) of the sampled id: truncated importance sampling between learner and engine."""
    if settings.importance_cap is None:
        return torch.ones_like(logp_C.detach())
    proximal_C = logp_C.detach() if fields.proximal_logp_N is None else fields.proximal_logp_N
    return (proximal_C - fields.behaviour_logp_N).clamp(max=math.log(settings.importance_cap)).exp().detach()


def _policy_gradient(
    gap_C: Tensor, logp_C: Tensor, action_logp_C: Tensor, fields: TokenFields, settings: "ObjectiveSettings"
) -> tuple[Tensor, Tensor]:
    """Sampled reverse KL: the stop-gradient log-ratio to the teacher as advantage (k1), decoupled PPO around it.

    With one update per batch the ratio is 1 and its expected gradient is that of the exact KL. The overlong penalty
    enters whole at each token of its response, which is the policy gradient of the sequence's reward; dividing it by
    the length would punish the longest answers least. Sources: thinkingmachines.ai/blog/on-policy-distillation;
    decoupled PPO, arXiv 2110.00641; DAPO, arXiv 2503.14476.
    """
    bound = settings.advantage_clip_nats
    advantage_C = (gap_C if bound is None else gap_C.clamp(-bound, bound)) + fields.overlong_N
    proximal_C = action_logp_C.detach() if fields.proximal_action_logp_N is None else fields.proximal_action_logp_N
    ratio_C = (action_logp_C - proximal_C).exp()
    kept_C = ratio_C.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    gain_C = torch.minimum(ratio_C * advantage_C, kept_C * advantage_C)
    clipped_C = (kept_C * advantage_C < ratio_C * advantage_C).to(gain_C.dtype)
    return -_importance_weight(logp_C, fields, settings) * gain_C, clipped_C


def _support(logp_CV: Tensor, teacher_logp_C: Tensor, fields: TokenFields) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k classes, stop ids still apart: ids [C, K+1] (the sampled id first), both models' log-probs, and which ones count."""
    assert fields.support_ids_NK is not None, "a dense loss needs the teacher's top-k"
    assert fields.support_logp_NK is not None
    ids_CX = torch.cat([fields.sampled_ids_N[:, None], fields.support_ids_NK.long()], -1)
    teacher_CX = torch.cat([teacher_logp_C[:, None], fields.support_logp_NK.to(logp_CV.dtype).clamp(min=LOWEST_LOGP)], -1)
    valid_CX = (ids_CX >= 0) & (ids_CX < logp_CV.shape[-1]) & ~_repeated(ids_CX)
    return ids_CX, logp_CV.gather(-1, ids_CX.clamp(0, logp_CV.shape[-1] - 1)), teacher_CX, valid_CX


def _repeated(ids_CX: Tensor) -> Tensor:
    """True at every occurrence of an id after its first in the row."""
    sorted_CX, order_CX = ids_CX.sort(dim=-1, stable=True)
    again_CX = torch.zeros_like(ids_CX, dtype=torch.bool)
    again_CX[:, 1:] = sorted_CX[:, 1:] == sorted_CX[:, :-1]
    return torch.zeros_like(again_CX).scatter(-1, order_CX, again_CX)


def _normalise(logp_CX: Tensor, valid_CX: Tensor, tail: bool) -> Tensor:
    """Log-probs renormalised on the valid classes, with `tail` one more for all the rest; at the others as good as log 0."""
    logp_CX = logp_CX.masked_fill(~valid_CX, LOWEST_LOGP)
    if tail:
        # An empty tail is rounding noise in both models: the floor makes it the same noise, so it costs nothing.
        rest_C = (1 - logp_CX.exp().sum(-1)).clamp(min=torch.finfo(logp_CX.dtype).eps)
        logp_CX = torch.cat([logp_CX, rest_C.log()[:, None]], -1)
    return logp_CX.log_softmax(-1)


def _divergence(student_CX: Tensor, p_CX: Tensor, teacher_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """A divergence between two normalised rows of log-probs, with its exact gradient; `p_CX`: the student's probabilities.

    The gradient is built by hand as sum of g_X d(log p_X). As sum of p_X d(log p_X) is 0, any multiple of p may be taken
    from g; the one taken here makes g exactly 0 where the rows are equal, so equal models get no gradient, not even noise.
    """
    return _WithSlope.apply(student_CX, *_value_and_slope(student_CX.detach(), p_CX, teacher_CX, settings))


class _WithSlope(torch.autograd.Function):
    """value [C] as a function of logp [C, X] whose gradient is slope [C, X]."""

    @staticmethod
    def forward(ctx: Any, logp_CX: Tensor, value_C: Tensor, slope_CX: Tensor) -> Tensor:
        ctx.save_for_backward(slope_CX)
        return value_C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_C: Tensor) -> tuple[Tensor, None, None]:
        (slope_CX,) = ctx.saved_tensors
        return slope_CX * upstream_C[:, None], None, None


def _value_and_slope(logp_CX: Tensor, p: Tensor, logq_CX: Tensor, settings: "ObjectiveSettings") -> tuple[Tensor, Tensor]:
    """p student, q teacher: the divergence [C] and g [C, X], its derivative by log p up to a multiple of p.

    Sources: forward/reverse mixture and generalised JSD, GKD (arXiv 2306.13649); skew KL, DistiLLM (arXiv 2402.03898).
    """

    def reverse() -> tuple[Tensor, Tensor]:
        slope = (logp_CX - logq_CX).mul_(p)
        return slope.sum(-1), slope

    def forward() -> tuple[Tensor, Tensor]:
        q = logq_CX.exp()
        return (logq_CX - logp_CX).mul_(q).sum(-1), p - q

    match settings.loss:
        case "reverse_kl":
            return reverse()
        case "forward_kl":
            return forward()
        case "mixed_kl":
            share, (r, r_slope), (f, f_slope) = settings.rkl_share, reverse(), forward()
            return share * r + (1 - share) * f, share * r_slope + (1 - share) * f_slope
        case "jsd":
            beta, q = settings.jsd_beta, logq_CX.exp()
            to_p, to_q = _log_mixture(logq_CX - logp_CX, beta)
            return -(beta * q * to_q + (1 - beta) * p * to_p).sum(-1), -(1 - beta) * p * to_p
        case "skew_kl":
            alpha, q = settings.skew_alpha, logq_CX.exp()
            _, to_q = _log_mixture(logq_CX - logp_CX, alpha)
            return -(q * to_q).sum(-1), -(1 - alpha) * p * torch.expm1(-to_q)


def _log_mixture(gap: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(m/p) and log(m/q) for m = share q + (1 - share) p, given gap = log(q/p); both exactly 0 where gap is."""
    from_p = torch.log1p(share * torch.expm1(gap.clamp(max=0)))
    from_q = torch.log1p((1 - share) * torch.expm1((-gap).clamp(max=0)))
    return torch.where(gap > 0, gap + from_q, from_p), torch.where(gap > 0, from_q, from_p - gap)


def _reference_kl(
    logp_CV: Tensor, p_CV: Tensor, logp_C: Tensor, reference_logits_CV: Tensor | None, fields: TokenFields, settings: "ObjectiveSettings"
) -> Tensor:
    """KL(student || reference) on raw ids, so the student keeps its own split of the stop mass.

    exact: over the vocabulary. k3: value e^r - 1 - r with r = log ref - log student at the sampled id. Differentiating
    that value would give, in expectation, the gradient of KL(reference || student); so the gradient is instead that of
    r^2/2, in expectation the gradient of KL(student || reference). Source: joschu.net/blog/kl-approx.html.
    """
    if reference_logits_CV is None:
        return torch.zeros_like(logp_C.detach())
    with torch.no_grad():
        reference_CV = _log_softmax(reference_logits_CV)
    if settings.reference_kl == "exact":
        slope_CV = (logp_CV.detach() - reference_CV).mul_(p_CV)
        return _WithSlope.apply(logp_CV, slope_CV.sum(-1), slope_CV)
    r_C = _gather(reference_CV, fields.sampled_ids_N[:, None]).squeeze(-1) - logp_C
    k2_C = r_C.square() / 2
    k3_C = (torch.expm1(r_C) - r_C).detach()
    return _importance_weight(logp_C, fields, settings) * (k3_C + (k2_C - k2_C.detach()))
