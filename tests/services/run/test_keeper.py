"""The governor's keeper over fake actors, called as Ray's are: method.remote(...)."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Snapshot
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.run.keeper import MAX_TRIES, GovernorKeeper
from tests.governor.test_governor import reading

BASE = LengthLimits(cap_tokens=64)


class Source:
    """A run in which every second rollout is far longer than the reference for four looks; later looks show nothing wrong."""

    def __init__(self) -> None:
        self.num_looks = 0

    def read(self) -> Snapshot:
        self.num_looks += 1
        return reading(self.num_looks, long=16 * self.num_looks) if self.num_looks <= 4 else reading(self.num_looks - 4)


class Actor:
    """A governor whose process dies with the calls whose numbers are in `deaths`, and stays dead."""

    def __init__(self, source: Source, terms: tuple[Any, ...], deaths: set[int], calls: list[str]) -> None:
        self.governor, self.deaths, self.calls, self.dead = Governor(source, *terms), deaths, calls, False  # type: ignore[arg-type]

    def __getattr__(self, method: str) -> Any:
        async def remote(*args: Any) -> Any:
            self.calls.append(method)
            self.dead |= len(self.calls) in self.deaths
            if self.dead:
                raise ActorDiedError
            return getattr(self.governor, method)(*args)

        return SimpleNamespace(remote=remote)


class Kept:
    def __init__(self, deaths: set[int]) -> None:
        self.calls: list[str] = []
        self.actors: list[Actor] = []
        self.restarts: list[str] = []
        self.lines: list[str] = []

        source = Source()

        def start(*terms: Any) -> Actor:
            self.actors.append(Actor(source, terms, deaths, self.calls))
            return self.actors[-1]

        self.keeper = GovernorKeeper(
            start, Policy(), BASE, 3, end=lambda actor: None, on_restart=self.restarts.append, say=self.lines.append
        )


async def test_a_governor_that_dies_decides_on_with_the_pressure_it_had() -> None:
    kept = Kept({9})
    pressures = [(await kept.keeper.tick(step))[0].after.pressure for step in range(1, 7)]
    assert len(kept.actors) == 2
    assert kept.restarts == ["crash"]
    assert pressures[3] == 1.0
    assert min(pressures[4:]) > 0.9  # one without memory would see no reason for any
    assert "the limits in force hold meanwhile" in kept.lines[0]


async def test_a_new_governor_obeys_the_newest_settings() -> None:
    kept = Kept({3})
    await kept.keeper.tick(1)
    await kept.keeper.set_policy(Policy(mode="observe"), LengthLimits(cap_tokens=32), 4)
    decision, record = await kept.keeper.tick(2)
    assert (decision.mode, record["config_generation"]) == ("observe", 4)


async def test_a_governor_that_cannot_be_brought_up_is_given_up_for_this_question_only() -> None:
    kept = Kept(set(range(3, 3 + MAX_TRIES)))
    await kept.keeper.tick(1)
    with pytest.raises(ActorLostError, match="governor lost"):
        await kept.keeper.tick(2)
    await kept.keeper.tick(3)
    assert kept.calls[-3:] == ["restore", "tick", "state"]
    assert kept.restarts == ["crash"]
