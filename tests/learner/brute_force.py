"""The objective written from its formulas: one token, one class at a time, float64, nothing shared with the code under test.

A `Case` is a batch as a mathematician sees it: whole distributions of student and teacher at every position. Each loss
comes as (value, differentiable): the gradient wanted is the autograd gradient of the second.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.settings import ObjectiveSettings


@dataclass
class Case:
    lengths: list[int]
    """Tokens of each sequence, concatenated below; the last sequence is golden."""
    sampled: list[int]
    student_logits: Tensor
    teacher_probs: Tensor
    """[N, teacher vocabulary], summing to 1."""
    reference_logits: Tensor
    supports: list[list[int]]
    """With repeats, -1 padding and ids beyond the student's vocabulary."""
    masks: list[float]
    behaviour_logp: list[float]
    tilts: list[float]
    overlong: list[float]
    stop_ids: list[int]
    proximal_probs: Tensor | None = None
    golden_weight: float = 0.1
    reference_kl_weight: float = 0.3
    stop_weight: float = 0.4


def random_case(seed: int, *, teacher_vocabulary: int = 10, proximal: bool = False) -> Case:
    """Six rollouts (one empty, one fully masked) and a golden answer; vocabulary 9, support 8, two stop ids."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.5) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    lengths = [3, 0, 2, 2, 3, 1, 2]
    num_tokens, vocabulary, stop_ids = sum(lengths), 9, [2, 7]
    sampled = torch.randint(0, min(vocabulary, teacher_vocabulary), (num_tokens,), generator=generator).tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for end, stop_id in ((ends[0], 2), (ends[3], 7), (ends[6], 7)):
        sampled[end - 1] = stop_id
    student_logits = normal(num_tokens, vocabulary)
    supports = torch.randint(-1, teacher_vocabulary, (num_tokens, 8), generator=generator)
    supports[::5] = torch.arange(8)  # all but one of the student's ids
    supports[3] = -1
    masks = torch.rand(num_tokens, generator=generator).gt(0.2).double()
    masks[3:5] = 0  # the third sequence, whole
    masks[8:10] = 0.1  # a downweighted tail
    ramp = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    own = student_logits.log_softmax(-1)[range(num_tokens), sampled]
    return Case(
        lengths=lengths,
        sampled=sampled,
        student_logits=student_logits,
        teacher_probs=normal(num_tokens, teacher_vocabulary).softmax(-1),
        reference_logits=normal(num_tokens, vocabulary),
        supports=supports.tolist(),
        masks=masks.tolist(),
        behaviour_logp=(own + normal(num_tokens, scale=0.7)).tolist(),
        tilts=(3 * (ramp - 0.3).clamp(min=0)).tolist(),
        overlong=(-ramp).tolist(),
        stop_ids=stop_ids,
        proximal_probs=(student_logits + normal(num_tokens, vocabulary, scale=0.3)).softmax(-1) if proximal else None,
    )


def fields_of(case: Case, settings: ObjectiveSettings, weights: list[float]) -> TokenFields:
    """The case as the learner gets it: log-probs of a few ids instead of distributions."""
    num_tokens = len(case.sampled)
    num_golden = case.lengths[-1]
    rows = range(num_tokens)
    q = case.teacher_probs
    golden = torch.zeros(num_tokens, dtype=torch.float64)
    golden[num_tokens - num_golden :] = case.golden_weight / num_golden
    supports = torch.tensor(case.supports)
    dense = settings.support not in ("sampled", "full")
    stop = torch.tensor([token in case.stop_ids and settings.stop_event == "class" for token in case.sampled])
    proximal = case.proximal_probs
    return TokenFields(
        sampled_ids_N=torch.tensor(case.sampled),
        position_N=torch.cat([torch.arange(length) for length in case.lengths]),
        rollout_N=golden == 0,
        weight_N=torch.tensor(weights, dtype=torch.float64),
        golden_weight_N=golden,
        behaviour_logp_N=torch.tensor(case.behaviour_logp, dtype=torch.float64),
        teacher_logp_N=q[rows, case.sampled].log(),
        teacher_stop_logp_N=q[:, case.stop_ids].sum(-1).log(),
        tilt_N=torch.tensor(case.tilts, dtype=torch.float64),
        overlong_N=torch.tensor(case.overlong, dtype=torch.float64) * settings.overlong_weight,
        stop_weight_N=torch.tensor(weights, dtype=torch.float64) * case.stop_weight,
        support_ids_NK=supports if dense else None,
        support_logp_NK=q.gather(-1, supports.clamp(min=0)).log() if dense else None,
        proximal_logp_N=None if proximal is None else proximal[rows, case.sampled].log(),
        proximal_action_logp_N=None
        if proximal is None
        else torch.where(stop, proximal[:, case.stop_ids].sum(-1), proximal[rows, case.sampled]).log(),
    )


def weigh(case: Case, settings: ObjectiveSettings) -> list[float]:
    """The reduction, spelt out."""
    weights, start = [], 0
    sequences = []
    for length in case.lengths[:-1]:
        sequences.append(case.masks[start : start + length])
        start += length
    counted = [sequence for sequence in sequences if sum(sequence) > 0]
    for sequence in sequences:
        for mask in sequence:
            if settings.reduction == "token_mean":
                weights.append(mask / sum(sum(other) for other in sequences))
            elif settings.reduction == "sequence_mean":
                weights.append(mask / sum(sequence) / len(counted) if sum(sequence) > 0 else 0.0)
            else:
                weights.append(mask / (len(sequences) * settings.constant_normaliser_tokens))
    return weights + [0.0] * case.lengths[-1]


def objective(case: Case, settings: ObjectiveSettings, logits: Tensor) -> tuple[float, Tensor]:
    """The whole batch: distillation, reference KL, golden cross-entropy."""
    value, differentiable = 0.0, torch.zeros((), dtype=torch.float64)
    first_golden = len(case.sampled) - case.lengths[-1]
    for n, weight in enumerate(weigh(case, settings)):
        p = softmax(logits[n])
        if n >= first_golden:
            mass = action_mass(p, case.sampled[n], case.stop_ids, settings)
            term = -case.golden_weight / case.lengths[-1] * torch.log(mass)
            value, differentiable = value + number(term), differentiable + term
            continue
        term = sampled_loss(case, settings, n, p) if settings.support == "sampled" else dense_loss(case, settings, n, p)
        kl, differentiable_kl = reference_kl(case, settings, n, p)
        stop = stop_loss(case, settings, n, p)
        value = value + weight * number(term + case.reference_kl_weight * kl + case.stop_weight * stop)
        differentiable = differentiable + weight * (term + case.reference_kl_weight * differentiable_kl + case.stop_weight * stop)
    return value, differentiable


def number(x: Tensor) -> float:
    return x.detach().item()


def softmax(logits: Tensor) -> list[Tensor]:
    exps = [torch.exp(logit) for logit in logits]
    return [e / sum(exps) for e in exps]


def action_mass(probs: list[Tensor], token: int, stop_ids: list[int], settings: ObjectiveSettings) -> Tensor:
    if settings.stop_event == "class" and token in stop_ids:
        return sum(probs[stop_id] for stop_id in stop_ids)
    return probs[token]


def tilted(q: list[Tensor], stop_ids: list[int], b: float) -> list[Tensor]:
    """p'(v) = p(v) e^(b [v in E]) / sum of the same."""
    lifted = [mass * math.exp(b if token in stop_ids else 0.0) for token, mass in enumerate(q)]
    return [mass / sum(lifted) for mass in lifted]


def stop_loss(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> Tensor:
    """KL of {stop, go on}, teacher to student."""
    q = list(case.teacher_probs[n])
    if settings.support == "full":
        common = q[: min(len(p), len(q))]
        q = [mass / sum(common) for mass in common]
    q = tilted(q, case.stop_ids, case.tilts[n])
    theirs, mine = sum(q[token] for token in case.stop_ids), sum(p[token] for token in case.stop_ids)
    return theirs * torch.log(theirs / mine) + (1 - theirs) * torch.log((1 - theirs) / (1 - mine))


def importance(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> float:
    if settings.importance_cap is None:
        return 1.0
    proximal = p if case.proximal_probs is None else case.proximal_probs[n]
    ratio = number(proximal[case.sampled[n]]) / math.exp(case.behaviour_logp[n])
    return min(ratio, settings.importance_cap)


def sampled_loss(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> Tensor:
    q = tilted(list(case.teacher_probs[n]), case.stop_ids, case.tilts[n])
    mine = action_mass(p, case.sampled[n], case.stop_ids, settings)
    theirs = action_mass(q, case.sampled[n], case.stop_ids, settings)
    advantage = number(torch.log(theirs) - torch.log(mine))
    if is_outlier(case, settings, n, p):
        advantage = max(advantage, -settings.trust_region_nats) if settings.outliers == "clip" else 0.0
    if settings.advantage_clip_nats is not None:
        advantage = max(-settings.advantage_clip_nats, min(settings.advantage_clip_nats, advantage))
    advantage += settings.overlong_weight * case.overlong[n]
    if case.proximal_probs is None:
        ratio = mine / mine.detach()
    else:
        ratio = mine / action_mass(list(case.proximal_probs[n]), case.sampled[n], case.stop_ids, settings)
    if number(ratio) > 1 + settings.clip_high and advantage > 0:
        ratio = torch.tensor(1 + settings.clip_high, dtype=torch.float64)
    if number(ratio) < 1 - settings.clip_low and advantage < 0:
        ratio = torch.tensor(1 - settings.clip_low, dtype=torch.float64)
    return -importance(case, settings, n, p) * ratio * advantage


def is_outlier(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> bool:
    """Whether the teacher finds what was sampled less likely than the student by more than the region."""
    q = list(case.teacher_probs[n])
    if settings.support == "full":
        q = [mass / sum(q[: min(len(p), len(q))]) for mass in q[: min(len(p), len(q))]]
    theirs, mine = (number(action_mass(probs, case.sampled[n], case.stop_ids, settings)) for probs in (q, p))
    return settings.trust_region_nats is not None and math.log(theirs) - math.log(mine) < -settings.trust_region_nats


def dense_loss(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> Tensor:
    q, outlier = list(case.teacher_probs[n]), is_outlier(case, settings, n, p)
    zero = torch.zeros((), dtype=torch.float64)
    if settings.support == "full":
        size = min(len(p), len(q))
        p, q = p[:size], [mass / sum(q[:size]) for mass in q[:size]]
        ids = set(range(size))
    else:
        ids = {token for token in [case.sampled[n], *case.supports[n]] if 0 <= token < len(p)}
    q = tilted(q, case.stop_ids, case.tilts[n])
    if settings.stop_event == "class":
        classes = [[token] for token in sorted(ids) if token not in case.stop_ids] + [case.stop_ids]
    else:
        classes = [[token] for token in sorted(ids)]
    if settings.tail_bucket:
        covered = {token for members in classes for token in members}
        rest = [token for token in range(max(len(p), len(q))) if token not in covered]
        if any(token < len(p) for token in rest):
            classes.append(rest)

    def masses(probs: list[Tensor]) -> list[Tensor]:
        sums = [sum((probs[token] for token in members if token < len(probs)), zero) for members in classes]
        return [mass / sum(sums) for mass in sums]

    if outlier:
        return kl(masses(q), masses(p)) if settings.outliers == "forward" else sum(masses(p)) * 0.0
    return divergence(masses(p), masses(q), settings)


def kl(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x * (torch.log(x) - torch.log(y)) for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=torch.float64))


def divergence(p: list[Tensor], q: list[Tensor], settings: ObjectiveSettings) -> Tensor:
    def mix(share: float) -> list[Tensor]:
        return [share * y + (1 - share) * x for x, y in zip(p, q, strict=True)]

    if settings.loss == "reverse_kl":
        return kl(p, q)
    if settings.loss == "forward_kl":
        return kl(q, p)
    if settings.loss == "mixed_kl":
        return settings.rkl_share * kl(p, q) + (1 - settings.rkl_share) * kl(q, p)
    if settings.loss == "jsd":
        m = mix(settings.jsd_beta)
        return settings.jsd_beta * kl(q, m) + (1 - settings.jsd_beta) * kl(p, m)
    return kl(q, mix(settings.skew_alpha))


def reference_kl(case: Case, settings: ObjectiveSettings, n: int, p: list[Tensor]) -> tuple[Tensor, Tensor]:
    reference = softmax(case.reference_logits[n])
    if settings.reference_kl == "exact":
        term = sum(x * (torch.log(x) - torch.log(y)) for x, y in zip(p, reference, strict=True))
        return term, term
    r = torch.log(reference[case.sampled[n]]) - torch.log(p[case.sampled[n]])
    weight = importance(case, settings, n, p)
    if case.proximal_probs is not None:
        weight *= number(p[case.sampled[n]] / case.proximal_probs[n][case.sampled[n]])
    return weight * (torch.exp(r) - 1 - r), weight * r**2 / 2
