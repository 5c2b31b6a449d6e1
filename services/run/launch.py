"""From a job to a finished run: read everything, bring the actors up, hand over to the main loop, write what remains, end everything.

job --> models, prompts, run directory, HTTP --> Ray --> teachers --> golden pass --+
                                                  +----> engines, learner ----------+--> Distillation.run --> final/, report
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

from opd_governor.actors.deadlines import Say
from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import BY_ENVIRONMENT
from opd_governor.services.inputs.golden import GoldenSet
from opd_governor.services.inputs.thinking import thinking_ids
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.mirror import Mirror
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.record.trackers import Trackers
from opd_governor.services.remote.jobs import announced
from opd_governor.services.report.report import write_report
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.cluster import connect, descendants, leave, refuse_taken_name, require_roles
from opd_governor.services.run.data import TrainingData
from opd_governor.services.run.distill import Actors, Distillation
from opd_governor.services.run.environments import conversations, environments_of
from opd_governor.services.run.errors import TerminatedError
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.golden_pass import golden_pass
from opd_governor.services.run.held_out import HeldOut
from opd_governor.services.run.judges import Judges, JudgesOf, judge_rollouts, judge_teacher
from opd_governor.services.run.keeper import start_governor
from opd_governor.services.run.reads import Reads, refuse_other_run, what_it_reads
from opd_governor.services.run.rewards import Rewards
from opd_governor.services.run.rooms import Rooms, take_rooms
from opd_governor.services.run.service import RunService
from opd_governor.services.run.sources import Sources
from opd_governor.services.run.teachers import start_teachers
from opd_governor.services.run.terms import base_limits
from opd_governor.services.run.weights import PROBE_TOKENS


@dataclass
class Run:
    """One run, made by `open`: everything that outlives a step.

    >>> async with Run.open(job, out, resume=False, say=print) as run:
    ...     await run.execute()
    """

    job: Job
    resume: bool
    say: Say
    sources: Sources
    directory: RunDirectory
    mirror: Mirror | None
    store: ConfigStore
    telemetry: Telemetry
    journal: Journal
    service: RunService
    reads: Reads
    _loop: Distillation | None = None
    _environments: EnvironmentPool | None = None
    _ending: bool = False
    _terminated: bool = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        job: Job,
        out: Path,
        *,
        resume: bool,
        accept_changes: bool = False,
        say: Say,
        on_step: Callable[[Record], None] = lambda record: None,
    ) -> AsyncIterator["Run"]:
        """Read models, prompts and problems, open the run directory and the port. Starts no actor.

        Raises JobError (DataError, ServiceError) for every mistake in them. Port and trackers are closed at the end.
        """
        sources = Sources.read(job)
        if job.rollout.thinking_ids is None and (ids := thinking_ids(sources.tokenizer)) is not None:
            job = job.model_copy(update={"rollout": job.rollout.model_copy(update={"thinking_ids": ids})})
        for line in sources.notes:
            say(line)
        directory = RunDirectory(out, resume=resume)
        mirror = Mirror(job.checkpoint.copy_to, directory) if job.checkpoint.copy_to else None
        if mirror and resume:
            for line in mirror.fetch():
                say(line)
        reads = what_it_reads(job, sources)
        if resume:
            for change in refuse_other_run(directory.checkpoints, reads, accept=accept_changes):
                say(f"goes on as another run: {change}")
            sources.stream.accept_changes = accept_changes
        trackers = Trackers(job, out, say)
        store = ConfigStore(job, directory.config)
        telemetry = Telemetry(job.name)
        monitor = RunMonitor(job.name, job.learner.total_steps, base_limits(job))

        def record_step(record: Record) -> None:
            trackers.log(record)
            on_step(record)

        with RunService.opened(job, directory, monitor, store, telemetry) as service, trackers:
            directory.write_job(job)
            journal = Journal(
                directory,
                telemetry,
                monitor,
                samples_per_step=job.service.samples_per_step,
                decode=sources.decode,
                on_step=record_step,
                say=say,
            )
            yield cls(job, resume, say, sources, directory, mirror, store, telemetry, journal, service, reads)

    async def execute(self) -> None:
        """The whole run, and the end of every process of it, however it ends."""
        fleet: Fleet | None = None
        async with self.service.serving(self.journal):
            self.say(f"run {self.job.name}: {self.service.url} (token in {self.directory.path / 'token'})")
            with contextlib.ExitStack() as to_the_end:
                try:
                    connect(self.job.cluster.address)
                    to_the_end.enter_context(self._signals())  # after Ray's own handlers, so that these hold
                    await refuse_taken_name(self.job.name, resume=self.resume)
                    require_roles(self.job, ray.cluster_resources())
                    async with announced(self.job.name, self.service.url, self.service.token, self.directory.path):
                        rooms = await take_rooms(self.job, self.sources.models, self.say)
                        self.job = rooms.job
                        probe = self.sources.ordinary_text(PROBE_TOKENS)
                        fleet = Fleet(self.job, self.sources.models, probe, on_restart=self.journal.restarted, say=self.journal.note)
                        await self._with_teachers(fleet, rooms)
                        self.journal.monitor.enter("finished")
                except BaseException as error:
                    if not isinstance(error, TerminatedError):
                        self.journal.monitor.enter("failed")
                    raise
                finally:
                    await self._end(fleet)

    async def _with_teachers(self, fleet: Fleet, rooms: Rooms) -> None:
        if rooms.shared:
            await fleet.start_learner(rooms)  # on one GPU each measures what is free: in order
        pool = await start_teachers(rooms, self.sources, self.journal)
        self._environments = environments_of(self.job, self.journal)
        try:
            if rooms.shared:
                await pool.start()
                await fleet.start_engines(rooms)
                golden = await self._golden_after(pool)
            else:
                _, golden = await asyncio.gather(fleet.start(rooms), self._golden_after(pool))
            await self._train(fleet, pool, golden)
        finally:
            self._ending = True
            if self._environments is not None:
                self._environments.end()
            await pool.close()

    async def _golden_after(self, pool: TeacherPool) -> GoldenSet:
        await pool.start()
        return await golden_pass(self.job, self.sources, pool, self.directory.path.parent, self.say, self._environments)

    async def _train(self, fleet: Fleet, pool: TeacherPool, golden: GoldenSet) -> None:
        job, sources, _journal, reference = self.job, self.sources, self.journal, golden.reference
        self.say(
            f"golden pass: {reference.num_answers} answers kept ({reference.kept_share:.0%}), mean {reference.mean_tokens:.0f} "
            f"and p99 {reference.p99_tokens:.0f} tokens, {reference.censored_share:.0%} cut{' (cached)' if golden.cached else ''}"
        )
        if reference.asked_cap_tokens > job.rollout.max_new_tokens:
            self.say(
                f"golden pass: rollout.max_new_tokens {job.rollout.max_new_tokens} hides the tail of the teacher's lengths, so a truncated "
                f"rollout counts as the tail; its own lengths ask for a cap of {reference.asked_cap_tokens}"
            )
        self.telemetry.use_reference(reference)
        sources.stream.mark(golden.finished, golden.answers, golden.refused, reference.model)
        await fleet.set_reference(reference.mean_tokens)
        async with contextlib.AsyncExitStack() as to_the_end:
            judges = JudgesOf(job.data.verifiers, to_the_end)
            if job.objective.reward is not None and job.objective.reward.when == "teacher_right":
                await self._find_where_the_teacher_is_right(golden, judges(job.objective.reward.verifier))
            self._loop = self._distillation(fleet, pool, golden, judges)
            await self._loop.run(self.resume)
        if self._terminated:
            raise TerminatedError("terminated: the run goes on from its checkpoint with --resume")

    async def _find_where_the_teacher_is_right(self, golden: GoldenSet, judges: Judges) -> None:
        stream = self.sources.stream
        right = await judge_teacher(judges, self.sources.decode, golden, lambda index: stream.at(index).answer)
        stream.teacher_right = right
        num_right, untried = sum(right.values()), len(stream) - len(right)
        said = f"golden pass: the teacher is right on {num_right} of the {len(right)} prompts it answered, the others are not distilled"
        self.say(said + (f"; {untried} more, not asked, are distilled (data.golden.num_prompts asks more)" if untried else ""))

    def _distillation(self, fleet: Fleet, pool: TeacherPool, golden: GoldenSet, judges: JudgesOf) -> Distillation:
        job, sources, journal = self.job, self.sources, self.journal
        reward = job.objective.reward
        sampler = conversations(job, sources, fleet, self._environments)
        return Distillation(
            job,
            self.store,
            TrainingData(
                sources.stream,
                sources.stream.golden(),
                golden.key,
                golden.reference.mean_tokens,
                sources.demonstrations,
                judge=partial(judge_rollouts, judges(reward.verifier), sources.decode)
                if reward and reward.verifier != BY_ENVIRONMENT
                else None,
                rewards=Rewards(reward, sources.stream.outcomes) if reward else None,
                reads=self.reads,
            ),
            Actors(fleet, pool, start_governor(job, self.store, self.service, journal), sampler),
            journal,
            Checkpoints(
                self.directory.checkpoints,
                fleet.learner,
                keep=job.checkpoint.keep,
                note=journal.note,
                mirror=self.mirror.push if self.mirror else None,
            ),
            HeldOut(sources, judges(job.data.eval.verifier), sampler) if sources.problems else None,
            lambda: self._finish(fleet),
        )

    async def _finish(self, fleet: Fleet) -> None:
        """The student, once all steps are taken. SIGTERM after the last step came too late to matter."""
        if self._terminated and self.journal.monitor.status()["step"] == self.job.learner.total_steps:
            self._terminated = False
        if not self._terminated:
            await fleet.learner.save_student(str(self.directory.final), model_card(self.job, self.directory))

    async def _end(self, fleet: Fleet | None) -> None:
        """No process of the run is left, and its report lies there."""
        self._ending = True
        if fleet is None:  # no room was found for any actor
            leave(descendants())
        else:
            await fleet.close()
            await asyncio.to_thread(fleet.stop)
        try:
            write_report(self.directory.path, ended=True)
        except OSError as error:
            self.say(f"no report: {error}; opd report {self.directory.path} writes it once there is room")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run with a checkpoint, the second at once."""
        main, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert main is not None

        def interrupt(number: signal.Signals) -> None:
            if self._ending:
                return
            if self._loop is None or self.journal.monitor.status()["phase"] == "stopping":
                main.cancel()
                return
            self.say(f"{number.name}: the run ends with a checkpoint (again: at once)")
            self._terminated = number == signal.SIGTERM
            self._loop.stop()

        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, interrupt, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def model_card(job: Job, directory: RunDirectory) -> str:
    """README.md of `final/`: what the student came from, and how it was trained."""
    teachers = ", ".join(t.model for t in job.teacher)
    library = "transformers" if job.student.lora is None else f"peft\nbase_model: {job.student.model}"
    header = f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [on-policy-distillation]\n---\n"
    return f"""{header}
# {job.name}

Distilled on-policy by OPD Governor on {time.strftime("%Y-%m-%d")}.

- student: `{job.student.model}`
- teacher: `{teachers}`
- objective: `{job.objective.loss}`, support `{job.objective.support}`
- steps: {job.learner.total_steps}, learning rate {job.learner.learning_rate:g}, seed {job.seed}
- governor: {job.governor.mode}

Metrics and decisions are in `{directory.metrics.name}` and `{directory.decisions.name}` of the run directory.
"""
