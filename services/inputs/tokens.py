"""Whose token ids each teacher is asked in: the student's, or those of a tokenizer of its own.

teacher.tokenizer, both vocabularies --> None | the teacher's tokenizer --> Vocabularies for its actor
"""

from typing import Any, Literal

from opd_governor.actors.learner.supports import SUPPORTS
from opd_governor.actors.teacher.byte_tokens import ByteTokenizer, TokenizerError
from opd_governor.actors.teacher.cross_tokenizer import Vocabularies
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.models import (
    answer_stop,
    config_of,
    context_tokens,
    end_of_turn,
    stop_event_ids,
    tokenizer_difference,
    tokenizer_of,
)
from opd_governor.services.job.settings import Job, JobError

SAME, OWN = "same", "own"


def own_tokenizer(teacher: TeacherSettings, model: str, student: Any, read: Any = None) -> str | None:
    """Folder or id of the tokenizer whose ids this teacher is asked in; None: the student's.

    `model`: the teacher's, resolved; `student`: the student's tokenizer; `read`: that of `model`, where it is loaded already.
    """
    if teacher.tokenizer not in (None, OWN, SAME):
        return teacher.tokenizer
    if teacher.tokenizer == OWN:
        return model
    if teacher.tokenizer == SAME or not teacher.means.local:
        return None
    if read is None:
        read = tokenizer_of(model, teacher.trust_remote_code)
    return model if tokenizer_difference(student, read) else None


def named_tokenizer(teacher: TeacherSettings, model: str | None) -> str | None:
    """Folder or id of a teacher's tokenizer, where there is one to look at. `model`: resolved; None: a server's."""
    if teacher.tokenizer not in (None, OWN, SAME):
        return teacher.tokenizer
    return teacher.model if model is None and teacher.tokenizer == OWN else model


def vocabularies(
    job: Job, teacher: TeacherSettings, model: str, student: tuple[str, Any], stop_ids: tuple[int, ...]
) -> Vocabularies | None:
    """What a teacher with tokens of its own needs to know of both; None where its tokens are the student's.

    `student`: its tokenizer by folder or id, and loaded; `stop_ids`: what ends the student's responses. Raises JobError.
    """
    name, tokenizer = student
    own = own_tokenizer(teacher, model, tokenizer)
    if own is None:
        return None
    theirs = tokenizer_of(own, teacher.trust_remote_code)
    try:
        for loaded in (tokenizer, theirs):
            ByteTokenizer(loaded)
    except TokenizerError as error:
        raise JobError(f"teacher {teacher.name}: tokenizer: {error}") from None
    local = teacher.means.local
    ends = {theirs.eos_token_id, end_of_turn(theirs)} - {None}
    stops = sorted(stop_event_ids(model, theirs, teacher.trust_remote_code)) if local else sorted(ends)
    if not stops:
        raise JobError(f"teacher {teacher.name}: tokenizer {own} does not say what ends an answer; give it an eos token")
    return Vocabularies(
        student=name,
        teacher=own,
        student_stop_ids=stop_ids,
        teacher_stop_ids=tuple(stops),
        answer_stop_id=answer_stop(tokenizer, bool(tokenizer.chat_template), stop_ids),
        context_tokens=context_tokens(config_of(model, teacher.trust_remote_code)) if local else None,
        trust_student=job.student.trust_remote_code,
        trust_teacher=teacher.trust_remote_code,
    )


def comparison(name: str, difference: str | None, student: Any, teacher: Any, job: Job) -> tuple[Literal["pass", "warn", "fail"], str, str]:
    """How a teacher with tokens of its own is compared: (status, what was found, remedy)."""
    found = f"teacher {name} reads tokens of its own" + (f" ({difference})" if difference else "")
    try:
        ours, theirs = ByteTokenizer(student), ByteTokenizer(teacher)
    except TokenizerError as error:
        return "fail", f"{found}, and {error}", "choose models whose tokenizers are known"
    if job.objective.needs.hidden:
        detail = f"{found}: objective.support {job.objective.support} needs one vocabulary"
        return "fail", detail, "set objective.support to sampled, or to teacher with tail_bucket"
    shared = len(ours.id_of_bytes.keys() & theirs.id_of_bytes.keys()) / max(1, len(ours.id_of_bytes))
    detail = f"{found}: compared by bytes, {shared:.0%} of the student's tokens are single tokens there too"
    if SUPPORTS[job.objective.support].dense and not job.objective.tail_bucket:
        return "warn", detail, "set objective.tail_bucket: without it ids that only one side has are left out"
    return "pass", detail, ""
