"""What a rollout engine asks of vLLM (imports neither vllm nor ray)."""

from typing import Any

from opd_governor.actors.rollout.settings import RolloutSettings


def engine_arguments(model: str, settings: RolloutSettings, *, seed: int, max_logprobs: int, cpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs, all but the weight transfer and the logits processors.

    `cpu`: vLLM's CPU platform. `settings.engine` comes last and wins; its hf_overrides are added to those here.
    """
    # A tied lm_head keeps its old packed copy when weights are reloaded, silently: the learner sends it apart.
    overrides = {"tie_word_embeddings": False} | settings.engine.get("hf_overrides", {})
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
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
    return arguments | settings.engine | {"hf_overrides": overrides}
