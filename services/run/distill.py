"""The main loop: a student distilled on its own samples, its lengths governed meanwhile.

    prompts --> rollout actors --Trajectory--> admission --> teacher pool --TokenScores--> learner --weights vN--> rollout actors
                    ^                              |                                          |
               LengthLimits                        +--- lengths, ends, loops, KL, stop mass --+--> telemetry --> /metrics
                    |                                                                                              |
                governor <---------------------- the run's own /metrics, or a Prometheus server -------------------+
                    ^
              PATCH /v1/config (targets and bounds, by a person)

One step of the loop
    consumes  the batch of rollouts launched for it (max_staleness steps ago) and the teacher's scores on it
    produces  one optimiser step, new weights in the engines, one line of metrics.jsonl, one governor decision
    waits for the slowest rollout of its batch, then the learner
    overlaps  with the rollouts of the next max_staleness steps; the engines' weight update and the step's record overlap with
              the next step's learning. At max_staleness 0 nothing overlaps: each step begins when the one before has ended

Every change (limits, tunable settings, pause, rollback) takes effect at the border between two steps.

Actors that die are started again: rollout actors by the fleet, teachers by their pool, the governor by its keeper. None of that costs
a step. The learner holds the run's state, so when it dies the loop goes back to the newest checkpoint and takes the steps since again.
"""

import contextlib
import gc
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.services.inputs.verifiers import Evaluation
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.batch import Batch, Sync
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.steps import StepTimes, step_record
from opd_governor.services.run.ahead import Ahead
from opd_governor.services.run.border import Border
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.collect import collect
from opd_governor.services.run.conversations import Sampler
from opd_governor.services.run.data import TrainingData
from opd_governor.services.run.errors import GuardRailError, LearnerError, SyncError
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.following import Following
from opd_governor.services.run.gate import Gate
from opd_governor.services.run.recovery import LearnerRecovery
from opd_governor.services.run.state import RunState
from opd_governor.services.run.terms import Command, Ruling, Terms
from opd_governor.services.run.weights import OnTaken

Evaluate = Callable[[Job, int], Awaitable[dict[str, Evaluation]]]
"""(job in force, step) -> decoding -> how held-out problems went."""


@dataclass(frozen=True, slots=True)
class Actors:
    """Handles of what runs on the cluster."""

    fleet: Fleet
    pool: TeacherPool
    governor: Any
    """A GovernorKeeper."""
    sampler: Sampler | None = None
    """Conversations; None: the fleet's engines, one turn a rollout."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A step up to its learner's update."""

    batch: Batch
    report: StepReport | None
    """None: no rollout of the batch was scored."""
    ruling: Ruling
    """What the learner's step ran under."""
    started: float
    """Monotonic."""
    waited_s: float
    learn_s: float


class Distillation:
    """The loop. What it is made of: batches under way, a border behind each step, a gate before it, the state, the recovery."""

    def __init__(
        self,
        job: Job,
        store: ConfigStore,
        data: TrainingData,
        actors: Actors,
        journal: Journal,
        checkpoints: Checkpoints,
        evaluate: Evaluate | None,
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        """`evaluate` is None without held-out problems. `finish` is awaited after the last checkpoint."""
        self._data, self._fleet, self._journal, self._checkpoints = data, actors.fleet, journal, checkpoints
        self._evaluate, self._finish = evaluate, finish
        self._following = Following(job, actors.fleet.learner, actors.pool, journal)
        self._terms = Terms(job, store, actors.governor, journal)
        self._ahead = Ahead(
            data.stream, partial(collect, actors.sampler or actors.fleet, actors.pool, demonstrations=data.demonstrations, judge=data.judge)
        )
        self._gate = Gate(actors.pool, journal, max(teacher.timeout_s for teacher in job.teacher))
        self._state = RunState(self._terms, self._ahead, actors.fleet.learner, journal, checkpoints, data)
        self._recovery = LearnerRecovery(actors.fleet, self._state, journal)
        self._border: Border | None = None
        """Behind the last step; None: it is done."""
        self._recorded = 0.0
        """When the last step got its record, monotonic."""

    def stop(self) -> None:
        """End the run with a checkpoint: at once while it waits for rollouts, which are drawn again, otherwise after the learner's step."""
        self._gate.stop()

    async def run(self, resume: bool) -> None:
        """From the first step (or the newest checkpoint) to the last. Raises GuardRailError, SyncError, LearnerError."""
        await self._state.begin(resume=resume)
        self._gate.pause(False)
        try:
            while True:
                try:
                    await self._run_to_the_end()
                    return
                except ActorLostError as error:
                    if error.role != "learner":
                        raise
                    await self._replace_learner(error)
        except Exception:
            with contextlib.suppress(Exception):  # the run ends with the first error, not with this one
                await self._end_border()
            await self._checkpoints.written()  # a resumed run will want it
            raise
        finally:
            if self._border is not None:
                await self._border.close()
            await self._ahead.drop()
            await self._checkpoints.close()

    async def _run_to_the_end(self) -> None:
        """From the border that the learner stands at."""
        await self._sync()
        if not self._state.begun:
            self._journal.begin(await self._evaluate_now())
            await self._checkpoint()  # the student as it came is the first place to roll back to
            self._state.begun = True
        self._journal.monitor.enter("running")
        _tune_garbage_collection()
        while self._state.step < self._terms.job.learner.total_steps and not self._gate.stopping:
            await self._one_step()
        await self._checkpoint()
        await self._checkpoints.written()
        await self._finish()

    async def _one_step(self) -> None:
        """Wait for the batch, learn from it, end the border before, begin the one behind this step."""
        started = time.monotonic()
        await self._gate.pass_through(self._checkpoint, self._roll_back)
        if self._gate.stopping:
            return
        if self._terms.outdated:  # changed while the run was paused
            await self._decide()
        if self._border is None:
            self._launch()
        batch = await self._gate.wait_for(self._ahead.first)
        if batch is None:
            return
        self._ahead.take()
        learned = await self._learn(batch, started)
        await self._end_border()
        self._state.step = batch.step
        self._recovery.reached(batch.step)
        self._journal.learned(batch, learned.report, learned.ruling.limits)
        self._border = Border(partial(self._sync_after, learned), self._decide, partial(self._conclude, learned))
        command = await self._border.learner_free()
        checkpoint = batch.step % self._terms.job.checkpoint.every_steps == 0 or self._gate.checkpoint_wanted
        if command.verb or checkpoint or self._is_eval_step() or self._terms.job.strict:
            await self._end_border()
        if command.verb == "rollback":
            await self._roll_back(command.reason)
        elif command.verb == "stop":
            await self._checkpoint()
            raise GuardRailError(command.reason)
        elif checkpoint:
            await self._checkpoint()

    # ---- the parts of a step

    def _launch(self) -> None:
        """Rollouts of the next step, and of as many more as may be sampled with the weights that the engines have now.

        Called as soon as the weights are there, not when the batch before is, so that the engines never run out of work.
        """
        job = self._terms.job
        self._ahead.launch(min(self._state.step + 1 + job.rollout.max_staleness, job.learner.total_steps), self._terms)

    async def _learn(self, batch: Batch, started: float) -> Learned:
        """One optimiser step on what was scored. Raises LearnerError after too many in a row that brought nothing."""
        learn_started = time.monotonic()
        job, ruling, report = self._terms.job, self._terms.ruling, None
        if self._data.rewards is not None:
            batch = replace(batch, scored=self._data.rewards.weigh(batch.trajectories, batch.scored))
        if batch.scored:
            golden = []
            if ruling.limits.golden_weight:
                golden = self._data.golden_for(batch.step, len(batch.scored), job.objective.golden_ratio)
            report = await self._fleet.learner.learn(
                batch.scored, golden, ruling.limits, self._data.reference_tokens, job.learner.learning_rate
            )
        learn_s = time.monotonic() - learn_started
        if batch.scored or not self._gate.missing_teachers():  # an outage of teachers is waited out, not held against the run
            self._count_skipped(report is None or report.skipped)
        for trajectory in batch.nonfinite:
            self._journal.nonfinite("engine", trajectory, None)
        for index in report.suspects if report else ():
            self._journal.nonfinite("learner", batch.scored[index].trajectory, batch.scored[index].scores)
        return Learned(batch, report, ruling, started, learn_started - started, learn_s)

    def _count_skipped(self, skipped: bool) -> None:
        self._state.skipped_in_a_row = self._state.skipped_in_a_row + 1 if skipped else 0
        if self._state.skipped_in_a_row >= self._terms.job.learner.max_skipped_steps:
            raise LearnerError(
                f"{self._state.skipped_in_a_row} steps in a row brought no finite loss and gradient, or no scored rollout: "
                "look at the teacher's scores and the learning rate; the newest checkpoint is whole"
            )

    async def _decide(self) -> Command:
        self._checkpoints.changed()
        return await self._terms.decide(self._state.step)

    async def _sync_after(self, learned: Learned, on_taken: OnTaken) -> Sync:
        return await self._sync(on_taken) if learned.report else Sync()

    async def _sync(self, on_taken: OnTaken = lambda: None) -> Sync:
        await self._following.bring()
        sync = await self._fleet.sync_weights(on_taken)
        self._journal.sync(sync)
        if not sync.sound:
            raise SyncError(
                f"weight sync {sync.weight_version}: {sync.words}; the engine does not hold the student's weights "
                "(raise cluster.probe_tolerance_nats only if bfloat16 explains it)"
            )
        return sync

    async def _conclude(self, learned: Learned, sync: Sync, command: Command, govern_s: float) -> None:
        """The rest of a border: evaluate where it is time, launch what may be sampled now, write the record."""
        evaluations = await self._evaluate_now() if self._is_eval_step() else {}
        if not self._terms.job.strict and not command.verb:
            self._launch()
        batch, ended = learned.batch, time.monotonic()
        # The step before may have ended within this one: time that both share counts once.
        total_s, self._recorded = ended - max(learned.started, self._recorded), ended
        times = StepTimes(batch.rollout_s, batch.score_s, learned.learn_s, sync.seconds, govern_s, total_s, learned.waited_s)
        record = step_record(batch, learned.report, learned.ruling.limits, learned.ruling.pressure, times, evaluations)
        self._journal.step(record, batch, times)

    async def _end_border(self) -> None:
        """Wait until the last step has its record and the engines its weights. Raises what went wrong there."""
        if self._border is None:
            return
        border = self._border
        try:
            await border.done()
        finally:
            self._border = None
            await border.close()

    def _is_eval_step(self) -> bool:
        job, step = self._terms.job, self._state.step
        return step % job.data.eval.every_steps == 0 or step == job.learner.total_steps

    async def _evaluate_now(self) -> dict[str, Evaluation]:
        if self._evaluate is None:
            return {}
        evaluations = await self._evaluate(self._terms.job, self._state.step)
        self._journal.evaluation(evaluations)
        return evaluations

    # ---- checkpoints and going back

    async def _checkpoint(self) -> None:
        self._gate.checkpoint_wanted = False
        await self._end_border()
        await self._state.take()

    async def _roll_back(self, reason: str) -> None:
        await self._end_border()
        to_step = await self._state.roll_back(reason)
        if to_step is not None:
            await self._sync()
            await self._terms.tell(f"rolled back to step {to_step}")
            self._journal.note(f"step {self._state.step}: rolled back to step {to_step}: {reason}")

    async def _replace_learner(self, error: ActorLostError) -> None:
        """A new learner at the newest checkpoint, and the loop back at its border."""
        with contextlib.suppress(ActorLostError):
            await self._end_border()
        await self._ahead.drop()
        await self._recovery.bring_back(error)


def _tune_garbage_collection() -> None:
    """Leave the million objects of imported libraries out of full collections, which took half of the driver's time.

    Rollouts under way are many objects and no cycles; looking for cycles took a tenth of the rest.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
