"""Whether the teachers that should follow the student can."""

from collections.abc import Iterator

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.checks import Check
from opd_governor.services.job.settings import Job


def check_follow(job: Job) -> Iterator[Check]:
    """How each follows, or one line for each thing that stands against it."""
    for teacher in job.teacher:
        if teacher.follow is None:
            continue
        faults = list(_faults(job, teacher))
        for fault, remedy in faults:
            yield Check("teacher follow", "fail", f"teacher {teacher.name}: follow {fault}", remedy, exit_code=2)
        if not faults:
            every, ema = teacher.follow.every_steps, teacher.follow.ema
            how = f"takes the student's weights every {every} steps" if every else f"averages the student's weights, ema {ema:g}"
            yield Check("teacher follow", "pass", f"teacher {teacher.name} {how}")


def _faults(job: Job, teacher: TeacherSettings) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do)."""
    if not teacher.means.follows:
        yield f"needs another back end than {teacher.backend}", "set backend to torch"
    if teacher.model != job.student.model:
        yield f"begins as a copy of the student, and its model is {teacher.model}", f"set it to {job.student.model}"
    if job.student.lora is not None:
        yield "needs a student all of whose weights are trained", "remove student.lora"
    if job.objective.needs.hidden:
        yield f"changes the head that objective.support {job.objective.support} keeps in the learner", "set support to sampled or student"
    if teacher.follow != job.follow:
        yield "differs from another teacher's", "let all that follow do it alike: the student keeps one such copy"
