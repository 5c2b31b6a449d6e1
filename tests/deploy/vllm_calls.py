"""Every call this project makes into vLLM, bound against the vLLM on the path. Prints one JSON line: call -> the parameters it uses.

Run by test_gpu_versions.py in a process whose path begins with a GPU wheel's source.
"""

import importlib
import inspect
import json
import os
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, packed_tensor
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightTransferEngine
from vllm.distributed.weight_transfer.clients import RayVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine, NCCLWeightTransferEngine
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.worker import gpu_worker

from opd_governor.actors.learner import transfer as outgoing
from opd_governor.actors.rollout import actor, engine, sampling
from opd_governor.actors.rollout.arguments import engine_arguments
from opd_governor.actors.rollout.settings import LoopStop, RolloutSettings, StopRamp
from opd_governor.actors.teacher.arguments import engine_arguments as teacher_arguments
from opd_governor.actors.teacher.scorers import ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.teacher.vllm_scorer import ids_asked
from opd_governor.actors.trajectory import LengthLimits, Prompt

os.environ[engine.OWNER] = str(os.getpid())
worker = importlib.import_module("opd_governor.actors.rollout.worker")  # what an engine's processes import


def used(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    """The parameters that this call fills, with their kinds; raises TypeError where it does not bind."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    return [f"{name}: {signature.parameters[name].kind.name}" for name in bound.arguments]


class TinyModel(torch.nn.Module):
    """A model with what `Outgoing` asks of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)

    def named_non_persistent_buffers(self) -> list[Any]:
        return []

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.layer

    get_input_embeddings = get_output_embeddings


def sources() -> list[str]:
    """The weight source answers both protocols, and both agree element for element."""
    source = outgoing.StudentSource(TinyModel(), torch.bfloat16)
    read: Any = source.metadata
    for described in (read, read()):
        assert [(meta.name, meta.dtype, meta.shape) for meta in described] == [(n, t.dtype, tuple(t.shape)) for n, t in source.iter_full()]
    assert [name for name, _ in source] == [name for name, _ in source.iter_full()]
    if implements := getattr(source, "implements_iter_full", None):
        assert implements()
        assert len(source.owned_names(3)) == len(read)
    return sorted(meta.name for meta in read)


def transfers() -> dict[str, Any]:
    """Both ends of a transfer: what the trainer engine calls, the rollout actor offers."""
    for verb in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        assert callable(getattr(actor.RolloutActor, verb))
        assert callable(getattr(RayVLLMWeightSyncClient, verb))
    for backend in ("nccl", "file", *engine.BACKENDS.values()):
        assert WeightTransferConfig(backend=backend).backend == backend
        assert not inspect.isabstract(WeightTransferEngineFactory._registry[backend]()), backend  # the registry holds loaders
    for abstract in (WeightTransferEngine, TrainerWeightTransferEngine):
        assert abstract.__abstractmethods__
    assert {"load_numel", "loaded_weights"} <= set(LayerReloadingInfo.__dataclass_fields__)  # what `abandon_update` forgets
    assert get_layerwise_info(torch.nn.Linear(2, 2)).can_load() is False
    assert "_weight_update_active" in inspect.getsource(gpu_worker)
    assert "group" in PyNcclCommunicator.__annotations__  # the store that a sender leaves word in
    return {
        "NCCLTrainerInitInfo": used(NCCLTrainerInitInfo, "127.0.0.1", 1, 3, rank=0, packed=outgoing.PACKED),
        "stateless_init_process_group": used(nccl_common.stateless_init_process_group, "127.0.0.1", 1, 0, 2, 0),
        "StatelessProcessGroup.create": used(StatelessProcessGroup.create, host="127.0.0.1", port=1, rank=0, world_size=2),
        "_get_streams": used(packed_tensor._get_streams, 0, 2),
        "PyNcclCommunicator.broadcast": used(PyNcclCommunicator.broadcast, 0, torch.zeros(1), src=0),
        "PyNcclCommunicator.destroy": used(PyNcclCommunicator.destroy, 0),
        "IPCTrainerInitInfo": used(IPCTrainerInitInfo, rank=1),
        "ipc.parse_update_info": used(IPCWeightTransferEngine.parse_update_info, 0, {}),
        "trainer_init": used(WeightTransferTrainerFactory.trainer_init, 0, client=0, source=0),
        "nccl.trainer_init": used(NCCLTrainerWeightTransferEngine.trainer_init, 0, client=0, source=0),
        "nccl.send_weights": used(NCCLTrainerWeightTransferEngine.send_weights, 0),
        "nccl.shutdown": used(NCCLTrainerWeightTransferEngine.shutdown, 0),
        "nccl.init_transfer_engine": used(NCCLWeightTransferEngine.init_transfer_engine, 0, 1),
        "nccl.receive_weights": used(NCCLWeightTransferEngine.receive_weights, 0, 1),
    }


def engines() -> dict[str, Any]:
    settings = RolloutSettings(tensor_parallel_size=2, samples_per_prompt=2)
    arguments = engine_arguments("m", settings, seed=0, max_logprobs=8, cpu=False)
    arguments |= {"weight_transfer_config": 0, "logits_processors": [], "kv_cache_memory_bytes": 1, "enable_sleep_mode": True}
    teacher = teacher_arguments(TeacherSettings(model="m", tensor_parallel_size=2), context_tokens=64, seed=0)
    return {
        "pause_scheduler_async": used(AsyncMPClient.pause_scheduler_async, 0, mode="keep", clear_cache=False),
        "AsyncEngineArgs": used(AsyncEngineArgs, **arguments),
        "EngineArgs": used(EngineArgs, **teacher),
        "LLM.generate": used(LLM.generate, 0, [{}], [0], use_tqdm=False),
        "from_engine_args": used(AsyncLLM.from_engine_args, 0),
        "add_request": used(AsyncLLM.add_request, 0, "1", {}, 0),
        "abort": used(AsyncLLM.abort, 0, "1"),
        "collective_rpc": used(AsyncLLM.collective_rpc, 0, "load_file", args=("p",)),
        "check_health": used(AsyncLLM.check_health, 0),
        "resume_generation": used(AsyncLLM.resume_generation, 0),
        "init_weight_transfer_engine": used(AsyncLLM.init_weight_transfer_engine, 0, 1),
        "start_weight_update": used(AsyncLLM.start_weight_update, 0),
        "update_weights": used(AsyncLLM.update_weights, 0, 1),
        "finish_weight_update": used(AsyncLLM.finish_weight_update, 0),
        "sleep": used(AsyncLLM.sleep, 0, level=1),
        "wake_up": used(AsyncLLM.wake_up, 0),
        "shutdown": used(AsyncLLM.shutdown, 0),
    }


def samplings() -> list[str]:
    """The sampling and scoring parameters themselves: vLLM validates them when they are built."""
    prompt, limits = Prompt(0, (1, 2)), LengthLimits(8)
    settings = RolloutSettings(loop_stop=LoopStop(enabled=True), stop_ramp=StopRamp(strength_nats=1.0), no_repeat_ngram=4, top_p=0.9)
    common: dict[str, Any] = {"stop_ids": (1,), "context_tokens": 64}
    sampling.sampling_params(prompt, limits, settings, seed=0, reference_tokens=5.0, top_k_logprobs=8, **common)
    sampling.greedy_params(prompt, limits, settings, **common)
    request = ScoreRequest((1, 2), (3, 4), top_k=2)
    SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, flat_logprobs=True, prompt_logprobs=2,
        prompt_logprob_token_ids=ids_asked(request, (1,), 10), prompt_logprob_start=1,
    )  # fmt: skip
    return sorted(SamplingParams.__struct_fields__ if hasattr(SamplingParams, "__struct_fields__") else SamplingParams.__annotations__)


if __name__ == "__main__":
    print(vllm.__file__)
    samplings()
    print(json.dumps({"sources": sources(), **transfers(), **engines()}))
