"""The losses: divergences between the student's and the teacher's distribution over the classes of a support. Pure torch.

A loss of your own is one function in a file that the job's `extensions` names:

    from opd_governor.actors.learner.divergences import LOSSES

    @LOSSES.add("total_variation")
    def total_variation(logp_CX, logq_CX, p_CX, settings):
        return (logp_CX.exp() - logq_CX.exp()).abs().sum(-1) / 2

Shapes: C positions, X classes. `logp_CX`: the student's log-probs, normalised over the classes, with a gradient. `logq_CX`: the
teacher's, without. `p_CX`: the student's probabilities without a gradient; the caller overwrites their memory afterwards, so a formula
whose gradient autograd has to work out takes `logp_CX.exp()` instead. Returns [C] nats, differentiable by `logp_CX`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_governor.actors.extensions import Kind

if TYPE_CHECKING:
    from opd_governor.actors.learner.settings import ObjectiveSettings

Divergence = Callable[[Tensor, Tensor, Tensor, "ObjectiveSettings"], Tensor]
LOSSES: Kind[Divergence] = Kind("loss")


class WithSlope(torch.autograd.Function):
    """value [C] as a function of logp [C, X] whose gradient is slope [C, X].

    The losses here build their gradient by hand, as sum of g_X d(log p_X). The sum of p_X d(log p_X) is 0, so any multiple of p may be
    taken from g. The one taken makes g exactly 0 where the rows are equal: equal models get no gradient, not even rounding noise.
    """

    @staticmethod
    def forward(ctx: Any, logp_CX: Tensor, value_C: Tensor, slope_CX: Tensor) -> Tensor:
        ctx.save_for_backward(slope_CX)
        return value_C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_C: Tensor) -> tuple[Tensor, None, None]:
        (slope_CX,) = ctx.saved_tensors
        return slope_CX * upstream_C[:, None], None, None


@LOSSES.add("reverse_kl")
def reverse_kl(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """KL(p || q)."""
    return WithSlope.apply(logp_CX, *_reverse(logp_CX.detach(), logq_CX, p_CX))


@LOSSES.add("forward_kl")
def forward_kl(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """KL(q || p)."""
    return WithSlope.apply(logp_CX, *_forward(logp_CX.detach(), logq_CX, p_CX))


@LOSSES.add("mixed_kl")
def mixed_kl(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """share KL(p || q) + (1 - share) KL(q || p), share = `rkl_share`."""
    share, logp = settings.rkl_share, logp_CX.detach()
    (r, r_slope), (f, f_slope) = _reverse(logp, logq_CX, p_CX), _forward(logp, logq_CX, p_CX)
    return WithSlope.apply(logp_CX, share * r + (1 - share) * f, share * r_slope + (1 - share) * f_slope)


@LOSSES.add("jsd")
def jsd(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p. Source: GKD, arXiv 2306.13649."""
    beta, q = settings.jsd_beta, logq_CX.exp()
    to_p, to_q = _log_mixture(logq_CX - logp_CX.detach(), beta)
    return WithSlope.apply(logp_CX, -(beta * q * to_q + (1 - beta) * p_CX * to_p).sum(-1), -(1 - beta) * p_CX * to_p)


@LOSSES.add("skew_kl")
def skew_kl(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor, settings: "ObjectiveSettings") -> Tensor:
    """KL(q || alpha q + (1 - alpha) p). Source: DistiLLM, arXiv 2402.03898."""
    alpha, q = settings.skew_alpha, logq_CX.exp()
    _, to_q = _log_mixture(logq_CX - logp_CX.detach(), alpha)
    return WithSlope.apply(logp_CX, -(q * to_q).sum(-1), -(1 - alpha) * p_CX * torch.expm1(-to_q))


def _reverse(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor) -> tuple[Tensor, Tensor]:
    slope_CX = (logp_CX - logq_CX).mul_(p_CX)
    return slope_CX.sum(-1), slope_CX


def _forward(logp_CX: Tensor, logq_CX: Tensor, p_CX: Tensor) -> tuple[Tensor, Tensor]:
    q_CX = logq_CX.exp()
    return (logq_CX - logp_CX).mul_(q_CX).sum(-1), p_CX - q_CX


def _log_mixture(gap: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(m/p) and log(m/q) for m = share q + (1 - share) p, given gap = log(q/p); both exactly 0 where gap is."""
    from_p = torch.log1p(share * torch.expm1(gap.clamp(max=0)))
    from_q = torch.log1p((1 - share) * torch.expm1((-gap).clamp(max=0)))
    return torch.where(gap > 0, gap + from_q, from_p), torch.where(gap > 0, from_q, from_p - gap)
