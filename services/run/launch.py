"""From a job to a finished run: resolve, check, bring the actors up, hand over to the main loop, write what remains, end everything.

job --> models, prompts, run directory, HTTP --> Ray --> teachers --> golden pass --+
                                                  +----> engines, learner ----------+--> Distillation.run --> final/, report
"""

import asyncio
import contextlib
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.sources import MetricsSource, OwnMetrics, PrometheusServer
from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.teacher.actor import start_teacher
from opd_governor.actors.teacher.pool import Support, TeacherPool
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, bind, load_or_create_token
from opd_governor.services.inputs.golden import GoldenSet, choose_prompts, collect_golden, golden_key
from opd_governor.services.inputs.models import context_tokens, resolve_model, stop_event_ids, tokenizer_of, weights_identity
from opd_governor.services.inputs.prompts import load_problems, open_prompts
from opd_governor.services.inputs.prune import resolve_student
from opd_governor.services.inputs.verifiers import Evaluation, Response, load_verifier, summarise
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.mirror import Mirror
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import ADDRESS, Record, RunDirectory
from opd_governor.services.record.steps import Source, nonfinite_record
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.record.trackers import Trackers
from opd_governor.services.remote.jobs import announced
from opd_governor.services.report.report import write_report
from opd_governor.services.run.cluster import connect, refuse_taken_name, require_roles, role_resources
from opd_governor.services.run.distill import Distillation, base_limits
from opd_governor.services.run.fleet import PROBE_TOKENS, Fleet, Models
from opd_governor.services.run.keeper import GovernorKeeper
from opd_governor.services.run.placement import place

Say = Callable[[str], None]

MAX_NONFINITE = 200
"""Samples kept per process of a run: enough to find the cause, and no full disk where every sample is spoiled."""
SERVING_S = 1.0
"""How often the run looks whether its HTTP thread lives."""


class TerminatedError(RuntimeError):
    """SIGTERM came before the last step: what there is lies in a checkpoint. Exit code 143, so that whoever restarts runs does."""


class Run:
    """Everything of one run that outlives a step; `execute` is the run."""

    def __init__(self, job: Job, out: Path, *, resume: bool, say: Say, on_step: Callable[[Record], None]) -> None:
        """Reads models, prompts and problems and opens the run directory and the port: every mistake in them ends here.

        Raises JobError (DataError, ServiceError) before any actor starts.
        """
        self.job, self._resume, self._say, self._on_step = job, resume, say, on_step
        self.models, self.tokenizer = resolve_models(job)
        self.stream = open_prompts(job, self.tokenizer, self.models.context_tokens)
        self.problems: list[Prompt] = []
        if job.data.eval.path:
            self.problems = load_problems(job.data.eval, job.data.prompts, self.tokenizer)
            self.verify = load_verifier(job.data.eval.verifier)
        self.directory = RunDirectory(out, resume=resume)
        self._mirror = Mirror(job.checkpoint.copy_to, self.directory) if job.checkpoint.copy_to else None
        if self._mirror and resume:
            for line in self._mirror.fetch():
                say(line)
        self._trackers = Trackers(job, out, say)
        self._token = load_or_create_token(out)
        self._listener = bind(job.service.host, job.service.port, self._token)
        self.directory.write_job(job)
        self.store = ConfigStore(job, self.directory.config)
        self.telemetry = Telemetry(job.name, job.rollout.max_new_tokens)
        self.monitor = RunMonitor(job.name, job.learner.total_steps, base_limits(job))
        app = create_app(self.monitor, self.store, self.telemetry.registry, self._token, protect_metrics=job.service.protect_metrics)
        self.server = ControlServer(app, self._listener)
        self.monitor.update(links={"page": self.server.url, "metrics": f"{self.server.url}/metrics"})
        self._loop: Distillation | None = None
        self._ending = self._terminated = False
        self._num_nonfinite = 0

    async def execute(self) -> None:
        """The whole run, and the end of every process of it, however it ends."""
        self.server.start()
        self._say(f"run {self.job.name}: {self.server.url} (token in {self.directory.path / 'token'})")
        fleet = Fleet(self.job, self.models, self._probe(), on_restart=self._count_restart, say=self._note)
        pool, serving = None, asyncio.create_task(self._keep_serving())
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._address_files())
                stack.enter_context(self._trackers)
                connect(self.job.cluster.address)
                # After Ray's own handlers, so that these hold; they stay until everything is ended.
                stack.enter_context(self._signals())
                await refuse_taken_name(self.job.name, resume=self._resume)
                require_roles(self.job, ray.cluster_resources())
                async with announced(self.job.name, self.server.url, self._token, self.directory.path):
                    pool = await self._start_teachers()
                    _, golden = await asyncio.gather(fleet.start(), self._golden_after(pool))
                    await self._train(fleet, pool, golden)
                    self.monitor.enter("finished")
            except BaseException as error:
                if not isinstance(error, TerminatedError):
                    self.monitor.enter("failed")
                raise
            finally:
                self._ending = True
                serving.cancel()
                if pool is not None:
                    await pool.close()
                await fleet.close()
                await asyncio.to_thread(fleet.stop)
                try:
                    write_report(self.directory.path, ended=True)
                except OSError as error:
                    self._say(f"no report: {error}; opd report {self.directory.path} writes it once there is room")
                self.server.stop()

    async def _golden_after(self, pool: TeacherPool) -> GoldenSet:
        await pool.start()
        return await self._write_golden(pool)

    async def _train(self, fleet: Fleet, pool: TeacherPool, golden: GoldenSet) -> None:
        reference = golden.reference
        self._say(
            f"golden pass: {reference.num_answers} answers kept ({reference.kept_share:.0%}), mean {reference.mean_tokens:.0f} "
            f"and p99 {reference.p99_tokens:.0f} tokens{' (cached)' if golden.cached else ''}"
        )
        for stat, value in (("mean", reference.mean_tokens), ("p99", reference.p99_tokens)):
            self.telemetry.set("opd_length_reference_tokens", value, stat=stat)
        self.stream.mark(golden.finished, golden.answers)
        await fleet.set_reference(reference.mean_tokens)
        self._loop = Distillation(
            self.job,
            stream=self.stream,
            golden=[prompt for prompt in self.stream.prompts() if prompt.golden_ids],
            golden_key=golden.key,
            reference_tokens=reference.mean_tokens,
            fleet=fleet,
            pool=pool,
            governor=self._start_governor(),
            directory=self.directory,
            store=self.store,
            telemetry=self.telemetry,
            monitor=self.monitor,
            evaluate=self._evaluator(fleet) if self.problems else None,
            decode=self._decode,
            on_step=self._record_step,
            on_warning=self._note,
            on_restart=self._count_restart,
            on_nonfinite=self._keep_nonfinite,
            finish=lambda: self._finish(fleet),
            mirror=self._mirror.push if self._mirror else None,
        )
        await self._loop.run(self._resume)
        if self._terminated:
            raise TerminatedError("terminated: the run goes on from its checkpoint with --resume")

    async def _finish(self, fleet: Fleet) -> None:
        if self._terminated and self.monitor.status()["step"] == self.job.learner.total_steps:
            self._terminated = False  # it came too late to matter
        if not self._terminated:
            await fleet.save_student(str(self.directory.final), model_card(self.job, self.directory))

    def _note(self, text: str) -> None:
        """A line about the run, for whoever watches: terminal, events.jsonl, live page."""
        self._say(text)
        event = {"time": time.time(), "step": self.monitor.status()["step"], "text": text}
        self.directory.append(self.directory.events, event)
        self.monitor.add_event(event)

    def _count_restart(self, role: str, reason: str) -> None:
        self.telemetry.inc("opd_actor_restarts_total", role=role)
        self._note(f"restarted: {role} ({reason})")

    def _keep_nonfinite(self, source: Source, trajectory: Trajectory, scores: TokenScores | None) -> None:
        self.telemetry.inc("opd_nonfinite_samples_total", source=source)
        if self._num_nonfinite < MAX_NONFINITE:
            self._num_nonfinite += 1
            self.directory.append(self.directory.nonfinite, nonfinite_record(source, trajectory, scores))
        if self._num_nonfinite == 1:
            self._note(f"step {trajectory.step}: a sample with a number that is none ({source}); see {self.directory.nonfinite}")

    async def _keep_serving(self) -> None:
        """HTTP is a thread of this process; should it end, another one takes over its socket."""
        while True:
            await asyncio.sleep(SERVING_S)
            if not self.server.alive:
                self.server.start()
                self._count_restart("service", "crash")

    def _record_step(self, record: Record) -> None:
        self._trackers.log(record)
        self._on_step(record)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the run with a checkpoint, the second at once."""
        main, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert main is not None

        def interrupt(number: signal.Signals) -> None:
            if self._ending:
                return
            if self._loop is None or self.monitor.status()["phase"] == "stopping":
                main.cancel()
                return
            self._say(f"{number.name}: the run ends with a checkpoint (again: at once)")
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

    # ---- the parts

    def _probe(self) -> list[int]:
        """Ordinary text for the weight probe: the first prompts, one after the other."""
        ids = itertools.chain.from_iterable(prompt.token_ids for prompt in itertools.cycle(self.stream.prompts()))
        return list(itertools.islice(ids, min(PROBE_TOKENS, self.models.context_tokens - 1)))

    async def _start_teachers(self) -> TeacherPool:
        """A pool per teacher; teachers with equal weights and back end share their actors."""
        gpu = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        share = self.job.cluster.gpus_per_teacher
        handles: dict[Any, Any] = {}
        teachers = []
        for settings, model in zip(self.job.teacher, self.models.teachers, strict=True):
            settings = settings.model_copy(update={"model": model})
            same = (weights_identity(model), settings.backend, settings.dtype) if settings.means.local else (settings.url, model)
            if same not in handles:
                cluster, cpus = self.job.cluster, self.job.cluster.cpus_per_actor
                gpus = 0.0 if not settings.means.local else gpu if share is None else share
                num_gpus = gpus * settings.tensor_parallel_size
                own = role_resources(self.job, "teacher") if settings.means.local else {}
                places = await place(
                    "teacher", settings.num_actors, cluster.placement_teacher, num_cpus=cpus, num_gpus=num_gpus, resources=own
                )
                handles[same] = start_teacher(settings, self.models.stop_ids, self.job.seed, places)
            teachers.append((settings, handles[same]))
        needs = self.job.objective.needs
        return TeacherPool(
            teachers,
            support=Support(student=needs.student_top_k > 0, top_k=needs.teacher_top_k, rest=needs.rest, hidden=needs.hidden),
            domains={prompt.domain for prompt in self.stream.prompts()},
            on_request=self._count_requests,
            on_restart=lambda teacher, reason: self._count_restart("teacher", reason),
            on_nonfinite=lambda trajectory, scores: self._keep_nonfinite("teacher", trajectory, scores),
            floor_s=self.job.cluster.deadline_floor_s,
            say=self._note,
            alone=self.job.repeatable,
        )

    def _count_requests(self, teacher: str, result: str, seconds: float, num: int) -> None:
        self.telemetry.inc("opd_teacher_requests_total", num, teacher=teacher, result=result)
        self.telemetry.observe("opd_teacher_request_seconds", *[seconds] * num, teacher=teacher)

    def _start_governor(self) -> GovernorKeeper:
        """On the driver's own node: it reads the run's /metrics over loopback."""
        source: MetricsSource
        if self.job.service.prometheus_url:
            source = PrometheusServer(self.job.service.prometheus_url, self.job.name)
        else:
            token = self._token if self.job.service.protect_metrics else None
            source = OwnMetrics(f"{self.server.url}/metrics", self.job.name, token)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Governor).options(num_cpus=0, scheduling_strategy=here)
        generation, tunables = self.store.in_force()
        job = tunables.apply(self.job)
        return GovernorKeeper(
            lambda policy, base, generation: actor.remote(source, policy, base, generation),
            job.governor,
            base_limits(job),
            generation,
            floor_s=self.job.cluster.deadline_floor_s,
            on_restart=lambda reason: self._count_restart("governor", reason),
            say=self._note,
        )

    async def _write_golden(self, pool: TeacherPool) -> GoldenSet:
        settings = self.job.data.golden
        prompts = choose_prompts(self.stream, settings, self.job.seed)
        teachers = {
            t.name: [weights_identity(model), t.beams, t.length_penalty, t.no_repeat_ngram, t.domains]
            for t, model in zip(self.job.teacher, self.models.teachers, strict=True)
        }
        max_new_tokens = settings.max_new_tokens or self.job.rollout.max_new_tokens
        rollout = self.job.rollout
        loops = [rollout.loop_min_repeats, rollout.loop_min_tokens]
        terms = {"teachers": teachers, "stop_ids": self.models.stop_ids, "loops": loops}
        key = golden_key(prompts, settings.model_copy(update={"max_new_tokens": max_new_tokens}), terms, self.job.seed)
        folder = Path(settings.cache_dir) if settings.cache_dir else self.directory.path.parent / "golden"

        async def generate(asked: Sequence[Prompt]) -> Sequence[tuple[int, ...] | None]:
            self._say(f"golden pass: {len(asked)} prompts to the teacher")
            return await pool.golden(asked, max_new_tokens=max_new_tokens, temperature=settings.temperature, seed=self.job.seed)

        def loop_in(token_ids: Sequence[int]) -> object | None:
            return find_loop(token_ids[:-1], min_repeats=rollout.loop_min_repeats, min_tokens=rollout.loop_min_tokens)

        return await collect_golden(prompts, settings, generate, self.models.stop_ids, loop_in, folder / f"{key}.parquet")

    def _evaluator(self, fleet: Fleet) -> Callable[[LengthLimits, int], Any]:
        async def evaluate(limits: LengthLimits, step: int) -> dict[str, Evaluation]:
            """Held-out problems, greedy and (unless turned off) sampled, at the cap people allow whatever the governor's."""
            settings = self.job.rollout
            decodings = {"greedy": True} | ({"sampled": False} if self.job.data.eval.sampled else {})
            names, runs = list(decodings), [self._answer(fleet, limits, step, settings, greedy) for greedy in decodings.values()]
            return {name: summarise(responses, self.verify) for name, responses in zip(names, await asyncio.gather(*runs), strict=True)}

        return evaluate

    async def _answer(self, fleet: Fleet, limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool) -> list[Response]:
        requests = [(problem, 0) for problem in self.problems]
        return [
            Response(self._decode(t.token_ids), t.prompt.answer or "", len(t.token_ids), t.truncated)
            async for group in fleet.rollout(requests, limits, step, settings, greedy=greedy)
            for t in group
        ]

    def _decode(self, token_ids: Sequence[int]) -> str:
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.models.stop_ids else token_ids
        return str(self.tokenizer.decode(ids))

    @contextlib.contextmanager
    def _address_files(self) -> Iterator[None]:
        """The service's address in the run directory, and in Prometheus' file discovery where asked; withdrawn at the end."""
        written = {self.directory.path / ADDRESS: self.server.url + "\n"}
        if folder := self.job.service.file_sd_dir:
            targets = [{"targets": [self.server.url.removeprefix("http://")], "labels": {"run": self.job.name}}]
            written[Path(folder) / f"opd-{self.job.name}.json"] = json.dumps(targets)
        for path, text in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            scratch.write_text(text)
            scratch.replace(path)
        try:
            yield
        finally:
            for path in written:
                path.unlink(missing_ok=True)


def resolve_models(job: Job) -> tuple[Models, Any]:
    """Folders or ids of the models, their stop event and common window; and the student's tokenizer. Raises JobError."""
    student = resolve_student(job.student.model, job.data.prompts)
    teachers = tuple(resolve_model(t.model) if t.means.local else t.model for t in job.teacher)
    tokenizer = tokenizer_of(job.student.tokenizer or student, job.student.trust_remote_code)
    stop_ids = job.rollout.stop_token_ids
    local = [student, *(m for m, t in zip(teachers, job.teacher, strict=True) if t.means.local)]
    if stop_ids is None:
        found = [stop_event_ids(model, tokenizer_of(model)) for model in local]
        stop_ids = tuple(sorted({stop_id for ids in found for stop_id in ids}))
    window = min(context_tokens(model) for model in local)
    if job.rollout.max_model_len:
        window = min(window, job.rollout.max_model_len)
    return Models(student, teachers, stop_ids, window), tokenizer


def model_card(job: Job, directory: RunDirectory) -> str:
    """README.md of `final/`: what the student came from, and how it did."""
    teachers = ", ".join(t.model for t in job.teacher)
    header = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [on-policy-distillation]\n---\n"
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
