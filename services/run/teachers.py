"""The teachers of a job on the cluster: one pool, actors shared by teachers that are the same model served in the same way."""

from typing import Any

import ray

from opd_governor.actors.teacher.actor import start_teacher
from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.pool import Support, TeacherPool
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.models import weights_identity
from opd_governor.services.job.settings import Job
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.cluster import role_resources
from opd_governor.services.run.placement import place
from opd_governor.services.run.sources import Sources

ASKED = {"name", "domains", "weight", "system_prompt", "context", "copied_run_tokens", "template", "render"}
PER_TEACHER = frozenset({*ASKED, "beams", "length_penalty", "no_repeat_ngram"})
"""Settings that shape a request or its use, not the actor that serves it: teachers may differ in them and share actors."""


async def start_teachers(job: Job, sources: Sources, journal: Journal) -> TeacherPool:
    """Start the actors, which load in the background (`pool.start` waits for them). Needs a connected Ray. Raises JobError."""
    handles: dict[str, Any] = {}
    teachers = []
    models = sources.models
    for settings, model, tokens in zip(job.teacher, models.teachers, models.tokens, strict=True):
        settings = settings.model_copy(update={"model": model})
        same = _served_as(settings)
        if same not in handles:
            handles[same] = start_teacher(settings, models.stop_ids, job.seed, await _places(job, settings), tokens)
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


async def _places(job: Job, settings: TeacherSettings) -> list[dict[str, Any]]:
    """Ray options of each of its actors. An actor that asks a server elsewhere holds no GPU and no teacher node."""
    cluster, local = job.cluster, settings.means.local
    gpu = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    num_gpus = (gpu if cluster.gpus_per_teacher is None else cluster.gpus_per_teacher) * settings.tensor_parallel_size
    return await place(
        "teacher",
        settings.num_actors,
        cluster.placement_teacher,
        num_cpus=cluster.cpus_per_actor,
        num_gpus=num_gpus if local else 0.0,
        resources=role_resources(job, "teacher") if local else {},
    )
