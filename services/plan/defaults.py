"""What GPUs want where the job file says nothing: bfloat16, recomputed activations, CUDA graphs, an engine as teacher, many sequences."""

import math
from typing import TypeVar

from opd_governor.actors.settings import Settings
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.hardware import Hardware
from opd_governor.services.plan.memory import GIB, Need
from opd_governor.services.plan.shapes import BYTES, Shape
from opd_governor.services.plan.times import Load

S = TypeVar("S", bound=Settings)
LEAST_AT_ONCE, MOST_AT_ONCE = 8, 1024
"""Bounds of rollout.max_num_seqs where memory chooses it: vLLM captures graphs up to this size."""
GUESSED_AT_ONCE = 256
"""rollout.max_num_seqs while engines are still being counted."""


def on_gpus(job: Job) -> Job:
    """The job with these choices in place of its own defaults. What the file names is kept."""
    needs = job.objective.needs
    teachers = []
    for teacher in job.teacher:
        if teacher.means.local:
            engine = not needs.hidden and teacher.beams == 1 and teacher.no_repeat_ngram == 0
            chosen = {"dtype": "bfloat16"} | ({"backend": "vllm"} if engine else {})
            teacher = _unless_named(teacher, **chosen)
        teachers.append(teacher)
    return job.model_copy(
        update={
            "learner": _unless_named(job.learner, dtype="bfloat16", gradient_checkpointing=True),
            "rollout": _unless_named(job.rollout, dtype="bfloat16", enforce_eager=False, max_num_seqs=GUESSED_AT_ONCE),
            "teacher": tuple(teachers),
        }
    )


def sequences_at_once(job: Job, student: Shape, engine: Need, hardware: Hardware) -> int:
    """Sequences that one engine decodes at once: as many as its KV cache holds at the cap, and no more than there can be under way."""
    rollout, cut = job.rollout, job.rollout.tensor_parallel_size
    cache = engine.gpu["KV cache"]
    if "kv_cache_memory_bytes" not in rollout.engine:  # the engine takes what its share of the GPU leaves
        cache = hardware.gib * GIB * rollout.gpu_memory_utilization - (engine.gpu_bytes - cache)
    kv = student.kv_bytes_per_token_at_2 * BYTES[rollout.dtype] / 2 / cut
    held = cache / (kv * (Load.of(job).prompt_tokens + rollout.max_new_tokens))
    under_way = rollout.prompts_per_step * rollout.samples_per_prompt * (1 + rollout.max_staleness) / rollout.num_actors
    return max(LEAST_AT_ONCE, min(MOST_AT_ONCE, math.floor(held / 8) * 8, math.ceil(under_way)))


def _unless_named(settings: S, **values: object) -> S:
    return settings.model_copy(update={key: value for key, value in values.items() if key not in settings.model_fields_set})
