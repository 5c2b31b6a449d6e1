"""Small environments for tests, and a pool without Ray."""

import os
import time
from typing import Any

from opd_governor.actors.environment.actor import EnvironmentActor
from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.environment.settings import EnvironmentSettings


class Countdown:
    """Says how many turns are left, and pays at the end where the student said `a`."""

    def __init__(self) -> None:
        self.left = 2

    def open(self, row: dict[str, Any]) -> "Countdown":
        return Countdown()

    def answer(self, message: dict[str, Any]) -> tuple[list[dict[str, str]], float | None, bool]:
        self.left -= 1
        if self.left < 0:
            return [], float("a" in message["content"]), True
        return [{"role": "user", "content": str(self.left)}], None, False


class Misbehaving:
    """Does to each prompt what its text says."""

    def open(self, row: dict[str, Any]) -> "Misbehaving":
        task = Misbehaving()
        task.prompt = row["prompt"]  # type: ignore[attr-defined]
        return task

    def answer(self, message: dict[str, Any]) -> Any:
        match self.prompt:  # type: ignore[attr-defined]
            case "raises":
                raise ValueError("no\nsuch world")
            case "hangs":
                time.sleep(600)
            case "shouts":
                return [{"role": "user", "content": "x" * 100_000}], None, False
            case "role":
                return [{"role": "narrator", "content": "once"}], None, False
            case "silent":
                return [], None, False
            case "reward":
                return [], "much", True
            case "nothing":
                return None
            case "dies":
                os._exit(3)
        return [], 1.0, True


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the one
        b: the other
    """
    return a + b


class Here:
    """An environment's process, in this one. `dies`: calls, counted from 1 over all processes, that end it."""

    calls = 0

    def __init__(self, settings: EnvironmentSettings, dies: set[int]) -> None:
        self.actor, self.dies = EnvironmentActor(settings), dies

    async def ready(self) -> None:
        return None

    async def answer(self, *asked: Any) -> Any:
        Here.calls += 1
        if Here.calls in self.dies:
            raise RuntimeError("killed")
        return self.actor.answer(*asked)

    def drop(self, ticket: int) -> None:
        self.actor.drop(ticket)

    def end(self) -> None:
        return None


def pool_here(entry: str, *, dies: set[int] = frozenset(), **settings: Any) -> EnvironmentPool:  # type: ignore[assignment]
    Here.calls = 0
    held = EnvironmentSettings(entry=f"tests.environment.worlds:{entry}", **settings)
    return EnvironmentPool(held, lambda: Here(held, set(dies)))
