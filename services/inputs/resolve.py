"""The job's models as a run and a check both see them: folders or ids, stop event, window, the student's tokenizer.

job --> student, teachers (pruned, converted, found) --> Models, tokenizer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_governor.actors.teacher.cross_tokenizer import Vocabularies
from opd_governor.services.inputs.models import context_tokens, resolve_model, stop_event_ids, tokenizer_of
from opd_governor.services.inputs.prune import resolve_student
from opd_governor.services.inputs.tokens import own_tokenizer, vocabularies
from opd_governor.services.job.settings import Job


@dataclass(frozen=True, slots=True)
class Models:
    """The job's models, resolved to folders or ids."""

    student: str
    teachers: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """The stop event of student and teachers together."""
    context_tokens: int
    """The smallest window of student and local teachers."""
    tokens: tuple[Vocabularies | None, ...] = ()
    """For each teacher: None where it reads the student's ids."""


def resolve(job: Job) -> tuple[Models, Any]:
    """The models, and the student's tokenizer. `trust_remote_code` counts for the model whose setting it is. Raises JobError."""
    student = resolve_student(job.student.model, job.data.prompts)
    teachers = tuple(resolve_model(t.model) if t.means.local else t.model for t in job.teacher)
    trusted = job.student.trust_remote_code
    local = [(student, trusted)]
    local += [(model, t.trust_remote_code) for model, t in zip(teachers, job.teacher, strict=True) if t.means.local]
    tokenizer = tokenizer_of(job.student.tokenizer or student, trusted)
    pairs = list(zip(job.teacher, teachers, strict=True))
    same = [(model, t.trust_remote_code) for t, model in pairs if t.means.local and own_tokenizer(t, model, tokenizer) is None]
    stop_ids = stop_ids_of(job, [local[0], *same])
    named = job.student.tokenizer or student
    tokens = tuple(vocabularies(job, t, model, (named, tokenizer), stop_ids) for t, model in pairs)
    return Models(student, teachers, stop_ids, window_of(job, local), tokens), tokenizer


def teacher_tokenizers(job: Job, models: Models) -> dict[str, Any]:
    """By name, of the teachers that render their own prompts or read tokens of their own."""
    return {
        teacher.name: tokenizer_of(tokens.teacher if tokens else model, teacher.trust_remote_code)
        for teacher, model, tokens in zip(job.teacher, models.teachers, models.tokens, strict=True)
        if tokens or teacher.render == "own"
    }


def stop_ids_of(job: Job, local: Sequence[tuple[str, bool]]) -> tuple[int, ...]:
    """The ids that end a response, in order: those the job names, otherwise every one that a local model ends with.

    `local`: (model, trust_remote_code) of each model whose files are here and whose ids are the student's.
    """
    if job.rollout.stop_token_ids is not None:
        return job.rollout.stop_token_ids
    found = [stop_event_ids(model, tokenizer_of(model, trusted), trusted) for model, trusted in local]
    return tuple(sorted({stop_id for ids in found for stop_id in ids}))


def window_of(job: Job, local: Sequence[tuple[str, bool]]) -> int:
    """Tokens of prompt and response together that every local model can hold, and the job allows."""
    windows = [context_tokens(model, trusted) for model, trusted in local]
    return min(windows + ([job.rollout.max_model_len] if job.rollout.max_model_len else []))
