"""How much memory each role takes on a GPU and on a host, term by term, from the job and its models' configs.

Every term is a product that a person can check; `tests/services/plan/test_memory.py` holds the learner's against measured allocations.
"""

from dataclasses import dataclass, field

from opd_governor.actors.rollout.arguments import lora_arguments
from opd_governor.actors.teacher.settings import PER_TEACHER, TeacherSettings
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.shapes import BYTES, Shape, adapter_parameters, kept_of, shape_of

GIB = 2**30
CONTEXT_BYTES = 1.2 * GIB
"""CUDA context, cuBLAS and NCCL of one process."""
LOSS_COPIES = 3.2
"""Float32 tensors of [chunk_tokens, vocabulary] at once in the loss: logits, log-probs, their gradient."""
BACKWARD_COPIES = 2.5
"""Float32 tensors of a layer's width (hidden and inner) at once while it goes back."""
RECOMPUTED_COPIES = 1.0
"""The same with checkpointing, beside what the layer under way keeps: its own tensors go while it goes back."""
LEAST_SEQUENCES = 8
"""Sequences of the whole window that an engine's KV cache should hold; below that it decodes almost one by one."""
GRAPHS_BYTES = 1.5 * GIB
"""What an engine takes beside weights and KV cache: captured graphs, sampler, workspace."""


@dataclass(frozen=True)
class Need:
    """Bytes one process of a role takes on its GPU, and on its host beside, by term; what makes each term smaller."""

    role: str
    gpu: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def gpu_bytes(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    def largest(self) -> str:
        """The largest term that a setting can make smaller."""
        return max((term for term in self.gpu if term in SHRINK), key=lambda term: self.gpu[term])


SHRINK = {
    "weights": "raise learner.num_ranks (weights are cut over ranks)",
    "moments": "raise learner.num_ranks (moments are cut over ranks)",
    "gradients": "raise learner.num_ranks (gradients are cut over ranks)",
    "copy": "raise learner.num_ranks to 2 or more: ranks hold a copy of two layers, one rank of all",
    "activations": "set learner.gradient_checkpointing: true or lower learner.micro_batch_tokens",
    "layer under way": "lower learner.micro_batch_tokens",
    "loss": "lower learner.chunk_tokens",
    "reference": "set objective.reference_kl_weight: 0 and leave reference_kl_weight out of governor.actuators, or raise learner.num_ranks",
    "engine weights": "raise rollout.tensor_parallel_size",
    "KV cache": "set rollout.max_model_len, lower rollout.max_num_seqs or set rollout.engine: {kv_cache_dtype: fp8}",
    "teacher weights": "set the teacher's dtype to bfloat16, raise its tensor_parallel_size with backend vllm, or serve it over http",
    "teacher KV cache": "set the teacher's max_model_len",
    "teacher batch": "lower the teacher's batch_tokens or chunk_tokens",
}


def with_reference(job: Job) -> bool:
    """Whether the learner holds the initial student beside the student. A LoRA student is its own with the addition off."""
    return job.student.lora is None and (job.objective.reference_kl_weight > 0 or job.governor.may_move("reference_kl_weight"))


def trained_parameters(job: Job, student: Shape) -> int:
    """Those that a step changes: they have gradients and moments, are in every checkpoint and travel to the engines."""
    if job.student.lora is None:
        return student.num_parameters
    return adapter_parameters(student.name, job.student.lora, job.student.trust_remote_code)


def sync_bytes(job: Job, student: Shape) -> float:
    """What one transfer of weights brings to an engine: all of them in its dtype, or an addition in float32."""
    return trained_parameters(job, student) * (BYTES[job.rollout.dtype] if job.student.lora is None else 4)


def window_tokens(job: Job, *shapes: Shape) -> int:
    """The longest sequence that the models and rollout.max_model_len allow."""
    return min(*(shape.context_tokens for shape in shapes), job.rollout.max_model_len or 2**31)


def learner_need(job: Job, student: Shape, num_ranks: int) -> Need:
    """One rank. Several micro-batches a step are assumed: gradients are there while the next one passes."""
    settings, trusted, lora = job.learner, job.student.trust_remote_code, job.student.lora
    tokens, itemsize = settings.micro_batch_tokens, BYTES[settings.dtype]
    whole, trained = student.num_parameters, trained_parameters(job, student) / num_ranks
    # A frozen base: one rank keeps it in the passes' precision, several share it out in float32.
    frozen = 0 if lora is None else whole / num_ranks * (itemsize if num_ranks == 1 else 4)
    kept = kept_of(student.name, settings.dtype, settings.gradient_checkpointing, trusted, lora)
    full = kept_of(student.name, settings.dtype, False, trusted, lora)
    layer = (whole - student.num_outside) / student.num_layers
    terms = {
        "weights": 4 * trained + frozen,
        "moments": 8 * trained,
        "gradients": 4 * trained,
        "activations": kept.per_token * tokens + student.num_layers * kept.per_layer_token * tokens,
    }
    if num_ranks > 1:
        terms["copy"] = itemsize * (student.num_outside + 2 * layer)
        terms["gathered gradients"] = itemsize * (student.num_outside + layer) if lora is None else 0.0
    elif settings.dtype == "bfloat16":
        terms["copy"] = full.fixed + student.num_layers * full.per_layer  # autocast holds it until the loss is there
    # The loss is done before the first layer goes back: the larger of the two moments counts.
    head = 4 * student.head_bytes_per_dtype_byte if lora is None else 0
    loss = LOSS_COPIES * 4 * min(settings.chunk_tokens, tokens) * student.vocabulary + 2 * head + 4 * tokens * student.hidden
    stream = 4 if lora is None else itemsize  # autocast adds up float32 weights' outputs in float32, a frozen base's in its own dtype
    copies = RECOMPUTED_COPIES if settings.gradient_checkpointing else BACKWARD_COPIES
    backward = copies * stream * tokens * (student.hidden + student.inner) + 2 * head
    if settings.gradient_checkpointing:
        backward += full.per_layer_token * tokens
    terms |= {"loss": loss} if loss > backward else {"layer under way": backward}
    if job.objective.needs.hidden:
        teacher = shape_of(job.teacher[0].model, job.teacher[0].trust_remote_code)
        terms["teacher's head"] = itemsize * teacher.head_bytes_per_dtype_byte
    if job.follow is not None:
        terms["teacher that follows"] = 4 * trained
    if with_reference(job):
        terms["reference"] = itemsize * (student.num_outside + (whole - student.num_outside) / num_ranks)
    snapshot = (12 if job.follow is None else 16) * trained
    loading = whole * (4 if lora is None or num_ranks > 1 else itemsize)
    return Need("learner", terms, {"snapshot for a checkpoint": snapshot, "loading the student (rank 0)": loading})


def engine_need(job: Job, student: Shape, tensor_parallel: int, window: int) -> Need:
    """One GPU of a rollout engine, with the least KV cache it can work with."""
    itemsize = BYTES[job.rollout.dtype]
    kv = student.kv_bytes_per_token_at_2 * (0.5 if str(job.rollout.engine.get("kv_cache_dtype", "")).startswith("fp8") else itemsize / 2)
    sequences = min(LEAST_SEQUENCES, job.rollout.max_num_seqs)
    lora = job.student.lora
    # A tied head is sent on its own and held on its own; a base that is never sent keeps it tied.
    head = itemsize * student.head_bytes_per_dtype_byte if lora is None else 0
    terms = {
        "engine weights": (itemsize * student.num_parameters + head) / tensor_parallel,
        "KV cache": kv * window * sequences / tensor_parallel,
        "engine workspace": GRAPHS_BYTES + CONTEXT_BYTES,
    }
    if lora is not None:
        room = lora_arguments(lora.rank, lora.targets, job.rollout.max_staleness)
        each = itemsize * trained_parameters(job, student) * room["max_lora_rank"] / lora.rank
        terms["versions of the addition"] = room["max_loras"] * each / tensor_parallel
    return Need("rollout", terms, {"engine process": 4.0 * GIB})


def teacher_need(teacher: TeacherSettings, shape: Shape, window: int) -> Need:
    """One GPU of a teacher actor."""
    itemsize = BYTES[teacher.dtype]
    if teacher.backend == "vllm":
        cut = teacher.tensor_parallel_size
        kv = shape.kv_bytes_per_token_at_2 * itemsize / 2 * (teacher.max_model_len or window)
        quantised = 0.5 if "quantization" in teacher.engine else 1.0
        terms = {
            "teacher weights": itemsize * quantised * shape.num_parameters / cut,
            "teacher KV cache": kv / cut,
            "teacher workspace": GRAPHS_BYTES + CONTEXT_BYTES,
        }
        return Need(f"teacher {teacher.name}", terms, {"teacher process": 4.0 * GIB})
    batch = teacher.batch_tokens * (4 * shape.hidden + 3 * shape.inner) * itemsize
    logits = 2 * 4 * min(teacher.chunk_tokens, teacher.batch_tokens) * shape.vocabulary
    terms = {"teacher weights": float(itemsize * shape.num_parameters), "teacher batch": batch + logits, "teacher workspace": CONTEXT_BYTES}
    return Need(f"teacher {teacher.name}", terms, {"loading a teacher": float(itemsize * shape.num_parameters)})


def local_teachers(job: Job) -> list[tuple[TeacherSettings, Shape]]:
    """The teachers that run on the cluster itself; of several that share actors the first."""
    served: dict[str, TeacherSettings] = {}
    for teacher in job.teacher:
        if teacher.means.local:
            served.setdefault(teacher.model_dump_json(exclude=set(PER_TEACHER)), teacher)
    return [(teacher, shape_of(teacher.model, teacher.trust_remote_code)) for teacher in served.values()]
