"""Passes over the student: micro-batches in, the gradient on its parameters out. Also the probe that engines are compared with."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.actors.learner.batching import MicroBatch, ModelInputs
from opd_governor.actors.learner.fields import LazyLogits, TokenFields, TokenLosses
from opd_governor.actors.learner.lora import without_lora
from opd_governor.actors.learner.models import Loaded
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.learner.sharding import shard, shard_frozen, summed, whole
from opd_governor.actors.trajectory import LengthLimits

EAGER_ROW_TOKENS = 256
"""Longest rows whose attention is done in plain products (see `Passes._choose_attention`)."""


class Passes:
    """Forward and backward over the student, with the frozen models beside it where the objective needs them."""

    def __init__(self, models: Loaded, settings: LearnerSettings, objective: ObjectiveSettings, stop_ids: Sequence[int]) -> None:
        self._models, self._settings, self._objective = models, settings, objective
        self._student = models.student
        self._attention = models.student.model.config._attn_implementation
        self._stop_ids = tuple(dict.fromkeys(stop_ids))
        self._run: Callable[[Callable[[], Any]], Any] = lambda run: run()
        """What every pass over the student runs inside."""

    @property
    def stop_ids(self) -> torch.Tensor:
        """[E], on the student's device."""
        return torch.tensor(self._stop_ids, device=self._student.device)

    def shard(self, device: torch.device) -> None:
        """Keep this rank's part of the student, whose parameters are others afterwards, and of the reference."""
        self._run = shard(self._student, device, self._settings.dtype)
        reference = self._models.reference
        if reference is not None and reference is not self._student:
            shard_frozen(reference, device)

    def gradient(
        self, micro_batches: Sequence[MicroBatch], limits: LengthLimits, optimizer: torch.optim.Optimizer
    ) -> tuple[float, float, list[TokenLosses]]:
        """Loss, gradient norm before clipping, and each token's part; the gradient itself is left clipped on the parameters."""
        optimizer.zero_grad(set_to_none=True)
        total, parts = 0.0, []
        for micro in micro_batches:
            self._choose_attention(micro.student.input_ids_BL.shape[1])
            loss, losses = self._run(partial(self._loss, micro.student, micro.fields, limits))
            loss.backward()
            total += float(loss.detach())
            parts.append(losses)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm)))
        return summed(total, self._student.device), grad_norm, parts

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int], dtype: str, *, base: bool = False) -> np.ndarray:
        """Log-probs [L - 1] of a fixed sequence, nats, float32, computed in `dtype`; `base`: without a LoRA student's addition."""
        device = self._student.device
        ids_BL = torch.tensor([list(token_ids)], device=device)
        off = without_lora(self._student.model) if base else contextlib.nullcontext()
        with off, _without_dropout(self._student.model), torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            logits_LV = self._run(lambda: self._student.head(self._student.hidden(ids_BL)[0, :-1]))
        return logits_LV.float().log_softmax(-1).gather(1, ids_BL[0, 1:, None])[:, 0].cpu().numpy()

    def _choose_attention(self, row_tokens: int) -> None:
        """On CPUs torch's flash kernel takes three times as long backward in bfloat16 as products and a softmax do. These keep a
        probability for every pair of tokens, so longer rows have the flash kernel."""
        if self._settings.dtype == "bfloat16" and not torch.cuda.is_available():
            self._student.model.set_attn_implementation("eager" if row_tokens <= EAGER_ROW_TOKENS else self._attention)

    def _loss(self, inputs: ModelInputs, fields: TokenFields, limits: LengthLimits) -> tuple[torch.Tensor, TokenLosses]:
        reference = self._models.reference if limits.reference_kl_weight > 0 else None
        with torch.autocast(self._student.device.type, torch.bfloat16, enabled=self._settings.dtype == "bfloat16"):
            with torch.no_grad(), without_lora(self._student.model) if reference is self._student else contextlib.nullcontext():
                reference_logits = _lazy(reference, inputs) if reference else None
            teacher_logits = None
            if self._models.teacher_head is not None:
                assert fields.teacher_hidden_NH is not None
                teacher_logits = LazyLogits(fields.teacher_hidden_NH, self._models.teacher_head, ())
            return chunked_objective(
                _lazy(self._student, inputs),
                fields,
                self._objective,
                self.stop_ids,
                chunk_tokens=self._settings.chunk_tokens,
                reference_kl_weight=limits.reference_kl_weight if reference else 0.0,
                teacher=teacher_logits,
                reference=reference_logits,
            )


@contextlib.contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """As engines have it."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def _lazy(lm: CausalLM, inputs: ModelInputs) -> LazyLogits:
    hidden_BLH = lm.hidden(inputs.input_ids_BL)
    return LazyLogits(hidden_BLH.flatten(0, 1)[inputs.predictor_N], lm.head, tuple(lm.model.get_output_embeddings().parameters()))
