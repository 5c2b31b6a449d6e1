"""GPUs as `opd check --gpus 8x80` describes them, and what such a card does in a second."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from opd_governor.services.job.settings import JobError

NODE_GPUS = 8
"""GPUs of a node where a description does not say."""
USABLE = 0.94
"""Share of a card's memory that processes get: the rest is the driver's and lost to fragments."""


@dataclass(frozen=True, slots=True)
class Card:
    """Dense bfloat16 FLOP/s and memory bytes/s of the data sheet, and bytes/s to another node."""

    name: str
    gib: float
    flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float


CARDS = (
    Card("L4/RTX class, 24 GiB", 24, 121e12, 0.30e12, 3e9),
    Card("A100, 40 GiB", 40, 312e12, 1.55e12, 25e9),
    Card("L40S class, 48 GiB", 48, 362e12, 0.86e12, 12e9),
    Card("H100, 80 GiB", 80, 989e12, 3.35e12, 50e9),
    Card("H200, 141 GiB", 141, 989e12, 4.8e12, 50e9),
    Card("B200, 180 GiB", 180, 2250e12, 8.0e12, 100e9),
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """GPUs by node, largest first, all with the same memory."""

    nodes: tuple[int, ...]
    gib: float
    """Memory of one GPU."""
    host_gib: float | None = None
    """Memory of one node; None: not known, not checked."""

    @property
    def num_gpus(self) -> int:
        return sum(self.nodes)

    @property
    def usable_bytes(self) -> float:
        return self.gib * 2**30 * USABLE

    @property
    def card(self) -> Card:
        """The card of CARDS whose memory is nearest."""
        return min(CARDS, key=lambda card: abs(math.log(card.gib / self.gib)))

    def words(self) -> str:
        """`4 nodes of 8 GPUs, 80 GiB each`."""
        return f"{self.num_gpus} GPUs of {self.gib:g} GiB on {len(self.nodes)} node{'s' if len(self.nodes) > 1 else ''}"

    def holds(self, units: Sequence[int]) -> bool:
        """Whether units of so many GPUs each find room, every unit within one node."""
        left = list(self.nodes)
        for unit in sorted(units, reverse=True):
            node = next((i for i, free in enumerate(left) if free >= unit), None)
            if node is None:
                return False
            left[node] -= unit
        return True


def parse_gpus(text: str) -> Hardware:
    """`8x80`: 8 GPUs of 80 GiB, on nodes of 8 (a last node may have fewer); `4x8x80`: 4 nodes of 8. Raises JobError.

    >>> parse_gpus("12x80").nodes
    (8, 4)
    """
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)", text.strip().lower())
    if not found or not int(found[2]) or not float(found[3]) or found[1] == "0":
        raise JobError(f"--gpus {text}: expected GPUs x GiB such as 8x80, or nodes x GPUs x GiB such as 4x8x80")
    gib, num = float(found[3]), int(found[2])
    if found[1]:
        return Hardware((num,) * int(found[1]), gib)
    full, rest = divmod(num, NODE_GPUS)
    return Hardware((NODE_GPUS,) * full + ((rest,) if rest else ()), gib)
