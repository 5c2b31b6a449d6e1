"""What the benchmark counts, keeps and prints, without TRL and without an engine."""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bench
import watch

WORK = replace(bench.WORKLOADS["sums"], steps=4, save_steps=(4,), max_staleness=3)
WARM_UP = WORK.batches_under_way


def steps(seconds: float) -> list[dict[str, Any]]:
    return [{"step": step, "seconds": seconds * (9 if step <= WARM_UP else 1), "tokens": 100, "truncation": 0.0} for step in range(1, 11)]


def test_warm_up_is_left_out_of_the_medians():
    summary = bench.summarise(steps(2.0), WORK)
    assert summary["measured_steps"] == 6
    assert summary["step_s"][1] == 2.0
    assert summary["tokens_per_s"][1] == 50.0
    with pytest.raises(ValueError, match="run at least 9"):
        bench.summarise(steps(2.0)[:6], WORK)


def test_a_long_step_and_the_short_ones_after_it_count_as_so_many_of_their_mean():
    uneven = [{"step": n, "seconds": 5.0 if n % WARM_UP == 0 else 1.0, "tokens": 100, "truncation": 0.0} for n in range(1, 14)]
    summary = bench.summarise(uneven, WORK)
    assert summary["step_s"] == [2.0, 2.0, 2.0]
    assert summary["tokens_per_s"] == [50.0, 50.0, 50.0]


def test_a_whole_step_of_ours_lasts_until_the_next_record():
    common = {"truncation": 0.0, "kl_nats": 1.0, "rollout_s": 1, "score_s": 1, "learn_s": 1, "sync_s": 1, "wait_s": 1}
    records = [{"step": n, "time": 100.0 + 7 * n, "step_s": 5.0, "lengths": [3, 4]} | common for n in (1, 2)]
    assert [(step["seconds"], step["tokens"]) for step in bench.our_steps(records)] == [(5.0, 7), (7.0, 7)]


def test_time_to_a_kl_is_between_the_steps_it_was_measured_at():
    assert bench.time_to_kl(0.75, {0: 1.0, 4: 0.5, 8: 0.25}, step_s=10.0) == 20.0
    assert bench.time_to_kl(0.5, {0: 1.0, 4: 0.5}, step_s=10.0) == 40.0
    assert bench.time_to_kl(0.2, {0: 1.0, 4: 0.5}, step_s=10.0) is None


def test_both_sides_run_are_measured_and_stand_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "prepare", lambda work, scratch: replace(work, student="start"))
    usage = asdict(watch.Usage(peak_pss_gib=1.5, cpu_s=20.0, wall_s=9.0, others_cores=0.01))
    runners = {
        side: lambda work, scratch, side=side, seconds=seconds: {"steps": steps(seconds), "students": {4: side}, "usage": usage}
        for side, seconds in (("trl", 4.0), ("ours", 2.0))
    }
    kl = {"start": 1.0, "trl": 0.5, "ours": 0.4}

    def measure(student: str, work: bench.Workload) -> dict[str, float]:
        return {"kl_nats": kl[student], "standard_error": 0.01, "mean_tokens": 30.0}

    bench.run(WORK, bench.SIDES, 2, tmp_path, runners, measure)
    assert len(list(tmp_path.glob("sums-float32-*.json"))) == 4
    ours = next(line for line in bench.table(tmp_path).splitlines() if "| ours |" in line)
    assert [cell.strip() for cell in ours.split("|")[4:8]] == ["2.00 (2.00-2.00)", "50 (50-50)", "2.0", "2.0"]
    assert "0.400 ± 0.010 (4)" in ours
    assert "7 (to 0.500)" in ours  # 0.5 lies at step 3.33 of 2 s each
    assert json.loads((tmp_path / "sums-start.json").read_text())["kl_nats"] == 1.0


def test_a_process_tree_is_watched_with_its_memory_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(watch.Watch, "PERIOD_S", 0.05)
    child = "x = bytearray(64 << 20); t = __import__('time')\nwhile t.process_time() < 0.6: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    started = time.monotonic()
    usage = watch.watched([sys.executable, "-c", code], {}, tmp_path / "log")
    assert usage.wall_s == pytest.approx(time.monotonic() - started, abs=0.2)
    assert 0.3 < usage.cpu_s < 2 * usage.wall_s
    assert 0.06 < usage.peak_pss_gib < 0.5


def test_a_side_that_fails_ends_the_bench_with_its_log(tmp_path):
    with pytest.raises(SystemExit, match="no such luck"):
        watch.watched([sys.executable, "-c", "raise SystemExit('no such luck')"], {}, tmp_path / "log")
