"""The Ray cluster a run is on: join it, what it must offer, the run's name there, processes ended for good."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import psutil
import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from opd_governor.actors import extensions
from opd_governor.actors.deadlines import HungError
from opd_governor.services.job.settings import Job, JobError

LOST = (RayActorError, NodeDiedError, WorkerCrashedError, ObjectLostError, HungError)
"""What a call to an actor raises when the actor, or the node it ran on, is gone or silent."""
NAME_FREE_S = 30.0
"""A dead actor's name is free within seconds."""
Role = Literal["rollout", "teacher", "learner"]
NAMESPACE = "opd"
"""Ray namespace of the runs' named actors; all others are anonymous and a run's own."""

ACTOR_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Huge pages for large tensors on CPUs: a loss over a vocabulary of 49,000 spends a fifth of its time on page faults without.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""What every actor starts with, unless the run's own environment says otherwise."""


def connect(address: str | None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), else start a private one that ends with this process."""
    variables = ACTOR_ENVIRONMENT | {extensions.VARIABLE: ""}
    environment = {"env_vars": {name: os.environ.get(name, value) for name, value in variables.items()}}
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False, "configure_logging": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, **options)
    else:
        with _interrupted_later():
            # address="local": without it Ray attaches to whatever cluster it remembers on this machine.
            ray.init(address="local", include_dashboard=False, **options)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Interrupted while it starts, Ray loses sight of the processes that it has started by then."""
    interrupts: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for number in interrupts:
            signal.raise_signal(number)


def descendants() -> dict[int, float]:
    """Process id -> create time of every process that this one has started, directly or not."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = process.create_time()
    return found


def leave(started: Mapping[int, float]) -> None:
    """Leave the cluster and end a private one. `started`: processes of the run (see `descendants`); those still alive end too: Ray's
    agents outlive a raylet that is killed by a minute."""
    ray.shutdown()
    end_processes(started.items())


def role_resources(job: Job, role: Role) -> dict[str, float]:
    """The Ray resource that keeps an actor on its role's nodes: a share so small that their GPUs and memory set the limit, not it."""
    return {f"opd_{role}": 0.001} if job.cluster.pin_roles else {}


def require_roles(job: Job, offered: Collection[str]) -> None:
    """Raises JobError where roles are pinned and no node has one of them: its actor would wait for ever."""
    roles = [role for role in get_args(Role) if role != "teacher" or any(teacher.means.local for teacher in job.teacher)]
    missing = [name for role in roles for name in role_resources(job, role) if name not in offered]
    if missing:
        raise JobError(
            f"cluster.pin_roles: no node of the cluster offers {', '.join(missing)}; "
            f"start one with `ray start --resources '{{\"{missing[0]}\": 1}}'`, or leave pin_roles off"
        )


async def refuse_taken_name(run: str, *, resume: bool) -> None:
    """Raises JobError when a live run on this cluster has the name: its metrics and its job could not be told from this one's.

    Every run's learner is an actor of that name and ends with its run; creating it closes the gap that looking first leaves.
    A run that is resumed waits a while: it may itself be the one that died a moment ago.
    """
    deadline = time.monotonic() + (NAME_FREE_S if resume else 0.0)
    while True:
        try:
            ray.get_actor(learner_name(run), namespace=NAMESPACE)
        except ValueError:
            return
        if time.monotonic() >= deadline:
            break
        await asyncio.sleep(0.5)
    raise JobError(f"name: {run!r} is taken by a live run on this cluster; give this run another name, or stop the other one")


def learner_name(run: str) -> str:
    return f"{run}/learner"


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
