"""From two readings of a run's metrics to the governor's signals, each declared once. Pure: no network, no clock.

A signal of your own, in a file that the job's `extensions` names:

    @SIGNALS.add("entropy")
    ...  # or: SIGNALS.add("entropy")(Signal(title=..., unit=..., help=..., disease="drift", test=..., read=...))

Everything else follows from the declaration: the law tests it, decisions and records carry it, its evidence is a metric
(opd_governor_evidence_nats{signal="entropy"}), a line of the dashboards and of the live page, a row of `opd replay --explain`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from opd_governor.actors.extensions import Kind
from opd_governor.actors.governor.evidence import MeanTest, Observation, ShareTest, Test, known
from opd_governor.actors.governor.snapshot import Growth, Snapshot, added, ratio

LARGEST = 1e15
"""No length, count or rate of a run comes near this: beyond it a number is a fault of the source."""
KL_FLOOR_NATS = 0.05
"""KL below this is next to nothing, and ratios of it are noise."""
MAX_EXPECTED_LOOPS = 0.05
"""A teacher that loops more often than this is no excuse for its student."""
STOP_MASS_FLOOR = 1e-6

Disease = Literal["long", "short", "drift"]
"""What a signal is evidence of: answers too long, answers too short, a student that leaves its teacher."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One declaration."""

    title: str
    """A few words, as in a sentence: "rollouts beyond the teacher's longest"."""
    unit: str
    """Of value and bound: `share`, `nats` (a log ratio), `log nats` (the log of a number of nats)."""
    help: str
    """One sentence for dashboards and documentation."""
    disease: Disease
    test: Test
    read: Callable[[Growth], Observation | None]
    """From two snapshots; None: nothing to say."""
    alone: float = 1.0
    """Most pressure that this signal may bring by itself."""
    required: bool = False
    """Without it, once it was measured, nobody can say that a run is healthy."""


SIGNALS: Kind[Signal] = Kind("signal", pattern="[a-z][a-z0-9_]*")


def _lengths(growth: Growth) -> Observation | None:
    num = growth.of("opd_length_scored_total")
    over, under = growth.of("opd_length_over_nats_total"), growth.of("opd_length_under_nats_total")
    squares, spread = growth.of("opd_length_squares_total"), growth.current.gauge("opd_length_reference_spread_nats")
    if not num or num < 0 or over is None or under is None:
        return None
    mean = (over - under) / num
    variance = None if squares is None else max(0.0, squares / num - mean * mean)
    return Observation(mean, num, spread=spread or 0.0, variance=variance if num > 1 else None)


def _tail(growth: Growth) -> Observation | None:
    num = growth.of("opd_length_scored_total")
    share = ratio(growth.of("opd_length_tail_total"), num)
    expected = ratio(growth.of("opd_length_tail_expected_total"), num)
    return None if share is None or num is None or expected is None else Observation(share, num, expected)


def _ends(growth: Growth) -> tuple[float | None, float | None]:
    """Rollouts that ended, and those of them that were cut."""
    by = {reason: growth.of("opd_rollouts_total", finish_reason=reason) for reason in ("stop", "length", "repetition")}
    used_up = growth.of("opd_rollouts_total", finish_reason="turns") or 0.0  # older records know no such end
    return added(*by.values(), used_up), added(by["length"], by["repetition"])


def _truncation(growth: Growth) -> Observation | None:
    """Where there is a reference the tail says the same and more: it knows what the teacher itself would have had cut."""
    if growth.of("opd_length_scored_total"):
        return None
    num, cut = _ends(growth)
    own = growth.of("opd_governor_cut_rollouts_total") or 0.0
    share = None if cut is None else ratio(max(0.0, cut - own), num)
    return None if share is None or num is None else Observation(share, num)


def _loops(growth: Growth) -> Observation | None:
    num, _ = _ends(growth)
    share = ratio(growth.of("opd_rollout_loops_total"), num)
    expected = min(MAX_EXPECTED_LOOPS, growth.current.gauge("opd_length_reference_loops_ratio") or 0.0)
    return None if share is None or num is None else Observation(share, num, expected)


def _kl(growth: Growth) -> Observation | None:
    kl_nats = growth.ratio("opd_kl_nats_total", "opd_kl_tokens_total")
    prompts = growth.ratio("opd_length_expected_nats_total", "opd_length_scored_total")
    return None if kl_nats is None else Observation(math.log(max(KL_FLOOR_NATS, kl_nats)), 1.0, prompts=prompts)


def _stop_mass(growth: Growth) -> Observation | None:
    student = growth.ratio("opd_stop_mass_student_total", "opd_stop_mass_tokens_total")
    teacher = growth.ratio("opd_stop_mass_teacher_total", "opd_stop_mass_tokens_total")
    if student is None or teacher is None or teacher <= STOP_MASS_FLOOR:
        return None
    return Observation(math.log(max(STOP_MASS_FLOOR, student) / teacher), 1.0)


SIGNALS.add("length")(
    Signal(
        title="lengths over their prompts' references",
        unit="nats",
        help="Mean log of length over the teacher's on the same prompt; a cut rollout counts as its expected length.",
        disease="long",
        test=MeanTest(sign=1.0, slack_spreads=0.12, max_baseline=math.log(2)),
        read=_lengths,
        required=True,
    )
)
SIGNALS.add("tail")(
    Signal(
        title="rollouts beyond the teacher's longest",
        unit="share",
        help="Share longer than the teacher's longest answers to the same prompt, or cut where the cap hides them.",
        disease="long",
        test=ShareTest(slack=0.02),
        read=_tail,
        required=True,
    )
)
SIGNALS.add("truncation")(
    Signal(
        title="cut rollouts",
        unit="share",
        help="Share cut by the job's cap, the window or the loop stop; only where no reference length is known.",
        disease="long",
        test=ShareTest(slack=0.05, max_baseline=0.3),
        read=_truncation,
    )
)
SIGNALS.add("loops")(
    Signal(
        title="looping rollouts",
        unit="share",
        help="Share that ends in a loop.",
        disease="long",
        test=ShareTest(slack=0.005, max_baseline=MAX_EXPECTED_LOOPS),
        read=_loops,
    )
)
SIGNALS.add("stop_mass")(
    Signal(
        title="the student's stop probability over the teacher's",
        unit="nats",
        help="Log ratio of the two probabilities of a stop on the same states: it sinks before lengths grow.",
        disease="long",
        test=MeanTest(sign=-1.0, slack=math.log(2), max_baseline=math.log(8), floor=0.15, alternatives=(0.5, 1.5)),
        read=_stop_mass,
        alone=0.5,
    )
)
SIGNALS.add("short")(
    Signal(
        title="lengths under their prompts' references",
        unit="nats",
        help="Mean log of length over the teacher's on the same prompt: far below, the student answers next to nothing.",
        disease="short",
        test=MeanTest(sign=-1.0, slack=0.4, slack_spreads=0.12, max_baseline=math.log(2)),
        read=_lengths,
    )
)
SIGNALS.add("kl")(
    Signal(
        title="KL to the teacher, over its running level,",
        unit="log nats",
        help="Log of mean KL against its running level. It also rises when prompts change: alone it moves the brake only, half way.",
        disease="drift",
        test=MeanTest(sign=1.0, slack=math.log(2.5), half_life_steps=50.0, floor=0.15, alternatives=(0.3, 1.0), max_step_nats=6.0),
        read=_kl,
        alone=0.5,
    )
)


@dataclass(frozen=True, slots=True)
class Signals:
    """What the law decides on, and what people look at beside it. None: not measured. Over the rollouts since the reading before."""

    time_s: float | None = None
    """When it was read, seconds since the epoch."""
    data_age_s: float | None = 0.0
    """How long before that the run itself was last seen; None: unknown, which counts as too old."""
    blind: bool = False
    """The source gave nothing that can be trusted."""
    blind_reason: str = ""
    steps_spanned: float | None = None
    """Learner steps between the two readings."""
    num_rollouts: float | None = None
    """Rollouts that came to an end other than an error."""
    observations: Mapping[str, Observation] = field(default_factory=dict)
    """Name of the signal -> what it read."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Name of a signal whose reading failed -> the error."""
    length_mean_tokens: float | None = None
    length_p95_tokens: float | None = None
    length_max_tokens: float | None = None
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    truncation_rate: float | None = None
    """Cut by the job's own cap, the window or the in-engine loop stop, before any filter."""
    governor_cut_rate: float | None = None
    """Cut by a cap that the governor had lowered."""
    expected_cut_rate: float | None = None
    """Share that the reference itself would have beyond the tail's threshold, or beyond the cap where that is lower."""
    loop_rate: float | None = None
    kl_nats: float | None = None
    stop_mass_student: float | None = None
    """Mean over positions of the student's summed probability of all stop ids."""
    stop_mass_teacher: float | None = None
    """The teacher's, at the same positions."""
    stop_density_per_token: float | None = None
    """Stop supervision: (1 - share cut by any cap) / mean length."""
    teacher_stop_logprob_nats: float | None = None
    """Median log-prob of the teacher's stop class at sampled stops."""
    eval_accuracy: float | None = None
    eval_truncation: float | None = None
    staleness_steps: float | None = None

    def cleaned(self) -> "Signals":
        """What is not finite, absurdly large, or negative where it cannot be, becomes None; such an observation is dropped."""
        values = {name: self._clean(name, getattr(self, name)) for name in self.__slots__ if name != "observations"}
        seen = {name: each for name, each in self.observations.items() if _is_sound(each)}
        return Signals(**values, observations=seen)

    def _clean(self, name: str, value: Any) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return value
        signed = name in ("kl_nats", "teacher_stop_logprob_nats")
        return value if math.isfinite(value) and abs(value) <= LARGEST and (signed or value >= 0) else None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Signals":
        seen = {name: Observation(**known(Observation, each)) for name, each in values.get("observations", {}).items()}
        return cls(**known(cls, {**values, "observations": seen}))


def compute(previous: Snapshot, current: Snapshot) -> Signals:
    """The signals between two snapshots of one run."""
    growth = Growth(previous, current)
    num_rollouts, cut_any = _ends(growth)
    cut_share = ratio(growth.of("opd_governor_cut_rollouts_total") or 0.0, num_rollouts)
    ended_early = ratio(cut_any, num_rollouts)
    mean = ratio(growth.of("opd_rollout_tokens_total"), num_rollouts)
    kept_share = None if ended_early is None else 1.0 - ended_early
    has_rollouts = num_rollouts is not None and num_rollouts > 0
    seen, faults = _read_all(growth) if has_rollouts else ({}, {})
    lengths, longest = "opd_rollout_length_tokens", current.gauge("opd_rollout_length_max_tokens")
    return Signals(
        steps_spanned=growth.of("opd_learner_steps_total"),
        num_rollouts=num_rollouts,
        observations=seen,
        faults=faults,
        length_mean_tokens=mean,
        length_p95_tokens=growth.quantile(lengths, 0.95),
        length_max_tokens=growth.longest(lengths, longest) if has_rollouts else None,
        reference_mean_tokens=current.gauge("opd_length_reference_tokens", stat="mean"),
        reference_p99_tokens=current.gauge("opd_length_reference_tokens", stat="p99"),
        truncation_rate=None if ended_early is None or cut_share is None else max(0.0, ended_early - cut_share),
        governor_cut_rate=cut_share,
        expected_cut_rate=growth.ratio("opd_length_tail_expected_total", "opd_length_scored_total"),
        loop_rate=ratio(growth.of("opd_rollout_loops_total"), num_rollouts),
        kl_nats=growth.ratio("opd_kl_nats_total", "opd_kl_tokens_total"),
        stop_mass_student=growth.ratio("opd_stop_mass_student_total", "opd_stop_mass_tokens_total"),
        stop_mass_teacher=growth.ratio("opd_stop_mass_teacher_total", "opd_stop_mass_tokens_total"),
        stop_density_per_token=ratio(kept_share, mean),
        teacher_stop_logprob_nats=growth.quantile("opd_stop_teacher_logprob", 0.5, form="class"),
        eval_accuracy=current.gauge("opd_eval_accuracy_ratio", decoding="greedy"),
        eval_truncation=current.gauge("opd_eval_truncation_ratio", decoding="greedy"),
        staleness_steps=growth.ratio("opd_sample_staleness_steps_sum", "opd_sample_staleness_steps_count"),
    )


def _read_all(growth: Growth) -> tuple[dict[str, Observation], dict[str, str]]:
    """What each signal reads, and the errors. A signal that raises is not measured, and the decision says so; the run goes on."""
    seen: dict[str, Observation] = {}
    faults: dict[str, str] = {}
    for name, signal in SIGNALS.items():
        try:
            observation = signal.read(growth)
            if observation is not None and not isinstance(observation, Observation):
                raise TypeError(f"read returned {type(observation).__name__}, not an Observation")
        except Exception as error:
            faults[name] = " ".join(f"{type(error).__name__}: {error}".split())
        else:
            seen |= {} if observation is None else {name: observation}
    return seen, faults


def _is_sound(seen: Observation) -> bool:
    numbers = (seen.value, seen.num, seen.expected, seen.prompts or 0.0, seen.spread, seen.variance or 0.0)
    return all(math.isfinite(number) and abs(number) <= LARGEST for number in numbers) and seen.num > 0 and min(numbers[4:]) >= 0
