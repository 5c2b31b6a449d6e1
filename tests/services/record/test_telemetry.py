"""Metrics: declared once, counters start at 0 and survive a restart, means are ratios of counters."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.actors.trajectory import Prompt, Trajectory
from opd_governor.services.record.telemetry import ADDITIONS, LENGTH_BUCKETS, METRICS, Telemetry


def trajectory(length: int, finish_reason: str = "stop", budget_tokens: int = 64, loop_onset: int | None = None) -> Trajectory:
    return Trajectory(
        Prompt(0, (1,)), tuple(range(length)), np.zeros(length, np.float32), finish_reason, budget_tokens, 1, 0, 0, loop_onset=loop_onset  # type: ignore[arg-type]
    )  # fmt: skip


def values(telemetry: Telemetry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(telemetry.registry).decode())
    return {f"{s.name}{sorted((k, v) for k, v in s.labels.items() if k != 'run')}": s.value for family in families for s in family.samples}


def test_counters_with_known_labels_start_at_0() -> None:
    seen = values(Telemetry("x"))
    assert seen["opd_rollout_loops_total[]"] == 0
    assert seen["opd_rollouts_total[('finish_reason', 'repetition')]"] == 0
    assert not any("_created" in name for name in seen)


def test_every_series_carries_the_run() -> None:
    families = text_string_to_metric_families(generate_latest(Telemetry("mine").registry).decode())
    assert all(sample.labels["run"] == "mine" for family in families for sample in family.samples)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=30))
def test_mean_length_is_the_ratio_of_two_counters(lengths: list[int]) -> None:
    telemetry = Telemetry("x")
    telemetry.record_rollouts([trajectory(n) for n in lengths], 64, 64)
    seen = values(telemetry)
    assert seen["opd_rollout_tokens_total[]"] / seen["opd_rollouts_total[('finish_reason', 'stop')]"] == sum(lengths) / len(lengths)
    assert seen["opd_rollout_length_max_tokens[]"] == max(lengths)
    assert seen["opd_rollout_length_tokens_count[]"] == len(lengths)


@pytest.mark.parametrize(
    ("budget_tokens", "cap_tokens", "max_new_tokens", "cut"),
    [
        (32, 32, 64, 1),  # the governor's cap
        (64, 64, 64, 0),  # the job's
        (40, 64, 64, 0),  # the context window
        (20, 32, 64, 0),  # the window, below a lowered cap
    ],
)
def test_a_rollout_is_cut_by_the_governor_where_its_lowered_cap_was_the_budget(
    budget_tokens: int, cap_tokens: int, max_new_tokens: int, cut: int
) -> None:
    telemetry = Telemetry("x")
    rollouts = [trajectory(budget_tokens, "length", budget_tokens=budget_tokens), trajectory(9)]
    telemetry.record_rollouts(rollouts, cap_tokens, max_new_tokens)
    assert values(telemetry)["opd_governor_cut_rollouts_total[]"] == cut


def test_loop_tokens_count_from_the_onset() -> None:
    telemetry = Telemetry("x")
    telemetry.record_rollouts([trajectory(40, "length", loop_onset=10), trajectory(5)], 64, 64)
    seen = values(telemetry)
    assert (seen["opd_rollout_loops_total[]"], seen["opd_rollout_loop_tokens_total[]"]) == (1, 30)


def test_totals_survive_a_restart() -> None:
    before = Telemetry("x")
    before.record_rollouts([trajectory(3), trajectory(64, "length")], 64, 64)
    before.inc("opd_teacher_requests_total", 5, teacher="big", result="ok")
    after = Telemetry("x")
    before.set("opd_eval_accuracy_ratio", 0.3, decoding="greedy")
    after.restore(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    assert values(after) == values(before)
    after.record_rollouts([trajectory(5)], 64, 64)
    assert values(after)["opd_rollout_length_tokens_count[]"] == 3


def test_a_histogram_with_other_edges_starts_at_zero() -> None:
    before, after = Telemetry("x"), Telemetry("x")
    before.record_rollouts([trajectory(3)], 64, 64)
    old = [
        [name, labels, [["1.0", "+Inf"], [0, 1], 3.0] if name == "opd_rollout_length_tokens" else value]
        for name, labels, value in before.state()
    ]
    after.restore(old)
    assert values(after)["opd_rollout_length_tokens_count[]"] == 0
    assert values(after)["opd_rollout_tokens_total[]"] == 3


def test_lengths_are_told_apart_within_an_eighth_whatever_cap_is_set_later() -> None:
    assert list(LENGTH_BUCKETS) == sorted(set(LENGTH_BUCKETS))
    assert all(upper - lower <= max(1, lower / 8) for lower, upper in itertools.pairwise(LENGTH_BUCKETS))
    assert LENGTH_BUCKETS[-1] == 2**20


def test_names_are_unique_and_additions_are_declared() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert set(names) >= ADDITIONS
