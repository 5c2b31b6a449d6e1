"""Everything that can be known to be wrong before an actor starts, each with its remedy.

folder, port, Prometheus --> check_machine --+
models, tokenizers, stops --> check_models --+--> [Check, ...] --> table, one line per failure, exit code
prompts, held-out problems --> check_data ---+
"""

from pathlib import Path
from typing import Any

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.check_data import check_data
from opd_governor.services.inputs.check_machine import (
    check_disk,
    check_dtypes,
    check_folder,
    check_objective,
    check_repeatable,
    check_service,
)
from opd_governor.services.inputs.check_models import check_pad, check_pair, check_stop_ids, check_student, check_teacher
from opd_governor.services.inputs.check_servers import check_server
from opd_governor.services.inputs.checks import Check, exit_code, failures, render
from opd_governor.services.inputs.follow import check_follow
from opd_governor.services.inputs.lora import check_lora
from opd_governor.services.inputs.models import resolve_model, split_pruned
from opd_governor.services.inputs.resolve import ModelFacts, server_tokenizer, student_facts, teacher_facts, window_of
from opd_governor.services.inputs.thinking import check_thinking
from opd_governor.services.inputs.tokens import own_tokenizer
from opd_governor.services.job.settings import Job, JobError

__all__ = ["Check", "check", "exit_code", "failures", "render"]


def check(job: Job, directory: Path) -> list[Check]:
    """Check a job against the world; starts nothing, writes nothing but converted models and encoded prompts in the cache."""
    checks = [*check_folder(directory), *check_service(job), *check_job_alone(job), *check_dtypes(job)]
    student = _look_at_student(job, checks)
    teachers = [_look_at_teacher(settings, checks) for settings in job.teacher]
    if student is None:
        return checks
    checks += [
        *check_student(student),
        *check_lora(job, student),
        *check_stop_ids(job, student),
        *check_thinking(job, student),
        *check_pad(student.tokenizer),
    ]
    others: dict[str, Any] = {}
    for settings, teacher in zip(job.teacher, teachers, strict=True):
        if teacher is not None:
            checks += check_teacher(settings, teacher)
        elif not settings.means.local and settings.url:
            checks += check_server(settings, student, job)
        read = teacher.tokenizer if teacher is not None else _server_tokenizer(settings, checks)
        if read is not None:
            checks += check_pair(settings, student, read, teacher.stops if teacher is not None else {}, job)
            if settings.render == "own" or own_tokenizer(settings, teacher.model if teacher else settings.model, student.tokenizer, read):
                others[settings.name] = read
    try:
        window = window_of(job, [facts for facts in (student, *teachers) if facts is not None])
    except JobError as error:
        return [*checks, Check("context window", "fail", str(error), exit_code=2)]
    return [*checks, *check_data(job, student.tokenizer, window, others), *check_disk(job, student, directory)]


def _look_at_student(job: Job, checks: list[Check]) -> ModelFacts | None:
    try:
        facts = student_facts(job.student, find=stand_in)
    except JobError as error:
        checks.append(Check("student model", "fail", str(error)))
        return None
    checks.append(Check("student model", "pass", facts.model))
    return facts


def _look_at_teacher(settings: TeacherSettings, checks: list[Check]) -> ModelFacts | None:
    try:
        facts = teacher_facts(settings)
    except JobError as error:
        checks.append(Check(f"teacher model {settings.name}", "fail", str(error)))
        return None
    if facts is not None:
        checks.append(Check(f"teacher model {settings.name}", "pass", facts.model))
    return facts


def _server_tokenizer(settings: TeacherSettings, checks: list[Check]) -> Any:
    if settings.means.local:
        return None  # its model could not be read, which is said
    try:
        return server_tokenizer(settings)
    except JobError as error:
        checks.append(Check(f"tokenizer {settings.name}", "fail", str(error), exit_code=2))
        return None


def check_job_alone(job: Job) -> list[Check]:
    """What needs no model, no data and no machine."""
    return [*check_objective(job), *check_repeatable(job), *check_follow(job)]


def stand_in(model: str) -> str:
    """The model itself, or the full one of a `pruned:` name: it is made at the run's start, and shares tokenizer and window."""
    if pruned := split_pruned(model):
        return stand_in(pruned[0])
    return resolve_model(model)
