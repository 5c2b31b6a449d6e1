"""A learner that dies takes its state with it: a new one goes back to the newest checkpoint, and steps since are taken again."""

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.services.record.journal import Journal
from opd_governor.services.run.errors import LearnerError
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.state import RunState

MAX_LOSSES = 3
"""A learner that dies this often before the same step will not get past it."""


class LearnerRecovery:
    """Replaces the learner and counts its deaths since the run last got further."""

    def __init__(self, fleet: Fleet, state: RunState, journal: Journal) -> None:
        self._fleet, self._state, self._journal = fleet, state, journal
        self._furthest_step = self._losses = 0

    def reached(self, step: int) -> None:
        """This step is learned. A step not reached before clears the count of deaths."""
        if step > self._furthest_step:
            self._furthest_step, self._losses = step, 0

    async def bring_back(self, error: ActorLostError) -> None:
        """A new learner at the newest checkpoint. Raises LearnerError once MAX_LOSSES learners died before the same step."""
        while True:
            self._losses += 1
            if self._losses > MAX_LOSSES:
                raise LearnerError(f"the learner died {MAX_LOSSES} times before step {self._furthest_step + 1}: {error}") from error
            self._journal.note(f"step {self._state.step}: {error}")
            self._journal.waiting_for("a new learner")
            try:
                await self._fleet.restart_learner()
                await self._state.restore_newest()
                break
            except ActorLostError as again:
                error = again
        self._fleet.learner_is_back()
        self._journal.waiting_for(None)
        self._journal.note(f"learner is back at the checkpoint of step {self._state.step}")
        self._journal.restarted("learner", error.reason)
