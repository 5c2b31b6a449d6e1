"""The supports: over which classes a loss compares student and teacher, and what has to be known of each position for it. Pure torch.

    SUPPORTS[name].needs --> what engines record, what teachers are asked for, whether the learner holds the teacher's head
    SUPPORTS[name].classes(position) --> Classes --close--> two normalised rows of log-probs --> a loss of LOSSES

A support of your own is one declaration in a file that the job's `extensions` names:

    SUPPORTS.add("teacher_top_4")(Support(lambda at, settings: listed(at, columns=4), teacher_ids=True))

Shapes: C positions, V vocabulary, K ids of a top-k, X classes, E stop ids.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_governor.actors.extensions import Kind
from opd_governor.actors.learner.fields import LOWEST_LOGP, TokenFields
from opd_governor.actors.trajectory import REST_ID, Rest

if TYPE_CHECKING:
    from opd_governor.actors.learner.settings import ObjectiveSettings


class Positions(NamedTuple):
    """What is known of C positions: both models' log-probs and the batch's fields."""

    fields: TokenFields
    logp_CV: Tensor
    """The student's, with a gradient."""
    p_CV: Tensor
    """Their exp, without one."""
    teacher_CV: Tensor | None
    """The teacher's over the vocabulary that both have, for a support with `hidden`."""
    stop_ids_E: Tensor
    stop_logp_C: Tensor
    """The student's log-prob of all stop ids together, with a gradient."""
    teacher_logp_C: Tensor
    """The teacher's of the sampled id."""
    teacher_stop_logp_C: Tensor


class Classes(NamedTuple):
    """Classes of C positions, each stop id still for itself: `ids_CX` may have one row for all positions."""

    ids_CX: Tensor
    student_CX: Tensor
    teacher_CX: Tensor
    valid_CX: Tensor
    """False: padding, a repeat, or an id that the student does not have."""
    complete: bool = False
    """They are all ids that both models have: `tail_bucket` has nothing to gather."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job's objective has to know of each position, beside the sampled token and the stop class."""

    student_top_k: int
    """The student's most likely ids, which the engine records and the teacher scores; 0: none."""
    teacher_top_k: int
    """The teacher's own most likely ids; 0: none."""
    hidden: bool
    """The teacher's hidden states, and its head beside the student."""
    rest: Rest | None = None
    """The teacher's log-prob of all that is not listed."""


@dataclass(frozen=True, slots=True)
class Support:
    """One way to choose the classes of a loss."""

    classes: Callable[[Positions, "ObjectiveSettings"], Classes] | None
    """None: no classes, the sampled token's log-ratio is the advantage of a policy gradient."""
    student_ids: bool = False
    """It needs the student's own top_k ids."""
    teacher_ids: bool = False
    """It needs the teacher's top_k ids."""
    hidden: bool = False
    """It needs the teacher's hidden states."""

    def needs(self, settings: "ObjectiveSettings") -> Needs:
        top_k = settings.top_k
        rest: Rest = "without_stops" if settings.stop_event == "class" else "with_stops"
        listed = self.student_ids or self.teacher_ids
        tail = rest if settings.tail_bucket and listed else None
        return Needs(top_k if self.student_ids else 0, top_k if self.teacher_ids else 0, self.hidden, tail)

    @property
    def dense(self) -> bool:
        """The loss compares distributions; else it is the sampled estimate of reverse KL."""
        return self.classes is not None


SUPPORTS: Kind[Support] = Kind("support")

LOWEST_REST = 1e-7
LOWEST_REST_LOGP = math.log(LOWEST_REST)
"""A rest below this is rounding of float32 log-probs. The floor is the same for both models, so an empty rest costs nothing."""


def listed(at: Positions, columns: int | None = None) -> Classes:
    """The sampled id, then the first `columns` ids (None: all) that the teacher scored at each position."""
    fields = at.fields
    assert fields.support_ids_NK is not None, "a dense loss needs the teacher's top-k"
    assert fields.support_logp_NK is not None
    ids_CX = torch.cat([fields.sampled_ids_N[:, None], fields.support_ids_NK[:, :columns].long()], -1)
    theirs_CK = fields.support_logp_NK[:, :columns].to(at.logp_CV.dtype).clamp(min=LOWEST_LOGP)
    teacher_CX = torch.cat([at.teacher_logp_C[:, None], theirs_CK], -1)
    valid_CX = (ids_CX >= 0) & (ids_CX < at.logp_CV.shape[-1]) & ~_repeated(ids_CX)
    return Classes(ids_CX, at.logp_CV.gather(-1, ids_CX.clamp(0, at.logp_CV.shape[-1] - 1)), teacher_CX, valid_CX)


def whole_vocabulary(at: Positions, settings: "ObjectiveSettings") -> Classes:
    """Every id that both models have."""
    assert at.teacher_CV is not None, "support full needs the teacher beside the learner"
    num_ids = at.teacher_CV.shape[-1]
    ids_CX = torch.arange(num_ids, device=at.logp_CV.device)[None]
    return Classes(ids_CX, at.logp_CV[:, :num_ids], at.teacher_CV, torch.ones_like(ids_CX, dtype=torch.bool), complete=True)


def _top_k(at: Positions, settings: "ObjectiveSettings") -> Classes:
    return listed(at)


SUPPORTS.add("sampled")(Support(None))
SUPPORTS.add("student")(Support(_top_k, student_ids=True))
SUPPORTS.add("teacher")(Support(_top_k, teacher_ids=True))
SUPPORTS.add("union")(Support(_top_k, student_ids=True, teacher_ids=True))
SUPPORTS.add("full")(Support(whole_vocabulary, hidden=True))


def close(at: Positions, classes: Classes, settings: "ObjectiveSettings", log_tilt_sum_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both models as distributions over the classes, the teacher tilted toward stopping: log p [C, X], log q [C, X], p [C, X].

    With stop event `class` the stop ids give way to one last class; with `tail_bucket` one more holds all that is not listed.
    """
    ids_CX, student_CX, teacher_CX, valid_CX, complete = classes
    whole = complete and at.teacher_CV is not None and at.logp_CV.shape == at.teacher_CV.shape
    stop_CX = torch.isin(ids_CX, at.stop_ids_E)
    if settings.stop_event == "class" and not (whole and len(at.stop_ids_E) == 1):
        student_CX = torch.cat([student_CX, at.stop_logp_C[:, None]], -1)
        teacher_CX = torch.cat([teacher_CX, at.teacher_stop_logp_C[:, None]], -1)
        valid_CX, stop_CX = F.pad(valid_CX & ~stop_CX, (0, 1), value=True), F.pad(torch.zeros_like(stop_CX), (0, 1), value=True)
    tilt_C = at.fields.tilt_N.to(student_CX.dtype)
    if tilt_C.any():
        teacher_CX = teacher_CX + tilt_C[:, None] * stop_CX - log_tilt_sum_C[:, None]
    if whole and valid_CX.all():  # both are distributions as they are
        return student_CX, teacher_CX, at.p_CV
    if settings.tail_bucket and not complete:
        student_C, teacher_C = _rests(at, classes, settings, student_CX, teacher_CX, valid_CX)
        student_CX, teacher_CX = torch.cat([student_CX, student_C[:, None]], -1), torch.cat([teacher_CX, teacher_C[:, None]], -1)
        valid_CX = F.pad(valid_CX, (0, 1), value=True)
    student_CX, teacher_CX = _normalise(student_CX, valid_CX), _normalise(teacher_CX, valid_CX)
    return student_CX, teacher_CX, student_CX.detach().exp()


def _rests(
    at: Positions, classes: Classes, settings: "ObjectiveSettings", student_CX: Tensor, teacher_CX: Tensor, valid_CX: Tensor
) -> tuple[Tensor, Tensor]:
    """[C] each model's log-prob of everything that is in no class, not below LOWEST_REST_LOGP.

    Where the teacher sent its own (the column REST_ID) both are sums over ids, so that a small rest keeps its digits. A back end that
    does not know the whole vocabulary sends none; then both are what the classes leave of 1, in float64. The teacher's log-probs are
    float32, so such a rest r is good to 1e-7 / r.
    """
    ids_NK, logp_NK = at.fields.support_ids_NK, at.fields.support_logp_NK
    if ids_NK is None or logp_NK is None or not (rest_NK := ids_NK == REST_ID).any():
        return _left_of_one(student_CX, valid_CX), _left_of_one(teacher_CX, valid_CX)
    inside_CV = torch.zeros_like(at.p_CV, dtype=torch.bool)
    rows_CX = torch.arange(len(inside_CV), device=inside_CV.device)[:, None].expand_as(classes.ids_CX)
    inside_CV[rows_CX[classes.valid_CX], classes.ids_CX[classes.valid_CX]] = True
    if settings.stop_event == "class":
        inside_CV[:, at.stop_ids_E] = True
    student_C = at.logp_CV.masked_fill(inside_CV, LOWEST_LOGP).logsumexp(-1)
    # Ids that the student lacks are in the teacher's support and in no class.
    foreign_CX = (classes.ids_CX >= at.logp_CV.shape[-1]) & ~_repeated(classes.ids_CX)
    parts = logp_NK.to(teacher_CX.dtype).masked_fill(~rest_NK, LOWEST_LOGP), classes.teacher_CX.masked_fill(~foreign_CX, LOWEST_LOGP)
    return student_C.clamp(min=LOWEST_REST_LOGP), torch.cat(parts, -1).logsumexp(-1).clamp(min=LOWEST_REST_LOGP)


def _left_of_one(logp_CX: Tensor, valid_CX: Tensor) -> Tensor:
    inside_C = logp_CX.double().masked_fill(~valid_CX, LOWEST_LOGP).exp().sum(-1)
    return torch.log1p(-inside_C.clamp(max=1 - LOWEST_REST)).to(logp_CX.dtype)


def _repeated(ids_CX: Tensor) -> Tensor:
    """True at every occurrence of an id after its first in the row."""
    sorted_CX, order_CX = ids_CX.sort(dim=-1, stable=True)
    again_CX = torch.zeros_like(ids_CX, dtype=torch.bool)
    again_CX[:, 1:] = sorted_CX[:, 1:] == sorted_CX[:, :-1]
    return torch.zeros_like(again_CX).scatter(-1, order_CX, again_CX)


def _normalise(logp_CX: Tensor, valid_CX: Tensor) -> Tensor:
    """Log-probs renormalised on the valid classes; at the others as good as log 0."""
    return logp_CX.masked_fill(~valid_CX, LOWEST_LOGP).log_softmax(-1)
