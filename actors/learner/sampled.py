"""Terms beside the dense losses: the policy gradient toward the teacher, the KL to the reference, the KL of stopping. Pure torch.

Shapes: C positions, V vocabulary.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_governor.actors.learner.divergences import WithSlope
from opd_governor.actors.learner.fields import TokenFields, pick

if TYPE_CHECKING:
    from opd_governor.actors.learner.settings import ObjectiveSettings

CERTAIN = 1e-6
"""A stop is not taken to be likelier than 1 minus this."""


def teacher_signal(gap_C: Tensor, outlier_C: Tensor, fields: TokenFields, settings: "ObjectiveSettings") -> Tensor:
    """The log-ratio to the teacher within its bounds, times the weight of distillation.

    Tokens outside the trust region are clipped to its edge or say nothing. Source: TrOPD, arXiv 2606.01249.
    """
    if settings.trust_region_nats is not None:
        edge_C = gap_C.clamp(min=-settings.trust_region_nats) if settings.outliers == "clip" else torch.zeros_like(gap_C)
        gap_C = torch.where(outlier_C, edge_C, gap_C)
    bound = settings.advantage_clip_nats
    signal_C = gap_C if bound is None else gap_C.clamp(-bound, bound)
    return signal_C if fields.distil_N is None else fields.distil_N * signal_C


def importance_weight(logp_C: Tensor, fields: TokenFields, settings: "ObjectiveSettings") -> Tensor:
    """min(pi_proximal / pi_behaviour, cap) of the sampled id: truncated importance sampling between learner and engine."""
    if settings.importance_cap is None:
        return torch.ones_like(logp_C.detach())
    proximal_C = logp_C.detach() if fields.proximal_logp_N is None else fields.proximal_logp_N
    return (proximal_C - fields.behaviour_logp_N).clamp(max=math.log(settings.importance_cap)).exp().detach()


def policy_gradient(
    advantage_C: Tensor, logp_C: Tensor, action_logp_C: Tensor, fields: TokenFields, settings: "ObjectiveSettings"
) -> tuple[Tensor, Tensor]:
    """Loss of an advantage, nats, on the sampled action, with decoupled PPO around it; and 1 where the clip cut its gradient off.

    With the stop-gradient log-ratio to the teacher as advantage (k1) and one update per batch the ratio is 1 and the expected gradient
    that of the exact reverse KL. An overlong penalty or a reward enters whole at each token of its response, which is the policy gradient
    of the sequence's reward; dividing it by the length would punish the longest answers least.
    Sources: thinkingmachines.ai/blog/on-policy-distillation; decoupled PPO, arXiv 2110.00641; DAPO, arXiv 2503.14476.
    """
    proximal_C = action_logp_C.detach() if fields.proximal_action_logp_N is None else fields.proximal_action_logp_N
    ratio_C = (action_logp_C - proximal_C).exp()
    kept_C = ratio_C.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    gain_C = torch.minimum(ratio_C * advantage_C, kept_C * advantage_C)
    clipped_C = (kept_C * advantage_C < ratio_C * advantage_C).to(gain_C.dtype)
    return -importance_weight(logp_C, fields, settings) * gain_C, clipped_C


def reference_kl(
    logp_CV: Tensor, p_CV: Tensor, logp_C: Tensor, reference_CV: Tensor | None, fields: TokenFields, settings: "ObjectiveSettings"
) -> Tensor:
    """KL(student || reference) on raw ids, so the student keeps its own split of the stop mass. `reference_CV`: log-probs.

    exact: over the vocabulary. k3: value e^r - 1 - r with r = log ref - log student at the sampled id. Differentiating
    that value would give, in expectation, the gradient of KL(reference || student); so the gradient is instead that of
    r^2/2, in expectation the gradient of KL(student || reference). Source: joschu.net/blog/kl-approx.html.
    """
    if reference_CV is None:
        return torch.zeros_like(logp_C.detach())
    if settings.reference_kl == "exact":
        slope_CV = (logp_CV.detach() - reference_CV).mul_(p_CV)
        return WithSlope.apply(logp_CV, slope_CV.sum(-1), slope_CV)
    r_C = pick(reference_CV, fields.sampled_ids_N[:, None]).squeeze(-1) - logp_C
    k2_C = r_C.square() / 2
    k3_C = (torch.expm1(r_C) - r_C).detach()
    # In later epochs the sample is one of the policy at the batch's start: its ratio weighs it back to the present one.
    moved_C = 0.0 if fields.proximal_logp_N is None else logp_C.detach() - fields.proximal_logp_N
    ratio_C = torch.as_tensor(moved_C).exp() * importance_weight(logp_C, fields, settings)
    return ratio_C * (k3_C + (k2_C - k2_C.detach()))


def stop_divergence(stop_logp_C: Tensor, teacher_stop_logp_C: Tensor) -> Tensor:
    """KL(teacher || student) of the two classes {stop, go on}, nats: q log(q / p) + (1 - q) log((1 - q) / (1 - p)).

    A policy gradient learns about stopping only where a stop was sampled; a student that rambles samples none. This term has a gradient
    at every position, p - q by the stop's log-odds, and none by anything else. `stop_logp_C`: with a gradient.
    """
    student_C, teacher_C = stop_logp_C.clamp(max=-CERTAIN), teacher_stop_logp_C.clamp(max=-CERTAIN)
    q_C = teacher_C.exp()
    return q_C * (teacher_C - student_C) + (1 - q_C) * (_log_rest(teacher_C) - _log_rest(student_C))


def _log_rest(logp_C: Tensor) -> Tensor:
    """log(1 - p)."""
    return torch.log(-torch.expm1(logp_C))
