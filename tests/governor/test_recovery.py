"""Where inflation is there: going back, pushing, braking, the end of the run."""

import itertools
from dataclasses import replace

import pytest

from opd_governor.actors.governor.actuators import ACTUATORS
from opd_governor.actors.governor.law import AFTER_PUSH, LOST, ONSET
from opd_governor.actors.governor.policy import Policy
from tests.governor.readings import HEALTHY, LOST_RUN, run, signals


def test_where_inflation_is_there_the_brake_is_let_go_and_golden_answers_come_in_full():
    policy = Policy(actuators=tuple(name for name in ACTUATORS if name != "rollback"))
    rambling = signals(tail=0.35, length=0.5, cut=0.35)
    decisions = run([HEALTHY] * 5 + [rambling] * 8, policy)
    pushed = next(d for d in decisions if d.after.course == "push")
    assert pushed.after.severity >= ONSET
    assert pushed.limits.lr_scale == 1
    assert pushed.limits.golden_weight == policy.max_golden_weight
    assert pushed.limits.cap_tokens == 88  # 1.1 x the reference's p99
    assert "push toward complete answers" in pushed.reason


def test_a_drug_that_does_not_work_is_changed():
    policy = Policy(actuators=tuple(name for name in ACTUATORS if name != "rollback"))
    decisions = run([HEALTHY] * 5 + [LOST_RUN] * 40, policy)
    courses = [course for course, _ in itertools.groupby(d.after.course for d in decisions)]
    assert courses[:4] == ["prevent", "push", "brake", "push"]
    assert not any(d.command for d in decisions)


def test_an_onset_is_answered_by_going_back_once_with_the_brake_on():
    rambling = signals(tail=0.35, length=0.5, cut=0.35)
    decisions = run([HEALTHY] * 20 + [rambling] * 4 + [HEALTHY] * 100)
    (back,) = [d for d in decisions if d.command]
    assert back.before.severity >= ONSET
    assert decisions.index(back) in (21, 22)
    assert (back.command, back.after.pressure) == ("rollback", 1)
    assert back.limits.lr_scale == pytest.approx(Policy().min_lr_scale)
    assert back.reason.endswith("roll back to the last healthy checkpoint")
    assert decisions[-1].after.pressure == 0, "the brake is let go step by step"


def test_one_bad_batch_is_no_onset():
    decisions = run([HEALTHY] * 20 + [replace(LOST_RUN, num_rollouts=512)] + [HEALTHY] * 20)
    assert not any(d.command for d in decisions)
    assert decisions[20].after.severity > LOST
    assert decisions[20].after.pressure > 0


def test_a_student_that_was_never_sound_is_pushed_at_once():
    rambling = signals(tail=0.35, length=0.5, cut=0.35)
    decisions = run([rambling] * 4 + [signals(tail=0.28, length=0.5, cut=0.28)] * 60)
    assert not any(d.command for d in decisions)
    assert {d.after.course for d in decisions[3:30]} == {"push"}, "no worse: what is learned slowly takes time"
    assert decisions[20].limits.lr_scale == 1
    assert decisions[-1].after.course != "push", "but not for ever"


def test_where_the_student_is_no_sounder_after_a_rollback_it_is_pushed():
    rambling = signals(tail=0.35, length=0.5, cut=0.35)
    decisions = run([HEALTHY] * 20 + [rambling] * 30)
    assert [d.command for d in decisions if d.command] == ["rollback"]
    assert "push" in {d.after.course for d in decisions}


def test_a_course_that_helps_is_kept():
    policy = Policy(actuators=tuple(name for name in ACTUATORS if name != "rollback"))
    falling = [signals(tail=share, length=0.3, cut=share) for share in (0.6 * 0.9**i for i in range(40))]
    decisions = run([HEALTHY] * 5 + [LOST_RUN] * 2 + falling, policy)
    assert not any(d.command for d in decisions)
    assert {d.after.course for d in decisions} == {"prevent", "push"}
    assert decisions[-1].after.course == "prevent"


def test_inflation_that_nothing_helps_rolls_back_and_stops_in_the_end():
    decisions = run([HEALTHY] * 20 + [LOST_RUN] * 150, Policy(max_rollbacks=2))
    commands = [d.command for d in decisions if d.command]
    assert commands[:3] == ["rollback", "rollback", "stop"]
    first, second, *_ = (d for d in decisions if d.command)
    assert first.before.course == "prevent"
    assert first.after.pressure == 1
    assert second.before.severity >= LOST
    assert second.reason.endswith("roll back to the last healthy checkpoint")


def test_a_student_that_was_pushed_back_to_health_is_not_left_under_the_brake():
    policy = Policy(actuators=tuple(name for name in ACTUATORS if name != "rollback"))
    lingering = signals(tail=0.045)  # a little over what the teacher has, for ever: evidence of the sickness would never fall
    decisions = run([HEALTHY] * 5 + [LOST_RUN] * 6 + [signals(tail=0.2)] * 6 + [lingering] * 20, policy)
    cured = next(i for i, d in enumerate(decisions) if d.before.course == "push" and d.after.course == "prevent")
    assert decisions[cured].after.pressure_long == AFTER_PUSH
    assert decisions[cured].limits.lr_scale > 0.5
    again = run([LOST_RUN], policy, state=decisions[cured].after)[-1]
    assert again.after.pressure_long > AFTER_PUSH, "what is new presses at once"
    unread = replace(lingering, observations={name: seen for name, seen in lingering.observations.items() if name != "length"})
    assert run([unread] * 20, policy, state=decisions[cured - 1].after)[-1].after.course == "push", "nothing is over that nobody measured"
