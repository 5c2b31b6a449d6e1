"""What one trajectory costs the driver, and how many rollout actors one driver can feed.

    python tests/bench/driver_cost.py            # every measurement, figure and driver_cost.json beside this file (about 6 minutes)
    python tests/bench/driver_cost.py --smoke    # the same in small, seconds, nothing written

The loop is the service's own: Distillation, Fleet, collect, TeacherPool, record, Telemetry, RunMonitor, RunDirectory. Engines,
teachers, learner and governor are timed fakes: each engine decodes SLOTS sequences at once at TOKENS_PER_S each and hands finished
rollouts on as the real actor does. Three measurements:
    curve    10 to 1000 rollout actors against the clock, fakes in the driver's process: CPU per trajectory, throughput
    long     a million trajectories as fast as they go: CPU per trajectory and resident memory as the run gets long
    ray      fakes behind real Ray actors (a few processes that stand for many): what messages and serialisation add
Driver CPU is the process' own time, all threads, after one step of warm-up; in `curve` and `long` the fakes' share is in it.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import ray
from prometheus_client import generate_latest

sys.path.insert(0, str(Path(__file__).parents[2]))

from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.group import LearnerGroup
from opd_governor.actors.learner.metrics import POSITION_BUCKETS, BatchMetrics
from opd_governor.actors.rollout.actor import Deliveries, RayEngine, hand_on_s
from opd_governor.actors.teacher.actor import RayTeacher
from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.actors.wire import pack, rows_of, tabulate, unpack
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory, read_records
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.run.checkpoints import Checkpoints
from opd_governor.services.run.data import TrainingData
from opd_governor.services.run.distill import Actors, Distillation
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.terms import base_limits

SEED = 0
SLOTS, TOKENS_PER_S = 16, 128
"""One engine: sequences at once, and tokens a second of each."""
PROMPT_TOKENS, LEAST_TOKENS, MOST_TOKENS = 64, 64, 448
"""Response lengths are uniform between the last two."""
SCORED_TOKENS_PER_S = 20_000
ACTORS_PER_TEACHER = 10
"""Teachers are busy four fifths of the time, as one pays for no more of them than it needs."""
LEARN_S = 1.0
HERE = Path(__file__).parent
TEACHER = TeacherSettings(model="b")
ZEROS = np.zeros(MOST_TOKENS, np.float32)
RESPONSES = {length: tuple(range(length)) for length in range(LEAST_TOKENS, MOST_TOKENS + 1)}


class Engine:
    """A rollout actor whose engine only waits; with `pace` 0 it does not wait."""

    def __init__(self, index: int, pace: float, num_actors: int) -> None:
        self._random, self._pace, self._num_actors = random.Random(SEED + index), pace, num_actors
        self._free = asyncio.Lock()

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any, greedy: bool = False
    ) -> AsyncGenerator[list[Trajectory], None]:
        async with self._free:
            drawn = [(self._random.randint(LEAST_TOKENS, MOST_TOKENS), prompt, sample) for prompt, sample in requests]
            rows = sorted(drawn, key=lambda row: row[0])
            elapsed_s, group = 0.0, []
            for number, (length, prompt, sample) in enumerate(rows):
                finish = "length" if length > 0.98 * MOST_TOKENS else "stop"
                group.append(Trajectory(prompt, RESPONSES[length], ZEROS[:length], finish, limits.cap_tokens, step, step - 1, 0, sample))
                due_s = self._pace * length / TOKENS_PER_S
                if len(group) == 1:
                    closes_s = due_s + hand_on_s(self._num_actors)
                last = number + 1 == len(rows)
                if not last and self._pace * rows[number + 1][0] / TOKENS_PER_S < closes_s:
                    continue  # the next one finishes before these are handed on
                handed_s = due_s if last else closes_s
                await asyncio.sleep(max(0.0, handed_s - elapsed_s) if self._pace else 0.0)
                elapsed_s = handed_s
                yield group
                group = []

    async def start(self) -> None: ...

    async def load_weights(self, weights: Any, version: int, probe: Sequence[int]) -> np.ndarray:
        return ZEROS[: len(probe) - 1]


class Scorer:
    """A teacher actor that only waits."""

    def __init__(self, pace: float) -> None:
        self._pace = pace

    async def score(self, requests: Sequence[Any]) -> tuple[str, list[TokenScores]]:
        await asyncio.sleep(self._pace * sum(request.num_tokens for request in requests) / SCORED_TOKENS_PER_S)
        return "a process", [TokenScores(TEACHER.name, ZEROS[: len(r.token_ids)], ZEROS[: len(r.token_ids)]) for r in requests]

    async def ping(self) -> str:
        return "a process"


class Sink:
    """A learner that only waits."""

    def __init__(self, pace: float) -> None:
        self._pace, self._version = pace, 0

    async def step(self, rollouts: Sequence[Any], *terms: Any) -> StepReport:
        await asyncio.sleep(self._pace * LEARN_S)
        self._version += 1
        tokens_P = np.full(len(POSITION_BUCKETS), 100 * len(rollouts))
        stops_M = np.full(len(rollouts), -0.5, np.float32)
        metrics = BatchMetrics(0.1, tokens_P, tokens_P * 0.1, 0, 0, 1.0, 0.0, 1.0, 1.0, 0, 0.0, stops_M, stops_M)
        return StepReport(0.1, 1.0, 1e-5, False, self._version, metrics)

    async def weights(self, dtype: str, *, trained_only: bool = False) -> tuple[int, np.ndarray]:
        return self._version, np.zeros(0, np.uint8)

    async def probe(self, token_ids: Sequence[int], dtype: str, *, base: bool = False) -> np.ndarray:
        return ZEROS[: len(token_ids) - 1]

    async def snapshot(self) -> None: ...

    async def save(self, folder: str) -> None: ...


class Host:
    """One Ray process that plays many engines, teachers and the learner. The driver sees the streams and messages of all of them."""

    def __init__(self, pace: float, num_actors: int) -> None:
        self._num_actors, self._pace, self._scorer, self._sink = num_actors, pace, Scorer(pace), Sink(pace)
        self._engines: dict[int, tuple[Engine, Deliveries]] = {}

    async def rollout_packed(self, index: int, ticket: int, message: bytes | None) -> bytes | None:
        if index not in self._engines:
            self._engines[index] = Engine(index, self._pace, self._num_actors), Deliveries()
        engine, deliveries = self._engines[index]
        return await deliveries.fetch(engine.rollout, ticket, message)

    async def start(self) -> None: ...

    async def load_weights(self, weights: Any, version: int, probe: Sequence[int]) -> np.ndarray:
        return ZEROS[: len(probe) - 1]

    async def probe(self, token_ids: Sequence[int], dtype: str = "", *, base: bool = False) -> np.ndarray:
        return ZEROS[: len(token_ids) - 1]

    async def score_packed(self, message: bytes, followed: object = None) -> bytes:
        process, scores = await self._scorer.score(rows_of(unpack(message)))
        return pack((process, tabulate(scores)))

    async def step_packed(self, rollouts: bytes, *terms: Any) -> StepReport:
        return await self._sink.step(rows_of(unpack(rollouts)), *terms)

    async def weights(self, dtype: str, *, trained_only: bool = False) -> tuple[int, np.ndarray]:
        return await self._sink.weights(dtype)

    async def snapshot(self) -> None: ...

    async def save(self, folder: str) -> None: ...


class Handle:
    """An object in this process that is called like a Ray actor: `handle.method.remote(...)`; `.options(...)` is ignored."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        bound = SimpleNamespace(remote=getattr(self._target, name))
        bound.options = lambda **options: bound
        return bound


class LocalEngine(RayEngine):
    """An engine in this process, as the pool sees it."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(Handle(engine))
        self._engine = engine

    async def rollout(self, *terms: Any) -> AsyncIterator[list[Trajectory]]:
        *terms, greedy = terms
        async for group in self._engine.rollout(*terms, greedy=greedy):
            yield group


class LocalLearner(LearnerGroup):
    """Without an object store there is no reference to a batch or to weights."""

    async def step(self, rollouts: Sequence[Any], *terms: Any) -> StepReport:
        return await self.ranks[0].step.remote(rollouts, *terms)

    async def weights(self, dtype: str, *, trained_only: bool = False) -> tuple[int, Any]:
        return 0, None


class HostedEngine:
    """Engine `index` behind a host."""

    def __init__(self, host: Any, index: int) -> None:
        self.start, self.load_weights = host.start, host.load_weights
        self.rollout_packed = SimpleNamespace(remote=partial(host.rollout_packed.remote, index))
        self.drop = SimpleNamespace(remote=lambda ticket: None)  # a fake samples nothing that must be stopped


class QuietGovernor:
    """Holds all limits. It reads /metrics, so the driver pays for serving them."""

    def __init__(self, base: LengthLimits, telemetry: Telemetry) -> None:
        async def tick(step: int) -> tuple[Any, Record]:
            generate_latest(telemetry.registry)
            decision = SimpleNamespace(
                limits=base, after=SimpleNamespace(pressure=0.0), healthy=True, signals=SimpleNamespace(data_age_s=0.0), action="hold",
                signal="", mode="enforce", command=None, reason="", readings={}, news="",
            )  # fmt: skip
            return decision, {"step": step, "mode": "enforce", "pressure": 0.0, "signals": {}, "limits": {}}

        async def limits() -> LengthLimits:
            return base

        async def state() -> dict[str, Any]:
            return {}

        self.tick, self.limits, self.state = tick, limits, state


class Prompts:
    """An endless stream of equal prompts, each with its own number."""

    def __init__(self) -> None:
        self._position, self._ids = 0, tuple(range(PROMPT_TOKENS))

    def next(self, num: int, unfinished_quota: float) -> list[Prompt]:
        self._position += num
        return [Prompt(index, self._ids, text="x" * 4 * PROMPT_TOKENS) for index in range(self._position - num, self._position)]

    def state(self) -> dict[str, int]:
        return {"position": self._position}

    def restore(self, state: dict[str, int]) -> None:
        self._position = state["position"]


@dataclass(frozen=True)
class Point:
    """One measured run."""

    num_actors: int
    num_trajectories: int
    """After warm-up."""
    wall_s: float
    driver_cpu_s: float
    us_per_trajectory: float
    """Driver CPU."""
    trajectories_per_s: float
    ideal_per_s: float
    """What the engines would make with a driver that costs nothing; 0 where they do not wait."""
    resident_mib: list[float]
    """At the end of each step (of at most 64 of them)."""


def measure(
    num_actors: int, num_steps: int, *, pace: float, engines: Sequence[Any], scorers: Sequence[Any], learner: LearnerGroup, samples: int = 1
) -> Point:
    """Run the loop over these actors; `pace` 1 is real time, 0 as fast as possible."""
    job = Job.model_validate(
        {
            "name": "driver-cost",
            "student": {"model": "a"},
            "teacher": {"model": "b"},
            "data": {"prompts": {"path": "p"}},
            "rollout": {
                "prompts_per_step": SLOTS * num_actors // samples,
                "samples_per_prompt": samples,
                "max_new_tokens": 512,
                "max_staleness": 1,
                "num_actors": num_actors,
            },
            "learner": {"total_steps": num_steps},
            "checkpoint": {"every_steps": 10**6},
        }
    )
    process, marks = psutil.Process(), []

    async def nothing() -> None: ...

    def mark(record: Record) -> None:
        memory = process.memory_info()  # its own: the object store's pages that it has touched are the store's
        marks.append((time.monotonic(), time.process_time(), (memory.rss - memory.shared) / 2**20, record["num_rollouts"]))

    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder), resume=False)
        telemetry, monitor = Telemetry(job.name), RunMonitor(job.name, num_steps, base_limits(job))
        fleet = Fleet(job, Models("a", ("b",), (1,), 1024, (None,)), list(range(48)))
        fleet.engines._create = engines.__getitem__
        fleet.learner._group = learner
        pool = TeacherPool(
            [(TEACHER, list(scorers))],
            events=Events(on_request=lambda *request: journal.teacher_requests(*request)),
        )
        journal = Journal(
            directory, telemetry, monitor, samples_per_step=job.service.samples_per_step, decode=lambda ids: "x" * len(ids),
            on_step=mark, say=sys.exit,
        )  # fmt: skip
        loop = Distillation(
            job, ConfigStore(job, directory.config), TrainingData(Prompts(), [], "", 256.0),
            Actors(fleet, pool, QuietGovernor(base_limits(job), telemetry)), journal,
            Checkpoints(directory.checkpoints, fleet.learner, keep=job.checkpoint.keep, note=journal.note), None, nothing,
        )  # type: ignore[arg-type]  # fmt: skip

        async def run() -> None:
            await fleet.engines.start()
            await loop.run(False)

        asyncio.run(run())
        assert len(read_records(directory.metrics)) == num_steps
    (begun_s, cpu_begun_s, _, _), (ended_s, cpu_ended_s, _, _) = marks[0], marks[-1]
    number, cpu_s, wall_s = sum(mark[3] for mark in marks[1:]), cpu_ended_s - cpu_begun_s, ended_s - begun_s
    ideal_per_s = 0.0
    if pace:
        draw = random.Random(SEED)
        longest = [max(draw.randint(LEAST_TOKENS, MOST_TOKENS) for _ in range(SLOTS)) for _ in range(1000)]
        ideal_per_s = num_actors * SLOTS / (pace * float(np.mean(longest)) / TOKENS_PER_S)
    every = max(1, len(marks) // 64)
    resident = [round(mark[2], 1) for mark in marks[::every]]
    return Point(num_actors, number, wall_s, cpu_s, 1e6 * cpu_s / number, number / wall_s, ideal_per_s, resident)


def local(num_actors: int, num_steps: int, pace: float) -> Point:
    """Fakes in this process."""
    engines = [LocalEngine(Engine(index, pace, num_actors)) for index in range(num_actors)]
    scorers = [Scorer(pace) for _ in range(max(1, num_actors // ACTORS_PER_TEACHER))]
    return measure(num_actors, num_steps, pace=pace, engines=engines, scorers=scorers, learner=LocalLearner([Handle(Sink(pace))]))


def over_ray(num_actors: int, num_steps: int, pace: float, num_hosts: int = 2) -> Point:
    """Fakes behind Ray actors."""
    host_type = ray.remote(concurrency_groups={"disk": 1})(Host)
    hosts = [host_type.options(num_cpus=0, max_concurrency=10_000).remote(pace, num_actors) for _ in range(num_hosts)]
    try:
        engines = [RayEngine(HostedEngine(hosts[index % num_hosts], index)) for index in range(num_actors)]
        scorers = [RayTeacher(hosts[index % num_hosts]) for index in range(max(1, num_actors // ACTORS_PER_TEACHER))]
        return measure(num_actors, num_steps, pace=pace, engines=engines, scorers=scorers, learner=LearnerGroup(hosts[:1]))
    finally:
        for host in hosts:
            ray.kill(host)


def report(name: str, point: Point) -> dict[str, Any]:
    """One line on the terminal, and the point for the file."""
    linear = f", {point.trajectories_per_s / point.ideal_per_s:.0%} of {point.ideal_per_s:.0f}" if point.ideal_per_s else ""
    print(
        f"{name:>6} {point.num_actors:5d} actors {point.num_trajectories:8d} trajectories: {point.us_per_trajectory:6.0f} us of driver CPU "
        f"each, {point.trajectories_per_s:7.0f}/s{linear}, resident {point.resident_mib[0]:.0f} -> {point.resident_mib[-1]:.0f} MiB",
        flush=True,
    )
    return asdict(point)


def merge(kept: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of earlier measurements; those measured again are replaced."""
    points = {point["num_actors"]: point for point in [*kept, *new]}
    return [points[number] for number in sorted(points)]


def draw(results: dict[str, Any], path: Path) -> None:
    """CPU per trajectory, throughput and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (cost, speed, memory) = plt.subplots(1, 3, figsize=(15, 4.2))
    for name, marker in (("curve", "o"), ("ray", "s")):
        points = results.get(name) or []
        numbers = [point["num_actors"] for point in points]
        label = "loop alone" if name == "curve" else "with Ray's messages"
        cost.plot(numbers, [point["us_per_trajectory"] for point in points], marker=marker, label=label)
        speed.plot(numbers, [point["trajectories_per_s"] for point in points], marker=marker, label=label)
    numbers = [point["num_actors"] for point in results["curve"]]
    speed.plot(numbers, [point["ideal_per_s"] for point in results["curve"]], "k--", label="engines alone")
    cost.axhline(200, color="grey", linestyle=":", label="target")
    cost.set(xscale="log", ylim=(0, None), xlabel="rollout actors", ylabel="driver CPU per trajectory, us")
    speed.set(xscale="log", yscale="log", xlabel="rollout actors", ylabel="trajectories per second")
    long = results["long"]
    memory.plot(np.linspace(0, long["num_trajectories"], len(long["resident_mib"])), long["resident_mib"])
    memory.set(ylim=(0, None), xlabel="trajectories", ylabel="driver resident memory, MiB")
    for axes in (cost, speed):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def start_ray() -> None:
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, runtime_env=environment, num_cpus=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small and quick; writes nothing")
    parser.add_argument("--only", choices=("curve", "long", "ray"), nargs="*", default=("curve", "long", "ray"))
    parser.add_argument("--actors", type=int, nargs="*", default=(10, 30, 100, 300, 500, 700, 1000), help="points of curve and ray")
    parser.add_argument("--trajectories", type=int, default=10**6, help="length of the long run")
    parser.add_argument("--profile", action="store_true", help="print where the driver's time of a short run goes")
    arguments = parser.parse_args()
    if arguments.profile:
        profile(lambda: report("long", local(100, 8, 0.0)))
        return
    numbers = (10, 30) if arguments.smoke else arguments.actors
    path = HERE / "driver_cost.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if "curve" in arguments.only:
        pace, steps = (0.02, 3) if arguments.smoke else (1.0, 6)
        results["curve"] = merge(results.get("curve", []), [report("curve", local(number, steps, pace)) for number in numbers])
    if "ray" in arguments.only:
        start_ray()
        pace, steps = (0.1, 3) if arguments.smoke else (1.0, 6)
        points = [report("ray", over_ray(number, steps, pace)) for number in numbers[: 1 if arguments.smoke else None]]
        results["ray"] = merge(results.get("ray", []), points)
        ray.shutdown()
    if "long" in arguments.only:
        results["long"] = report(
            "long", local(10, 20, 0.0) if arguments.smoke else local(100, 2 + arguments.trajectories // (100 * SLOTS), 0.0)
        )
    results["setting"] = {
        "slots": SLOTS, "tokens_per_s": TOKENS_PER_S, "response_tokens": [LEAST_TOKENS, MOST_TOKENS], "prompt_tokens": PROMPT_TOKENS,
        "learn_s": LEARN_S, "seed": SEED,
    }  # fmt: skip
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "ray": ray.__version__}
    if not arguments.smoke:
        path.write_text(json.dumps(results, indent=1) + "\n")
        if {"curve", "long"} <= results.keys():
            draw(results, HERE / "driver_cost.png")


def profile(run: Callable[[], Any]) -> None:
    import cProfile
    import pstats

    with cProfile.Profile() as profiler:
        run()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


if __name__ == "__main__":
    main()
