"""vLLM logits processors: a bias toward stopping beyond a target length, no n-gram twice, an end of thinking.

All read their values from a request's `SamplingParams.extra_args` (sampling.py writes them) and leave other requests alone.
They run before penalties and temperature, so with logprobs_mode="processed_logprobs" their effect is in every recorded log-prob:
the behaviour policy is log_softmax((logits + bias) / temperature).

Name them in EngineArgs(logits_processors=LOGITS_PROCESSORS). They follow the interface of vLLM's model runner V1, the one on
CPUs; on GPUs set VLLM_USE_V2_MODEL_RUNNER=0 where they are named, because runner V2 refuses them at start.

Shapes: B = requests in the batch, V = vocabulary, E = stop ids.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from opd_governor.actors.rollout.sampling import NO_REPEAT_NGRAM, STOP_RAMP, THINKING_BUDGET
from opd_governor.actors.rollout.thinking import Watch

LOGITS_PROCESSORS = (f"{__name__}:StopRamp", f"{__name__}:NoRepeatNgram", f"{__name__}:ThinkingBudget")


@dataclass(frozen=True, slots=True)
class Ramp:
    """One request's ramp. `output_ids` is vLLM's own list, which grows with the response."""

    strength_nats: float
    target_tokens: float
    width_tokens: int
    stop_ids: tuple[int, ...]
    output_ids: list[int]

    def bias_nats(self) -> float:
        """Added to every stop id's logit for the next token: 0 up to the target length, then linear to full strength."""
        return self.strength_nats * min(max((len(self.output_ids) - self.target_tokens) / self.width_tokens, 0.0), 1.0)


class StopRamp(LogitsProcessor):
    """Adds strength * clip((t - target) / width, 0, 1) to the logit of every stop id, t being the tokens generated so far."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._ramps: dict[int, Ramp] = {}

    def is_argmax_invariant(self) -> bool:
        """A bias on the stop ids can make a stop the likeliest token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that enter, leave or move within the batch."""
        process_dict_updates(self._ramps, batch_update, _ramp_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V], changed in place."""
        rows: list[int] = []
        stop_ids: list[int] = []
        biases: list[float] = []
        for row, ramp in self._ramps.items():
            if bias_nats := ramp.bias_nats():
                rows += [row] * len(ramp.stop_ids)
                stop_ids += ramp.stop_ids
                biases += [bias_nats] * len(ramp.stop_ids)
        if rows:
            index = (torch.tensor(rows, device=self._device), torch.tensor(stop_ids, device=self._device))
            logits[index] += torch.tensor(biases, dtype=logits.dtype, device=self._device)
        return logits


class Ngrams:
    """Which tokens have followed each (n - 1)-gram of a response that grows; a token is read once."""

    def __init__(self, n: int, output_ids: list[int]) -> None:
        self._n = n
        self._output_ids = output_ids
        self._num_read = 0
        self._followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def banned(self) -> list[int]:
        """Tokens that would complete an n-gram which the response already has."""
        ids, n = self._output_ids, self._n
        for end in range(max(self._num_read, n - 1), len(ids)):
            self._followers[tuple(ids[end - n + 1 : end])].append(ids[end])
        self._num_read = len(ids)
        if len(ids) < n:
            return []
        return self._followers.get(tuple(ids[len(ids) - n + 1 :]), [])


class NoRepeatNgram(LogitsProcessor):
    """No n-gram occurs twice in a response; the prompt's n-grams may be repeated.

    The rule of Paulus et al. 2017 (arXiv 1705.04304, section 2.5).
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._ngrams: dict[int, Ngrams] = {}

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be banned."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that enter, leave or move within the batch."""
        process_dict_updates(self._ngrams, batch_update, _ngrams_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V], changed in place."""
        rows: list[int] = []
        banned_ids: list[int] = []
        for row, ngrams in self._ngrams.items():
            banned = ngrams.banned()
            rows += [row] * len(banned)
            banned_ids += banned
        if rows:
            logits[torch.tensor(rows, device=self._device), torch.tensor(banned_ids, device=self._device)] = -torch.inf
        return logits


class ThinkingBudget(LogitsProcessor):
    """Where a response has thought for its budget the end mark is the only token left."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._watched: dict[int, tuple[Watch, int]] = {}

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be another one."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that enter, leave or move within the batch."""
        process_dict_updates(self._watched, batch_update, _watch_of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V], changed in place."""
        used_up = [(row, end_id) for row, (watch, end_id) in self._watched.items() if watch.is_used_up()]
        if used_up:
            rows, end_ids = torch.tensor(used_up, device=self._device).T
            logits[rows] = -torch.inf
            logits[rows, end_ids] = 0.0
        return logits


def _watch_of(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> tuple[Watch, int] | None:
    if (values := (params.extra_args or {}).get(THINKING_BUDGET)) is None:
        return None
    begin_id, end_id, budget_tokens = values
    return Watch((begin_id, end_id), budget_tokens, prompt_ids or (), output_ids), end_id


def _ramp_of(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Ramp | None:
    if (values := (params.extra_args or {}).get(STOP_RAMP)) is None:
        return None
    strength_nats, target_tokens, width_tokens = values
    return Ramp(strength_nats, target_tokens, width_tokens, tuple(params.stop_token_ids or ()), output_ids)


def _ngrams_of(params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]) -> Ngrams | None:
    if (n := (params.extra_args or {}).get(NO_REPEAT_NGRAM)) is None:
        return None
    return Ngrams(n, output_ids)
