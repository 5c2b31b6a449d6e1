"""Whether a job fits GPUs, described (`--gpus 8x80`) or there: the plan, and what on GPUs is known not to work."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from opd_governor.services.inputs.models import resolve_model
from opd_governor.services.inputs.preflight import Check, check_job_alone, stand_in
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.plan.hardware import Hardware
from opd_governor.services.plan.layout import plan


def local_hardware() -> Hardware | None:
    """The GPUs of this machine; None without."""
    if not torch.cuda.is_available():
        return None
    return Hardware((torch.cuda.device_count(),), torch.cuda.get_device_properties(0).total_memory / 2**30)


def check_fit(job: Job, hardware: Hardware) -> list[Check]:
    """The plan on this hardware, or why there is none. Reads configs alone."""
    try:
        found = plan(_readable(job), hardware)
    except JobError as error:
        return [Check("plan", "fail", str(error))]
    return [*(Check("plan", "pass", line) for line in found.lines()), *_check_precision(found.job)]


OF_THE_RUN = {"model", "load_format", "skip_tokenizer_init", "logprobs_mode", "worker_extension_cls", "weight_transfer_config"}
"""Engine arguments that a run does not work without as it sets them."""


def _readable(job: Job) -> Job:
    """Models by folders or ids that have a config: a pruned student is planned for as the model it is cut from. Raises JobError."""
    student = job.student.model_copy(update={"model": stand_in(job.student.model)})
    teachers = tuple(t.model_copy(update={"model": resolve_model(t.model)}) if t.means.local else t for t in job.teacher)
    return job.model_copy(update={"student": student, "teacher": teachers})


def check_dry(job: Job, hardware: Hardware) -> list[Check]:
    """What can be said without models, prompts or a cluster: the job's own consistency and the plan."""
    return [*check_job_alone(job), *check_engine_arguments(job), *check_fit(job, hardware)]


def check_engine_arguments(job: Job) -> Iterator[Check]:
    """`rollout.engine` and `teacher.engine` against the fields of the installed vLLM."""
    named: dict[str, Mapping[str, Any]] = {"rollout.engine": job.rollout.engine} | {
        f"teacher {teacher.name}: engine": teacher.engine for teacher in job.teacher
    }
    if not any(named.values()):
        return
    if importlib.util.find_spec("vllm") is None:
        yield Check("engine arguments", "warn", "vllm is not installed here: the names under engine are not checked")
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = set(AsyncEngineArgs.__dataclass_fields__)
    for where, arguments in named.items():
        if own := sorted(OF_THE_RUN & set(arguments)):
            yield Check("engine arguments", "fail", f"{where}: {own[0]} is set by the run itself", "leave it out", exit_code=2)
            continue
        if unknown := sorted(set(arguments) - known):
            near = _nearest(unknown[0], known)
            yield Check("engine arguments", "fail", f"{where}: vLLM has no argument {unknown[0]!r}", near, exit_code=2)
        elif arguments:
            yield Check("engine arguments", "pass", f"{where}: {', '.join(sorted(arguments))}")


def _nearest(name: str, known: set[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "see vLLM's engine arguments"


def _check_precision(job: Job) -> Iterator[Check]:
    slow = [name for name, role in (("learner", job.learner), ("rollout", job.rollout)) if role.dtype == "float32"]
    slow += [f"teacher {t.name}" for t in job.teacher if t.means.local and t.dtype == "float32"]
    if slow:
        detail = f"float32 on GPUs: {', '.join(slow)}"
        yield Check("dtype on GPUs", "warn", detail, "set dtype: bfloat16, half the memory and several times as fast")
    if job.rollout.enforce_eager:
        yield Check("CUDA graphs", "warn", "rollout.enforce_eager: true", "set it to false: decoding is 2 to 4 times as fast")
