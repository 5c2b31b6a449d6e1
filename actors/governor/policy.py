"""The governor's tunable settings: people write targets, bounds and gains; the governor moves values inside them."""

from typing import Annotated, Literal

from pydantic import Field

from actors.settings import Settings


class Policy(Settings):
    """What the governor aims at and how far it may go. Tunable while a run goes on."""

    mode: Literal["off", "observe", "enforce"] = "enforce"
    """off: nothing is computed; observe: computed and logged, nothing changes; enforce: limits follow."""
    target_truncation: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rollouts that may be truncated before it counts as an error."""
