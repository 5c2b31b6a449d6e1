"""The places of a run's engines, and which of them samples what. Knows asyncio, not Ray."""

import asyncio
import heapq
from collections.abc import Sequence
from typing import Any

from opd_governor.actors.deadlines import Pace
from opd_governor.actors.trajectory import Prompt

Request = tuple[Prompt, int]
"""A prompt and which of its samples."""


class Slot:
    """The place of one engine, and the engine that fills it now."""

    def __init__(self, index: int, handle: Any, floor_s: float) -> None:
        self.index, self.handle = index, handle
        self.live = False
        self.load_tokens = 0
        """Tokens allowed to the requests in flight."""
        self.failures = 0
        """Since its last finished rollout."""
        self.replacing: asyncio.Task[None] | None = None
        self.pace = Pace(floor_s)
        self.calls: dict[str, Pace] = {}

    @property
    def name(self) -> str:
        return f"rollout actor {self.index}"


def share_out(slots: Sequence[Slot], requests: Sequence[Request], cap_tokens: int, *, strict: bool) -> list[tuple[Slot, list[Request]]]:
    """Requests to the least loaded live engines; samples of one prompt stay together for the prefix cache.

    `strict`: shared out as if all engines lived and had nothing to do, so that the shares are the same in every process.
    """
    groups: dict[tuple[int, int], list[Request]] = {}
    for prompt, sample in requests:
        groups.setdefault((prompt.epoch, prompt.index), []).append((prompt, sample))
    loads = [(0 if strict else slot.load_tokens, slot.index) for slot in slots if slot.live or strict]
    heapq.heapify(loads)
    shares: dict[int, list[Request]] = {}
    for group in groups.values():
        load, index = loads[0]
        heapq.heapreplace(loads, (load + len(group) * cap_tokens, index))
        shares.setdefault(index, []).extend(group)
    return [(slots[index], share) for index, share in shares.items()]
