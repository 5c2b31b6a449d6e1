"""The objective's losses for other trainers: functions of logits, without a run, a job file, Ray or vLLM.

    from opd_governor import reverse_kl

    loss_T = reverse_kl(student_logits_TV, teacher_logits_TV, stop_ids=[2, 7])
    loss_T[mask_T].mean().backward()

Every function returns one number a position, nats, with a gradient by the student's logits; any leading dimensions ([V], [T, V],
[B, T, V]) are kept. Logits may be bfloat16: the arithmetic is float32 (float64 for float64 logits). The formulas are in
actors/learner/README.md, and these functions are the service's own arithmetic (`objective.token_losses`).

With `stop_ids` all of them count as one event, with the sum of their probabilities. `tilt_nats` (a number, or one a position) tilts the
teacher toward that event. Without `stop_ids` every id stands for itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, **stops: Any) -> Tensor:
    """KL(student || teacher) over the whole vocabulary. `stops`: stop_ids, tilt_nats.

    >>> logits = torch.zeros(3, 4)
    >>> reverse_kl(logits, logits)
    tensor([0., 0., 0.])
    """
    return divergence("reverse_kl", student_logits, teacher_logits, **stops)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, **stops: Any) -> Tensor:
    """KL(teacher || student) over the whole vocabulary. `stops`: stop_ids, tilt_nats."""
    return divergence("forward_kl", student_logits, teacher_logits, **stops)


def mixed_kl(student_logits: Tensor, teacher_logits: Tensor, reverse_share: float = 0.5, **stops: Any) -> Tensor:
    """reverse_share x reverse KL + (1 - reverse_share) x forward KL. `stops`: stop_ids, tilt_nats."""
    return divergence("mixed_kl", student_logits, teacher_logits, rkl_share=reverse_share, **stops)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, **stops: Any) -> Tensor:
    """Generalised Jensen-Shannon divergence, m = beta teacher + (1 - beta) student (GKD, arXiv 2306.13649). `stops` as above."""
    return divergence("jsd", student_logits, teacher_logits, jsd_beta=beta, **stops)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1, **stops: Any) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) (DistiLLM, arXiv 2402.03898). `stops`: stop_ids, tilt_nats."""
    return divergence("skew_kl", student_logits, teacher_logits, skew_alpha=alpha, **stops)


def divergence(
    loss: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    stop_ids: Sequence[int] | None = None,
    tilt_nats: float | Tensor = 0.0,
    **options: float,
) -> Tensor:
    """Any loss of `LOSSES` by its name, over the whole vocabulary; `options` as in `ObjectiveSettings`."""
    settings = _settings(stop_ids, support="full", loss=loss, **options)
    student_NV, teacher_NV = _rows(student_logits), _rows(teacher_logits)
    fields = _fields(student_NV, torch.zeros(len(student_NV), dtype=torch.long, device=student_NV.device), stop_ids, tilt_nats)
    return token_losses(student_NV, fields, settings, _stops(stop_ids, student_NV), teacher_NV).loss_N.view(student_logits.shape[:-1])


def top_k_divergence(
    loss: str,
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logp: Tensor,
    support_ids: Tensor,
    support_logp: Tensor,
    *,
    stop_ids: Sequence[int] | None = None,
    teacher_stop_logp: Tensor | None = None,
    tilt_nats: float | Tensor = 0.0,
    tail_bucket: bool = False,
    **options: float,
) -> Tensor:
    """A loss over the ids that a teacher scored, the sampled one among them, renormalised on them or with one class for the rest.

    `teacher_logp`: its log-prob of the sampled ids; `support_ids`, `support_logp` [..., K]: ids (-1 pads) and its log-probs;
    `teacher_stop_logp`: of all stop ids together, needed with `stop_ids`.
    """
    settings = _settings(stop_ids, teacher_stop_logp, support="union", loss=loss, tail_bucket=tail_bucket, **options)
    support = {"support_ids_NK": _rows(support_ids), "support_logp_NK": _rows(support_logp)}
    return _sampled(student_logits, sampled_ids, teacher_logp, teacher_stop_logp, settings, stop_ids, tilt_nats, support)


def sampled_reverse_kl(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logp: Tensor,
    *,
    behaviour_logp: Tensor | None = None,
    importance_cap: float | None = 2.0,
    stop_ids: Sequence[int] | None = None,
    teacher_stop_logp: Tensor | None = None,
    tilt_nats: float | Tensor = 0.0,
    **options: float,
) -> Tensor:
    """A policy gradient whose expectation over samples of the student is the gradient of reverse KL: the log-ratio of the sampled token is
    an advantage without a gradient.

    `behaviour_logp`: the engine's log-prob of the sampled ids, for importance weights up to `importance_cap`; None: the student's own
    samples of this very moment. `options`: advantage_clip_nats, clip_low, clip_high. Its value at one token is
    log p - log q of that token, clipped and weighted: an estimate of reverse KL, which may be negative.
    """
    cap = None if behaviour_logp is None else importance_cap
    settings = _settings(stop_ids, teacher_stop_logp, support="sampled", importance_cap=cap, **options)
    behaviour = {} if behaviour_logp is None else {"behaviour_logp_N": behaviour_logp.flatten()}
    return _sampled(student_logits, sampled_ids, teacher_logp, teacher_stop_logp, settings, stop_ids, tilt_nats, behaviour)


def _sampled(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logp: Tensor,
    teacher_stop_logp: Tensor | None,
    settings: ObjectiveSettings,
    stop_ids: Sequence[int] | None,
    tilt_nats: float | Tensor,
    more: dict[str, Tensor],
) -> Tensor:
    student_NV = _rows(student_logits)
    stop_logp_N = teacher_logp if teacher_stop_logp is None else teacher_stop_logp
    known = {"teacher_logp_N": teacher_logp.flatten(), "teacher_stop_logp_N": stop_logp_N.flatten()}
    fields = _fields(student_NV, sampled_ids.flatten(), stop_ids, tilt_nats, **known, **more)
    return token_losses(student_NV, fields, settings, _stops(stop_ids, student_NV)).loss_N.view(student_logits.shape[:-1])


def _settings(stop_ids: Sequence[int] | None, teacher_stop_logp: Tensor | None = None, **settings: Any) -> ObjectiveSettings:
    if stop_ids is not None and teacher_stop_logp is None and settings["support"] != "full":
        raise ValueError("stop_ids need teacher_stop_logp, the teacher's log-prob of all of them together at each position")
    return ObjectiveSettings(stop_event="raw" if stop_ids is None else "class", **settings)


def _rows(array: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return array.reshape(-1, array.shape[-1])


def _stops(stop_ids: Sequence[int] | None, like: Tensor) -> Tensor:
    """Without stop ids any id stands in: as an event of its own it changes nothing."""
    return torch.tensor([0] if stop_ids is None else list(stop_ids), device=like.device)


def _fields(
    student_NV: Tensor, sampled_ids_N: Tensor, stop_ids: Sequence[int] | None, tilt_nats: float | Tensor, **known: Tensor
) -> TokenFields:
    zero_N = torch.zeros(len(student_NV), dtype=torch.promote_types(student_NV.dtype, torch.float32), device=student_NV.device)
    blank = dict.fromkeys(
        ("weight_N", "golden_weight_N", "behaviour_logp_N", "teacher_logp_N", "teacher_stop_logp_N", "overlong_N"), zero_N
    )  # fmt: skip
    if stop_ids is None and (isinstance(tilt_nats, Tensor) or tilt_nats):
        raise ValueError("tilt_nats needs stop_ids: it tilts the teacher toward them")
    tilt_N = zero_N + (tilt_nats.flatten() if isinstance(tilt_nats, Tensor) else tilt_nats)
    return TokenFields(sampled_ids_N=sampled_ids_N, position_N=sampled_ids_N, rollout_N=zero_N == 0, tilt_N=tilt_N, **blank | known)
