"""The governor's tunable settings: people write targets, bounds and gains; the governor moves values inside them.

The other end of every bound is the job's own setting, passed beside the policy as the base limits: what holds at zero
pressure. A bound that lies on the base's loose side leaves that value alone.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from opd_governor.actors.settings import Settings

Actuator = Literal[
    "golden_weight",
    "lr_scale",
    "reference_kl_weight",
    "stop_tilt_nats",
    "loop_tail_weight",
    "unfinished_quota",
    "cap_tokens",
    "admission_quota",
    "rollback",
]
Share = Annotated[float, Field(ge=0, le=1)]
Gain = Annotated[float, Field(ge=0, le=100)]
Stage = tuple[Share, Share]


class Gains(Settings):
    """Pressure added per step and per unit of excess over a signal's target; 0 turns the signal off.

    An error (gain x excess) is bounded by 1 before it counts.
    """

    tail_share: Gain = 6.0
    """On the share of rollouts longer than `tail_multiple` x the reference: the signal that leads by 15-25 steps."""
    length_max: Gain = 0.05
    """On the longest rollout over the reference: small, because it is one rollout."""
    kl: Gain = 0.5
    """On mean KL over its running level."""
    stop_mass: Gain = 0.5
    """On the student's missing stop mass."""
    loops: Gain = 4.0
    """On the share of looping rollouts."""
    truncation: Gain = 4.0
    """On the truncated share: it confirms, it does not lead."""
    density: Gain = 0.5
    """On the fall of stop-supervision density below its running level."""
    short: Gain = 1.5
    """On answers that are too short."""


class Stages(Settings):
    """For each actuator the pressures at which it starts to move and reaches its bound: 0 <= start < full <= 1."""

    golden_weight: Stage = (0.0, 1.0)
    lr_scale: Stage = (0.0, 1.0)
    reference_kl_weight: Stage = (0.1, 0.6)
    stop_tilt_nats: Stage = (0.2, 0.7)
    loop_tail_weight: Stage = (0.2, 0.4)
    unfinished_quota: Stage = (0.3, 0.7)
    cap_tokens: Stage = (0.5, 1.0)
    admission_quota: Stage = (0.7, 1.0)

    @field_validator("*")
    @classmethod
    def _ordered(cls, value: Stage) -> Stage:
        if value[0] >= value[1]:
            raise ValueError(f"a stage starts below the pressure at which it is full, got {list(value)}")
        return value


class Policy(Settings):
    """What the governor aims at and how far it may go. Tunable while a run goes on."""

    mode: Literal["off", "observe", "enforce"] = "enforce"
    """off: nothing is computed; observe: computed and logged, nothing changes; enforce: limits follow."""

    target_truncation: Share = 0.05
    """Share of rollouts that may be truncated before it counts as an error. Rollouts cut by a cap that the governor lowered don't count."""
    target_tail_share: Share = 0.03
    """Share of rollouts that may be longer than `tail_multiple` x the reference p99."""
    target_length_max_ratio: Annotated[float, Field(ge=1, le=100)] = 2.0
    """Longest rollout over the reference p99."""
    target_kl_ratio: Annotated[float, Field(ge=1, le=100)] = 1.5
    """Mean KL over its own running level."""
    target_stop_mass_deficit: Share = 0.5
    """Share of the teacher's stop mass that the student may lack on the same states."""
    target_loop_rate: Share = 0.02
    """Share of rollouts that may end in a loop."""
    target_density_ratio: Share = 0.7
    """Stop-supervision density, (1 - truncation) / mean length, over its running level: lower is an error."""
    target_length_min_ratio: Share = 0.4
    """Mean length over the reference mean: lower is an error (a student that answers nothing is a failure too)."""
    tail_multiple: Annotated[float, Field(ge=1, le=10)] = 1.25
    """Rollouts longer than this multiple of the reference p99 belong to the tail."""

    gains: Gains = Gains()
    proportional_gain: Gain = 0.5
    """Pressure added at once per unit by which the worst error rose since the last decision."""
    release_per_step: Share = 0.02
    """Pressure taken back per step once `healthy_steps` have passed."""
    healthy_steps: Annotated[int, Field(ge=0, le=10_000)] = 20
    """Steps in a row without an error before pressure falls or a longer cap is granted: early recoveries relapse."""
    pressure_floor: Share = 0.0
    """Pressure never falls below this: prevention that is always on."""
    window_rollouts: Annotated[float, Field(gt=0, le=100_000)] = 32.0
    """Shares are averaged over about this many rollouts, so one odd answer in a small batch is no trend."""
    kl_window_rollouts: Annotated[float, Field(gt=0, le=100_000)] = 96.0
    """KL is averaged over about this many: a single step of few rollouts scatters by half of its value."""
    level_half_life_steps: Annotated[float, Field(gt=0, le=10_000)] = 25.0
    """Half-life of the running levels of KL and stop-supervision density, steps; a quarter of it where they get better."""

    actuators: tuple[Actuator, ...] = get_args(Actuator)
    """What the governor may move; the rest stays at the job's own settings. Without `rollback` it neither rolls back nor stops."""
    stages: Stages = Stages()
    max_golden_weight: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Weight of the golden cross-entropy at full pressure."""
    min_lr_scale: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor on the learning rate at full pressure."""
    max_reference_kl_weight: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Weight of KL to the initial student at full pressure."""
    max_stop_tilt_nats: Annotated[float, Field(ge=0, le=20)] = 4.0
    """Teacher's tilt toward stopping beyond the target length at full pressure."""
    min_loop_tail_weight: Share = 0.0
    """Weight of tokens after a loop's onset at full pressure; 0 masks them."""
    min_unfinished_quota: Share = 0.0
    """Share of prompts that the teacher does not finish, at full pressure."""
    min_cap_tokens: Annotated[int, Field(ge=1)] = 16
    """The cap never goes below this, nor below `cap_floor_ratio` x the reference p99, whichever is more."""
    cap_floor_ratio: Annotated[float, Field(ge=1, le=10)] = 1.5
    """At least `tail_multiple`: a cap below it would hide the tail it is there to hold."""
    min_admission_quota: Share = 0.1
    """Share of truncated rollouts admitted to a batch at full pressure."""
    initial_cap_tokens: Annotated[int, Field(ge=1)] | None = None
    """Progressive horizon: the cap starts here and grows in healthy stretches. None: starts at rollout.max_new_tokens."""
    cap_growth_per_step: Annotated[float, Field(gt=1, le=2)] = 1.05
    """Largest factor by which the cap grows in one healthy step."""

    blind_after_s: Annotated[float, Field(gt=0)] = 120.0
    """Age of the data after which the governor falls back to conservative limits, seconds."""
    blind_pressure: Share = 0.5
    """Pressure that a blind governor falls back to when it holds less."""

    rollback_pressure: Share = 0.95
    """Roll back when pressure has been this high, and inflation confirmed, for `rollback_patience_steps`."""
    rollback_patience_steps: Annotated[int, Field(ge=0, le=10_000)] = 8
    """Time the other actuators get to rescue the run."""
    confirm_truncation: Share = 0.3
    """Truncated (or looping) share that confirms inflation; rollouts cut by a lowered cap count here."""
    early_rollback: bool = False
    """Roll back on the leading signals alone, before any truncation. Worth it where a few steps are all that is lost."""
    early_rollback_pressure: Share = 0.8
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 3
    """After this many the run is stopped (exit code 4) where it would roll back once more."""
    rollback_cooldown_steps: Annotated[int, Field(ge=0, le=10_000)] = 12
    """Steps after a rollback in which no other is decided."""

    @field_validator("mode", mode="before")
    @classmethod
    def _unquoted_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false

    @model_validator(mode="after")
    def _consistent(self) -> "Policy":
        if len(set(self.actuators)) < len(self.actuators):
            raise ValueError(f"actuators names one twice: {list(self.actuators)}")
        if self.cap_floor_ratio < self.tail_multiple:
            raise ValueError(f"cap_floor_ratio {self.cap_floor_ratio} is below tail_multiple {self.tail_multiple}: raise it")
        if self.initial_cap_tokens is not None and self.initial_cap_tokens < self.min_cap_tokens:
            raise ValueError(f"initial_cap_tokens {self.initial_cap_tokens} is below min_cap_tokens {self.min_cap_tokens}: raise it")
        if self.pressure_floor >= self.rollback_pressure:
            raise ValueError(f"pressure_floor {self.pressure_floor} reaches rollback_pressure {self.rollback_pressure}: lower it")
        return self
