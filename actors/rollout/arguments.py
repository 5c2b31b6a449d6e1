"""What a rollout engine asks of vLLM (imports neither vllm nor ray)."""

from collections.abc import Sequence
from typing import Any

from opd_governor.actors.rollout.settings import RolloutSettings

HEAD_APART = {"tie_word_embeddings": False}
"""A tied lm_head keeps its old packed copy when weights are reloaded, silently: the learner sends it apart."""


def engine_arguments(model: str, settings: RolloutSettings, *, seed: int, max_logprobs: int, cpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs, all but the weight transfer and the logits processors.

    `cpu`: vLLM's CPU platform. `settings.engine` comes last and wins.
    """
    arguments: dict[str, Any] = {
        "model": model,
        "runner": "generate",  # by the architecture's name alone vLLM takes a model of own code for one that embeds
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "hf_overrides": HEAD_APART,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "seed": seed,
        "enable_prefix_caching": settings.samples_per_prompt > 1,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": max(max_logprobs, 20),
        "disable_log_stats": True,
        "worker_extension_cls": "opd_governor.actors.rollout.worker.EngineWorker",
    }
    if settings.tensor_parallel_size > 1:
        # Inside a placement group vLLM would choose Ray for its workers and refuse a bundle of several GPUs.
        arguments["distributed_executor_backend"] = "mp"
    if cpu:
        # Requests that make room in a full KV cache go back to prefill. Where they do not fit into one batch a chunked prefill
        # takes back the draw of a seeded request, which vLLM can do on GPUs only: on a CPU the engine dies. Whole prompts are
        # never taken back.
        arguments["enable_chunked_prefill"] = False
    return arguments | settings.engine


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM allows as its largest rank."""


def lora_arguments(rank: int, targets: Sequence[str], max_staleness: int) -> dict[str, Any]:
    """What an engine takes beside them for a LoRA student: the base's own weights, which never change, and room for adapters.

    Requests in flight may name max_staleness + 1 versions, and one is loaded before one goes. vLLM drops an adapter it has no room for
    without a word. `targets`: the layers that have an addition. Left to itself vLLM makes room on the head too, and then dies over a
    probe's log-probs where other requests share its pass.
    """
    num_adapters = max_staleness + 2
    return {
        "enable_lora": True,
        "lora_target_modules": list(targets),
        "max_lora_rank": next(known for known in LORA_RANKS if known >= rank),
        "max_loras": num_adapters,
        "max_cpu_loras": num_adapters,
        "load_format": "safetensors",
        "hf_overrides": {},
    }
