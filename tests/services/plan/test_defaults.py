"""What a job that names nothing runs with on described GPUs, and that what it names is kept."""

from pathlib import Path
from typing import Any

import pytest

from opd_governor.services.job.settings import Job
from opd_governor.services.plan.hardware import parse_gpus
from opd_governor.services.plan.layout import Plan, plan
from opd_governor.services.plan.memory import GIB
from opd_governor.services.plan.shapes import BYTES, shape_of

JOBS = Path(__file__).parents[3] / "deploy/jobs"


def bare(gpus: str = "8x80", **sections: Any) -> Plan:
    """The plan of a job with no more than it needs."""
    job = {
        "name": "bare",
        "student": {"model": "Qwen/Qwen3-1.7B-Base"},
        "teacher": {"model": "Qwen/Qwen3-4B"},
        "data": {"prompts": {"path": "none.jsonl"}},
        "governor": {"actuators": ["lr_scale"]},
    }
    return plan(Job.model_validate(job | sections), parse_gpus(gpus))


def test_a_job_that_names_nothing_is_bfloat16_recomputed_captured_and_taught_by_an_engine() -> None:
    found = bare()
    (teacher,) = found.job.teacher
    assert (found.job.learner.dtype, found.job.rollout.dtype, teacher.dtype) == ("bfloat16",) * 3
    assert found.job.learner.gradient_checkpointing
    assert not found.job.rollout.enforce_eager
    assert teacher.backend == "vllm", "it writes the golden answers too, where torch writes row by row"
    assert "CUDA graphs" in found.lines()[-1]


def test_what_the_file_names_is_kept() -> None:
    found = bare(
        learner={"dtype": "float32", "gradient_checkpointing": False, "micro_batch_tokens": 1024},
        rollout={"dtype": "float32", "enforce_eager": True, "max_num_seqs": 5},
        teacher={"model": "Qwen/Qwen3-4B", "backend": "torch", "dtype": "float32"},
    )
    (teacher,) = found.job.teacher
    assert (found.job.learner.dtype, found.job.rollout.dtype, teacher.dtype, teacher.backend) == ("float32", "float32", "float32", "torch")
    assert (found.job.learner.gradient_checkpointing, found.job.rollout.enforce_eager) == (False, True)
    assert found.job.rollout.max_num_seqs == 5


@pytest.mark.parametrize("gpus", ["1x80", "2x80", "8x24", "8x80", "8x180"])
def test_sequences_are_as_many_as_the_cache_holds_at_the_cap_and_as_can_be_under_way(gpus: str) -> None:
    rollout = {"prompts_per_step": 512, "samples_per_prompt": 4, "max_new_tokens": 4096, "max_model_len": 8192}
    found = bare(gpus, rollout=rollout)
    job, engine = found.job.rollout, found.needs[1]
    shape = shape_of("Qwen/Qwen3-1.7B-Base")
    cache = job.engine.get("kv_cache_memory_bytes") or found.hardware.gib * GIB * job.gpu_memory_utilization - engine.gpu["engine weights"]
    held = cache / (shape.kv_bytes_per_token_at_2 * BYTES["bfloat16"] / 2 * 4096 / job.tensor_parallel_size)
    assert 8 <= job.max_num_seqs <= min(1024, held)
    assert bare(gpus, rollout=rollout | {"prompts_per_step": 4, "samples_per_prompt": 1}).job.rollout.max_num_seqs == 8


def test_more_memory_is_more_sequences() -> None:
    rollout = {"prompts_per_step": 4096, "max_new_tokens": 8192, "max_model_len": 10000, "num_actors": 1}
    numbers = [bare(gpus, rollout=rollout).job.rollout.max_num_seqs for gpus in ("8x24", "8x80", "8x180")]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("objective", "teacher"), [({"support": "full", "loss": "jsd"}, {}), ({}, {"beams": 4}), ({}, {"no_repeat_ngram": 3})]
)
def test_what_an_engine_cannot_do_stays_with_torch(objective: dict[str, Any], teacher: dict[str, Any]) -> None:
    found = bare(objective=objective, teacher={"model": "Qwen/Qwen3-4B"} | teacher)
    assert found.job.teacher[0].backend == "torch"
    assert found.job.teacher[0].dtype == "bfloat16"
