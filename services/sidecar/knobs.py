"""What can be turned in a TRL trainer while it runs: one declaration per knob, each with the attribute that the trainer really reads.

`args.max_completion_length`, the obvious cap, is copied when the trainer is built and moves nothing afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd_governor.actors.extensions import Kind
from opd_governor.actors.trajectory import LengthLimits


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing to turn."""

    reads: Callable[[Any], float | None]
    """The trainer's value now; None: this trainer has no such knob."""
    writes: Callable[[Any, float], None]
    wanted: Callable[[LengthLimits, float], float | None]
    """From the limits and the value before anything was turned; None: left alone."""


KNOBS: Kind[Knob] = Kind("knob of TRL's trainers")


def _engines(trainer: Any) -> list[tuple[Any, str]]:
    """(object, attribute) of every place that is read at each generation."""
    config = getattr(trainer, "generation_config", None)
    places = [(config, "max_new_tokens")] if config is not None else []
    if getattr(trainer, "use_vllm", False) and getattr(trainer, "vllm_generation", None) is not None:
        places.append((trainer.vllm_generation, "max_completion_length"))
    worker = getattr(trainer, "rollout_worker", None)
    if worker is not None and hasattr(worker, "max_tokens"):
        places.append((worker, "max_tokens"))
    return places


def _read_cap(trainer: Any) -> float | None:
    places = _engines(trainer)
    return float(getattr(*places[-1])) if places and getattr(*places[-1]) else None


def _write_cap(trainer: Any, value: float) -> None:
    for place, name in _engines(trainer):
        setattr(place, name, int(value))


KNOBS.add("cap")(Knob(_read_cap, _write_cap, lambda limits, held: min(held, limits.cap_tokens)))


def _read_beta(trainer: Any) -> float | None:
    """GRPO's weight of KL to the reference. At 0 no reference model was built, so there it cannot be raised.

    In distillation trainers `beta` says which divergence is taken: that is never moved.
    """
    has_reference = getattr(trainer, "ref_model", None) is not None or getattr(trainer, "beta", 0.0) > 0
    return float(trainer.beta) if hasattr(trainer, "reward_funcs") and has_reference and hasattr(trainer, "beta") else None


KNOBS.add("beta")(
    Knob(_read_beta, lambda trainer, value: setattr(trainer, "beta", value), lambda limits, held: max(held, limits.reference_kl_weight))
)


def _read_lmbda(trainer: Any) -> float | None:
    """GOLD's share of batches sampled from the student; the rest are the data set's own, complete answers."""
    return float(trainer.lmbda) if isinstance(getattr(trainer, "lmbda", None), int | float) else None


KNOBS.add("lmbda")(
    Knob(
        _read_lmbda,
        lambda trainer, value: setattr(trainer, "lmbda", value),
        # A golden weight g beside an objective of weight 1 is a share g / (1 + g) of golden answers.
        lambda limits, held: min(held, 1.0 / (1.0 + limits.golden_weight)),
    )
)
