"""One real run, watched from outside: Ray, vLLM, teacher, learner, governor, HTTP, and the files it leaves."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_governor.services.record.rundir import read_records
from opd_governor.services.record.telemetry import declared
from tests.chaos.harness import prompts_due
from tests.live_run import JOB, ROOT, LiveRun

pytestmark = pytest.mark.integration

GRACE_S = 30
"""Kubernetes' own default."""
SMALL = (
    "learner.total_steps=24",
    "data.eval.limit=32",
    "data.eval.every_steps=12",
    "data.golden.num_prompts=64",
    "checkpoint.every_steps=8",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveRun, dict[str, Any]]]:
    """A short governed run; while it goes, /metrics is read and the cap is patched."""
    live = LiveRun(tmp_path_factory.mktemp("run") / "sums", *SMALL)
    seen: dict[str, Any] = {}
    with live.client() as client:
        live.wait_for(lambda: client.get("/v1/run").json()["step"] >= 4)
        seen["health"] = client.get("/healthz", headers={"Authorization": ""}).status_code, client.get("/readyz").status_code
        config = client.get("/v1/config")
        seen["generation"] = int(config.headers["etag"].strip('"'))
        patch = {"rollout": {"max_new_tokens": 24}}
        headers = {"If-Match": config.headers["etag"], "Content-Type": "application/merge-patch+json"}
        seen["patched"] = client.patch("/v1/config", content=json.dumps(patch), headers=headers)
        live.wait_for(lambda: client.get("/v1/config").json()["observed_generation"] == seen["generation"] + 1)
        seen["observed_at_step"] = client.get("/v1/run").json()["step"]
        live.wait_for(lambda: client.get("/v1/run").json()["step"] >= 20)
        seen["metrics"] = client.get("/metrics").text
        seen["governor"] = client.get("/v1/governor").json()
        seen["code"] = live.finish()
    yield live, seen
    if live.process.poll() is None:
        live.process.kill()


def test_a_run_exits_0_and_leaves_its_directory(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, seen = finished
    assert seen["code"] == 0, live.log.read_text()[-3000:]
    names = {path.name for path in live.out.iterdir()}
    expected = "job.yaml metrics.jsonl decisions.jsonl config.jsonl samples.jsonl checkpoints final report.html length.png"
    assert names >= set(expected.split())
    records = read_records(live.out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(25))
    assert (live.out / "token").stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load((live.out / "job.yaml").read_text())["name"] == "sums"
    assert list((live.out / "checkpoints").glob("step-*/manifest.json"))


def test_no_process_is_left_after_a_run(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, _ = finished
    assert len(live.processes) > 5
    assert live.left_over() == []


def test_the_final_student_loads_and_generates(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, _ = finished
    final = live.out / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("3+4?", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]
    assert "On-policy" in (final / "README.md").read_text() or "on-policy" in (final / "README.md").read_text()


def test_metrics_are_the_declared_ones_and_agree_with_the_trajectories(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, seen = finished
    families = list(text_string_to_metric_families(seen["metrics"]))
    known = {metric.name for metric in declared()}
    for family in families:
        names = {family.name, f"{family.name}_total"}
        assert names & known, family.name
        assert all(sample.labels["run"] == "sums" for sample in family.samples)
    values = {sample.name: sample.value for family in families for sample in family.samples if set(sample.labels) == {"run"}}
    steps = int(values["opd_learner_steps_total"])
    lengths = [length for record in read_records(live.out / "metrics.jsonl")[: steps + 1] for length in record["lengths"]]
    rollouts = sum(sample.value for f in families for sample in f.samples if sample.name == "opd_rollouts_total")
    assert rollouts == len(lengths)
    assert values["opd_rollout_tokens_total"] / rollouts == sum(lengths) / len(lengths)


def test_a_patched_cap_bounds_rollouts_from_the_step_it_was_observed(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, seen = finished
    assert seen["patched"].status_code == 200, seen["patched"].text
    records = [record for record in read_records(live.out / "metrics.jsonl") if record["num_rollouts"]]
    after = [record for record in records if record["step"] > seen["observed_at_step"] + 1]
    assert len(after) > 5
    assert max(record["length_max"] for record in after) == 24
    assert all(record["cap_tokens"] == 24 and record["config_generation"] == seen["generation"] + 1 for record in after)
    assert max(record["length_max"] for record in records if record["config_generation"] == seen["generation"]) > 24


def test_health_and_governor_answer_while_the_run_goes(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    _, seen = finished
    assert seen["health"] == (200, 200)
    assert seen["governor"]["mode"] == "enforce"
    assert 0 <= seen["governor"]["pressure"] <= 1


@pytest.mark.alone
def test_sigterm_leaves_a_checkpoint_within_its_grace_and_resume_loses_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    stale = (*SMALL, "data.eval.path=null", "rollout.max_staleness=2", "rollout.prompts_per_step=24", "data.prompts.limit=200")
    live = LiveRun(tmp_path / "sums", *stale)
    with live.client() as client:
        live.wait_for(lambda: client.get("/v1/run").json()["step"] >= 3)
    live.process.send_signal(signal.SIGTERM)
    assert live.finish(GRACE_S) == 143, live.log.read_text()[-3000:]
    assert live.left_over() == []
    stopped_at = read_records(live.out / "metrics.jsonl")[-1]["step"]
    assert stopped_at < 24
    assert (live.out / f"checkpoints/step-{stopped_at}/manifest.json").exists()
    assert not (live.out / "final").exists()

    resumed = LiveRun(live.out, *stale, resume=True)
    assert resumed.finish() == 0, resumed.log.read_text()[-3000:]
    records = read_records(live.out / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 25))
    assert max(r["staleness_mean"] for r in records) > 1
    used = [tuple(key) for record in records for key in record["prompts"]]
    assert used == prompts_due(stale, 24)
    assert len(set(used)) == len(used) == 24 * 24

    files = list(live.out.rglob("*"))
    assert [path for path in files if path.stat().st_mode & 0o077] == []
    assert [path for path in (*files, live.log) if path.is_file() and b"hunter2" in path.read_bytes()] == []


@pytest.mark.parametrize("there", ["raylet", "ray::RolloutActor"])
def test_ctrl_c_twice_leaves_no_process(tmp_path: Path, there: str) -> None:
    """While Ray itself starts, and while the actors do."""
    live = LiveRun(tmp_path / "sums", *SMALL)

    def started() -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process for process in psutil.Process(live.process.pid).children(recursive=True) if process.name().startswith(there)]
        return []

    live.wait_for(started)
    for _ in range(2):
        live.remember()
        live.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert live.finish(60) != 0
    assert live.left_over() == []


def test_a_run_directory_in_use_is_refused_with_one_line(finished: tuple[LiveRun, dict[str, Any]]) -> None:
    live, _ = finished
    again = subprocess.run(
        [sys.executable, "-m", "opd_governor", "run", str(JOB), "--out", str(live.out)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode in (2, 3)
    assert "--resume" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1
