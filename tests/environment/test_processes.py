"""An environment's real processes: killed, hanging, raising."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray

from opd_governor.actors.environment.handle import RayEnvironment
from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.environment.protocol import Failure, Reply
from opd_governor.actors.environment.settings import EnvironmentSettings
from tests.environment import worlds

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", autouse=True)
def private_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def pool_of(entry: str, lost: list[str], timeout_s: float = 30.0) -> EnvironmentPool:
    settings = EnvironmentSettings(entry=f"{worlds.__file__}:{entry}", concurrency=1, timeout_s=timeout_s)
    return EnvironmentPool(settings, partial(RayEnvironment, settings), on_restart=lost.append)


async def test_a_killed_process_loses_no_conversation_and_doubles_none() -> None:
    lost: list[str] = []
    pool, message = pool_of("Countdown", lost), {"role": "assistant", "content": "a"}
    tasks = [pool.open({"prompt": "q"}) for _ in range(2)]
    first = [await pool.answer(task, message) for task in tasks]
    handle: Any = tasks[0].seat.handle
    ray.kill(handle.actor)
    rest = [[await pool.answer(task, message) for task in tasks] for _ in range(2)]
    assert [r.messages[0]["content"] for r in first if isinstance(r, Reply)] == ["1", "1"]
    assert [r.messages[0]["content"] for r in rest[0] if isinstance(r, Reply)] == ["0", "0"], "played again to the new process"
    assert rest[1] == [Reply((), 1.0, True)] * 2
    assert lost == ["crash"]
    pool.end()


async def test_one_that_hangs_dies_or_raises_costs_its_conversation_alone() -> None:
    lost: list[str] = []
    pool = pool_of("Misbehaving", lost, timeout_s=5.0)
    prompts = ["hangs", "fine", "dies", "raises", "fine"]
    found = await asyncio.gather(*(pool.answer(pool.open({"prompt": each}), {"role": "assistant", "content": ""}) for each in prompts))
    assert [answer.reason if isinstance(answer, Failure) else answer.reward for answer in found] == ["timeout", 1.0, "died", "raised", 1.0]
    assert lost == ["hang", "crash", "crash", "crash"]
    pool.end()
