"""What may change while a job runs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.learner.settings import LearnerSettings
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.settings import Settings
from opd_governor.services.job.generations import (
    ConfigError,
    Document,
    FieldChange,
    Generation,
    StaleConfigError,
    Store,
    merge_patch,
    overlay,
)
from opd_governor.services.job.settings import Job

__all__ = [
    "ConfigError",
    "ConfigStore",
    "Document",
    "FieldChange",
    "Generation",
    "StaleConfigError",
    "Tunables",
    "merge_patch",
]

_ROLLOUT = RolloutSettings.model_fields
_LEARNER = LearnerSettings.model_fields
# The fields below take range, default and description from the settings they tune.


class RolloutTunables(Settings):
    """How the student is sampled."""

    max_new_tokens: Annotated[int, _ROLLOUT["max_new_tokens"]]
    temperature: Annotated[float, _ROLLOUT["temperature"]]
    top_p: Annotated[float, _ROLLOUT["top_p"]]
    top_k: Annotated[int, _ROLLOUT["top_k"]]
    min_p: Annotated[float, _ROLLOUT["min_p"]]


class LearnerTunables(Settings):
    """How the student is updated."""

    learning_rate: Annotated[float, _LEARNER["learning_rate"]]


class Tunables(Settings):
    """What may change while a job runs; what is not a field here may not. The same keys as in the job file."""

    rollout: RolloutTunables
    governor: Policy
    learner: LearnerTunables

    @classmethod
    def of(cls, job: Job) -> "Tunables":
        """The job's own values of the tunable fields."""
        return cls.model_validate(job, from_attributes=True)

    def apply(self, job: Job) -> Job:
        """The job with these values in it, validated as a whole. Raises ValidationError."""
        return Job.model_validate(overlay(job.model_dump(), self.model_dump()))


class ConfigStore(Store[Tunables]):
    """The tunable settings of one job: each change is validated with the whole job."""

    def __init__(self, job: Job, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError when the recorded patches do not fit the job any more."""
        super().__init__(Tunables.of(job), path, clock, check=lambda tunables: tunables.apply(job))
