"""The Ray shell of the learner: a scored batch in, one optimiser step, new weights out.

ScoredRollout + golden --build_micro_batches--> forward, chunked_objective, backward --AdamW--> weights v(N+1)

With several ranks each takes its share of the rows; loss and gradients are summed over ranks, everything else is the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import save
from torch.distributed import TCPStore

from opd_governor.actors.learner.batching import MicroBatch, build_micro_batches
from opd_governor.actors.learner.checkpoint import STUDENT
from opd_governor.actors.learner.fields import TokenLosses
from opd_governor.actors.learner.follower import Follower
from opd_governor.actors.learner.lora import adapter_bytes
from opd_governor.actors.learner.metrics import BatchMetrics, summarise
from opd_governor.actors.learner.models import LearnerModels, load_models
from opd_governor.actors.learner.optimizer import build_optimizer, learning_rate_at
from opd_governor.actors.learner.outgoing import HEAD, Outgoing
from opd_governor.actors.learner.passes import Passes
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.learner.sharding import gather, join, open_rendezvous, rank_and_size
from opd_governor.actors.learner.state import (
    MERGED,
    AdapterFiles,
    Snapshot,
    files_of,
    restore_follower,
    restore_run,
    snapshot,
    write,
)
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout
from opd_governor.actors.wire import rows_of, unpack


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


class Learner:
    """The student and its optimiser. The constructor loads the models; `start` sets up the process that the learner has to itself."""

    def __init__(
        self,
        models: LearnerModels,
        settings: LearnerSettings,
        objective: ObjectiveSettings,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        seed: int = 0,
    ) -> None:
        self._settings, self._objective = settings, objective
        self._max_new_tokens, self._seed = max_new_tokens, seed
        loaded = load_models(models, settings)
        self._student = loaded.student
        self._passes = Passes(loaded, settings, objective, stop_ids)
        self._files = files_of(loaded.student, models, stop_ids)
        self._lora, self._follow = models.lora, models.follow
        self._follower = self._new_follower()
        self._optimizer = self._new_optimizer()
        self.weight_version = 0
        self._snapshot: Snapshot | None = None
        self._store: TCPStore | None = None
        self._sender: Any = None

    # ---- the process and its peers

    def start(self) -> int:
        """Set up this process: threads, random numbers, and files that are its owner's alone. Returns the process id."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(self._seed)
        os.umask(0o077)
        return self.ping()

    def ping(self) -> int:
        """The process id: another one than before means a restart."""
        return os.getpid()

    def open_rendezvous(self) -> tuple[str, int]:
        """On the first rank: host and port where the ranks of a learner meet."""
        self._store = open_rendezvous(ray.util.get_node_ip_address(), self._settings.num_ranks)
        return self._store.host, self._store.port

    def join(self, rank: int, host: str, port: int) -> None:
        """Become one of `num_ranks` ranks and keep this rank's part of the student. Call on all ranks at once."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        store = self._store or TCPStore(host, port, self._settings.num_ranks, is_master=False)
        join(store, rank, self._settings.num_ranks, device)
        self._passes.shard(device)
        self._optimizer, self._follower = self._new_optimizer(), self._new_follower()

    def _new_optimizer(self) -> torch.optim.AdamW:
        return build_optimizer([p for p in self._student.model.parameters() if p.requires_grad], self._settings)

    def _new_follower(self) -> Follower | None:
        return Follower(self._follow, self._files.weights()) if self._follow is not None else None

    # ---- steps

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
        micro_batches = self._micro_batches(rollouts, golden, limits, reference_tokens)
        rate = learning_rate_at(self.weight_version, self._settings, base_learning_rate) * limits.lr_scale
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
        if self._follower is not None and not skipped:
            self._follower.after_step(self._files.weights(), self.weight_version)
        stop_ids = self._passes.stop_ids.cpu()
        parts = [summarise(part, micro.fields, stop_ids) for micro, part in zip(micro_batches, first, strict=True)]
        suspects = self._suspects(rollouts, limits, reference_tokens) if skipped else ()
        return StepReport(loss, grad_norm, rate, skipped, self.weight_version, reduce(add, parts), suspects)

    def _micro_batches(
        self, rollouts: Sequence[ScoredRollout], golden: Sequence[Prompt], limits: LengthLimits, reference_tokens: float
    ) -> list[MicroBatch]:
        """This rank's share of a batch, on the CPU."""
        return build_micro_batches(
            rollouts,
            golden,
            self._objective,
            limits,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._passes.stop_ids.tolist(),
            reference_length_tokens=reference_tokens,
            share=rank_and_size(),
        )

    def _epoch(self, micro_batches: list[MicroBatch], limits: LengthLimits, rate: float) -> tuple[float, float, bool, list[TokenLosses]]:
        """One forward and backward over the batch and one optimiser step; a non-finite one changes nothing."""
        total, grad_norm, parts = self._passes.gradient(micro_batches, limits, self._optimizer)
        skipped = not (np.isfinite(total) and np.isfinite(grad_norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        return total, grad_norm, skipped, parts

    def _suspects(self, rollouts: Sequence[ScoredRollout], limits: LengthLimits, reference_tokens: float) -> tuple[int, ...]:
        """Each rollout on its own, once: only where a step was skipped, so the cost is rare."""
        found = []
        for index, rollout in enumerate(rollouts):
            micro_batches = self._micro_batches([rollout], [], limits, reference_tokens)
            loss, grad_norm, _ = self._passes.gradient(micro_batches, limits, self._optimizer)
            if not (np.isfinite(loss) and np.isfinite(grad_norm)):
                found.append(index)
        self._optimizer.zero_grad(set_to_none=True)
        return tuple(found)

    # ---- weights for engines

    def probe(self, token_ids: Sequence[int], dtype: str = "float32", *, base: bool = False) -> np.ndarray:
        """Log-probs [L - 1] of a fixed sequence, float32, to hold against an engine's; `dtype`: what the engine computes in; `base`:
        without a LoRA student's addition."""
        return self._passes.probe(token_ids, dtype, base=base)

    @torch.no_grad()
    def weights(self, dtype: str, *, trained_only: bool = False) -> tuple[int, np.ndarray]:
        """The weight version, and all weights as the bytes of a safetensors file (uint8), the tied output head on its own; no weights
        but on rank 0. `trained_only`: for engines that have had all of them, without those that no step changes. Of a student with an
        addition always that alone, float32, with its settings in the file's header."""
        if self._lora is not None:
            return self.weight_version, np.frombuffer(adapter_bytes(gather(self._files.weights()), self._lora), np.uint8)
        outgoing = Outgoing(self._student.model, getattr(torch, dtype), trained_only=trained_only, num_ids=self._student.vocabulary)
        first = rank_and_size()[0] == 0
        tensors = {name: tensor.to("cpu").contiguous() for name, tensor in outgoing if first}
        if HEAD in tensors:
            tensors[HEAD] = tensors[HEAD].clone()  # a file holds no memory twice
        return self.weight_version, np.frombuffer(save(tensors), np.uint8)

    def send_weights(self, backend: str, dtype: str, actors: list[Any], workers_per_engine: int) -> None:
        """The same weights to every engine in one broadcast: `backend` nccl, ipc or gloo. Every rank takes part. Raises TransferError."""
        from opd_governor.actors.learner.transfer import Sender  # vllm takes seconds to import and is needed here only

        if self._sender is None or actors != self._sender.actors:  # the first time, or an engine was replaced: form the group again
            self._leave_group()
            student, rank = self._student, rank_and_size()[0]
            self._sender = Sender(
                backend, student.model, getattr(torch, dtype), actors, workers_per_engine, rank, num_ids=student.vocabulary
            )
        try:
            self._sender.send()
        except Exception:
            self._leave_group()
            raise

    def _leave_group(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    # ---- files

    def followed_version(self) -> int:
        """The student's version when the weights of a teacher that follows it last changed."""
        assert self._follower is not None, "no teacher follows"
        return self._follower.version

    @torch.no_grad()
    def followed(self, dtype: str) -> tuple[int, np.ndarray]:
        """That version, and those weights as the bytes of a safetensors file (uint8); no weights but on rank 0."""
        assert self._follower is not None, "no teacher follows"
        return self._follower.version, np.frombuffer(save(gather(self._follower.weights(), getattr(torch, dtype))), np.uint8)

    def save_student(self, folder: str, card: str | None = None, dtype: str = "float32") -> None:
        """Write the student in Hugging Face layout, with its tokenizer and, where given, a model card. Rank 0 writes."""
        adapter = isinstance(self._files, AdapterFiles)  # it stays float32
        weights = gather(self._files.weights(), None if adapter else getattr(torch, dtype))
        merged = gather(self._files.merged()) if isinstance(self._files, AdapterFiles) else {}
        if rank_and_size()[0] > 0:
            return
        if merged and isinstance(self._files, AdapterFiles):
            gap_nats = self._files.write_merged(f"{folder}/{MERGED}", merged, card, dtype)
            card = f"{card or ''}\nMerged into the weights in `{MERGED}/`: log-probs {gap_nats:.2g} nats away in the mean.\n"
        self._files.write(folder, weights, card, dtype)

    def snapshot(self) -> None:
        """Copy what `save` will write, between two steps: the next one may run while it is written. Every rank copies its part."""
        self._snapshot = snapshot(self._files, self._student, self._optimizer, self.weight_version, self._follower)

    def save(self, folder: str) -> None:
        """Write the snapshot for `restore` on any number of ranks: student, optimiser, generators, counters. Raises OSError.

        Every rank writes its part; they meet in a group of their own, so that steps go on meanwhile.
        """
        taken, self._snapshot = self._snapshot, None
        assert taken is not None, "save without a snapshot"
        write(self._files, taken, folder)

    def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Take a checkpoint's weights; returns the weight version in force.

        On a rollback the version goes on from the present one, because versions never repeat, and the moments that led astray are
        dropped.
        """
        self._files.read(f"{folder}/{STUDENT}")
        if self._follower is not None:
            restore_follower(self._follower, folder)
        if rollback:
            self._optimizer.state.clear()
        else:
            self.weight_version = restore_run(self._student, self._optimizer, folder)
        return self.weight_version

    def version(self) -> int:
        return self.weight_version
