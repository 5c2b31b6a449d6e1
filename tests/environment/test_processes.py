"""Real processes of an environment: one is killed in the middle of conversations, another hangs, a third dies of what it is asked."""

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray

from opd_governor.actors.environment.handle import RayEnvironment
from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.environment.protocol import Failure, Reply
from opd_governor.actors.environment.settings import EnvironmentSettings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def private_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def pool_of(entry: str, said: list[str], timeout_s: float = 30.0) -> EnvironmentPool:
    settings = EnvironmentSettings(entry=f"tests.environment.worlds:{entry}", concurrency=1, timeout_s=timeout_s)
    return EnvironmentPool(settings, partial(RayEnvironment, settings), on_restart=said.append)


async def test_a_killed_process_loses_no_conversation() -> None:
    said: list[str] = []
    pool = pool_of("Countdown", said)
    message = {"role": "assistant", "content": "a"}
    tasks = [pool.open({"prompt": "q"}) for _ in range(2)]
    first = [await pool.answer(task, message) for task in tasks]
    handle: Any = tasks[0].seat.handle
    os.kill(await handle.actor.__ray_call__.remote(lambda actor: os.getpid()), signal.SIGKILL)
    rest = [[await pool.answer(task, message) for task in tasks] for _ in range(2)]
    assert [r.messages[0]["content"] for r in first if isinstance(r, Reply)] == ["1", "1"]
    assert [r.messages[0]["content"] for r in rest[0] if isinstance(r, Reply)] == ["0", "0"], "played again to the new process"
    assert rest[1] == [Reply((), 1.0, True)] * 2
    assert said == ["crash"]
    pool.end()


async def test_one_that_hangs_or_dies_costs_its_conversation_alone() -> None:
    said: list[str] = []
    pool = pool_of("Misbehaving", said, timeout_s=2.0)
    prompts = ["hangs", "fine", "dies", "raises", "fine"]
    found = await asyncio.gather(*(pool.answer(pool.open({"prompt": prompt}), {"role": "assistant", "content": ""}) for prompt in prompts))
    reasons = [answer.reason if isinstance(answer, Failure) else answer.reward for answer in found]
    assert reasons == ["timeout", 1.0, "died", "raised", 1.0]
    assert said == ["hang", "crash", "crash", "crash"]
    pool.end()
