"""Where the run stands, written to checkpoints and brought back from them.

border --take--> checkpoint --restore_newest--> the same border, in this process or a later one
                            --roll_back-------> its weights alone; step, prompts and pressure stay
"""

import asyncio

from opd_governor.actors.learner.checkpoint import step_of
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.rundir import Record
from opd_governor.services.run.ahead import Ahead
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.data import TrainingData
from opd_governor.services.run.learner import RunLearner
from opd_governor.services.run.terms import Terms


class RunState:
    """Everything that later steps depend on, except what the learner itself keeps."""

    def __init__(
        self, terms: Terms, ahead: Ahead, learner: RunLearner, journal: Journal, checkpoints: Checkpoints, data: TrainingData
    ) -> None:
        """`data` names the golden answers in the prompt stream and what the run reads; a resumed run should have the same."""
        self._terms, self._ahead, self._learner, self._journal = terms, ahead, learner, journal
        self._checkpoints, self._data = checkpoints, data
        self._first: Record = {}
        self.step = 0
        """The last step that is learned."""
        self.skipped_in_a_row = 0
        """Steps up to this one that brought no update."""
        self.begun = False
        """The student as it came was evaluated and has a checkpoint."""

    async def begin(self, *, resume: bool) -> None:
        """Remember the state before the first step; `resume`: go on from the newest checkpoint."""
        await self._terms.begin()
        self._first = await self._state({})
        self._journal.learner_version(0)
        if resume:
            await self.restore_newest()

    async def take(self) -> None:
        """Take a checkpoint of this border. It is written while the run goes on; one before it is waited for.

        Rollouts under way are not part of it: their prompts are drawn again.
        """
        await self._checkpoints.written()
        if self._checkpoints.taken_step == self.step:
            return
        try:
            sizes = await asyncio.to_thread(self._journal.record_sizes)
        except OSError as error:
            self._journal.note(f"checkpoint of step {self.step} not written: {error}; free the disk, the run goes on")
            return
        await self._checkpoints.take(await self._state(sizes))

    async def restore_newest(self) -> None:
        """Go on from the newest checkpoint that verifies, or from the start if there is none. Also used mid-run, to go back."""
        folder, state = await self._checkpoints.resume()
        if folder is None:
            state = self._first
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self._ahead.restore(self.step, state["cursor"])
        await self._terms.restore(state)
        if state["golden_key"] != self._data.golden_key:
            self._journal.note("the golden answers are not those that the checkpoint's run had: teacher, prompts or their settings differ")
        if self._data.rewards is not None:
            self._data.rewards.restore(state.get("rewards", {}))
        self._journal.restore(state["telemetry"], state["records"])
        self.begun = folder is not None
        self._journal.learner_version(await self._learner.restore(str(folder)) if folder else 0)

    async def roll_back(self, reason: str) -> int | None:
        """The learner's weights back to the last healthy checkpoint, moments dropped. Returns its step; None, with a warning, without one.

        The engines need a sync afterwards. Steps, prompts and pressure go on.
        """
        await self._ahead.drop()
        folder, _ = await self._checkpoints.newest(healthy=True)
        if folder is None:
            self._journal.note(f"no healthy checkpoint to roll back to ({reason}); the run goes on")
            return None
        self._checkpoints.changed()
        await self._learner.restore(str(folder), rollback=True)
        return step_of(folder)

    async def _state(self, sizes: dict[str, int]) -> Record:
        """`sizes`: of the records files, in bytes."""
        return {
            "step": self.step,
            "cursor": self._ahead.cursor(),
            **await self._terms.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "golden_key": self._data.golden_key,
            "reads": dict(self._data.reads),
            "rewards": self._data.rewards.state() if self._data.rewards else {},
            "telemetry": self._journal.telemetry_state(),
            "records": sizes,
        }
