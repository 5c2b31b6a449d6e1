"""Scored rollouts and golden answers in, padded micro-batches with every token's fields out.

    admit: bounds truncated rollouts --> (teacher scores them) --> build_micro_batches

Shapes: B rows of a micro-batch, L padded length, N its response tokens in row order, T tokens of one response, K support.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.supports import SUPPORTS
from opd_governor.actors.learner.weights import (
    comparable,
    distillation_weight,
    overlong_terms,
    position_weights,
    stop_tilt,
    token_mask,
    token_weights,
    within_horizon,
)
from opd_governor.actors.packing import like_lengths
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, Trajectory


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Right-padded rows of prompt and response, and where the states that predict the response lie.

    >>> hidden_NH = model.model(inputs.input_ids_BL).last_hidden_state.flatten(0, 1)[inputs.predictor_N]
    """

    input_ids_BL: Tensor
    predictor_N: Tensor
    """Index, in [B x L] flattened, of the position whose hidden state predicts each response token."""

    def to(self, device: torch.device | str) -> "ModelInputs":
        return ModelInputs(self.input_ids_BL.to(device), self.predictor_N.to(device))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass consumes."""

    student: ModelInputs
    fields: TokenFields

    def to(self, device: torch.device | str) -> "MicroBatch":
        return MicroBatch(self.student.to(device), self.fields.to(device))


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence before padding: its prompt, all that stands behind it, and the fields of each token there that was sampled."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    fields: dict[str, np.ndarray]
    mask_T: np.ndarray | None = None
    """Which of the response were sampled; None: all."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def admit(trajectories: Sequence[Trajectory], quota: float) -> tuple[list[Trajectory], list[Trajectory]]:
    """Refuse truncated rollouts until their share in what is left is at most `quota`; returns (admitted, refused), in order.

    Those with the largest share of tokens before a loop's onset stay, the earlier ones where equal. Where every rollout
    is truncated a quota below 1 refuses all: nothing else would keep the share.
    """
    truncated = [index for index, trajectory in enumerate(trajectories) if trajectory.truncated]
    num_complete = len(trajectories) - len(truncated)
    # k truncated beside c complete: k / (k + c) <= quota
    num_kept = len(truncated) if quota >= 1 else math.floor(quota * num_complete / (1 - quota) + 1e-9)
    kept = set(sorted(truncated, key=lambda index: -_healthy_share(trajectories[index]))[:num_kept])
    admitted = [t for index, t in enumerate(trajectories) if not t.truncated or index in kept]
    refused = [t for index, t in enumerate(trajectories) if t.truncated and index not in kept]
    return admitted, refused


def _healthy_share(trajectory: Trajectory) -> float:
    if trajectory.loop_onset is None or not trajectory.token_ids:
        return 1.0
    return trajectory.loop_onset / len(trajectory.token_ids)


def build_micro_batches(
    rollouts: Sequence[ScoredRollout],
    golden: Sequence[Prompt],
    settings: ObjectiveSettings,
    limits: LengthLimits,
    *,
    micro_batch_tokens: int,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    reference_length_tokens: float | None = None,
    pad_id: int = 0,
    share: tuple[int, int] = (0, 1),
) -> list[MicroBatch]:
    """One optimiser step's batch, longest rows first, as micro-batches of at most `micro_batch_tokens` padded tokens.

    A row longer than that has a micro-batch to itself. `share` (rank, number of ranks) leaves this rank's rows only: their weights
    stay shares of the whole batch, and all ranks get equally many micro-batches. `golden`: prompts with `golden_ids`, learnt by
    cross-entropy with weight `limits.golden_weight` (mean over their tokens). `max_new_tokens` is the constant reduction's normaliser and
    `reference_length_tokens` the stop tilt's target where the settings leave them open; `stop_ids` are what a
    horizon keeps. Raises ValueError where a tilt has no target, or a dense loss no support.

    >>> for micro in build_micro_batches(rollouts, golden, settings, limits, micro_batch_tokens=8192, max_new_tokens=512):
    ...     hidden_NH = model.model(micro.student.input_ids_BL).last_hidden_state.flatten(0, 1)[micro.student.predictor_N]
    """
    normaliser_tokens = settings.constant_normaliser_tokens or float(max_new_tokens)
    targets = [settings.stop_tilt_target_tokens or r.trajectory.prompt.expected_tokens or reference_length_tokens for r in rollouts]
    if limits.stop_tilt_nats > 0 and None in targets:
        raise ValueError("objective.stop_tilt_target_tokens: not set and no reference length known; set it or stop_tilt_nats to 0")

    masks = [
        token_mask(r.trajectory, settings, limits.loop_tail_weight, stop_ids, limits.excess_weight) * comparable(r.scores, settings)
        for r in rollouts
    ]
    weights = token_weights(masks, settings.reduction, normaliser_tokens)
    whole_weights = weights
    if settings.overlong_weight > 0 or limits.stop_weight > 0:
        whole_masks = [token_mask(r.trajectory, settings, 1.0, stop_ids) * comparable(r.scores, settings) for r in rollouts]
        whole_weights = token_weights(whole_masks, settings.reduction, normaliser_tokens)
    rows = [
        _rollout_row(rollout, weight_T, whole_T, settings, limits, target_tokens or 0.0)
        for rollout, weight_T, whole_T, target_tokens in zip(rollouts, weights, whole_weights, targets, strict=True)
    ]
    if settings.reward is not None:
        # Every sampled token is an action of the answer: one that the teacher cannot judge, or a loop's, as well.
        masks = [token_mask(r.trajectory, settings, 1.0, stop_ids) for r in rollouts]
        shares = token_weights(masks, settings.reduction, normaliser_tokens)
        for row, rollout, share_T in zip(rows, rollouts, shares, strict=True):
            row.fields["reward_weight_N"] = share_T
            row.fields["reward_N"] = np.full(len(share_T), settings.reward.weight * rollout.advantage)
    golden_masks = [within_horizon(prompt.golden_ids or (), settings.horizon_tokens, stop_ids) for prompt in golden]
    golden_weight = limits.golden_weight / max(sum(float(mask_T.sum()) for mask_T in golden_masks), 1)
    blank = _blank_teacher(rows)
    rows += [_golden_row(prompt, golden_weight * mask_T, blank) for prompt, mask_T in zip(golden, golden_masks, strict=True)]
    rows.sort(key=lambda row: -row.num_tokens)
    rank, num_ranks = share
    groups = [_group(dealt, micro_batch_tokens) for dealt in _deal(rows, num_ranks)]
    # A pass is a meeting of all ranks: who has fewer micro-batches makes up with rows that count nothing.
    num_missing = max(map(len, groups)) - len(groups[rank])
    nothing = _golden_row(Prompt(-1, (pad_id,), golden_ids=(pad_id,)), np.zeros(1), blank)
    return [_pad(group, pad_id) for group in [*groups[rank], *([[nothing]] * num_missing)]]


def _rollout_row(
    rollout: ScoredRollout,
    weight_T: np.ndarray,
    whole_weight_T: np.ndarray,
    settings: ObjectiveSettings,
    limits: LengthLimits,
    target_tokens: float,
) -> _Row:
    trajectory, scores = rollout.trajectory, rollout.scores
    num_tokens = len(trajectory.token_ids)
    overlong_T, tail_weight_T = overlong_terms(trajectory, settings, weight_T, whole_weight_T)
    if settings.position_gamma > 0:
        weight_T = weight_T * position_weights(scores, trajectory, settings.position_gamma)
    fields = _blank_fields(trajectory.token_ids) | {
        "rollout_N": np.ones(num_tokens, bool),
        "weight_N": weight_T,
        "behaviour_logp_N": trajectory.logprobs_T,
        "teacher_logp_N": scores.sampled_logp_T,
        "teacher_stop_logp_N": scores.stop_logp_T,
        "tilt_N": stop_tilt(num_tokens, limits.stop_tilt_nats, target_tokens, settings.stop_tilt_width_tokens),
        "distil_N": np.full(num_tokens, distillation_weight(trajectory, settings)),
        "overlong_N": overlong_T,
        "tail_weight_N": tail_weight_T,
        "stop_weight_N": limits.stop_weight * whole_weight_T,
    }
    if scores.sampled_only_T is not None:
        fields["sampled_only_N"] = scores.sampled_only_T
    support = SUPPORTS[settings.support]
    if support.student_ids or support.teacher_ids:
        if scores.support_ids_TK is None or scores.support_logp_TK is None:
            raise ValueError(f"objective.support {settings.support}: teacher {scores.teacher} returned no top-k log-probs")
        fields |= {"support_ids_NK": scores.support_ids_TK, "support_logp_NK": scores.support_logp_TK}
    if support.hidden:
        if scores.hidden_TH is None:
            raise ValueError(f"objective.support {settings.support}: teacher {scores.teacher} returned no hidden states")
        fields["teacher_hidden_NH"] = scores.hidden_TH
    for name, values in fields.items():
        assert len(values) == num_tokens, f"{name}: {len(values)} values for {num_tokens} tokens"
    return _Row(trajectory.prompt.token_ids, trajectory.conversation_ids, fields, trajectory.mask_T)


def as_float32(hidden_TH: np.ndarray) -> np.ndarray:
    """Hidden states of `TokenScores`: the bits of bfloat16 are the upper half of float32's."""
    return (hidden_TH.astype(np.uint32) << 16).view(np.float32) if hidden_TH.dtype == np.uint16 else hidden_TH


def _hidden(parts: list[np.ndarray]) -> Tensor:
    """All rows' hidden states, in bfloat16 where all of them are."""
    if all(part.dtype == np.uint16 for part in parts):
        return torch.from_numpy(np.concatenate(parts)).view(torch.bfloat16)
    return torch.from_numpy(np.concatenate([as_float32(part) for part in parts]))


def _blank_teacher(rows: list[_Row]) -> dict[str, np.ndarray]:
    """One token's fields where no teacher spoke: a support without columns, hidden states of zeros."""
    fields = rows[0].fields if rows else {}
    return {
        name: np.zeros((1, 0 if name.startswith("support") else field.shape[1]), field.dtype)
        for name, field in fields.items()
        if name in ("support_ids_NK", "support_logp_NK", "teacher_hidden_NH")
    }


def _golden_row(prompt: Prompt, weight_T: np.ndarray, blank: dict[str, np.ndarray]) -> _Row:
    assert prompt.golden_ids is not None, f"prompt {prompt.index} has no golden answer"
    num_tokens = len(prompt.golden_ids)
    fields = _blank_fields(prompt.golden_ids) | {"golden_weight_N": weight_T}
    fields |= {name: np.broadcast_to(row, (num_tokens, row.shape[1])) for name, row in blank.items()}
    return _Row(prompt.token_ids, prompt.golden_ids, fields)


def _blank_fields(response_ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    num_tokens = len(response_ids)
    names = ["weight", "golden_weight", "tail_weight", "stop_weight", "behaviour_logp", "teacher_logp", "teacher_stop_logp", "tilt"]
    names += ["overlong", "distil", "reward", "reward_weight"]
    return {
        "sampled_ids_N": np.asarray(response_ids, np.int64),
        "position_N": np.arange(num_tokens),
        "rollout_N": np.zeros(num_tokens, bool),
        "sampled_only_N": np.zeros(num_tokens, bool),
    } | {f"{name}_N": np.zeros(num_tokens) for name in names}


def _deal(rows: list[_Row], num_ranks: int) -> list[list[_Row]]:
    """Each row to the rank with the fewest tokens so far; rows of like length stay neighbours."""
    dealt: list[list[_Row]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in rows:
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += row.num_tokens
    return dealt


def _group(rows: list[_Row], micro_batch_tokens: int) -> list[list[_Row]]:
    """Rows cut into micro-batches, longest first."""
    return [[rows[index] for index in batch] for batch in like_lengths([row.num_tokens for row in rows], micro_batch_tokens)]


def _pad(rows: list[_Row], pad_id: int) -> MicroBatch:
    return MicroBatch(_inputs(rows, pad_id), TokenFields(**{name: _join(rows, name) for name in rows[0].fields}))


def _inputs(rows: list[_Row], pad_id: int) -> ModelInputs:
    """Tokens that were not sampled are read by the model and predicted by nothing: no loss ever sees their states' logits."""
    longest = max(row.num_tokens for row in rows)
    input_ids_BL = torch.full((len(rows), longest), pad_id)
    predictors = []
    for place, row in enumerate(rows):
        assert row.prompt_ids, "a response needs at least one prompt token to be predicted from"
        input_ids_BL[place, : row.num_tokens] = torch.tensor(row.prompt_ids + row.response_ids)
        sampled_N = torch.arange(len(row.response_ids))
        if row.mask_T is not None:
            sampled_N = sampled_N[torch.from_numpy(row.mask_T)]
        predictors.append(place * longest + len(row.prompt_ids) - 1 + sampled_N)
    return ModelInputs(input_ids_BL, torch.cat(predictors))


def _join(rows: list[_Row], name: str) -> Tensor:
    """One field of all rows, as float32 unless it holds ids or flags; supports are padded to the widest, ids with -1."""
    parts = [row.fields[name] for row in rows]
    if name == "teacher_hidden_NH":
        return _hidden(parts)
    if parts[0].ndim == 2:
        width = max(part.shape[1] for part in parts)
        padding = -1 if name == "support_ids_NK" else 0
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=padding) for part in parts]
    joined = torch.from_numpy(np.concatenate(parts))
    return joined.float() if joined.is_floating_point() else joined
