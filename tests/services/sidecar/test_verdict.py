"""The verdicts on made-up runs whose illness is known."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.services.sidecar.seen import StepSeen
from opd_governor.services.sidecar.verdict import SICK, diagnose


def run(draw: Callable[[int, random.Random], dict[str, float | None]], num_steps: int = 80, seed: int = 0) -> list[StepSeen]:
    rng = random.Random(seed)
    return [StepSeen(step=step, **draw(step, rng)) for step in range(1, num_steps + 1)]  # type: ignore[arg-type]


def noisy(rng: random.Random, level: float) -> float:
    return level * rng.uniform(0.95, 1.05)


def cap_too_low(step: int, rng: random.Random) -> dict[str, float | None]:
    return {
        "length_mean_tokens": noisy(rng, 228),
        "length_max_tokens": 256.0,
        "truncation": rng.uniform(0.6, 0.75),
        "terminated_mean_tokens": noisy(rng, 170),
    }


def never_stops(step: int, rng: random.Random) -> dict[str, float | None]:
    return {
        "length_mean_tokens": noisy(rng, 700),
        "length_max_tokens": 1024.0,
        "truncation": rng.uniform(0.55, 0.7),
        "terminated_mean_tokens": noisy(rng, 90),
    }


def all_cut(step: int, rng: random.Random) -> dict[str, float | None]:
    return {"length_mean_tokens": 256.0, "length_max_tokens": 256.0, "truncation": 1.0}


def slowly_inflating(step: int, rng: random.Random) -> dict[str, float | None]:
    return {
        "length_mean_tokens": noisy(rng, 100 + step),
        "length_max_tokens": 512.0 if step > 40 else noisy(rng, 300),
        "truncation": max(0.0, (step - 40) / 130),
    }


def looping(step: int, rng: random.Random) -> dict[str, float | None]:
    return {
        "length_mean_tokens": noisy(rng, 300),
        "truncation": 0.02,
        "loops": rng.uniform(0.2, 0.3) if step > 30 else rng.uniform(0, 0.02),
    }


def shrinking(step: int, rng: random.Random) -> dict[str, float | None]:
    return {"length_mean_tokens": noisy(rng, max(8.0, 200 - 5 * step)), "truncation": 0.0, "reward": 0.5 - step / 400}


def concise(step: int, rng: random.Random) -> dict[str, float | None]:
    return {"length_mean_tokens": noisy(rng, max(60.0, 200 - 5 * step)), "truncation": 0.0, "reward": 0.3 + step / 200}


def thinking_longer(step: int, rng: random.Random) -> dict[str, float | None]:
    return {"length_mean_tokens": noisy(rng, 200 + 4 * step), "truncation": 0.01, "reward": 0.3 + step / 200 + rng.uniform(-0.01, 0.01)}


def learns_to_stop(step: int, rng: random.Random) -> dict[str, float | None]:
    return {
        "length_mean_tokens": noisy(rng, max(120.0, 500 - 10 * step)),
        "length_max_tokens": 512.0,
        "truncation": max(0.01, 0.9 - step / 40),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("draw", "kinds"),
    [
        (cap_too_low, {"cap_too_low"}),
        (never_stops, {"never_stops"}),
        (all_cut, {"truncated_from_start"}),
        (slowly_inflating, {"inflating"}),
        (looping, {"looping"}),
        (shrinking, {"shrinking"}),
        (concise, {"healthy"}),
        (thinking_longer, {"healthy"}),
        (learns_to_stop, {"healthy"}),
    ],
)
def test_verdict(draw: Callable[[int, random.Random], dict[str, float | None]], kinds: set[str], seed: int) -> None:
    diagnosis = diagnose(run(draw, seed=seed))
    assert diagnosis.kind in kinds, diagnosis
    assert diagnosis.sick == (diagnosis.kind in SICK)
    assert bool(diagnosis.advice) == diagnosis.sick


def test_a_cap_too_low_is_told_before_inflation_whatever_else_grows() -> None:
    """The commonest sick log: cut from the first step, and longer with every step because the shorter answers go."""
    steps = [
        StepSeen(step=step, length_mean_tokens=200 + step / 2, length_max_tokens=256.0, truncation=0.6 + step / 250)
        for step in range(1, 90)
    ]
    diagnosis = diagnose(steps)
    assert diagnosis.kind in ("cap_too_low", "truncated_from_start")
    assert "cap" in diagnosis.advice[0].what


def test_truncation_alone_is_enough() -> None:
    diagnosis = diagnose([StepSeen(step=step, truncation=0.01 if step < 40 else 0.8) for step in range(80)])
    assert (diagnosis.kind, diagnosis.since_step) == ("collapsed", 40)
    assert any("how long" in text for text in diagnosis.unknown)


def test_a_mean_alone_is_enough_and_what_it_cannot_tell_is_said() -> None:
    rng = random.Random(1)
    diagnosis = diagnose([StepSeen(step=step, length_mean_tokens=noisy(rng, 100 if step < 40 else 400)) for step in range(80)])
    assert diagnosis.kind == "inflating"
    assert abs((diagnosis.since_step or 0) - 40) <= 2
    assert any("cut" in text for text in diagnosis.unknown)


def test_a_mean_that_stands_at_one_value_is_a_cap() -> None:
    diagnosis = diagnose([StepSeen(step=step, length_mean_tokens=256.0) for step in range(20)])
    assert diagnosis.kind == "truncated_from_start"
    assert diagnosis.cap_tokens == 256


def test_a_padded_clip_ratio_is_believed_only_where_the_longest_is_the_cap() -> None:
    steps = [StepSeen(step=step, length_mean_tokens=100.0, length_max_tokens=150.0 + step % 30, truncation=0.3) for step in range(60)]
    assert diagnose(steps, padded_clip_ratio=True).kind == "healthy"
    assert diagnose(steps).sick


def test_a_run_that_learned_to_stop_and_lost_it_again_has_collapsed() -> None:
    shares = [1.0] * 8 + [0.5, 0.2] + [0.02] * 20 + [0.4] * 3 + [0.95] * 30
    diagnosis = diagnose([StepSeen(step=step, truncation=share, length_max_tokens=512.0) for step, share in enumerate(shares)])
    assert diagnosis.kind == "collapsed"
    assert 29 <= (diagnosis.since_step or 0) <= 34


def test_a_run_that_is_still_learning_to_stop_is_no_longer_sick() -> None:
    shares = [1.0] * 5 + [0.14 if step % 2 else 0.12 for step in range(40)]
    diagnosis = diagnose([StepSeen(step=step, truncation=share, length_max_tokens=512.0) for step, share in enumerate(shares)])
    assert (diagnosis.kind, diagnosis.sure) == ("healthy", "not sure")


def test_few_steps_are_too_few() -> None:
    diagnosis = diagnose([StepSeen(step=step, truncation=1.0) for step in range(3)])
    assert (diagnosis.kind, diagnosis.sure, diagnosis.sick) == ("unknown", "not sure", False)


def test_the_governor_acts_before_the_collapse() -> None:
    rng = random.Random(0)
    steps = []
    for step in range(1, 100):
        grown = max(0, step - 40)
        steps.append(
            StepSeen(
                step=step,
                num_rollouts=32,
                length_mean_tokens=noisy(rng, 100 + 6 * grown),
                length_max_tokens=min(512.0, noisy(rng, 200 + 20 * grown)),
                truncation=min(1.0, max(0.0, (grown - 16) / 20)),
            )
        )
    diagnosis = diagnose(steps)
    assert diagnosis.kind == "collapsed"
    assert diagnosis.governor is not None
    assert diagnosis.since_step is not None
    assert 40 <= diagnosis.governor.step <= diagnosis.since_step


FIELD = st.one_of(st.none(), st.floats(0, 1e9))
SHARE = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD, SHARE, SHARE, FIELD, st.one_of(st.none(), st.floats(-1e6, 1e6))), max_size=60), st.booleans())
def test_any_steps_get_a_verdict(rows: list[tuple[float | None, ...]], padded: bool) -> None:
    names = ("length_mean_tokens", "length_max_tokens", "truncation", "loops", "cap_tokens", "reward")
    steps = [StepSeen(step=step, **dict(zip(names, row, strict=True))) for step, row in enumerate(rows)]  # type: ignore[arg-type]
    diagnosis = diagnose(steps, padded_clip_ratio=padded)
    assert diagnosis.sentence
    assert diagnosis.since_step is None or diagnosis.first_step <= diagnosis.since_step <= diagnosis.last_step  # type: ignore[operator]
