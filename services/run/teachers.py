"""The teachers of a job on the cluster: one pool, actors shared by teachers that are the same model served in the same way."""

from typing import Any

from opd_governor.actors.teacher.actor import start_teacher
from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.pool import Support, TeacherPool
from opd_governor.actors.teacher.settings import PER_TEACHER, TeacherSettings
from opd_governor.services.inputs.models import weights_identity
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.rooms import Rooms
from opd_governor.services.run.sources import Sources


async def start_teachers(rooms: Rooms, sources: Sources, journal: Journal) -> TeacherPool:
    """Start the actors, which load in the background (`pool.start` waits for them). Needs a connected Ray. Raises JobError."""
    job = rooms.job
    handles: dict[str, Any] = {}
    teachers = []
    models = sources.models
    for settings, model, tokens in zip(job.teacher, models.teachers, models.tokens, strict=True):
        settings = settings.model_copy(update={"model": model, "max_model_len": settings.max_model_len or _longest(settings, models)})
        same = _served_as(settings)
        if same not in handles:
            handles[same] = start_teacher(settings, models.stop_ids, job.seed, await rooms.teacher(settings), tokens)
        teachers.append((settings, handles[same]))
    needs = job.objective.needs
    return TeacherPool(
        teachers,
        support=Support(student=needs.student_top_k > 0, top_k=needs.teacher_top_k, rest=needs.rest, hidden=needs.hidden),
        domains=sources.stream.survey.domains,
        events=Events(
            on_request=journal.teacher_requests,
            on_restart=lambda teacher, reason: journal.restarted("teacher", reason),
            on_nonfinite=lambda trajectory, scores: journal.nonfinite("teacher", trajectory, scores),
            say=journal.note,
        ),
        floor_s=job.cluster.deadline_floor_s,
        strict=job.strict,
    )


def _served_as(settings: TeacherSettings) -> str:
    """Equal for teachers that can share actors: the same weights, and every setting of the actor the same."""
    served = settings.model_copy(update={"model": weights_identity(settings.model) if settings.means.local else settings.model})
    return served.model_dump_json(exclude=set(PER_TEACHER))


def _longest(settings: TeacherSettings, models: Models) -> int | None:
    """Tokens that it can be asked to score: the common window, unless its prompts are its own. None: its model's window."""
    own_prompt = settings.system_prompt or settings.context or settings.demonstration or settings.template or settings.render == "own"
    return None if own_prompt or settings.backend != "vllm" else models.context_tokens
