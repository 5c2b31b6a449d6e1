"""Weights out through vLLM's own trainer engines (nccl, ipc), where learner and engines have GPUs.

    StudentSource (all weights, the output head on its own) --vLLM trainer engine--> every worker of every rollout actor

Without GPUs the fleet moves the same weights as one file instead (`Learner.weights`).
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import ray
import torch
from ray.util import get_node_ip_address
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource, WeightTransferInitRequest
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from opd_governor.actors.handles import each_handle, plain
from opd_governor.actors.learner.outgoing import Outgoing


class Metadata(list[ParamMeta]):
    """vLLM 0.33 reads `source.metadata`, 0.32 calls `source.metadata()`: both get this list."""

    def __call__(self) -> "Metadata":
        return self


class StudentSource(WeightSource):
    """The student's weights (see `Outgoing`) for vLLM's trainer engines, 0.32 and 0.33."""

    def __init__(self, model: Any, dtype: torch.dtype, num_ids: int | None = None) -> None:
        self._outgoing = Outgoing(model, dtype, num_ids=num_ids)

    @cached_property
    def metadata(self) -> Metadata:
        return Metadata(ParamMeta(*described) for described in self._outgoing.described())

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One round, as vLLM 0.33 asks for it."""
        return iter(self._outgoing)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One round, as vLLM 0.32 asks for it."""
        return iter(self._outgoing)


class EnginesClient(RayVLLMWeightSyncClient):
    """Several engines in one group: each engine's workers get ranks after those of the engines before it."""

    def __init__(self, actors: list[Any], workers_per_engine: int) -> None:
        super().__init__(actors)
        self._workers_per_engine = workers_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        requests = []
        for index in range(len(self.handles)):
            own = dict(init_info)
            if "rank_offset" in own:
                own["rank_offset"] += index * self._workers_per_engine
            requests.append(WeightTransferInitRequest(init_info=own))
        ray.get([handle.init_weight_transfer_engine.remote(request) for handle, request in zip(self.handles, requests, strict=True)])

    def update_weights(self, update_info: Any) -> None:
        """Handles of shared GPU memory travel as numbers and bytes."""
        if isinstance(update_info, dict) and update_info.get("ipc_handles") is not None:
            update_info = update_info | {"ipc_handles": each_handle(update_info["ipc_handles"], plain)}
        super().update_weights(update_info)


def open_trainer(
    backend: str, source: StudentSource, actors: list[Any], workers_per_engine: int, rank: int = 0
) -> TrainerWeightTransferEngine[Any]:
    """On every rank of the learner. Rank 0 meets the engines: it blocks until all of them have joined.

    `send_weights()` of what is returned is one whole update; every rank calls it, since all of them gather, and over ipc each shares
    its own GPU's copy.
    """
    client = EnginesClient(actors, workers_per_engine)
    init_info: IPCTrainerInitInfo | NCCLTrainerInitInfo = IPCTrainerInitInfo(rank=rank)
    if backend == "nccl":
        world_size = 1 + len(actors) * workers_per_engine
        init_info = NCCLTrainerInitInfo(get_node_ip_address(), get_open_port(), world_size, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
