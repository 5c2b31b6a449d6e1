"""The governor around the law: readings in a row, clocks, settings that change, restarts, and the record it leaves."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.report.replay import replay
from tests.governor.metrics_server import ScriptedSource

BASE = LengthLimits(cap_tokens=192, golden_weight=0.1)


class Clock:
    """Wall and monotonic time under the test's hand."""

    def __init__(self) -> None:
        self.wall_s, self.monotonic_s = 1_000_000.0, 50.0

    def forward(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds


def reading(steps: int, long: int = 0, taken_s: float | None = None) -> Snapshot:
    """After `steps` steps of 32 rollouts of 40 tokens each; `long` of all were of 150."""
    total = 32.0 * steps
    return Snapshot.of(
        [
            ("opd_rollouts_total", {"finish_reason": "stop"}, total),
            ("opd_rollout_tokens_total", {}, 40 * total + 110 * long),
            ("opd_rollout_length_tokens_count", {}, total),
            ("opd_rollout_length_tokens_bucket", {"le": "42"}, total - long),
            ("opd_rollout_length_tokens_bucket", {"le": "+Inf"}, total),
            ("opd_learner_steps_total", {}, float(steps)),
            ("opd_length_reference_tokens", {"stat": "mean"}, 40.0),
            ("opd_length_reference_tokens", {"stat": "p99"}, 60.0),
            ("opd_length_scored_total", {}, total),
            ("opd_length_over_nats_total", {}, 1.3 * long),
            ("opd_length_under_nats_total", {}, 0.0),
            ("opd_length_squares_total", {}, 0.1 * total + 1.7 * long),
            ("opd_length_reference_spread_nats", {}, 0.3),
            ("opd_length_tail_total", {}, float(long)),
            ("opd_length_tail_expected_total", {}, 0.01 * total),
        ],
        taken_s,
    )


def governor_of(*readings: Snapshot | None, policy: Policy | None = None, clock: Clock | None = None) -> Governor:
    clock = clock or Clock()
    return Governor(ScriptedSource(*readings), policy or Policy(), BASE, now_s=lambda: clock.wall_s, monotonic_s=lambda: clock.monotonic_s)


def write_records(path: Path, governor: Governor, num_ticks: int, change_at: int | None = None) -> None:
    with (path / "decisions.jsonl").open("a") as file:
        for step in range(1, num_ticks + 1):
            if step == change_at:
                governor.set_policy(Policy(false_alarm_steps=100.0), BASE, generation=2)
            file.write(json.dumps(governor.tick(step)[1]) + "\n")


def test_a_reading_without_new_rollouts_is_no_news_and_loses_none():
    governor = governor_of(reading(1), reading(1), reading(3, long=32))
    assert [governor.tick(step)[0].signals.num_rollouts for step in (1, 2, 3)] == [32, 0, 64]


def test_a_new_policy_and_base_hold_from_the_next_tick_on():
    governor = governor_of(reading(1), reading(2))
    governor.tick(1)
    governor.set_policy(Policy(), LengthLimits(cap_tokens=96), generation=7)
    assert governor.limits().cap_tokens == 192
    decision, record = governor.tick(2)
    assert decision.limits.cap_tokens == governor.limits().cap_tokens == 96
    assert record["config_generation"] == 7
    assert record["base"]["cap_tokens"] == 96


def test_settings_that_changed_are_news_and_the_governors_own_keys_are_not():
    governor = governor_of(*(reading(step) for step in range(1, 6)))
    governor.tick(1)
    governor.set_policy(Policy(max_rollbacks=1), BASE, generation=2)
    assert governor.tick(2)[1]["news"] == ""
    governor.set_policy(Policy(max_rollbacks=1), BASE, generation=3)  # temperature, say
    assert governor.tick(3)[1]["news"] == "settings changed (generation 3)"
    governor.set_policy(Policy(max_rollbacks=1), LengthLimits(cap_tokens=96), generation=4)
    governor.tell("rolled back to step 2")
    assert governor.tick(4)[1]["news"] == "settings changed (generation 4), rolled back to step 2"
    assert governor.tick(5)[1]["news"] == ""


def test_age_counts_from_the_last_scrape_even_when_the_wall_clock_jumps_back():
    clock = Clock()
    governor = governor_of(reading(1, taken_s=clock.wall_s - 1), None, policy=Policy(blind_after_s=60), clock=clock)
    assert governor.tick(1)[0].signals.data_age_s == 1
    clock.forward(30)
    clock.wall_s -= 86_400
    assert governor.tick(2)[0].action == "hold"
    clock.forward(31)
    decision, _ = governor.tick(3)
    assert decision.signals.data_age_s == 62
    assert decision.action == "fallback"


def test_a_scrape_from_the_future_is_not_believed():
    clock = Clock()
    governor = governor_of(reading(1, taken_s=clock.wall_s + 3600), clock=clock)
    decision, _ = governor.tick(1)
    assert decision.signals.blind
    assert "a clock jumped" in decision.reason


def test_a_server_that_answers_with_old_data_is_not_believed():
    clock = Clock()
    governor = governor_of(reading(1, taken_s=clock.wall_s), clock=clock)
    assert governor.tick(1)[0].healthy
    clock.forward(121)
    assert governor.tick(2)[0].action == "fallback"


def test_a_restart_of_the_run_is_read_from_zero():
    governor = governor_of(reading(9, long=5), reading(1))
    governor.tick(1)
    decision, _ = governor.tick(2)
    assert decision.signals.num_rollouts == 32
    assert decision.signals.observations["tail"].value == 0


def test_a_restored_governor_decides_and_records_what_it_would_have():
    readings, clock = [reading(step, long=10 * step) for step in range(1, 5)], Clock()
    whole = governor_of(*readings, clock=clock)
    records = [whole.tick(step)[1] for step in range(1, 5)]
    first, second = governor_of(*readings[:2], clock=clock), governor_of(*readings[2:], clock=clock)
    again = [first.tick(step)[1] for step in (1, 2)]
    second.restore(json.loads(json.dumps(first.state())))
    assert second.limits() == first.limits()
    again += [second.tick(step)[1] for step in (3, 4)]
    assert again == records
    assert records[-1]["pressure"] > 0


def test_off_reads_nothing():
    governor = governor_of(None, policy=Policy(mode="off"))
    decision, _ = governor.tick(1)
    assert not decision.signals.blind
    assert decision.limits == BASE


@given(st.lists(st.one_of(st.none(), st.integers(0, 32)), min_size=1, max_size=8), st.integers(1, 9))
@settings(deadline=None)
def test_replay_equals_the_record_bit_for_bit(tmp_path_factory, per_step, change_at):
    path = tmp_path_factory.mktemp("run")
    total, readings = 0, []
    for step, long in enumerate(per_step, start=1):
        total += long or 0
        readings.append(None if long is None else reading(step, long=total))
    write_records(path, governor_of(*readings), len(readings), change_at)
    rows = replay(path)
    assert [row.step for row in rows] == list(range(1, len(readings) + 1))
    assert all(row.differences == () for row in rows)


def test_replay_shows_where_another_policy_would_have_differed(tmp_path):
    write_records(tmp_path, governor_of(reading(1), reading(2, long=10), reading(3, long=20)), 3)
    rows = replay(tmp_path, Policy(false_alarm_steps=1e9))
    assert "pressure" not in rows[0].differences
    assert "pressure" in rows[2].differences
    assert rows[2].recorded["pressure"] > rows[2].replayed["pressure"] == 0


def test_replay_finds_an_altered_record(tmp_path):
    write_records(tmp_path, governor_of(reading(1), reading(2, long=30), reading(3, long=60)), 3)
    path = tmp_path / "decisions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["limits"]["lr_scale"] = 0.77
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert replay(tmp_path)[2].differences == ("limits.lr_scale",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ""),
        ("{", "decisions.jsonl:1: "),
        ('{"step": 1, "signals": {}, "before": {}}', "no policy in this record"),
        ("[1]", "decisions.jsonl:1: not a decision record"),
    ],
)
def test_a_broken_record_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "decisions.jsonl").write_text(text)
    if not message:
        assert replay(tmp_path) == []
        return
    with pytest.raises(ValueError, match=message):
        replay(tmp_path)


def test_a_directory_without_records_is_named(tmp_path):
    with pytest.raises(ValueError, match="give the directory of a run"):
        replay(tmp_path)
