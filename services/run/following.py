"""Teachers that follow the student: after a step that changed their weights they are told of the new ones.

learner's Follower --one object in Ray's store--> RayTeacher.follow --named in each call--> TeacherActor, which fetches it once

A teacher's process that Ray restarts begins as the student came, and fetches what its next call names.
"""

from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.services.job.settings import Job
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.learner import RunLearner


class Following:
    """Does nothing where no teacher follows."""

    def __init__(self, job: Job, learner: RunLearner, pool: TeacherPool, journal: Journal) -> None:
        self._job, self._learner, self._pool, self._journal = job, learner, pool, journal
        self._told = ""

    async def bring(self) -> None:
        """At a border, before the learner goes on: scores from here on are those of the weights that the step left."""
        if self._job.follow is None:
            return
        name = f"{self._learner.num_restores}/{await self._learner.followed_version()}"
        if name == self._told:
            return
        teachers = [teacher for teacher in self._pool.teachers if teacher.settings.follow is not None]
        dtype = "bfloat16" if all(teacher.settings.dtype == "bfloat16" for teacher in teachers) else "float32"
        version, weights = await self._learner.followed(dtype)
        for teacher in teachers:
            for member in teacher.members:
                member.handle.follow(name, weights)
        self._told = name
        self._journal.followed(version)
