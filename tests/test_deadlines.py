"""Deadlines of remote calls: how they follow from the work, and the message when one passes."""

import asyncio

import pytest
from ray.exceptions import RayTaskError

from opd_governor.actors.deadlines import FIRST_S, HungError, Pace, first_line, within


def test_a_deadline_grows_with_the_work_and_never_falls_below_the_floor() -> None:
    pace = Pace(floor_s=60.0)
    pace.observe(tokens=6000, seconds=9.0)
    assert pace.deadline_s(60_000) == pytest.approx(900.0)
    assert pace.deadline_s(10) == 60.0


def test_before_anything_was_measured_a_large_model_may_load() -> None:
    assert Pace().deadline_s(1) >= FIRST_S


def test_a_stall_is_remembered_for_a_while_and_then_forgotten() -> None:
    pace = Pace(floor_s=0.001)
    pace.observe(100, 10.0)
    pace.observe(100, 0.1)
    assert pace.deadline_s(100) == pytest.approx(90.0)
    for _ in range(100):
        pace.observe(100, 0.1)
    assert pace.deadline_s(100) == pytest.approx(1.0)


async def test_the_watchdog_says_what_is_waited_for_before_it_gives_up() -> None:
    lines: list[str] = []
    with pytest.raises(HungError, match=r"waited 0\.1 s for 3 scores from teacher t, deadline 0\.1 s"):
        await within(asyncio.sleep(60), 0.1, lambda: "3 scores from teacher t", lines.append)
    assert len(lines) == 1
    assert "for 3 scores from teacher t; given up at 0.1 s" in lines[0]


async def test_an_answer_in_time_says_nothing_and_an_error_is_passed_on() -> None:
    lines: list[str] = []
    assert await within(asyncio.sleep(0, "done"), 1.0, lambda: "x", lines.append) == "done"

    async def fail() -> None:
        raise KeyError("k")

    with pytest.raises(KeyError):
        await within(fail(), 1.0, lambda: "x", lines.append)
    assert lines == []


def test_what_happened_in_an_actor_is_said_in_its_own_words() -> None:
    lost = RayTaskError("load_weights", "a page of frames\n" * 30, ValueError("no module named 'lm_head'\nin a model"))
    assert first_line(lost) == "ValueError: no module named 'lm_head'"
    assert first_line(RuntimeError("plain")) == "RuntimeError: plain"
    assert first_line(lost.as_instanceof_cause()) == "ValueError: no module named 'lm_head'"
