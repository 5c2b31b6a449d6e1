"""The plan's time formulas against kept runs."""

from tests.bench.plan_times import kept_runs


def test_phases_of_kept_runs_are_forecast_within_30_percent() -> None:
    rows = kept_runs()
    assert {row["phase"] for row in rows} == {"rollout", "learn", "sync"}
    assert max(row["answer_tokens"] for row in rows) > 2 * min(row["answer_tokens"] for row in rows)
    near = [abs(row["ratio"] - 1) <= 0.3 for row in rows]
    assert sum(near) >= 0.95 * len(near)
