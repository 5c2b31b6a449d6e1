"""What a step runs under: the job with a person's changes, and the governor's last decision.

PATCH /v1/config --ConfigStore--> job in force --base limits--> governor --Decision--> limits in force
"""

from dataclasses import dataclass
from typing import Any

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.rundir import Record


@dataclass(frozen=True, slots=True)
class Command:
    """What the governor asks of the loop beside its limits: "rollback", "stop", or None for nothing."""

    verb: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ruling:
    """The governor's last decision."""

    limits: LengthLimits
    pressure: float = 0.0
    """From 0 (at rest) to 1."""
    healthy: bool = True
    """A checkpoint written now is one to roll back to."""


class Terms:
    """Job and limits in force. They change only when `begin`, `decide` or `restore` is called, at a border between two steps."""

    def __init__(self, job: Job, store: ConfigStore, governor: Any, journal: Journal) -> None:
        """`job`: as the job file has it. `governor`: a GovernorKeeper."""
        self._original, self._store, self._governor, self._journal = job, store, governor, journal
        self.job = job
        self.generation = 0
        """Of the settings in force; rises with every change by a person."""
        self.ruling = Ruling(base_limits(job))

    async def begin(self) -> None:
        """The settings that the store has, and the limits that the governor starts from."""
        self.generation, tunables = self._store.in_force()
        self.job = tunables.apply(self._original)
        self._journal.aim(self.job.governor.aim)
        self.ruling = Ruling(await self._governor.limits())

    @property
    def outdated(self) -> bool:
        """A person has changed the settings since the last decision."""
        return self._store.generation != self.generation

    async def decide(self, step: int) -> Command:
        """Bring a person's changes into force, then have the governor decide on the metrics up to `step`.

        Without a governor the last limits hold, with a warning.
        """
        generation, tunables = self._store.in_force()
        self._journal.config(generation)
        if generation != self.generation:
            self.generation = generation
            self.job = tunables.apply(self._original)
            self._journal.aim(self.job.governor.aim)
            await self._governor.set_policy(self.job.governor, base_limits(self.job), generation)
        try:
            decision, record = await self._governor.tick(step)
        except ActorLostError as error:
            self._journal.note(f"step {step}: no decision, the last limits hold: {error}")
            return Command()
        self.ruling = Ruling(decision.limits, decision.after.pressure, decision.healthy)
        self._journal.decision(decision, record)
        return Command(decision.command, decision.reason)

    async def tell(self, news: str) -> None:
        """A change that the governor must not take for sickness, in words."""
        await self._governor.tell(news)

    def observed(self) -> None:
        """Rollouts were launched on these settings: what GET /v1/config calls observed."""
        self._store.observe(self.generation)
        self._journal.config_observed(self.generation)

    async def state(self) -> Record:
        """Of a checkpoint."""
        return {
            "governor": await self._governor.state(),
            "pressure": self.ruling.pressure,
            "healthy": self.ruling.healthy,
            "config_generation": self.generation,
        }

    async def restore(self, state: Record) -> None:
        """Back to a checkpoint. Settings changed since then come into force with the next decision."""
        self.generation = state["config_generation"]
        await self._governor.restore(state["governor"])
        self.ruling = Ruling(await self._governor.limits(), state["pressure"], state["healthy"])


def base_limits(job: Job) -> LengthLimits:
    """The job's own settings as limits: what holds at zero pressure."""
    objective = job.objective
    tail_weight = {"mask": 0.0, "keep": 1.0, "downweight": objective.loop_tail_weight}[objective.loop_tail]
    return LengthLimits(
        cap_tokens=job.rollout.max_new_tokens,
        golden_weight=objective.golden_weight,
        reference_kl_weight=objective.reference_kl_weight,
        stop_tilt_nats=objective.stop_tilt_nats,
        excess_weight=objective.excess_weight,
        stop_weight=objective.stop_weight,
        loop_tail_weight=tail_weight,
        admission_quota=objective.admission_quota,
        unfinished_quota=1.0 if job.data.unfinished_by_teacher == "quota" else None,
    )
