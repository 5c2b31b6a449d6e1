"""What a batch knows about each response token, and what the objective finds for each of them. Pure torch.

Shapes: N tokens of a micro-batch, V vocabulary, K support, H hidden. Log-probs are natural logarithms (nats) of the temperature-1 softmax.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_LOGP = -1000.0
"""Stands in for log 0: exp of it is 0, and its distance from any log-prob is finite."""


@dataclass(frozen=True, slots=True)
class TokenFields:
    """What a batch knows about each of N response tokens. Golden tokens carry zeros where a teacher's scores would be.

    >>> chunk = fields.select(slice(0, 1024)); fields = fields.to("cuda")
    """

    sampled_ids_N: Tensor
    position_N: Tensor
    """Index of the token in its response."""
    rollout_N: Tensor
    """True: sampled by the student; False: of a golden answer."""
    weight_N: Tensor
    """Share of the token's loss in the batch's loss (see `weights.token_weights`); 0 masks it."""
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
    stop_weight_N: Tensor | None = None
    """Weight of the dense loss on stopping; 0 on golden tokens. None: there is none."""
    distil_N: Tensor | None = None
    """Factor on the teacher's signal: its weight, 0 on a rollout that is not distilled; None: 1."""
    reward_N: Tensor | None = None
    """Advantage of the response's reward, times its weight, nats; None: no reward."""
    reward_weight_N: Tensor | None = None
    """Share of the token's reward term in the batch's loss, beside `weight_N`: the masks of distillation do not hold for it."""
    tail_weight_N: Tensor | None = None
    """Weight of the overlong penalty alone, beside `weight_N`: what a loop's tokens lack where their distillation is masked."""
    support_ids_NK: Tensor | None = None
    """Ids of a top-k support; repeats count once, -1 is padding."""
    support_logp_NK: Tensor | None = None
    """The teacher's raw log-probs at them."""
    teacher_hidden_NH: Tensor | None = None
    """The teacher's hidden states, for a support that needs them; zeros on golden tokens."""
    sampled_only_N: Tensor | None = None
    """True: a dense loss has no classes here and gives way to the sampled estimator; None: False everywhere."""
    proximal_logp_N: Tensor | None = None
    """Log-prob of the sampled id under the policy at the batch's start. None: the current policy is that policy."""
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
    """Per token, before weighting. The first four carry a gradient, the rest is for metrics."""

    loss_N: Tensor
    """The distillation loss."""
    reference_kl_N: Tensor
    """KL to the reference; zeros without one."""
    stop_loss_N: Tensor
    """KL of {stop, go on} from the tilted teacher to the student; zeros where no token has a `stop_weight_N`."""
    action_logp_N: Tensor
    """The student's log-prob of the action: the stop class at a sampled stop, else the sampled id."""
    logp_N: Tensor
    """The student's log-prob of the sampled id."""
    kl_N: Tensor
    """log pS - log pT of the action: no tilt, no clip, both at temperature 1 and without filters. On samples of that distribution its
    mean is reverse KL, whatever the loss. Samples drawn at another temperature or through top-p, top-k or min-p come from another
    distribution: there it is the mean log-ratio of what was sampled, which may be above or below reverse KL."""
    clipped_N: Tensor
    """1 where the PPO clip cut the gradient off."""
    outlier_N: Tensor
    """1 where the teacher finds the sampled token less likely than the trust region allows."""
    signal_N: Tensor
    """The teacher's signal on the sampled token, nats: its log-ratio with tilt and bound, times `distil_N`."""
    entropy_N: Tensor
    student_stop_logp_N: Tensor
    teacher_logp_N: Tensor
    teacher_stop_logp_N: Tensor

    def detach(self) -> "TokenLosses":
        return TokenLosses(*(getattr(self, f.name).detach() for f in dataclasses.fields(self)))

    def to(self, device: torch.device | str) -> "TokenLosses":
        return TokenLosses(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    @staticmethod
    def cat(parts: "list[TokenLosses]") -> "TokenLosses":
        return TokenLosses(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(TokenLosses)))


class LazyLogits(NamedTuple):
    """Logits not made yet: the hidden state that predicts each token, and the head that turns hidden states into logits."""

    hidden_NH: Tensor
    head: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    """The head's parameters: the ones whose gradient is wanted beside that of the hidden states."""


def pick(logp_CV: Tensor, ids_CX: Tensor) -> Tensor:
    """Log-probs of some ids per row; an id outside the vocabulary has none."""
    inside_CX = ids_CX < logp_CV.shape[-1]
    return logp_CV.gather(-1, torch.where(inside_CX, ids_CX, 0)).masked_fill(~inside_CX, LOWEST_LOGP)
