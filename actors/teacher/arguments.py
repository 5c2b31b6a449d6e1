"""What the vLLM back end of a teacher asks of vLLM (imports neither vllm nor ray)."""

from typing import Any

from opd_governor.actors.teacher.settings import TeacherSettings


def engine_arguments(settings: TeacherSettings, *, context_tokens: int | None, seed: int) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs. `context_tokens`: the longest sequence to be scored, None for the model's own window.

    `settings.engine` comes last and wins.
    """
    arguments: dict[str, Any] = {
        "model": settings.model,
        "runner": "generate",  # by the architecture's name alone vLLM takes a model of own code for one that embeds
        "dtype": settings.dtype,
        "load_format": "safetensors",  # never a pickle
        "seed": seed,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "disable_log_stats": True,
        "max_logprobs": -1,
        # One more, for the token that a request must generate after a response that fills the window; it is never fed back.
        "max_model_len": None if context_tokens is None else context_tokens + 1,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        # Prompt log-probs need the whole prompt computed; a cached prefix would only take memory.
        "enable_prefix_caching": False,
    }
    if settings.tensor_parallel_size > 1:
        # Inside a placement group vLLM would choose Ray for its workers and refuse a bundle of several GPUs.
        arguments["distributed_executor_backend"] = "mp"
    return arguments | settings.engine
