"""The Ray shell of the learner: a scored batch in, one optimiser step, new weights out.

ScoredRollout + golden --build_micro_batches--> forward, chunked_objective, backward --AdamW--> weights v(N+1)

With several ranks each takes its share of the rows; loss and gradients are summed over ranks, everything else is the same.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file, save, save_file
from torch.distributed import TCPStore
from transformers import AutoTokenizer

from opd_governor.actors.causal_lm import CausalLM, compile_layers
from opd_governor.actors.learner.batching import MicroBatch, ModelInputs, build_micro_batches
from opd_governor.actors.learner.checkpoint import OPTIMIZER, STUDENT, load_moments, moments
from opd_governor.actors.learner.metrics import BatchMetrics, summarise
from opd_governor.actors.learner.objective import LazyLogits, TokenFields, TokenLosses, chunked_objective
from opd_governor.actors.learner.optimizer import build_optimizer, learning_rate_at
from opd_governor.actors.learner.outgoing import HEAD, Outgoing
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.learner.sharding import gather, join, of_every_rank, open_rendezvous, rank_and_size, scatter, shard, summed, whole
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout
from opd_governor.actors.wire import rows_of, unpack

COUNTERS = "learner.json"
RANDOM = "random.safetensors"
EAGER_ROW_TOKENS = 256
"""Longest rows whose attention is done in plain products (see `Learner._choose_attention`)."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies in host memory of all that a step changes."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    """Generator state by rank and device, "0/cpu"; dropout draws from it."""
    weight_version: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one learner step did."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    """Loss or gradient was not finite: the weights stayed as they were."""
    weight_version: int
    metrics: BatchMetrics
    suspects: tuple[int, ...] = ()
    """Of a skipped step: the rollouts (their places in the batch) that give no finite loss or gradient on their own."""


@contextlib.contextmanager
def _disk_errors(folder: str) -> Iterator[None]:
    """OSError whatever the writers raise: on a full disk safetensors and tokenizers have error types of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{folder}: {error}") from error


class Learner:
    """The student, its optimiser, and beside them the frozen models that a loss may need.

    Of the `teacher` only its head, for the full support; the reference (the initial student) only where `with_reference`.
    """

    def __init__(
        self,
        model: str,
        settings: LearnerSettings,
        objective: ObjectiveSettings,
        *,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        seed: int,
        with_reference: bool,
        teacher: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(seed)
        os.umask(0o077)  # what this process writes is its owner's alone
        self._path, self._settings, self._objective = model, settings, objective
        self._stop_ids, self._max_new_tokens, self._trust = stop_ids, max_new_tokens, trust_remote_code
        # Master weights and moments are float32 whatever precision the passes run in.
        # A student of several ranks is loaded on the CPU: whole, it may not fit one rank's device.
        self._student = self._load(model, "float32", device="cpu" if settings.num_ranks > 1 else None)
        self._student.model.train()
        self._attention = self._student.model.config._attn_implementation
        if settings.gradient_checkpointing:
            self._student.model.gradient_checkpointing_enable()
        if settings.freeze_embeddings:
            self._student.model.get_input_embeddings().requires_grad_(False)
        self._reference = self._load_frozen(model) if with_reference else None
        self._teacher_head = self._load_frozen(teacher).head if teacher else None
        if settings.compile:
            for lm in (self._student, self._reference):
                if lm is not None:
                    compile_layers(lm.model)
        self._run: Callable[[Callable[[], Any]], Any] = lambda run: run()
        """What every pass over the student runs inside."""
        self._ready()
        self.weight_version = 0
        self._snapshot: Snapshot | None = None
        self._trainer: Any = None
        self._trainer_actors: list[Any] = []

    def open_rendezvous(self) -> tuple[str, int]:
        """On the first rank: host and port where the ranks of a learner meet."""
        self._store = open_rendezvous(ray.util.get_node_ip_address(), self._settings.num_ranks)
        return self._store.host, self._store.port

    def join(self, rank: int, host: str, port: int) -> None:
        """Become one of `num_ranks` ranks and keep this rank's part of the student. Call on all ranks at once."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        store = self._store if rank == 0 else TCPStore(host, port, self._settings.num_ranks, is_master=False)
        join(store, rank, self._settings.num_ranks, device)
        self._run = shard(self._student, device)
        self._ready()

    def _ready(self) -> None:
        """What stands on the student's parameters and device."""
        self._stop_ids_E = torch.tensor(self._stop_ids, device=self._student.device)
        self._optimizer = build_optimizer([p for p in self._student.model.parameters() if p.requires_grad], self._settings)

    def step_packed(self, rollouts: bytes, *terms: Any) -> StepReport:
        """`step` as the group calls it: a packed batch."""
        return self.step(rows_of(unpack(rollouts)), *terms)

    def step(
        self,
        rollouts: Sequence[ScoredRollout],
        golden: Sequence[Prompt],
        limits: LengthLimits,
        reference_tokens: float,
        base_learning_rate: float | None = None,
    ) -> StepReport:
        """Learn from one batch. `base_learning_rate` replaces the job's where a person tuned it.

        `golden` are prompts with golden answers; `reference_tokens` is the stop tilt's target where none is set.
        """
        micro_batches = build_micro_batches(
            rollouts,
            golden,
            self._objective,
            limits,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            max_new_tokens=self._max_new_tokens,
            reference_length_tokens=reference_tokens,
            share=rank_and_size(),
        )
        micro_batches = [micro.to(self._student.device) for micro in micro_batches]
        rate = learning_rate_at(self.weight_version, self._settings) * limits.lr_scale
        if base_learning_rate is not None:
            rate *= base_learning_rate / self._settings.learning_rate
        first: list[TokenLosses] | None = None
        loss, grad_norm, skipped = 0.0, 0.0, False
        for _ in range(self._settings.epochs_per_batch):
            loss, grad_norm, failed, losses = self._epoch(micro_batches, limits, rate)
            skipped |= failed
            if first is None:
                first = losses
                fields = [micro.fields.with_proximal(part) for micro, part in zip(micro_batches, losses, strict=True)]
                micro_batches = [MicroBatch(m.student, f) for m, f in zip(micro_batches, fields, strict=True)]
        assert first is not None
        self.weight_version += 1
        parts = [summarise(part, micro.fields, self._stop_ids_E) for micro, part in zip(micro_batches, first, strict=True)]
        suspects = self._suspects(rollouts, limits, reference_tokens) if skipped else ()
        return StepReport(loss, grad_norm, rate, skipped, self.weight_version, reduce(add, parts), suspects)

    def _suspects(self, rollouts: Sequence[ScoredRollout], limits: LengthLimits, reference_tokens: float) -> tuple[int, ...]:
        """Each rollout on its own, once: only where a step was skipped, so the cost is rare."""
        found = []
        for index, rollout in enumerate(rollouts):
            (micro,) = build_micro_batches(
                [rollout],
                [],
                self._objective,
                limits,
                micro_batch_tokens=self._settings.micro_batch_tokens,
                max_new_tokens=self._max_new_tokens,
                reference_length_tokens=reference_tokens,
                share=rank_and_size(),
            )
            loss, grad_norm, _ = self._gradient([micro.to(self._student.device)], limits)
            if not (np.isfinite(loss) and np.isfinite(grad_norm)):
                found.append(index)
        self._optimizer.zero_grad(set_to_none=True)
        return tuple(found)

    def _epoch(self, micro_batches: list[MicroBatch], limits: LengthLimits, rate: float) -> tuple[float, float, bool, list[TokenLosses]]:
        """One forward and backward over the batch and one optimiser step; a non-finite one changes nothing."""
        total, grad_norm, parts = self._gradient(micro_batches, limits)
        skipped = not (np.isfinite(total) and np.isfinite(grad_norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        return total, grad_norm, skipped, parts

    def _gradient(self, micro_batches: list[MicroBatch], limits: LengthLimits) -> tuple[float, float, list[TokenLosses]]:
        """Loss, gradient norm before clipping, and each token's part; the gradient itself is left clipped on the parameters."""
        self._optimizer.zero_grad(set_to_none=True)
        total, parts = 0.0, []
        for micro in micro_batches:
            self._choose_attention(micro.student.input_ids_BL.shape[1])
            loss, losses = self._run(partial(self._loss, micro.student, micro.fields, limits))
            loss.backward()
            total += float(loss.detach())
            parts.append(losses)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        grad_norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self._settings.max_grad_norm)))
        return summed(total, self._student.device), grad_norm, parts

    def _choose_attention(self, row_tokens: int) -> None:
        """On CPUs torch's flash kernel takes three times as long backward in bfloat16 as products and a softmax do. These keep a
        probability for every pair of tokens, so longer rows have the flash kernel."""
        if self._settings.dtype == "bfloat16" and not torch.cuda.is_available():
            self._student.model.set_attn_implementation("eager" if row_tokens <= EAGER_ROW_TOKENS else self._attention)

    def _loss(self, inputs: ModelInputs, fields: TokenFields, limits: LengthLimits) -> tuple[torch.Tensor, TokenLosses]:
        reference = self._reference if limits.reference_kl_weight > 0 else None
        with torch.autocast(self._student.device.type, torch.bfloat16, enabled=self._settings.dtype == "bfloat16"):
            with torch.no_grad():
                reference_logits = self._lazy(reference, inputs) if reference else None
            teacher_logits = None
            if self._teacher_head is not None:
                assert fields.teacher_hidden_NH is not None
                teacher_logits = LazyLogits(fields.teacher_hidden_NH, self._teacher_head, ())
            return chunked_objective(
                self._lazy(self._student, inputs),
                fields,
                self._objective,
                self._stop_ids_E,
                chunk_tokens=self._settings.chunk_tokens,
                reference_kl_weight=limits.reference_kl_weight if reference else 0.0,
                teacher=teacher_logits,
                reference=reference_logits,
            )

    @staticmethod
    def _lazy(lm: CausalLM, inputs: ModelInputs) -> LazyLogits:
        hidden_BLH = lm.hidden(inputs.input_ids_BL)
        return LazyLogits(hidden_BLH.flatten(0, 1)[inputs.predictor_N], lm.head, tuple(lm.model.get_output_embeddings().parameters()))

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int], dtype: str = "float32") -> np.ndarray:
        """Log-probs [L - 1] of a fixed sequence, float32, to hold against an engine's; `dtype`: what the engine computes in."""
        device = self._student.device
        ids_BL = torch.tensor([list(token_ids)], device=device)
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            logits_LV = self._run(lambda: self._student.head(self._student.hidden(ids_BL)[0, :-1]))
        return logits_LV.float().log_softmax(-1).gather(1, ids_BL[0, 1:, None])[:, 0].cpu().numpy()

    @torch.no_grad()
    def weights(self, dtype: str, *, trained_only: bool = False) -> tuple[int, np.ndarray]:
        """The weight version, and all weights as the bytes of a safetensors file (uint8), the tied output head on its own; no weights
        but on rank 0. `trained_only`: for engines that have had all of them, without those that no step changes."""
        outgoing = Outgoing(self._student.model, getattr(torch, dtype), trained_only=trained_only)
        first = rank_and_size()[0] == 0
        tensors = {name: tensor.to("cpu").contiguous() for name, tensor in outgoing if first}
        if HEAD in tensors:
            tensors[HEAD] = tensors[HEAD].clone()  # a file holds no memory twice
        return self.weight_version, np.frombuffer(save(tensors), np.uint8)

    def send_weights(self, backend: str, dtype: str, actors: list[Any], workers_per_engine: int) -> None:
        """The same weights to every engine over GPUs: `backend` nccl or ipc. Rank 0 sends, the others help to gather."""
        from opd_governor.actors.learner.transfer import (  # vllm takes seconds to import and is needed on GPUs only
            StudentSource,
            open_trainer,
        )

        rank, _ = rank_and_size()
        if rank > 0:
            for _ in StudentSource(self._student.model, getattr(torch, dtype)):
                pass
            return
        if actors != self._trainer_actors:  # the first time, or an engine was replaced: the group is formed anew
            self._trainer = open_trainer(backend, self._student.model, getattr(torch, dtype), actors, workers_per_engine)
            self._trainer_actors = actors
        self._trainer.send_weights()

    def save_student(self, folder: str, card: str | None = None) -> None:
        """Write the student in Hugging Face layout, with its tokenizer and, where given, a model card. Rank 0 writes."""
        weights = gather(self._weights_once())
        if rank_and_size()[0] > 0:
            return
        self._write_student(folder, weights)
        if card is not None:
            (Path(folder) / "README.md").write_text(card)

    def _write_student(self, folder: str, weights: dict[str, torch.Tensor]) -> None:
        with _disk_errors(folder):
            self._student.model.save_pretrained(folder, state_dict=weights)
            AutoTokenizer.from_pretrained(self._path, trust_remote_code=self._trust).save_pretrained(folder)
            source = Path(self._path) / "generation_config.json"
            if source.is_file():
                shutil.copyfile(source, Path(folder) / source.name)

    def _weights_once(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model's file holds: a tied weight has one name there."""
        model = self._student.model
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
        return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)

    def snapshot(self) -> None:
        """Copy what `save` will write, between two steps: the next one may run while it is written. Every rank gives, rank 0 keeps."""
        weights = gather(self._weights_once(), copy=True)
        optimizer = moments(self._optimizer, self._optimized_names())
        generators = {"cpu": torch.get_rng_state()}
        if self._student.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self._student.device)
        random = {
            f"{rank}/{kind}": part
            for kind, state in generators.items()
            for rank, part in enumerate(of_every_rank(state, self._student.device))
        }
        if rank_and_size()[0] == 0:
            self._snapshot = Snapshot(weights, optimizer, random, self.weight_version)

    def save(self, folder: str) -> None:
        """Write the snapshot for `restore` on any number of ranks: student, optimiser, generators, counters. Raises OSError.

        On rank 0 only, which alone has it; it meets no other rank, so that steps go on meanwhile.
        """
        taken, self._snapshot = self._snapshot, None
        assert taken is not None, "save without a snapshot"
        path = Path(folder)
        self._write_student(str(path / STUDENT), taken.weights)
        with _disk_errors(folder):
            save_file(taken.moments, path / OPTIMIZER)
            save_file(taken.random, path / RANDOM)
            (path / COUNTERS).write_text(json.dumps({"weight_version": taken.weight_version}))

    @torch.no_grad()
    def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Take a checkpoint's weights; returns the weight version in force.

        On a rollback the version goes on from the present one, for versions never repeat, and the moments that led astray are
        dropped.
        """
        saved = CausalLM(str(Path(folder) / STUDENT), device="cpu", trust_remote_code=self._trust)
        own = self._student.model.state_dict()
        for name, tensor in saved.model.state_dict().items():
            own[name].copy_(scatter(tensor, own[name]))
        if rollback:
            self._optimizer.state.clear()
        else:
            load_moments(self._optimizer, self._optimized_names(), load_file(Path(folder) / OPTIMIZER))
            random = load_file(Path(folder) / RANDOM)
            rank, _ = rank_and_size()  # one that the checkpoint's run had not keeps its own generators
            if (state := random.get(f"{rank}/cpu")) is not None:
                torch.set_rng_state(state)
            if (state := random.get(f"{rank}/cuda")) is not None and self._student.device.type == "cuda":
                torch.cuda.set_rng_state(state, self._student.device)
            self.weight_version = json.loads((Path(folder) / COUNTERS).read_text())["weight_version"]
        return self.weight_version

    def version(self) -> int:
        return self.weight_version

    def ping(self) -> int:
        """The process id: another one than before means a restart."""
        return os.getpid()

    def _optimized_names(self) -> list[str]:
        """Parameter names in the optimiser's own order."""
        name_of = {id(p): name for name, p in self._student.model.named_parameters()}
        return [name_of[id(p)] for group in self._optimizer.param_groups for p in group["params"]]

    def _load(self, path: str, dtype: str, device: str | None = None) -> CausalLM:
        return CausalLM(path, dtype=dtype, device=device, trust_remote_code=self._trust)

    def _load_frozen(self, path: str) -> CausalLM:
        lm = self._load(path, self._settings.dtype)
        lm.model.requires_grad_(False)
        return lm
