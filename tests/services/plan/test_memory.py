"""The learner's memory as the planner estimates it, against the allocations of real steps: models, dtypes, checkpointing, batches.

python -m pytest -s tests/services/plan/test_memory.py     # prints the table
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.memory import learner_need
from opd_governor.services.plan.shapes import shape_of

pytestmark = pytest.mark.integration

TOLERANCE = 0.15
ROW_TOKENS = 512
MODELS: dict[str, dict[str, Any]] = {
    "qwen3, 4 layers": {},
    "qwen3, tied": {"tie_word_embeddings": True},
    "qwen3, 8 layers, small vocabulary": {"num_hidden_layers": 8, "vocab_size": 1000},
    "llama, wide": {
        "arch": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 2000,
    },
}  # fmt: skip
LEARNERS: tuple[tuple[str, bool, int, int], ...] = (
    ("float32", False, 2048, 256),
    ("float32", True, 2048, 256),
    ("bfloat16", False, 2048, 256),
    ("bfloat16", True, 2048, 256),
    ("float32", True, 4096, 1024),
)
"""dtype, checkpointing, micro_batch_tokens, chunk_tokens."""


def build(folder: Path, changes: dict[str, Any]) -> str:
    shape: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 64, "max_position_embeddings": 1024, "vocab_size": 4000, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    } | changes  # fmt: skip
    config = AutoConfig.for_model(shape.pop("arch", "qwen3"), **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def batch(num: int) -> list[ScoredRollout]:
    """Rows of ROW_TOKENS without padding."""
    rollouts = []
    for index in range(num):
        rng = np.random.default_rng(index)
        token_ids = tuple(int(token) for token in rng.integers(4, 80, ROW_TOKENS - 4))
        logp = rng.uniform(-6, -1, len(token_ids)).astype(np.float32)
        trajectory = Trajectory(Prompt(index, (5, 6, 7, 8)), token_ids, logp, "stop", ROW_TOKENS, 1, 0, 0)
        rollouts.append(ScoredRollout(trajectory, TokenScores("t", logp, logp - 1)))
    return rollouts


def measured_bytes(folder: str, settings: LearnerSettings, lora: LoraSettings | None = None) -> int:
    """Peak of two steps of two micro-batches: what the allocator gave since the first began (moments and gradients too), above the weights.

    Both steps are watched: what was allocated before the watch began and freed during it would be missed.
    """
    learner = Learner(LearnerModels(folder, lora=lora), settings, ObjectiveSettings(), stop_ids=(1,), max_new_tokens=ROW_TOKENS)
    rollouts, limits = batch(2 * settings.micro_batch_tokens // ROW_TOKENS), LengthLimits(ROW_TOKENS)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(2):
            learner.step(rollouts, [], limits, 4.0)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak + sum(p.numel() * p.element_size() for p in learner._student.model.parameters())


@pytest.mark.parametrize(("model", "lora"), [*((model, None) for model in MODELS), ("qwen3, 4 layers", LoraSettings())])
def test_the_estimate_is_within_15_percent_of_what_a_step_allocates(model: str, lora: LoraSettings | None, tmp_path: Path) -> None:
    folder = build(tmp_path, MODELS[model])
    student = {"model": folder, "lora": lora and lora.model_dump()}
    ratios = []
    for dtype, checkpointing, micro, chunk in LEARNERS:
        learner = {"dtype": dtype, "gradient_checkpointing": checkpointing, "micro_batch_tokens": micro, "chunk_tokens": chunk}
        job = Job.model_validate(
            {
                "name": "m", "student": student, "teacher": {"model": folder}, "data": {"prompts": {"path": "none.jsonl"}},
                "learner": learner, "governor": {"actuators": ["lr_scale"]},
            }
        )  # fmt: skip
        estimate, measured = learner_need(job, shape_of(folder), 1).gpu_bytes, measured_bytes(folder, LearnerSettings(**learner), lora)
        ratios.append(estimate / measured)
        print(
            f"{f'{model}, LoRA' if lora else model:<34} {dtype:<8} {'checkpointed' if checkpointing else 'kept':<12} "
            f"{micro:5d} tokens, chunks of {chunk:4d}: "
            f"estimated {estimate / 2**20:6.1f} MiB, measured {measured / 2**20:6.1f}, {ratios[-1]:.2f}"
        )
    assert max(abs(ratio - 1) for ratio in ratios) < TOLERANCE, ratios
