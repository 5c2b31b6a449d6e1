"""Weights out through vLLM's own trainer engines (nccl, ipc; gloo is nccl on CPU tensors), as one broadcast to all engines.

    StudentSource (all weights, the output head on its own) --vLLM trainer engine--> every worker of every rollout actor

The fleet can also move the same weights as one file (`Learner.weights`), which needs no group.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import ray
import torch
import vllm
from ray.util import get_node_ip_address
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.utils.network_utils import get_open_port

from opd_governor.actors.deadlines import TransferError, first_line
from opd_governor.actors.handles import each_handle, plain
from opd_governor.actors.learner.outgoing import Outgoing
from opd_governor.actors.weight_groups import GLOO_BACKEND, GLOO_BUFFER_BYTES, close_group, over_gloo

PACKED = tuple(int(part) for part in vllm.__version__.split(".")[:2]) >= (0, 33)
"""0.32's packed receiver may free buffers on GPUs that are still read."""


class Metadata(list[ParamMeta]):
    """vLLM 0.33 reads `source.metadata`, 0.32 calls `source.metadata()`: both get this list."""

    def __call__(self) -> "Metadata":
        return self


class StudentSource(WeightSource):
    """The student's weights (see `Outgoing`) for vLLM's trainer engines, 0.32 and 0.33."""

    def __init__(self, model: Any, dtype: torch.dtype, num_ids: int | None = None) -> None:
        self._outgoing = Outgoing(model, dtype, num_ids=num_ids)
        self.broken = False
        """Gathering itself failed: it is a rank of the learner that is gone, no engine."""
        self.begin()

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(ParamMeta(*described) for described in self._outgoing.described())

    def begin(self) -> None:
        """A round is to come."""
        self._round: Iterator[tuple[str, torch.Tensor]] | None = None

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One round, as vLLM 0.33 asks for it."""
        self._round = self._whole()
        return self._round

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One round, as vLLM 0.32 asks for it."""
        return self.iter_full()

    def finish(self) -> None:
        """Go through what is left of the round: other ranks are in the middle of it, and each tensor takes all of them."""
        for _ in self._round if self._round is not None else self._whole():
            pass

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from self._outgoing
        except Exception:
            self.broken = True
            raise


class EnginesClient(RayVLLMWeightSyncClient):
    """Several engines in one group: each engine's workers get ranks after those of the engines before it.

    Every verb raises as soon as one engine fails in it, even where the others never answer.
    """

    def __init__(self, actors: list[Any], workers_per_engine: int) -> None:
        super().__init__(actors)
        self._workers_per_engine = workers_per_engine
        self.trainer: Any = None
        """The trainer engine that has this client."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        requests = []
        for index in range(len(self.handles)):
            own = dict(init_info)
            if "rank_offset" in own:
                own["rank_offset"] += index * self._workers_per_engine
            requests.append(WeightTransferInitRequest(init_info=own))
        _all(handle.init_weight_transfer_engine.remote(request) for handle, request in zip(self.handles, requests, strict=True))

    def start_weight_update(self) -> None:
        _all(handle.start_weight_update.remote() for handle in self.handles)

    def update_weights(self, update_info: Any) -> None:
        """Handles of shared GPU memory travel as numbers and bytes. Called beside the broadcast: where an engine fails the group is
        closed, or the broadcast would wait for that engine for ever."""
        if isinstance(update_info, dict) and update_info.get("ipc_handles") is not None:
            update_info = update_info | {"ipc_handles": each_handle(update_info["ipc_handles"], plain)}
        request = WeightTransferUpdateRequest(update_info=update_info)
        try:
            _all(handle.update_weights.remote(request) for handle in self.handles)
        except Exception:
            _close(self.trainer)
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        _all(handle.finish_weight_update.remote() for handle in self.handles)


def _all(replies: Iterable[Any]) -> None:
    waiting = list(replies)
    while waiting:
        done, waiting = ray.wait(waiting)
        ray.get(done)


def _close(trainer: Any) -> None:
    """End the trainer's group, if it has one."""
    if (communicator := getattr(trainer, "model_update_group", None)) is not None:
        close_group(communicator)


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """As for nccl."""

    backend: ClassVar[str] = GLOO_BACKEND
    packed_buffer_size_bytes: int = GLOO_BUFFER_BYTES


class GlooTrainer(NCCLTrainerWeightTransferEngine):
    """vLLM's nccl trainer engine on CPU tensors."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(cls, *args: Any, **kwargs: Any) -> "GlooTrainer":
        with over_gloo():
            return super().trainer_init(*args, **kwargs)

    def send_weights(self) -> None:
        with over_gloo():
            super().send_weights()


with contextlib.suppress(ValueError):  # already registered in this process
    WeightTransferTrainerFactory.register_engine(GLOO_BACKEND, GlooTrainer)


class Sender:
    """One rank's end of the transfer to these engines; every rank has one, since all of them gather, and over ipc each shares its own
    GPU's copy. Rank 0 meets the engines. After an error it is of no more use: close it and make another."""

    def __init__(
        self,
        backend: str,
        model: Any,
        dtype: torch.dtype,
        actors: list[Any],
        workers_per_engine: int,
        rank: int = 0,
        *,
        num_ids: int | None = None,
    ) -> None:
        """`num_ids`: the ids that are tokens; rows past them are not sent (see `Outgoing`)."""
        self.actors = actors
        self._init_info = _init_info(backend, 1 + len(actors) * workers_per_engine, rank)
        self._client, self._source = EnginesClient(actors, workers_per_engine), StudentSource(model, dtype, num_ids)
        self._trainer: TrainerWeightTransferEngine[Any] | None = None

    def send(self) -> None:
        """One whole update. Raises TransferError where an engine did not get it; the learner itself is as it was."""
        self._source.begin()
        try:
            if self._trainer is None:  # blocks until all engines have joined
                self._trainer = WeightTransferTrainerFactory.trainer_init(self._init_info, client=self._client, source=self._source)
                self._client.trainer = self._trainer
            self._trainer.send_weights()
        except Exception as error:
            if self._source.broken:
                raise
            self._source.finish()
            raise TransferError(first_line(error)) from None

    def close(self) -> None:
        """Leave the group."""
        _close(self._trainer)
        if self._trainer is not None:
            self._trainer.shutdown()


def _init_info(backend: str, world_size: int, rank: int) -> TrainerInitInfo:
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank)
    here = (get_node_ip_address(), get_open_port(), world_size)
    return GlooTrainerInitInfo(*here, rank=rank) if backend == "gloo" else NCCLTrainerInitInfo(*here, rank=rank, packed=PACKED)
