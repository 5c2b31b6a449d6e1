"""Teachers that should follow the student: what is said of them before anything starts."""

from typing import Any

import pytest

from opd_governor.services.inputs.follow import check_follow
from opd_governor.services.job.settings import Job


def lines(*teachers: dict[str, Any], **groups: dict[str, Any]) -> list[str]:
    named = [{"model": "m", "name": f"t{index}"} | teacher for index, teacher in enumerate(teachers)]
    tree = {"name": "a", "student": {"model": "m"}, "teacher": named, "data": {"prompts": {"path": "p"}}} | groups
    return [f"{found.status} {found.line()}" for found in check_follow(Job.model_validate(tree))]


def test_how_each_follows_is_said() -> None:
    assert lines({}) == []
    assert lines({"follow": {"every_steps": 8}}, {}) == ["pass teacher t0 takes the student's weights every 8 steps"]
    assert lines({"follow": {"ema": 0.99}}) == ["pass teacher t0 averages the student's weights, ema 0.99"]


@pytest.mark.parametrize(
    ("teacher", "groups", "line"),
    [
        ({"backend": "vllm"}, {}, "needs another back end than vllm; set backend to torch"),
        ({"model": "n"}, {}, "begins as a copy of the student, and its model is n; set it to m"),
        ({}, {"student": {"model": "m", "lora": {}}}, "needs a student all of whose weights are trained; remove student.lora"),
        ({}, {"objective": {"support": "full"}}, "changes the head that objective.support full keeps in the learner; set support to"),
    ],
)
def test_what_stands_against_it_is_one_line(teacher: dict[str, Any], groups: dict[str, Any], line: str) -> None:
    (told,) = lines({"follow": {"ema": 0.9}} | teacher, **groups)
    assert told.startswith(f"fail teacher t0: follow {line}")


def test_two_ways_at_once_are_refused() -> None:
    first, second = lines({"follow": {"ema": 0.9}}, {"follow": {"ema": 0.8}})
    assert first.startswith("pass")
    assert second.startswith("fail teacher t1: follow differs from another teacher's; let all that follow do it alike")
