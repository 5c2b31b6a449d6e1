"""Runs on a real Ray cluster: submitted, found by name, steered and stopped; two at once; with token authentication and without."""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.services.record.rundir import read_records
from tests.integration.ray_head import ROOT, RayHead, ray_head
from tests.tiny import build_tiny

pytestmark = pytest.mark.integration

POLL_S = 0.5
LOOK_S = 20
"""A look at a run is an `opd` process, whose start takes a core from that run: only so often where a file tells too."""
TRANSCRIPT = ROOT / "deploy/jobs/README.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and prompts, and `make_job_file` beside them."""
    folder = tmp_path_factory.mktemp("home")
    build_tiny(folder / "student", seed=1)
    build_tiny(folder / "teacher", seed=2)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(32)))
    return folder


def make_job_file(home: Path, name: str, total_steps: int, max_new_tokens: int = 24) -> Path:
    job = {
        "name": name,
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "data": {"prompts": {"path": "prompts.jsonl"}, "golden": {"num_prompts": 8}},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": max_new_tokens, "dtype": "float32"},
        "learner": {"total_steps": total_steps, "dtype": "float32"},
        "governor": {"mode": "observe"},
        "cluster": {"pin_roles": True},
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(POLL_S)
    return value


def facts(head: RayHead, run: str) -> dict[str, Any]:
    result = head.opd("status", run, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def wait_for_steps(head: RayHead, run: str, out: Path, steps: int = 1) -> dict[str, Any]:
    """Wait at the run's own records, then ask for it by name."""

    def reached() -> dict[str, Any] | None:
        records = out / "metrics.jsonl"
        if not (records.exists() and len(read_records(records)) >= steps) and time.monotonic() < next_look[0]:
            return None
        next_look[0] = time.monotonic() + LOOK_S
        now = facts(head, run)
        assert now["status"] in ("PENDING", "RUNNING"), head.opd("logs", run).stdout[-3000:]
        return now if now.get("step", 0) >= steps else None

    next_look = [time.monotonic() + LOOK_S]
    return dict(wait_for(reached, f"step {steps} of {run}"))


def said(result: "subprocess.CompletedProcess[str]", code: int = 0) -> str:
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def guarded() -> Iterator[RayHead]:
    with ray_head(auth=True) as head:
        yield head


def test_two_runs_on_a_guarded_cluster_are_steered_by_name(guarded: RayHead, home: Path, tmp_path: Path) -> None:
    head = guarded
    out = {name: tmp_path / f"runs/{name}" for name in ("one", "two")}
    file = {"one": make_job_file(home, "one", 100_000), "two": make_job_file(home, "two", 6)}
    assert "submitted one as one" in said(head.opd("submit", file["one"], "--out", out["one"]))
    wait_for_steps(head, "one", out["one"])
    # Only now: two engines that start at once on two cores take longer than one after the other.
    assert "submitted two as two" in said(head.opd("submit", file["two"], "--out", out["two"]))
    assert "attached to one" in said(head.opd("submit", file["one"], "--out", out["one"]))

    wait_for(lambda: facts(head, "two")["url"], "the second run's service")
    runs = {run["run"]: run for run in json.loads(said(head.opd("list", "--json")))}
    assert set(runs) == {"one", "two"}
    assert runs["one"]["url"] != runs["two"]["url"]
    for name, run in runs.items():
        metrics = httpx.get(f"{run['url']}/metrics", trust_env=False).text
        assert {s.labels["run"] for family in text_string_to_metric_families(metrics) for s in family.samples} == {name}

    # The name is in use, from wherever a second run of it comes.
    taken = [sys.executable, "-m", "opd_governor", "run", str(file["one"]), "--out", str(tmp_path / "taken")]
    environment = head.environment | {"RAY_ADDRESS": head.gcs_address}
    refused = subprocess.run(taken, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert (
        said(refused, 2) == "opd: name: 'one' is taken by a live run on this cluster; give this run another name, or stop the other one\n"
    )

    # A change reaches one run only, and its rollouts obey it.
    assert "rollout.max_new_tokens  24   16" in said(head.opd("tune", "one", "rollout.max_new_tokens=16"))
    assert "nothing to change" in said(head.opd("tune", "one", "rollout.max_new_tokens=16"))
    step = facts(head, "one")["step"]
    wait_for_steps(head, "one", out["one"], step + 3)
    newest = read_records(out["one"] / "metrics.jsonl")[-1]
    assert (newest["config_generation"], newest["cap_tokens"], newest["length_max"]) == (2, 16, 16)
    history = read_records(out["one"] / "config.jsonl")
    assert " opd " in history[-1]["source"]
    assert len(read_records(out["two"] / "config.jsonl")) == 1

    said(head.opd("pause", "one"))
    paused = wait_for(lambda: (now := facts(head, "one"))["phase"] == "paused" and now, "the pause")
    time.sleep(1)
    assert facts(head, "one")["step"] == paused["step"]
    said(head.opd("resume", "one"))
    wait_for_steps(head, "one", out["one"], paused["step"] + 1)

    # The token is with the cluster's jobs, which its authentication guards; it is in no log.
    tokens = [(directory / "token").read_text().strip() for directory in out.values()]
    logs = [path.read_text(errors="replace") for path in head.folder.glob("session_2*/logs/**/*") if path.is_file()]
    assert len(logs) > 10
    assert not any(token in log for token in tokens for log in logs)
    assert httpx.get(f"{head.address}/api/jobs/", trust_env=False).status_code == 401
    without = RayHead(head.address, head.gcs_address, head.environment | {"RAY_AUTH_TOKEN": "0" * 64}, head.folder)
    assert "the cluster wants its token" in said(without.opd("list"), 1)

    said(head.opd("stop", "one"))
    for name in ("one", "two"):
        ended = wait_for(lambda name=name: (now := facts(head, name))["ended_s"] and now, f"the end of {name}")
        assert (ended["status"], ended["exit_code"], ended["url"]) == ("SUCCEEDED", 0, None), head.opd("logs", name).stdout[-3000:]
        steps = [record["step"] for record in read_records(out[name] / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        assert (out[name] / f"checkpoints/step-{steps[-1]}/manifest.json").exists()
        assert (out[name] / "final/config.json").exists()
    assert len(steps) == 6
    assert f"{len(steps)}/6" in said(head.opd("logs", "two"))
    assert "has ended (SUCCEEDED)" in said(head.opd("tune", "one", "rollout.max_new_tokens=20"), 1)
    assert "ended already" in said(head.opd("stop", "one"))


def test_the_transcript_in_the_docs_is_what_happens(home: Path, tmp_path: Path) -> None:
    """Run every command of the transcript on a cluster without authentication, with tiny models under the quickstart's name."""
    found = re.finditer(r"^\$ opd (.*)\n((?:(?!\$|```).*\n)*)", TRANSCRIPT.read_text(), re.MULTILINE)
    commands = [(match[1], match[2].splitlines()) for match in found]
    assert len(commands) >= 8
    file = make_job_file(home, "sums", 100_000, max_new_tokens=192)
    with ray_head(auth=False) as head:
        for line, expected in commands:
            words = [str(file) if word == "deploy/jobs/sums.yaml" else word for word in shlex.split(line)]
            if words[0] == "submit":
                words += ["--out", str(tmp_path / "sums")]
            if words[0] == "status":
                wait_for_steps(head, "sums", tmp_path / "sums")
            if words[0] == "resume":
                wait_for(lambda: facts(head, "sums")["phase"] == "paused", "the pause")
            assert shape(said(head.opd(*words)).splitlines()) == shape(expected), line
        wait_for(lambda: facts(head, "sums")["status"] == "SUCCEEDED", "the end")


def shape(lines: list[str]) -> list[str]:
    """Output without what differs between runs: paths, addresses, times and the step that was reached."""
    changing = [
        (r"/\S+", "PATH"),
        (r"\d{4}-\d\d-\d\d [\d:]{8}", "TIME"),
        (r"http:\S+", "URL"),
        (r"^(step|total_steps|weight_version|pressure)(\s+)[\d.]+", r"\1\2N"),
    ]
    for pattern, name in reversed(changing):
        lines = [re.sub(pattern, name, line) for line in lines]
    return lines
