"""The governor's tunable settings: people set the aim and the bounds; the governor moves values inside them.

There are no gains, targets or stages to set: every signal is a test against the teacher's own lengths, and one number says how often all of
them together may be wrong. The other end of every bound is the job's own setting, passed beside the policy as the base limits: what
holds at zero pressure. A bound that lies on the base's loose side leaves that value alone.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from opd_governor.actors.governor.actuators import ACTUATORS
from opd_governor.actors.governor.reference import Aim
from opd_governor.actors.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]
_AIM, _ALARMS = "governor.length_factor or governor.length_budget_tokens", "governor.false_alarm_steps"
REMOVED = {
    **dict.fromkeys(("target_tail_share", "target_length_max_ratio", "tail_multiple", "target_truncation", "target_density_ratio"), _AIM),
    **dict.fromkeys(("target_length_min_ratio", "cap_floor_ratio", "pressure_floor"), _AIM),
    **dict.fromkeys(("target_kl_ratio", "target_stop_mass_deficit", "target_loop_rate", "gains", "proportional_gain"), _ALARMS),
    **dict.fromkeys(("window_rollouts", "kl_window_rollouts", "level_half_life_steps", "healthy_steps", "release_per_step"), _ALARMS),
    **dict.fromkeys(("confirm_truncation", "rollback_pressure", "early_rollback_pressure", "early_rollback"), _ALARMS),
    **dict.fromkeys(("stages", "rollback_patience_steps", "rollback_cooldown_steps", "cap_growth_per_step"), "the law itself"),
}
"""Keys of earlier versions -> what decides in their place."""


class Policy(Settings):
    """What the governor aims at and how far it may go. Tunable while a run goes on."""

    mode: Literal["off", "observe", "enforce"] = "enforce"
    """off: nothing is computed; observe: computed and logged, nothing changes; enforce: limits follow."""

    length_factor: Annotated[float, Field(ge=0.1, le=2)] = 1.0
    """The aim: lengths like the teacher's on the same prompt, times this. .5 asks for answers half as long."""
    length_budget_tokens: Annotated[int, Field(ge=1)] | None = None
    """The aim: no reference longer than this, tokens. None: no budget."""
    false_alarm_steps: Annotated[float, Field(ge=10, le=1e9)] = 5000.0
    """Mean steps of a healthy run between two false alarms, over all signals together. Fewer: quicker to act, more often for nothing."""

    actuators: tuple[Annotated[str, ACTUATORS.key], ...] | None = None
    """What the governor may move; the rest stays at the job's own settings. None: everything. Without `rollback` it neither rolls back
    nor stops."""
    max_golden_weight: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Weight of the golden cross-entropy at full pressure."""
    min_lr_scale: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor on the learning rate at full pressure."""
    max_reference_kl_weight: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Weight of KL to the initial student at full pressure."""
    max_stop_tilt_nats: Annotated[float, Field(ge=0, le=20)] = 4.0
    """Teacher's tilt toward stopping beyond the target length at full pressure."""
    max_stop_weight: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Weight of the dense loss on stopping at full pressure."""
    min_excess_weight: Share = 0.0
    """Weight of tokens beyond the teacher's longest answers to the same prompt, at full pressure."""
    min_loop_tail_weight: Share = 0.0
    """Weight of tokens after a loop's onset at full pressure; 0 masks them."""
    min_unfinished_quota: Share = 0.0
    """Share of prompts that the teacher does not finish, at full pressure; only with data.unfinished_by_teacher: quota."""
    min_cap_tokens: Annotated[int, Field(ge=1)] = 16
    """The cap never goes below this, nor below the teacher's own p99, whichever is more."""
    min_admission_quota: Share = 0.1
    """Share of truncated rollouts admitted to a batch at full pressure."""
    bounds: dict[Annotated[str, ACTUATORS.key], float] = Field(default={})
    """Bounds of actuators that extensions add, by name; without an entry the actuator's own holds."""
    initial_cap_tokens: Annotated[int, Field(ge=1)] | None = None
    """Progressive horizon: the cap starts here and grows by 5 % a healthy step. None: starts at rollout.max_new_tokens."""

    blind_after_s: Annotated[float, Field(gt=0)] = 120.0
    """Age of the data after which the governor falls back to conservative limits, seconds."""
    blind_pressure: Share = 0.5
    """Pressure that a blind governor falls back to when it holds less."""
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 3
    """After this many the run is stopped (exit code 4) where it would roll back once more."""

    @field_validator("mode", mode="before")
    @classmethod
    def _unquoted_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false

    @model_validator(mode="before")
    @classmethod
    def _removed(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key in REMOVED:
                raise ValueError(f"{key} is gone: {REMOVED[key]} decides in its place; remove the key")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "Policy":
        named = self.actuators or ()
        if len(set(named)) < len(named):
            raise ValueError(f"actuators names one twice: {list(named)}")
        if self.initial_cap_tokens is not None and self.initial_cap_tokens < self.min_cap_tokens:
            raise ValueError(f"initial_cap_tokens {self.initial_cap_tokens} is below min_cap_tokens {self.min_cap_tokens}: raise it")
        for name, bound in self.bounds.items():
            low, high = ACTUATORS[name].range
            if ACTUATORS[name].bound_key in Policy.model_fields:
                raise ValueError(f"bounds.{name}: set {ACTUATORS[name].bound_key} instead")
            if not low <= bound <= high:
                raise ValueError(f"bounds.{name}: {bound:g} is outside [{low:g}, {high:g}]")
        return self

    @property
    def aim(self) -> Aim:
        return Aim(self.length_factor, self.length_budget_tokens)

    def may_move(self, actuator: str) -> bool:
        return self.actuators is None or actuator in self.actuators

    def bound(self, actuator: str) -> float:
        """Of an actuator, at full pressure."""
        declared = ACTUATORS[actuator]
        own = self.bounds.get(actuator, declared.bound)
        return float(getattr(self, declared.bound_key, own))
