"""The actors of one run on a Ray cluster: start them, hand work to them, bring new weights over, end them.

Fleet.start --> rollout actors, teacher pools, learner, governor
learner.weights --one object--> every rollout actor --> probe held against the learner's
"""

import asyncio
import contextlib
import heapq
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import psutil
import ray

from actors.learner.actor import Learner, StepReport
from actors.learner.group import LearnerGroup
from actors.rollout.actor import RolloutActor
from actors.rollout.settings import RolloutSettings
from actors.trajectory import LengthLimits, Prompt, ScoredRollout, Trajectory
from services.job import Job, JobError
from services.placement import place

PROBE_TOKENS = 48
"""Length of the probe sequence: long enough to touch every weight, short enough to cost nothing."""
FLOAT32_TOLERANCE_NATS = 1e-2
"""Rounding in float32 stays a tenth of this on models of 30 layers; wrong weights differ by whole nats."""
BFLOAT16_TOLERANCE_NATS = 0.25
Role = Literal["rollout", "teacher", "learner"]
NAMESPACE = "opd"
"""Ray namespace of the runs' named actors; all others are anonymous and a run's own."""


@dataclass(frozen=True, slots=True)
class Models:
    """The job's models, resolved to folders or ids, and the stop event of student and teachers together."""

    student: str
    teachers: tuple[str, ...]
    stop_ids: tuple[int, ...]
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Sync:
    """One weight sync."""

    seconds: float = 0.0
    gap_nats: float = 0.0
    """Largest engine-learner difference on the probe."""
    tolerance_nats: float = 0.0


def connect(address: str | None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), else start a private one that ends with this process."""
    environment = {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}}
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False, "configure_logging": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, **options)
    else:
        # address="local": without it Ray attaches to whatever cluster it remembers on this machine.
        ray.init(address="local", include_dashboard=False, **options)


def role_resources(job: Job, role: Role) -> dict[str, float]:
    """The Ray resource that keeps an actor on its role's nodes: a share so small that their GPUs and memory set the limit, not it."""
    return {f"opd_{role}": 0.001} if job.cluster.pin_roles else {}


def require_roles(job: Job, offered: Collection[str]) -> None:
    """Raises JobError where roles are pinned and no node has one of them: its actor would wait for ever."""
    roles = [role for role in get_args(Role) if role != "teacher" or any(teacher.backend != "http" for teacher in job.teacher)]
    missing = [name for role in roles for name in role_resources(job, role) if name not in offered]
    if missing:
        raise JobError(
            f"cluster.pin_roles: no node of the cluster offers {', '.join(missing)}; "
            f"start one with `ray start --resources '{{\"{missing[0]}\": 1}}'`, or leave pin_roles off"
        )


def refuse_taken_name(run: str) -> None:
    """Raises JobError when a live run on this cluster has the name: its metrics and its job could not be told from this one's.

    Every run's learner is an actor of that name and ends with its run; creating it closes the gap that looking first leaves.
    """
    try:
        ray.get_actor(_learner_name(run), namespace=NAMESPACE)
    except ValueError:
        return
    raise JobError(f"name: {run!r} is taken by a live run on this cluster; give this run another name, or stop the other one")


def _learner_name(run: str) -> str:
    return f"{run}/learner"


class Fleet:
    """Rollout actors and learner of a run (teacher pool and governor have handles of their own)."""

    def __init__(self, job: Job, models: Models, probe: Sequence[int]) -> None:
        """`probe`: ids of ordinary text, PROBE_TOKENS or so, on which engine and learner are compared after each sync."""
        self._job, self._models, self._probe = job, models, list(probe)
        self._rollouts: list[Any] = []
        self._learner = LearnerGroup(())
        self._load_tokens: list[int] = []
        self._descendants: dict[int, float] = {}

    async def start(self) -> None:
        """Bring learner and engines up side by side; returns when all of them answer."""
        job, models = self._job, self._models
        gpu = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        cpus = job.cluster.cpus_per_actor

        def gpus(value: float | None) -> float:
            return gpu if value is None else value

        self._transfer = self._choose_transfer(bool(gpu))
        places = await place(
            "learner",
            job.learner.num_ranks,
            job.cluster.placement_learner,
            num_cpus=cpus,
            num_gpus=gpus(job.cluster.gpus_per_learner),
            resources=role_resources(job, "learner"),
        )
        places[0] = places[0] | {"name": _learner_name(job.name), "namespace": NAMESPACE}
        learner_type = ray.remote(Learner)
        self._learner = LearnerGroup(
            [
                learner_type.options(**options).remote(
                    models.student,
                    job.learner,
                    job.objective,
                    stop_ids=models.stop_ids,
                    max_new_tokens=job.rollout.max_new_tokens,
                    seed=job.seed,
                    with_reference=job.objective.reference_kl_weight > 0 or "reference_kl_weight" in job.governor.actuators,
                    teacher=models.teachers[0] if job.objective.support == "full" else None,
                    trust_remote_code=job.student.trust_remote_code,
                )
                for options in places
            ]
        )
        num_gpus = gpus(job.cluster.gpus_per_rollout) * job.rollout.tensor_parallel_size
        places = await place(
            "rollout",
            job.rollout.num_actors,
            job.cluster.placement_rollout,
            num_cpus=cpus,
            num_gpus=num_gpus,
            resources=role_resources(job, "rollout"),
        )
        rollout_type = ray.remote(RolloutActor)
        self._rollouts = [
            rollout_type.options(max_concurrency=10_000, **options).remote(
                models.student,
                job.rollout,
                stop_ids=models.stop_ids,
                reference_tokens=None,
                weight_transfer=self._transfer,
                seed=job.seed,
                top_k=job.objective.top_k if job.objective.support in ("student", "union") else 0,
            )
            for options in places
        ]
        self._load_tokens = [0] * len(self._rollouts)
        await asyncio.gather(self._learner.start(), *(actor.start.remote() for actor in self._rollouts))
        self._remember_processes()

    def _choose_transfer(self, has_gpus: bool) -> str:
        choice = self._job.cluster.weight_transfer
        if choice != "auto":
            return choice
        if not has_gpus:
            return "file"
        share = self._job.cluster.gpus_per_rollout
        return "ipc" if share is not None and 0 < share < 1 else "nccl"

    async def sync_weights(self, version: int) -> Sync:
        """Bring the learner's weights into every engine, requests kept in flight, and measure on the probe what arrived."""
        started = time.monotonic()
        if self._transfer == "file":
            weights = self._learner.weights(self._job.rollout.dtype)
            # The object store moves the weights once per node; each actor on it reads the same copy.
            await asyncio.gather(*(actor.load_weights.remote(weights, version) for actor in self._rollouts))
        else:
            await asyncio.gather(*(actor.announce_version.remote(version) for actor in self._rollouts))
            rollout = self._job.rollout
            await self._learner.send_weights(self._transfer, rollout.dtype, self._rollouts, rollout.tensor_parallel_size)
        seconds = time.monotonic() - started
        expected, *probes = await asyncio.gather(self.learner_probe(), *(actor.probe.remote(self._probe) for actor in self._rollouts))
        gap = max(float(np.abs(probe - expected).max()) for probe in probes)
        tolerance = self._job.cluster.probe_tolerance_nats or (FLOAT32_TOLERANCE_NATS if self._all_float32() else BFLOAT16_TOLERANCE_NATS)
        return Sync(seconds, gap, tolerance)

    def _all_float32(self) -> bool:
        return self._job.rollout.dtype == self._job.learner.dtype == "float32"

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """Sample a response for each (prompt, sample number), handed on in groups as they finish."""
        shares = self._share(requests, limits.cap_tokens)
        queue: asyncio.Queue[list[Trajectory] | BaseException | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._stream(index, share, limits, step, settings, greedy, queue)) for index, share in shares.items()]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _stream(
        self, index: int, share: list, limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool, queue: asyncio.Queue
    ) -> None:
        """One actor's share into the common queue; None at its end, an exception as it is."""
        budget = len(share) * limits.cap_tokens
        self._load_tokens[index] += budget
        try:
            method = self._rollouts[index].rollout.options(num_returns="streaming")
            async for reference in method.remote(share, limits, step, settings, greedy=greedy):
                await queue.put(await reference)
            await queue.put(None)
        except Exception as error:  # handed to the consumer, which raises it
            await queue.put(error)
        finally:
            self._load_tokens[index] -= budget

    def _share(self, requests: Sequence[tuple[Prompt, int]], cap_tokens: int) -> dict[int, list[tuple[Prompt, int]]]:
        """Requests to the least loaded actors; samples of one prompt stay together for the prefix cache."""
        groups: dict[tuple[int, int], list[tuple[Prompt, int]]] = {}
        for prompt, sample in requests:
            groups.setdefault((prompt.epoch, prompt.index), []).append((prompt, sample))
        loads = [(load, index) for index, load in enumerate(self._load_tokens)]
        heapq.heapify(loads)
        shares: dict[int, list[tuple[Prompt, int]]] = {}
        for group in groups.values():
            load, index = loads[0]
            heapq.heapreplace(loads, (load + len(group) * cap_tokens, index))
            shares.setdefault(index, []).extend(group)
        return shares

    async def set_reference(self, reference_tokens: float) -> None:
        """Tell the engines the reference length, which a stop ramp may start from."""
        await asyncio.gather(*(actor.set_reference.remote(reference_tokens) for actor in self._rollouts))

    async def learn(
        self,
        rollouts: Sequence[ScoredRollout],
        golden: Sequence[Prompt],
        limits: LengthLimits,
        reference_tokens: float,
        learning_rate: float,
    ) -> StepReport:
        """One optimiser step."""
        return await self._learner.step(rollouts, golden, limits, reference_tokens, learning_rate)

    async def learner_probe(self) -> np.ndarray:
        """The learner's log-probs on the probe sequence."""
        return await self._learner.probe(self._probe)

    async def save(self, folder: str) -> None:
        """Student and optimiser into a checkpoint's folder, which learner and driver share."""
        await self._learner.save(folder)

    async def save_student(self, folder: str, card: str) -> None:
        """The student alone, in Hugging Face layout."""
        await self._learner.save_student(folder, card)

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        """Bring the learner back to a checkpoint; returns the weight version in force."""
        return await self._learner.restore(folder, rollback=rollback)

    def _remember_processes(self) -> None:
        """Engines start processes of their own: what descends from this one is ours to end."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._descendants[process.pid] = process.create_time()

    def stop(self) -> None:
        """End every actor and, where it is private, the cluster; afterwards no process of the run is left."""
        self._remember_processes()
        if ray.is_initialized():
            self.end_actors()
            ray.shutdown()
        end_processes(self._descendants.items())

    def end_actors(self) -> None:
        """Engines first, so that they end their own processes."""
        with contextlib.suppress(Exception):  # an engine that is already gone has nothing to shut down
            ray.get([actor.shutdown.remote() for actor in self._rollouts], timeout=10)
        for actor in (*self._rollouts, *self._learner.ranks):
            ray.kill(actor)


def end_processes(processes: Iterable[tuple[int, float]], grace_s: float = 5.0) -> None:
    """End processes by (pid, create time), by force after `grace_s`; a reused pid is left alone."""
    alive = []
    for pid, created in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.terminate()
                alive.append(process)
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace_s)
