"""What the governor may move, each declared once. Pure.

An actuator of your own, in a file that the job's `extensions` names:

    ACTUATORS.add("entropy_weight")(Actuator(title="entropy weight", unit="", help="...", tighter="up", bound=0.1, rest=0.0, ...))

Its value in force is `limits.get("entropy_weight")`, in the engine, the loss or wherever you obey it. The policy's bound, decisions,
records, the metric opd_governor_entropy_weight, dashboards, the live page and `opd replay` follow from the declaration.
"""

from dataclasses import dataclass
from typing import Literal

from opd_governor.actors.extensions import Kind
from opd_governor.actors.governor.signals import SIGNALS, Disease
from opd_governor.actors.trajectory import LengthLimits


@dataclass(frozen=True, slots=True)
class Actuator:
    """One declaration."""

    title: str
    """What a person calls it, in reasons and plots."""
    unit: str
    help: str
    """One sentence for dashboards and documentation."""
    tighter: Literal["up", "down"]
    """The direction that presses."""
    bound: float
    """Value at full pressure, unless the policy says otherwise."""
    moved_by: tuple[Disease, ...] = ("long",)
    """Evidence of what moves it."""
    stage: tuple[float, float] = (0.0, 1.0)
    """Pressures at which it starts to move and reaches its bound."""
    shortens: bool = False
    """It makes answers shorter: answers that are too short already take it back."""
    in_recovery: float | None = None
    """How far it is moved while the student is pushed out of an inflation that is there: 0 at rest, 1 at its bound. None: by pressure."""
    rest: float = 0.0
    """Resting value of an actuator that is no field of LengthLimits."""
    range: tuple[float, float] = (0.0, 1.0)
    """Of its bound."""
    metric: str = ""
    """Its gauge, where it is not opd_governor_<name>."""
    bound_key: str = ""
    """Key of the policy that sets its bound; empty: `bounds`."""
    is_value: bool = True
    """False: a command, with no value in force."""

    def __post_init__(self) -> None:
        """Raises ValueError for a declaration that the law cannot follow."""
        start, full = self.stage
        if not 0 <= start < full <= 1:
            raise ValueError(f"actuator {self.title!r}: stage {self.stage} must be two pressures, 0 <= start < full <= 1")
        if self.in_recovery is not None and not 0 <= self.in_recovery <= 1:
            raise ValueError(f"actuator {self.title!r}: in_recovery {self.in_recovery} is outside [0, 1]")


ACTUATORS: Kind[Actuator] = Kind("actuator", pattern="[a-z][a-z0-9_]*", reserved=("generation", "extra"))
"""By name, which is also a field of LengthLimits or a key of its `extra`, and part of a metric's name."""

ACTUATORS.add("cap_tokens")(
    Actuator(
        title="cap",
        unit="tokens",
        help="Most new tokens a rollout; under pressure it follows the teacher's own p99. A lower cap raises truncation by definition.",
        tighter="down",
        bound=16,
        stage=(0.5, 1.0),
        shortens=True,
        in_recovery=1.0,
        bound_key="min_cap_tokens",
    )
)
ACTUATORS.add("golden_weight")(
    Actuator(
        title="golden weight",
        unit="",
        help="Weight of the cross-entropy on golden answers: the teacher's own, which end.",
        tighter="up",
        bound=1.0,
        moved_by=("long", "short", "drift"),
        in_recovery=1.0,
        range=(0, 10),
        bound_key="max_golden_weight",
    )
)
ACTUATORS.add("lr_scale")(
    Actuator(
        title="learning rate x",
        unit="factor",
        help="Brake on the learning rate: it prevents an onset, and is let go where the student must learn its way out of one.",
        tighter="down",
        bound=0.1,
        moved_by=("long", "short", "drift"),
        in_recovery=0.0,
        bound_key="min_lr_scale",
    )
)
ACTUATORS.add("reference_kl_weight")(
    Actuator(
        title="reference KL",
        unit="",
        help="Weight of the KL to the student as it came.",
        tighter="up",
        bound=0.1,
        moved_by=("long", "short"),
        stage=(0.1, 0.6),
        in_recovery=0.0,
        range=(0, 10),
        bound_key="max_reference_kl_weight",
    )
)
ACTUATORS.add("stop_tilt_nats")(
    Actuator(
        title="stop tilt",
        unit="nats",
        help="Tilt of the teacher toward stopping beyond the target length.",
        tighter="up",
        bound=4.0,
        stage=(0.2, 0.7),
        shortens=True,
        in_recovery=1.0,
        range=(0, 20),
        metric="opd_governor_stop_tilt",
        bound_key="max_stop_tilt_nats",
    )
)
ACTUATORS.add("stop_weight")(
    Actuator(
        title="stop weight",
        unit="",
        help="Weight of the dense loss on stopping: toward the tilted teacher's at every token, whether a stop was sampled or not.",
        tighter="up",
        bound=1.0,
        stage=(0.2, 0.7),
        shortens=True,
        in_recovery=1.0,
        range=(0, 10),
        bound_key="max_stop_weight",
    )
)
ACTUATORS.add("excess_weight")(
    Actuator(
        title="excess weight",
        unit="share",
        help="Weight of tokens beyond the teacher's longest answers to the same prompt; 0 masks them.",
        tighter="down",
        bound=0.0,
        stage=(0.0, 0.4),
        shortens=True,
        in_recovery=1.0,
        bound_key="min_excess_weight",
    )
)
ACTUATORS.add("loop_tail_weight")(
    Actuator(
        title="loop tail weight",
        unit="share",
        help="Weight of tokens after the onset of a loop; 0 masks them.",
        tighter="down",
        bound=0.0,
        stage=(0.2, 0.4),
        shortens=True,
        in_recovery=1.0,
        bound_key="min_loop_tail_weight",
    )
)
ACTUATORS.add("admission_quota")(
    Actuator(
        title="admission quota",
        unit="share",
        help="Largest share of truncated rollouts admitted to a batch.",
        tighter="down",
        bound=0.1,
        stage=(0.7, 1.0),
        shortens=True,
        in_recovery=0.0,
        bound_key="min_admission_quota",
    )
)
ACTUATORS.add("unfinished_quota")(
    Actuator(
        title="unfinished quota",
        unit="share",
        help="Largest share of prompts in a step that the teacher itself does not finish, where prompts are chosen by it.",
        tighter="down",
        bound=0.0,
        moved_by=("long", "drift"),
        stage=(0.1, 0.5),
        in_recovery=1.0,
        bound_key="min_unfinished_quota",
    )
)
ACTUATORS.add("rollback")(
    Actuator(
        title="rollback",
        unit="",
        help="Back to the last healthy checkpoint where nothing else helped; at last the run is stopped.",
        tighter="up",
        bound=1,
        is_value=False,
    )
)


def movable() -> dict[str, Actuator]:
    """The actuators that have a value in force."""
    return {name: actuator for name, actuator in ACTUATORS.items() if actuator.is_value}


def describe() -> dict[str, list[dict[str, str]]]:
    """What pages draw: name, title and unit of each actuator with a value, name and title of each signal."""
    return {
        "actuators": [{"name": name, "title": each.title, "unit": each.unit} for name, each in movable().items()],
        "signals": [{"name": name, "title": each.title} for name, each in SIGNALS.items()],
    }


def value_of(limits: LengthLimits, name: str) -> float | None:
    """In force; None: nothing to move in this job."""
    value = limits.get(name)
    return ACTUATORS[name].rest if value is None and name not in LengthLimits.__slots__ else value


def metric_of(name: str) -> str:
    """Name of its gauge."""
    return ACTUATORS[name].metric or f"opd_governor_{name}"
