"""What each trainer's keys mean: one declaration per trainer. Pure.

Keys match whole or behind a `/`, so `train/completions/mean_length` is `completions/mean_length`. The first name that a log has wins.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_governor.actors.extensions import Kind
from opd_governor.services.sidecar.formats import Row
from opd_governor.services.sidecar.seen import StepSeen

STEP_NAMES = (
    "step",
    "global_step",
    "_step",
    "train/step",
    "rollout/step",
    "training/global_step",
    "iteration",
    "iter",
    "trainer/global_step",
)
SKIPPED = ("eval", "val", "validation", "test")
"""Held-out answers are another population."""
MAX_TOKENS = 1e9
MAX_STEPS = 20_000
"""Steps judged; of a longer log as many, evenly chosen."""
SAMPLE_ROWS = 5000
"""Rows looked at to recognise a trainer."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A trainer's names for the fields of StepSeen."""

    words: str
    names: Mapping[str, tuple[str, ...]]
    """Field -> keys, best first. A key beginning with `1-` is one minus the value."""
    padded_clip_ratio: bool = False
    """Its truncation is the share of answers as long as the batch's longest: trusted only where the longest is the cap."""
    generic: bool = False
    """Tried when no trainer of the others is recognised."""
    notes: tuple[str, ...] = field(default=())
    """What its figures cannot tell."""


TRAINERS: Kind[Vocabulary] = Kind("trainer's log")

_TRL = {
    "length_mean_tokens": ("completions/mean_length", "completion_length"),
    "length_max_tokens": ("completions/max_length",),
    "length_min_tokens": ("completions/min_length",),
    "terminated_mean_tokens": ("completions/mean_terminated_length",),
    "truncation": ("completions/clipped_ratio", "completions/clip_ratio"),
    "kl_nats": ("kl", "teacher_kl", "jsd"),
    "entropy_nats": ("entropy", "entropy/mean"),
    "reward": ("reward", "rewards/accuracy_reward/mean"),
    "loss": ("loss",),
    "grad_norm": ("grad_norm",),
    "learning_rate": ("learning_rate",),
    "cap_tokens": ("governor/cap_tokens", "max_completion_length"),
}
TRAINERS.add("trl")(
    Vocabulary(
        "TRL",
        _TRL,
        notes=("TRL counts an answer as cut when its last id is no stop id of the tokenizer: custom stop strings look cut.",),
    )
)
TRAINERS.add("ours")(
    Vocabulary(
        "this project",
        {
            "length_mean_tokens": ("length_mean",),
            "length_p95_tokens": ("length_p95",),
            "length_max_tokens": ("length_max",),
            "truncation": ("truncation",),
            "loops": ("loops",),
            "num_rollouts": ("num_rollouts",),
            "kl_nats": ("kl_nats",),
            "entropy_nats": ("entropy_nats",),
            "reward": ("eval_sampled_accuracy", "eval_accuracy"),
            "loss": ("loss",),
            "grad_norm": ("grad_norm",),
            "learning_rate": ("learning_rate",),
            "cap_tokens": ("cap_tokens",),
        },
    )
)
TRAINERS.add("verl")(
    Vocabulary(
        "verl",
        {
            "length_mean_tokens": ("response_length/mean", "response_length_non_aborted/mean"),
            "length_max_tokens": ("response_length/max", "response_length_non_aborted/max"),
            "length_min_tokens": ("response_length/min", "response_length_non_aborted/min"),
            "truncation": ("response_length/clip_ratio", "response_length_non_aborted/clip_ratio"),
            "kl_nats": ("distillation/abs_loss", "distillation/loss", "actor/kl_loss", "actor/ppo_kl"),
            "entropy_nats": ("actor/entropy", "actor/entropy_loss"),
            "reward": ("critic/rewards/mean", "critic/score/mean"),
            "loss": ("actor/pg_loss",),
            "grad_norm": ("actor/grad_norm",),
            "learning_rate": ("actor/lr",),
        },
        padded_clip_ratio=True,
        notes=("verl's clip_ratio is the share of answers as long as the batch's longest: it is believed only where that is the cap.",),
    )
)
TRAINERS.add("nemo-rl")(
    Vocabulary(
        "NeMo-RL",
        {
            "length_mean_tokens": ("mean_gen_tokens_per_sample", "gen_tokens_per_sample/mean", "Mean Generation Length"),
            "length_p95_tokens": ("gen_tokens_per_sample/p95", "max_gen_tokens_per_turn/p95"),
            "length_max_tokens": ("max_gen_tokens_per_sample", "gen_tokens_per_sample/max", "Max Generation Length"),
            "truncation": ("truncation_rate", "Truncation Rate", "1-natural_termination_rate"),
            "kl_nats": ("kl_loss", "kl_penalty"),
            "entropy_nats": ("approx_entropy",),
            "reward": ("train/reward", "Avg Reward", "reward"),
            "loss": ("train/loss", "Loss", "loss"),
            "grad_norm": ("grad_norm",),
            "learning_rate": ("train/lr", "lr"),
        },
    )
)
TRAINERS.add("prime-rl")(
    Vocabulary(
        "prime-rl",
        {
            "length_mean_tokens": (
                "agg/all/num_output_tokens/mean",
                "all/num_output_tokens/mean",
                "num_output_tokens/mean",
                "seq_len/mean",
            ),
            "length_p95_tokens": ("agg/all/num_output_tokens/p90", "all/num_output_tokens/p90", "num_output_tokens/p90"),
            "length_max_tokens": ("agg/all/num_output_tokens/max", "all/num_output_tokens/max", "num_output_tokens/max", "seq_len/max"),
            "length_min_tokens": ("agg/all/num_output_tokens/min", "all/num_output_tokens/min", "num_output_tokens/min"),
            "truncation": (
                "agg/all/is_truncated/mean",
                "all/is_truncated/mean",
                "is_truncated/mean",
                "stop_condition/generation_truncated",
                "Truncation",
            ),
            # prime-rl logs teacher minus student; the sign is turned when it is read.
            "kl_nats": ("ref_kl", "ref_kl/all/mean", "mismatch_kl/all/mean", "Mismatch KL"),
            "entropy_nats": ("entropy/all/mean", "Entropy"),
            "reward": ("agg/all/reward/mean", "all/reward/mean", "reward/mean", "Reward"),
            "loss": ("loss/mean", "Loss"),
            "grad_norm": ("optim/grad_norm", "Grad. Norm"),
            "learning_rate": ("optim/lr", "LR"),
        },
    )
)
TRAINERS.add("slime")(
    Vocabulary(
        "slime or miles",
        {
            "length_mean_tokens": ("rollout/response_len/mean", "rollout/response_lengths", "raw_response_length/response_length_mean"),
            "length_max_tokens": ("rollout/response_len/max", "raw_response_length/response_length_max"),
            "length_min_tokens": ("rollout/response_len/min",),
            "truncation": ("rollout/truncated_ratio", "rollout/truncated", "raw_response_length/response_length_clip_ratio"),
            "loops": ("rollout/repetition_frac",),
            "kl_nats": ("train/opd_reverse_kl", "train/kl_loss", "train/ppo_kl"),
            "entropy_nats": ("train/entropy_loss",),
            "reward": ("rollout/raw_reward", "rollout/rewards"),
            "loss": ("train/loss",),
            "grad_norm": ("train/grad_norm",),
            "learning_rate": ("train/lr-pg_0",),
        },
        notes=("slime's repetition_frac is 0 by construction for answers under about 3,000 tokens.",),
    )
)
TRAINERS.add("openrlhf")(
    Vocabulary(
        "OpenRLHF",
        {
            "length_mean_tokens": ("rollout/response_length_mean", "train/response_length", "response_length", "gen_len"),
            "truncation": ("rollout/truncated_rate", "truncated_rate"),
            "kl_nats": ("kl", "ppo_kl"),
            "entropy_nats": ("entropy_loss",),
            "reward": ("rollout/reward_mean", "train/reward", "reward"),
            "loss": ("policy_loss",),
            "learning_rate": ("actor_lr",),
        },
    )
)
TRAINERS.add("tinker")(
    Vocabulary(
        "tinker-cookbook",
        {
            "length_mean_tokens": ("env/all/ac_tokens_per_turn", "ac_tokens_per_turn"),
            "kl_nats": ("teacher_kl",),
            "entropy_nats": ("optim/entropy",),
            "reward": ("env/all/reward/total", "reward/total"),
            "learning_rate": ("optim/lr",),
        },
        notes=("no truncation is logged: answers that were cut look like answers that ended.",),
    )
)
TRAINERS.add("generic")(
    Vocabulary(
        "a trainer not known here, by the look of its names",
        {
            "length_mean_tokens": (
                "mean_length", "length_mean", "length/mean", "avg_length", "response_length", "mean_response_length",
                "completion_length", "mean_completion_length", "avg_response_length", "num_tokens/mean", "gen_length", "output_length",
                "response_length_mean", "response_len", "mean_tokens",
            ),
            "length_p95_tokens": ("length_p95", "p95_length", "length/p95", "response_length_p95"),
            "length_max_tokens": ("max_length", "length_max", "length/max", "response_length_max", "max_response_length"),
            "length_min_tokens": ("min_length", "length_min", "length/min"),
            "truncation": (
                "truncation", "truncated", "truncation_rate", "truncated_ratio", "truncation_ratio", "clipped_ratio", "truncated_frac",
                "truncated_rate", "frac_truncated", "truncation_frac", "cut_ratio",
            ),
            "loops": ("loops", "loop_rate", "repetition", "repetition_rate", "repeat_rate", "repetition_frac"),
            "kl_nats": ("kl", "reverse_kl", "mean_kl", "kl_loss", "teacher_kl"),
            "entropy_nats": ("entropy",),
            "reward": ("reward", "mean_reward", "reward/mean", "accuracy", "score"),
            "loss": ("loss", "train_loss"),
            "grad_norm": ("grad_norm",),
            "learning_rate": ("learning_rate", "lr"),
            "cap_tokens": ("cap_tokens", "max_new_tokens", "max_tokens", "cap"),
        },
        generic=True,
    )
)  # fmt: skip
LENGTH_FIELDS = frozenset({"length_mean_tokens", "length_max_tokens", "length_p95_tokens", "truncation"})


def recognise(rows: Sequence[Row]) -> tuple[str, dict[str, str]]:
    """The trainer whose names fit best, and its keys: key of the log -> field of StepSeen. Empty where none fits."""
    seen = _keys(rows)
    best, found = "generic", dict[str, str]()
    score = (0, 0, False)
    for name, vocabulary in TRAINERS.items():
        keys = _match(seen, vocabulary)
        lengths = sum(field in LENGTH_FIELDS for field in keys.values())
        merit = (lengths, len(keys), not vocabulary.generic)
        # Names of another trainer must not be taken by chance: a generic reading needs to know more about length.
        if keys and merit > score:
            best, found, score = name, keys, merit
    return best, found


def _match(keys: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, str]:
    tails: dict[str, list[str]] = {}
    for key in keys:
        parts = key.lower().split("/")
        if parts[0].split("_")[0] in SKIPPED:
            continue
        for start in range(len(parts)):
            tails.setdefault("/".join(parts[start:]), []).append(key)
    found: dict[str, str] = {}
    for name, candidates in vocabulary.names.items():
        for candidate in candidates:
            matching = tails.get(candidate.removeprefix("1-").lower(), [])
            if matching:
                # Of several (one for each data source) the aggregate, which has the shortest name or most rows.
                key = max(matching, key=lambda key: (keys[key], "agg" in key, -len(key)))
                found.setdefault(key, name)
                break
    return found


def to_steps(rows: Sequence[Row]) -> tuple[str, list[StepSeen]]:
    """The trainer's name and its steps in rising order; of a step logged twice (a run that was resumed) the later row counts."""
    name, keys = recognise(rows)
    vocabulary = TRAINERS[name]
    inverse = {key for key, field in keys.items() if f"1-{key.rpartition('/')[2]}" in vocabulary.names.get(field, ())}
    negative = {key for key in keys if key.rpartition("/")[2] == "ref_kl"}
    step_key = _step_key(rows)
    numbered = [(index if step_key is None else _whole(row.get(step_key)), row) for index, row in enumerate(rows)]
    kept = _thinned({step for step, _ in numbered if step is not None})
    merged: dict[int, dict[str, float]] = {}
    for step, row in numbered:
        if step is None or (kept is not None and step not in kept):
            continue
        told = {}
        for key, field_name in keys.items():
            value = _value(field_name, row.get(key))
            if value is not None:
                told[field_name] = 1.0 - value if key in inverse else -value if key in negative else value
        if told:
            merged.setdefault(step, {}).update(told)
    return name, [StepSeen(step=step, **told) for step, told in sorted(merged.items())]  # type: ignore[arg-type]


def _thinned(steps: set[int]) -> frozenset[int] | None:
    """Of very many steps evenly chosen ones; None: all of them."""
    if len(steps) <= MAX_STEPS:
        return None
    return frozenset(sorted(steps)[:: -(-len(steps) // MAX_STEPS)])


def _keys(rows: Sequence[Row]) -> Counter[str]:
    """How often each key occurs, in a sample from all over the log."""
    seen: Counter[str] = Counter()
    for row in rows[:: max(1, len(rows) // SAMPLE_ROWS)]:
        seen.update(row.keys())
    return seen


def _step_key(rows: Sequence[Row]) -> str | None:
    known = ("step", "global_step", "_step", "iteration", "iter")
    seen = {key: count for key, count in _keys(rows).items() if key.rpartition("/")[2].lower() in known}
    if not seen:
        return None
    ranked = {name: rank for rank, name in enumerate(STEP_NAMES)}
    return max(seen, key=lambda key: (seen[key], -ranked.get(key.lower(), len(ranked))))


def _whole(value: Any) -> int | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and 0 <= number < 1e12 else None


def _value(name: str, value: Any) -> float | None:
    """A number that this field can have; None otherwise."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if name in ("truncation", "loops"):
        return number if 0 <= number <= 1 else None
    if name.endswith("_tokens"):
        # A terminated mean of 0 says that no answer ended, not that answers are empty.
        return number if (number > 0 or name != "terminated_mean_tokens") and 0 <= number <= MAX_TOKENS else None
    return number
