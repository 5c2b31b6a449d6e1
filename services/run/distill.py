"""The main loop: a student distilled on its own samples, its lengths governed while it goes.

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
    overlaps  the rollouts of the next max_staleness steps with all it does for this one; the engines' weight update and the step's
              record with the next step's learning. At max_staleness 0 nothing: each begins when the one before has ended

Every change (limits, tunable settings, pause, rollback) takes effect at the border between two steps.

What dies is started again: rollout actors by the fleet, teachers by their pool, the governor by its keeper, none of which costs a
step. The learner's state is the run's, so with it the loop goes back to the newest checkpoint and takes the steps since again.
"""

import asyncio
import contextlib
import gc
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.checkpoint import step_of
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.services.inputs.prompts import PromptStream
from opd_governor.services.inputs.verifiers import Evaluation
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.batch import Batch, Launch, Sync
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory
from opd_governor.services.record.steps import Source, StepTimes, record_batch, step_record
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.collect import collect
from opd_governor.services.run.fleet import Fleet

PAUSE_POLL_S = 0.1
"""How often a paused run looks for a verb."""
STATUS_S = 1.0
"""How often a run that waits for a batch looks for what keeps it."""
MAX_LEARNER_LOSSES = 3
"""A learner that dies this often on its way to the same next step will not get there."""

Evaluate = Callable[[LengthLimits, int], Any]
"""(limits, step) -> awaitable dict of decoding -> Evaluation."""
OnNonfinite = Callable[[Source, Trajectory, TokenScores | None], None]
"""A sample to be kept for inspection: who found it, and what the teacher said on it."""


class GuardRailError(RuntimeError):
    """The governor gave the run up: exit code 4."""


class SyncError(RuntimeError):
    """Engine and learner disagree after a weight sync: what is sampled is not the student. The run must stop."""


class LearnerError(RuntimeError):
    """Too many steps in a row could not be learned from."""


def base_limits(job: Job) -> LengthLimits:
    """The job's own settings as limits: what holds at zero pressure."""
    objective = job.objective
    tail_weight = {"mask": 0.0, "keep": 1.0, "downweight": objective.loop_tail_weight}[objective.loop_tail]
    return LengthLimits(
        cap_tokens=job.rollout.max_new_tokens,
        golden_weight=objective.golden_weight,
        reference_kl_weight=objective.reference_kl_weight,
        stop_tilt_nats=objective.stop_tilt_nats,
        loop_tail_weight=tail_weight,
        admission_quota=objective.admission_quota,
        unfinished_quota=1.0 if job.data.unfinished_by_teacher == "quota" else None,
    )


Decided = tuple[str | None, str]
"""The governor's command, and why."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A step up to its learner's update: what its record will tell."""

    batch: Batch
    report: StepReport | None
    limits: LengthLimits
    pressure: float
    started: float
    """Monotonic."""
    waited_s: float
    learn_s: float


class Distillation:
    """The loop's state and its verbs. The actors' handles belong to the fleet, the pool and the governor's actor."""

    def __init__(
        self,
        job: Job,
        *,
        stream: PromptStream,
        golden: list[Prompt],
        golden_key: str,
        reference_tokens: float,
        fleet: Fleet,
        pool: TeacherPool,
        governor: Any,
        directory: RunDirectory,
        store: ConfigStore,
        telemetry: Telemetry,
        monitor: RunMonitor,
        evaluate: Evaluate | None,
        decode: Callable[[Sequence[int]], str],
        on_step: Callable[[Record], None],
        on_warning: Callable[[str], None],
        on_restart: Callable[[str, str], None],
        on_nonfinite: OnNonfinite,
        finish: Callable[[], Awaitable[None]],
        mirror: Callable[[Path], None] | None = None,
    ) -> None:
        """`finish` is awaited after the last checkpoint. `on_restart`: (role, reason) of what died and is back.

        `golden_key`: of the golden answers in the stream; those of a resumed run should be the same. `mirror` copies a checkpoint
        to a second place.
        """
        self._original_job = self._job = job
        self._stream, self._golden, self._golden_key, self._reference_tokens = stream, golden, golden_key, reference_tokens
        self._fleet, self._pool, self._governor = fleet, pool, governor
        self._directory, self._store, self._telemetry, self._monitor = directory, store, telemetry, monitor
        self._evaluate, self._warn = evaluate, on_warning
        self._journal = Journal(
            directory,
            telemetry,
            monitor,
            samples_per_step=job.service.samples_per_step,
            decode=decode,
            on_step=on_step,
            warn=on_warning,
        )
        self._on_restart, self._on_nonfinite, self._finish = on_restart, on_nonfinite, finish
        self._checkpoints = Checkpoints(directory.checkpoints, fleet, keep=job.checkpoint.keep, warn=on_warning, mirror=mirror)
        self._outage_s = max(teacher.timeout_s for teacher in job.teacher)
        self._furthest_step = self._learner_losses = 0
        self._limits = base_limits(job)
        self._pressure = 0.0
        self._healthy = True
        self._generation = 0
        self._step = 0
        self._launched: deque[tuple[Launch, asyncio.Task[Batch], dict[str, int]]] = deque()
        self._next_launch = 1
        self._finishing: asyncio.Task[None] | None = None
        """The end of the step before: engines' weights, record."""
        self._ended = 0.0
        """When the last step got its record, monotonic."""
        self._skipped_in_a_row = 0
        self._begun = False
        self._stopping = False
        self._stop_asked = asyncio.Event()
        self._paused = False
        self._want_checkpoint = False

    # ---- the loop

    async def run(self, resume: bool) -> None:
        """From the first step (or the newest checkpoint) to the last. Raises GuardRailError, SyncError, LearnerError."""
        self._generation, tunables = self._store.in_force()
        self._job = tunables.apply(self._original_job)
        self._limits = await self._governor.limits()
        self._first_state = await self._state({})
        if resume:
            await self._restore_newest()
        self._pause(False)
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
            with contextlib.suppress(Exception):  # what ends the run is on its way already
                await self._finished()
            await self._checkpoints.written()  # whoever goes on will want it
            raise
        finally:
            if self._finishing is not None:
                self._finishing.cancel()
                await asyncio.gather(self._finishing, return_exceptions=True)
            await self._drop_launched()
            await self._checkpoints.close()

    async def _run_to_the_end(self) -> None:
        """From the border that the learner stands at."""
        await self._sync()
        if not self._begun:
            self._journal.begin(await self._evaluate_now())
            await self._checkpoint()  # the student as it came is the first place to roll back to
            self._begun = True
        self._monitor.enter("running")
        gc.collect()
        gc.freeze()  # a million objects of imported libraries, which every full collection would walk: half of the driver's time
        gc.set_threshold(50_000, 20, 20)  # rollouts under way are many objects and no cycles: looking for some took a tenth of the rest
        while self._step < self._job.learner.total_steps and not self._stopping:
            await self._one_step()
        await self._checkpoint()
        await self._checkpoints.written()
        await self._finish()

    async def _one_step(self) -> None:
        started = time.monotonic()
        await self._obey_verbs()
        if self._stopping:
            return
        if self._store.generation != self._generation:  # changed while the run was paused
            await self._decide()
        if self._finishing is None:
            self._launch()
        batch = await self._wait_for(self._launched[0][1])
        if batch is None:
            return
        waited_s = time.monotonic() - started
        launch, _, _ = self._launched.popleft()

        learn_started = time.monotonic()
        limits = self._limits
        report = None
        if batch.scored:
            golden = self._golden_for(launch.step, len(batch.scored))
            report = await self._fleet.learn(batch.scored, golden, limits, self._reference_tokens, self._job.learner.learning_rate)
        learn_s = time.monotonic() - learn_started
        if batch.scored or not self._teachers_missing():  # an outage is waited out, not held against the run
            self._count_skipped(report is None or report.skipped)

        for trajectory in batch.nonfinite:
            self._on_nonfinite("engine", trajectory, None)
        for index in report.suspects if report else ():
            self._on_nonfinite("learner", batch.scored[index].trajectory, batch.scored[index].scores)

        await self._finished()
        self._step = launch.step
        if self._step > self._furthest_step:
            self._furthest_step, self._learner_losses = self._step, 0
        record_batch(self._telemetry, batch, report, limits)
        self._telemetry.beat()
        learned = Learned(batch, report, limits, self._pressure, started, waited_s, learn_s)
        taken = asyncio.Event()
        deciding = asyncio.create_task(self._decide())  # beside the sync: reading metrics costs the loop nothing
        self._finishing = asyncio.create_task(self._finish_step(learned, deciding, taken))
        await taken.wait()
        command, reason = await deciding
        checkpoint = self._step % self._job.checkpoint.every_steps == 0 or self._want_checkpoint
        if command or checkpoint or self._is_eval_step() or not self._job.rollout.max_staleness:
            await self._finished()
        if command == "rollback":
            await self._roll_back(reason)
        elif command == "stop":
            await self._checkpoint()
            raise GuardRailError(reason)
        elif checkpoint:
            await self._checkpoint()

    async def _finish_step(self, learned: Learned, deciding: asyncio.Task[Decided], taken: asyncio.Event) -> None:
        """The engines' part of a border, and the step's record. `taken` is set as soon as the learner may go on.

        With rollouts ahead of it the learner has its next batch, or soon will: it need not wait for the engines to have the weights.
        """
        try:
            sync = await self._sync(taken.set) if learned.report else Sync()
        finally:
            taken.set()
            synced = time.monotonic()
            await asyncio.wait([deciding])
            govern_s = time.monotonic() - synced
        evaluations = await self._evaluate_now() if self._is_eval_step() else {}
        if self._job.rollout.max_staleness and not deciding.result()[0]:
            self._launch()
        batch, ended = learned.batch, time.monotonic()
        # The step before may have ended within this one: its time is not told twice.
        total_s, self._ended = ended - max(learned.started, self._ended), ended
        times = StepTimes(batch.rollout_s, batch.score_s, learned.learn_s, sync.seconds, govern_s, total_s, learned.waited_s)
        record = step_record(batch, learned.report, learned.limits, learned.pressure, times, evaluations)
        self._journal.step(record, batch, times)

    async def _finished(self) -> None:
        """Wait until the step before has its record and the engines its weights. Raises what went wrong there."""
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            await finishing

    def _launch(self) -> None:
        """Rollouts of the next step, and of as many more as may be sampled with the weights that the engines have now.

        Each on the terms in force when it is launched. Called as soon as the weights are there, not when the batch before is, so that
        the engines never run out of work.
        """
        while self._next_launch <= self._step + 1 + self._job.rollout.max_staleness and self._next_launch <= self._job.learner.total_steps:
            cursor = self._stream.state()
            prompts = self._stream.next(self._job.rollout.prompts_per_step, self._limits.unfinished_quota)
            launch = Launch(self._next_launch, prompts, self._limits, self._job.rollout, self._generation)
            self._launched.append((launch, asyncio.create_task(collect(self._fleet, self._pool, launch)), cursor))
            self._next_launch += 1
            self._store.observe(self._generation)
            self._telemetry.set("opd_config_observed_generation", self._generation)

    # ---- borders

    async def _decide(self) -> Decided:
        """Bring a person's changes into force, have the governor decide, obey. Returns its command and the reason."""
        self._checkpoints.taken_step = None
        generation, tunables = self._store.in_force()
        self._telemetry.set("opd_config_generation", generation)
        if generation != self._generation:
            self._generation = generation
            self._job = tunables.apply(self._original_job)
            await self._governor.set_policy(self._job.governor, base_limits(self._job), generation)
        try:
            decision, record = await self._governor.tick(self._step)
        except ActorLostError as error:
            self._warn(f"step {self._step}: no decision, the last limits hold: {error}")
            return None, ""
        self._limits, self._pressure, self._healthy = decision.limits, decision.after.pressure, decision.healthy
        self._journal.decision(decision, record)
        return decision.command, decision.reason

    async def _obey_verbs(self) -> None:
        """Verbs that came over HTTP; returns when the run may go on.

        With a teacher gone it waits, and is paused after the time a request may take; it goes on by itself when one is back.
        """
        missing_since: float | None = None
        while True:
            for verb in self._monitor.take_verbs():
                if verb in ("pause", "resume"):
                    self._pause(verb == "pause")
                elif verb == "stop":
                    self._stopping = True
                elif verb == "checkpoint":
                    self._want_checkpoint = True
                else:
                    await self._roll_back("asked for over HTTP")
            missing = self._teachers_missing()
            missing_since = (missing_since or time.monotonic()) if missing else None
            waited_out = missing_since is not None and time.monotonic() - missing_since > self._outage_s
            if self._want_checkpoint and (self._paused or missing):
                await self._checkpoint()
            if self._stopping:
                self._monitor.enter("stopping")
                return
            self._monitor.enter("paused" if self._paused or waited_out else "running")
            self._monitor.update(waiting_for=missing)
            if not self._paused and not missing:
                return
            await asyncio.sleep(PAUSE_POLL_S)

    def _pause(self, paused: bool) -> None:
        if self._paused and not paused:
            self._telemetry.beat()  # else the pause itself would look like a stall until the next step ends
        self._paused = paused
        self._telemetry.set("opd_run_paused", float(paused))

    async def _wait_for(self, batch: asyncio.Task[Batch]) -> Batch | None:
        """The batch, or None once the run is to stop; meanwhile the status names a teacher that is gone."""
        stop = asyncio.create_task(self._stop_asked.wait())
        while not (await asyncio.wait([batch, stop], timeout=STATUS_S, return_when=asyncio.FIRST_COMPLETED))[0]:
            self._monitor.update(waiting_for=self._teachers_missing())
        stop.cancel()
        self._monitor.update(waiting_for=None)
        return None if self._stopping else batch.result()

    def _teachers_missing(self) -> str | None:
        """Teachers none of whose actors takes work now, in words; None: all of them have one that does."""
        names = [name for name, num_live in self._pool.num_live().items() if not num_live]
        return f"teacher {', '.join(names)}: no actor answers" if names else None

    def stop(self) -> None:
        """End the run with a checkpoint: at once where it waits for rollouts, which are drawn again, else after the learner's step."""
        self._stopping = True
        self._stop_asked.set()
        self._monitor.enter("stopping")

    async def _sync(self, on_taken: Callable[[], None] = lambda: None) -> Sync:
        sync = await self._fleet.sync_weights(on_taken)
        self._journal.sync(sync)
        if not sync.sound:
            raise SyncError(
                f"weight sync {sync.weight_version}: engine and learner differ by {sync.gap_nats:.3g} nats on the probe, tolerance "
                f"{sync.tolerance_nats:g}; the engine does not hold the student's weights "
                "(raise cluster.probe_tolerance_nats only if bfloat16 explains it)"
            )
        return sync

    def _golden_for(self, step: int, num_rollouts: int) -> list[Prompt]:
        """Golden answers beside this batch, in turn; none while their weight is 0."""
        if not self._golden or self._limits.golden_weight == 0:
            return []
        num = max(1, round(self._job.objective.golden_ratio * num_rollouts))
        return [self._golden[(step * num + i) % len(self._golden)] for i in range(num)]

    def _count_skipped(self, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self._job.learner.max_skipped_steps:
            raise LearnerError(
                f"{self._skipped_in_a_row} steps in a row brought no finite loss and gradient, or no scored rollout: "
                "look at the teacher's scores and the learning rate; the newest checkpoint is whole"
            )

    # ---- held-out evaluation

    def _is_eval_step(self) -> bool:
        return self._step % self._job.data.eval.every_steps == 0 or self._step == self._job.learner.total_steps

    async def _evaluate_now(self) -> dict[str, Evaluation]:
        if self._evaluate is None:
            return {}
        evaluations: dict[str, Evaluation] = await self._evaluate(base_limits(self._job), self._step)
        self._journal.evaluation(evaluations)
        return evaluations

    # ---- checkpoints

    async def _checkpoint(self) -> None:
        """Take the state of this border, which is written while the run goes on.

        Rollouts under way are not part of it, their prompts will be drawn again. A second one waits for the first to be written.
        """
        self._want_checkpoint = False
        await self._finished()
        await self._checkpoints.written()
        if self._checkpoints.taken_step == self._step:
            return
        try:
            sizes = await asyncio.to_thread(self._directory.record_sizes)
        except OSError as error:
            self._warn(f"checkpoint of step {self._step} not written: {error}; free the disk, the run goes on")
            return
        await self._checkpoints.take(await self._state(sizes))

    async def _state(self, sizes: dict[str, int]) -> Record:
        """Everything at this border that later steps depend on, the learner's own apart. `sizes`: of the records files."""
        return {
            "step": self._step,
            "cursor": self._launched[0][2] if self._launched else self._stream.state(),
            "governor": await self._governor.state(),
            "pressure": self._pressure,
            "healthy": self._healthy,
            "skipped_in_a_row": self._skipped_in_a_row,
            "config_generation": self._generation,
            "golden_key": self._golden_key,
            "telemetry": self._telemetry.state(),
            "records": sizes,
        }

    async def _replace_learner(self, error: ActorLostError) -> None:
        """A new learner at the newest checkpoint, and the loop back at its border; steps since are taken again."""
        with contextlib.suppress(ActorLostError):
            await self._finished()
        await self._drop_launched()
        while True:
            self._learner_losses += 1
            if self._learner_losses > MAX_LEARNER_LOSSES:
                raise LearnerError(f"the learner died {MAX_LEARNER_LOSSES} times before step {self._furthest_step + 1}: {error}") from error
            self._warn(f"step {self._step}: {error}")
            self._monitor.update(waiting_for="a new learner")
            try:
                await self._fleet.restart_learner()
                await self._restore_newest()
                break
            except ActorLostError as again:
                error = again
        self._fleet.learner_is_back()
        self._monitor.update(waiting_for=None)
        self._warn(f"learner is back at the checkpoint of step {self._step}")
        self._on_restart("learner", error.reason)

    async def _restore_newest(self) -> None:
        """Go on from the newest checkpoint that verifies; from the start where there is none. Also within a run that has gone beyond."""
        folder, state = await self._checkpoints.resume()
        if folder is None:
            state = self._first_state
        self._step = state["step"]
        self._next_launch = self._step + 1
        self._generation = state["config_generation"]  # a later one is a change that comes with the first step
        self._skipped_in_a_row, self._pressure, self._healthy = state["skipped_in_a_row"], state["pressure"], state["healthy"]
        self._stream.restore(state["cursor"])
        await self._governor.restore(state["governor"])
        self._limits = await self._governor.limits()
        if state["golden_key"] != self._golden_key:
            self._warn("the golden answers are not those that the checkpoint's run had: teacher, prompts or their settings differ")
        self._journal.restore(state["telemetry"], state["records"])
        self._begun = folder is not None
        if folder is not None:
            await self._fleet.restore(str(folder))

    async def _roll_back(self, reason: str) -> None:
        """Weights of the last healthy checkpoint, moments dropped; steps, prompts and pressure go on."""
        await self._finished()
        await self._drop_launched()
        folder, _ = await self._checkpoints.newest(healthy=True)
        if folder is None:
            self._warn(f"no healthy checkpoint to roll back to ({reason}); the run goes on")
            return
        self._checkpoints.taken_step = None
        await self._fleet.restore(str(folder), rollback=True)
        await self._sync()
        self._warn(f"step {self._step}: rolled back to step {step_of(folder)}: {reason}")

    async def _drop_launched(self) -> None:
        """Abandon rollouts under way; their prompts are drawn again."""
        if self._launched:
            self._stream.restore(self._launched[0][2])
            self._next_launch = self._launched[0][0].step
        tasks = [task for _, task, _ in self._launched]
        self._launched.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
