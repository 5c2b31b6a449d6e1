"""The pool of engines over fakes: they have the methods of RayEngine and a script of how they die."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.deadlines import ActorLostError, CallerError
from opd_governor.actors.rollout.pool import MAX_FAILURES, MAX_ISSUES, RolloutPool
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory

LIMITS = LengthLimits(cap_tokens=8)
SETTINGS = RolloutSettings()
REQUESTS = [(Prompt(index, (1, 2)), sample) for index in range(4) for sample in range(2)]


class FakeEngine:
    """Answers one request after the other. `dies_after`: with this many answered it raises; `stops_after`: it says nothing more."""

    def __init__(self, dies_after: int | None = None, stops_after: int | None = None, weights: int = 0) -> None:
        self.dies_after, self.stops_after, self.weights = dies_after, stops_after, weights
        self.asked: list[Request] = []
        self.num_answered, self.ended, self.cancelled = 0, False, False
        self.poison: set[int] = set()

    async def start(self) -> None: ...

    async def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool
    ) -> AsyncIterator[list[Trajectory]]:
        self.asked += requests
        try:
            for prompt, sample in sorted(requests, key=lambda request: request[0].index in self.poison):
                await asyncio.sleep(0.001)
                if self.ended or self.num_answered == self.dies_after or prompt.index in self.poison:
                    raise ConnectionError("the process is gone")
                if self.num_answered == self.stops_after:
                    await asyncio.sleep(60)
                self.num_answered += 1
                yield [answer(prompt, sample, step, self.weights)]
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def end(self) -> None:
        self.ended = True


def answer(prompt: Prompt, sample: int, step: int, version: int) -> Trajectory:
    return Trajectory(prompt, (7, 1), np.zeros(2, np.float32), "stop", 8, step, version, 0, sample)


class Pool:
    """A RolloutPool over these engines in turn; later ones are healthy. Replacements are given weights 5."""

    def __init__(self, *first: FakeEngine, num: int = 1, equip: Callable[[FakeEngine], Any] | None = None, **options: Any) -> None:
        self.engines: list[FakeEngine] = []
        self.restarts: list[str] = []
        self.lines: list[str] = []
        script = iter(first)

        def create(index: int) -> FakeEngine:
            self.engines.append(next(script, None) or FakeEngine())
            return self.engines[-1]

        async def give_weights(engine: FakeEngine) -> None:
            engine.weights = 5

        self.pool = RolloutPool(
            num, create, equip or give_weights, on_restart=self.restarts.append, say=self.lines.append, **{"floor_s": 0.2} | options
        )

    async def run(self, requests: Sequence[Request] = REQUESTS) -> list[Trajectory]:
        found = [t async for group in self.pool.rollout(requests, LIMITS, 1, SETTINGS) for t in group]
        assert Counter((t.prompt.index, t.sample) for t in found) == Counter((p.index, s) for p, s in requests)
        return found


async def _measured(pool: RolloutPool) -> None:
    """Some work done before, so that deadlines stand at the floor."""
    for slot in pool._slots:
        slot.pace.observe(1000, 0.001)


@pytest.mark.parametrize("answered", range(len(REQUESTS)))
async def test_an_engine_that_dies_is_replaced_and_every_request_is_answered_once(answered: int) -> None:
    run = Pool(FakeEngine(dies_after=answered))
    await run.pool.start()
    found = await run.run()
    assert run.engines[1].asked == REQUESTS[answered:]
    assert [t.weight_version for t in found] == [0] * answered + [5] * (len(REQUESTS) - answered)
    assert run.restarts == ["crash"]
    assert run.engines[0].ended
    assert f"{len(REQUESTS) - answered} of {len(REQUESTS)} rollouts of step 1 from rollout actor 0, which are issued again" in run.lines[0]


async def test_what_one_engine_leaves_goes_to_the_others_at_once() -> None:
    run = Pool(FakeEngine(), FakeEngine(dies_after=1), num=2, equip=lambda engine: asyncio.sleep(60))
    await run.pool.start()
    async with asyncio.timeout(5):
        await run.run()
    assert len(run.engines[0].asked) == 7
    assert len(run.engines[1].asked) == 4
    await run.pool.close()


async def test_an_engine_that_falls_silent_is_found_named_and_replaced() -> None:
    run = Pool(FakeEngine(stops_after=3), floor_s=1.0)
    await run.pool.start()
    await _measured(run.pool)
    async with asyncio.timeout(30):
        await run.run()
    assert run.restarts == ["hang"]
    assert "5 of 8 rollouts of step 1 from rollout actor 0; given up at 1.0 s" in run.lines[0]
    assert "lost (hang)" in run.lines[1]
    assert "deadline 1.0 s" in run.lines[1]


async def test_a_slow_engine_keeps_its_time_as_long_as_its_work_was_slow_before() -> None:
    run = Pool(FakeEngine(), floor_s=0.001)
    await run.pool.start()
    for _ in range(3):
        await run.run()
    assert run.restarts == []


async def test_two_launches_on_an_engine_that_dies_share_one_replacement() -> None:
    run = Pool(FakeEngine(dies_after=5))
    await run.pool.start()
    others = [(Prompt(index, (1, 2)), 0) for index in range(10, 14)]
    await asyncio.gather(run.run(), run.run(others))
    assert run.restarts == ["crash"]
    assert len(run.engines) == 2


async def test_a_mistake_of_the_caller_is_raised_and_costs_no_engine() -> None:
    run = Pool()
    await run.pool.start()

    async def refuse(*_: Any) -> AsyncIterator[list[Trajectory]]:
        raise CallerError("prompt too long")
        yield []

    run.engines[0].rollout = refuse  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="too long"):
        await run.run()
    assert run.restarts == []


async def test_a_request_that_kills_every_engine_ends_as_an_error_and_the_others_are_answered() -> None:
    engines = [FakeEngine() for _ in range(6)]
    for engine in engines:
        engine.poison = {2}
    run = Pool(*engines)
    await run.pool.start()
    found = await run.run()
    assert [t.prompt.index for t in found if t.finish_reason == "error"] == [2, 2]
    assert len(run.restarts) == MAX_ISSUES  # the first one answered the six others; the last one to die is still being replaced
    await run.pool.close()


async def test_an_engine_that_never_finishes_anything_is_given_up_with_its_error() -> None:
    run = Pool(*(FakeEngine(dies_after=0) for _ in range(9)))
    await run.pool.start()
    first = [t async for group in run.pool.rollout(REQUESTS, LIMITS, 1, SETTINGS) for t in group]
    assert {t.finish_reason for t in first} == {"error"}
    with pytest.raises(ActorLostError, match="rollout lost"):
        await run.run()
    assert len(run.engines) == MAX_FAILURES


async def test_a_replacement_that_does_not_start_is_tried_again() -> None:
    failures = [OSError("no memory"), OSError("no memory")]

    async def equip(engine: FakeEngine) -> None:
        if failures:
            raise failures.pop()

    run = Pool(FakeEngine(dies_after=2), equip=equip)
    await run.pool.start()
    await run.run()
    assert len(run.engines) == 4
    assert run.restarts == ["crash"]


async def test_without_a_learner_whoever_waits_is_told_and_a_new_one_brings_the_engines_back() -> None:
    learner_lives = False

    async def equip(engine: FakeEngine) -> None:
        if not learner_lives:
            raise ActorLostError("learner", RuntimeError("gone"))

    run = Pool(FakeEngine(dies_after=2), equip=equip)
    await run.pool.start()
    with pytest.raises(ActorLostError):
        await run.run()
    learner_lives = True
    run.pool.retry()
    await run.run()
    assert run.restarts == ["crash"]


async def test_a_call_to_all_engines_leaves_out_the_one_that_fails_and_replaces_it() -> None:
    run = Pool(num=2)
    await run.pool.start()

    async def call(engine: FakeEngine) -> int:
        if engine is run.engines[1]:
            raise ConnectionError("gone")
        return engine.weights

    assert await run.pool.on_each("the probe", call) == [0]
    await run.run()
    assert run.restarts == ["crash"]
    assert len(run.pool.handles) == 2


async def test_work_that_nobody_waits_for_any_more_is_cancelled_in_the_engine() -> None:
    run = Pool(FakeEngine(stops_after=1))
    await run.pool.start()
    task = asyncio.create_task(run.run())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert run.engines[0].cancelled
    assert run.pool.load_tokens() == [0]
    assert run.restarts == []


@pytest.mark.parametrize("answered", [0, 3, 7])
async def test_a_repeatable_batch_lost_with_its_engine_is_asked_again_whole_and_still_answered_once(answered: int) -> None:
    pool = Pool(FakeEngine(dies_after=answered), strict=True)
    await pool.pool.start()
    found = await pool.run()
    assert pool.engines[1].asked == REQUESTS
    assert [t.weight_version for t in found] == [0] * answered + [5] * (len(REQUESTS) - answered)


async def test_repeatable_shares_do_not_depend_on_who_lives_or_is_busy() -> None:
    pool = Pool(num=2, strict=True)
    await pool.pool.start()
    await pool.run()
    shares = [list(engine.asked) for engine in pool.engines]
    assert [len(share) for share in shares] == [4, 4]
    first = pool.pool._slots[0]
    first.load_tokens = 10_000
    await pool.run()
    assert [engine.asked for engine in pool.engines] == [share * 2 for share in shares]
    first.live = False
    await pool.run()
    assert pool.engines[0].asked == shares[0] * 2
    # Two calls to the one that lives, each what its own engine would have been asked.
    assert sorted(pool.engines[1].asked[8:], key=lambda request: request[0].index) == sorted(REQUESTS, key=lambda r: r[0].index)
