"""Runs on a cluster from the command line, over a fake Jobs API and real HTTP services."""

import inspect
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from opd_governor.services.cli.app import app
from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, bind
from opd_governor.services.job.load import load_job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.rundir import ADDRESS
from opd_governor.services.remote import jobs
from opd_governor.services.remote.steer import Endpoint, RemoteError, RunClient, parse_changes
from tests.services.control.fake_run import FakeRun, make_job
from tests.services.remote.fake_jobs import FakeJobs

Opd = Callable[..., Result]
TOKEN = "a-secret-token"


@pytest.fixture
def cluster() -> FakeJobs:
    return FakeJobs()


@pytest.fixture
def opd(cluster: FakeJobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Opd:
    """`opd("list")` against the fake cluster, from an empty folder."""
    monkeypatch.setattr(jobs, "connect", lambda address: cluster)
    monkeypatch.delenv("OPD_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/prompts.jsonl").write_text('{"prompt": "1+1"}\n')
    path = tmp_path / "home/sums.yaml"
    path.write_text(yaml.safe_dump(make_job(cluster={"address": "10.0.0.1:6379"}).model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., tuple[ControlServer, FakeRun, ConfigStore]]]:
    """The HTTP service of a live run."""
    servers: list[ControlServer] = []

    def start(name: str = "sums") -> tuple[ControlServer, FakeRun, ConfigStore]:
        run, store = FakeRun(), ConfigStore(make_job(name=name), tmp_path / f"{name}-config.jsonl")
        status = run.status
        run.status = lambda: status() | {"name": name}  # type: ignore[method-assign]
        servers.append(ControlServer(create_app(run, store, run.registry, TOKEN), bind("127.0.0.1", 0, TOKEN)))
        servers[-1].start()
        return servers[-1], run, store

    yield start
    for server in servers:
        server.stop()


def announcement(server: ControlServer) -> dict[str, str]:
    return {jobs.URL_KEY: server.url, jobs.TOKEN_KEY: TOKEN}


# ---- submit


def test_the_job_travels_with_absolute_paths_and_leaves_its_own_cluster_behind(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    result = opd("submit", job_file, "--set", "data.golden.cache_dir=cache")
    assert result.exit_code == 0, result.output
    sent = yaml.safe_load(cluster.files["sums"]["job.yaml"])
    assert sent["data"]["prompts"]["path"] == str(job_file.parent / "prompts.jsonl")
    assert sent["data"]["golden"]["cache_dir"] == str(Path.cwd() / "cache")
    assert sent["cluster"]["address"] is None
    assert sent["student"]["model"] == "student"
    out = Path.cwd() / "runs/sums"
    assert cluster.jobs["sums"].entrypoint == jobs.entrypoint(out)
    assert f"opd run job.yaml --out {out} --resume" in jobs.entrypoint(out)
    assert str(out) in result.output


def test_what_travels_is_a_job_file_that_says_the_same(opd: Opd, cluster: FakeJobs, job_file: Path, tmp_path: Path) -> None:
    opd("submit", job_file, "--set", "preset=governed")
    (tmp_path / "job.yaml").write_text(cluster.files["sums"]["job.yaml"])
    job = load_job(job_file, ("preset=governed", "cluster.address=null"))
    assert load_job(tmp_path / "job.yaml") == job


def test_a_second_submit_attaches_to_the_live_run_and_says_so(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    opd("submit", job_file)
    cluster.run("sums")
    result = opd("submit", job_file)
    assert result.exit_code == 0
    assert "attached to sums" in result.output
    assert list(cluster.jobs) == ["sums"]


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_a_run_that_has_ended_is_submitted_again_under_the_next_id(opd: Opd, cluster: FakeJobs, job_file: Path, status: str) -> None:
    cluster.add_foreign("sums.2")
    opd("submit", job_file)
    cluster.end("sums", status)
    assert "submitted sums as sums.3" in opd("submit", job_file).output
    assert opd("logs", "sums").output == "log of sums.3\n"


def test_losing_the_race_to_submit_is_attaching(cluster: FakeJobs, tmp_path: Path) -> None:
    class Raced(FakeJobs):
        def list_jobs(self) -> list[Any]:
            seen = super().list_jobs()
            if not seen:  # another submit comes between looking and submitting
                jobs.submit(rival, make_job(), tmp_path)
                self.jobs, self.files = rival.jobs, rival.files
            return seen

    rival = cluster
    submission, new = jobs.submit(Raced(), make_job(), tmp_path)
    assert (submission.id, new) == ("sums", False)


def test_waiting_ends_as_the_run_ends(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    result = opd("submit", job_file, "--wait")
    assert result.exit_code == 0
    assert "log of sums" in result.output
    cluster.end("sums", "FAILED", 4, "Job entrypoint command failed with exit code 4\nmore")
    result = opd("logs", "sums", "--follow")
    assert result.exit_code == 4
    assert result.stderr == "opd: sums: FAILED: Job entrypoint command failed with exit code 4\n"


def test_a_bad_job_file_is_refused_before_anything_travels(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    result = opd("submit", job_file, "--set", "learner.total_steps=-1")
    assert result.exit_code == 2
    assert "learner.total_steps" in result.stderr
    assert not cluster.jobs


def _run_entrypoint(tmp_path: Path, script: str) -> tuple[subprocess.Popen[str], Path]:
    """The submitted job's shell, as Ray starts it, with another program in the place of `opd`. It writes a line a start."""
    program, starts = tmp_path / "bin/opd", tmp_path / "starts"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho start >> {starts}\n{script}\n")
    program.chmod(0o700)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    return subprocess.Popen(jobs.entrypoint(tmp_path / "o u t"), shell=True, env=environment, start_new_session=True, text=True), starts


@pytest.mark.parametrize(
    ("script", "code", "num_starts"),
    [
        ("test $(wc -l < {starts}) -ge 3 || kill -9 $$", 0, 3),
        ("exit 4", 4, 1),
        ("exit 130", 130, 1),
        ("kill -9 $$", 137, jobs.MAX_DRIVER_STARTS),
    ],
)
def test_a_driver_that_a_signal_ended_is_started_again_and_any_other_end_is_the_jobs(
    tmp_path: Path, script: str, code: int, num_starts: int
) -> None:
    process, starts = _run_entrypoint(tmp_path, script.format(starts=tmp_path / "starts"))
    assert process.wait(20) == code
    assert len(starts.read_text().split()) == num_starts


def test_a_stopped_job_ends_as_its_driver_ends(tmp_path: Path) -> None:
    process, starts = _run_entrypoint(tmp_path, "trap 'sleep 0.3; exit 0' TERM; while :; do sleep 0.05; done")
    while not starts.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)  # as the cluster does
    assert process.wait(20) == 0
    assert len(starts.read_text().split()) == 1


# ---- list, status, stop


def test_the_list_shows_runs_only_and_no_token(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    cluster.add_foreign("raysubmit_x")
    opd("submit", job_file)
    cluster.run("sums", **{jobs.URL_KEY: "http://10.0.0.7:1234", jobs.TOKEN_KEY: TOKEN})
    for words in ((), ("--json",)):
        output = opd("list", *words).output
        assert "http://10.0.0.7:1234" in output
        assert TOKEN not in output
        assert "raysubmit_x" not in output
    assert [run["run"] for run in json.loads(opd("list", "--json").output)] == ["sums"]


def test_status_joins_what_ray_and_the_run_say(opd: Opd, cluster: FakeJobs, job_file: Path, service: Any) -> None:
    server, _, _ = service()
    opd("submit", job_file)
    starting = json.loads(opd("status", "sums", "--json").output)
    assert (starting["status"], starting["url"]) == ("PENDING", None)
    cluster.run("sums", **announcement(server))
    running = json.loads(opd("status", "sums", "--json").output)
    assert (running["id"], running["status"], running["phase"], running["step"]) == ("sums", "RUNNING", "running", 5)
    assert "phase" in opd("status", "sums").output
    cluster.end("sums", "FAILED", 3, "no")
    assert json.loads(opd("status", "sums", "--json").output)["exit_code"] == 3


def test_stop_asks_a_live_run_and_ends_the_job_of_one_that_has_not_begun(opd: Opd, cluster: FakeJobs, job_file: Path, service: Any) -> None:
    opd("submit", job_file)
    assert "had not begun" in opd("stop", "sums").output
    assert cluster.jobs["sums"].status == "STOPPED"
    result = opd("stop", "sums")
    assert (result.exit_code, "ended already (STOPPED)" in result.output) == (0, True)

    server, run, _ = service()
    opd("submit", job_file)
    cluster.run("sums.2", **announcement(server))
    assert opd("stop", "sums").exit_code == 0
    assert run.requested == ["stop"]
    assert cluster.jobs["sums.2"].status == "RUNNING"

    del cluster.jobs["sums.2"].metadata[jobs.URL_KEY]
    cluster.run("sums.2", **{jobs.ENDING_KEY: "yes"})
    assert "is ending already" in opd("stop", "sums").output
    assert cluster.jobs["sums.2"].status == "RUNNING"  # its report is being written: not to be killed


def test_a_run_that_was_killed_is_found_ended_though_it_took_nothing_back(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    opd("submit", job_file)
    cluster.run("sums", **{jobs.URL_KEY: "http://10.0.0.7:1234", jobs.TOKEN_KEY: TOKEN})
    cluster.end("sums", "FAILED", 137, "killed")
    assert "10.0.0.7" not in opd("list").output
    assert "has ended (FAILED)" in opd("pause", "sums").stderr


def test_pause_and_resume_reach_the_run_of_that_name_only(opd: Opd, cluster: FakeJobs, job_file: Path, service: Any) -> None:
    (one, run_one, _), (two, run_two, _) = service("one"), service("two")
    for name, server in (("one", one), ("two", two)):
        opd("submit", job_file, "--set", f"name={name}")
        cluster.run(name, **announcement(server))
    assert opd("pause", "two").exit_code == opd("resume", "two").exit_code == 0
    assert (run_one.requested, run_two.requested) == ([], ["pause", "resume"])


def test_an_unknown_run_is_answered_with_those_there_are(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    opd("submit", job_file)
    result = opd("pause", "sum")
    assert result.exit_code == 1
    assert result.stderr == "opd: sum: no run of this name on the cluster (there: sums), and no run directory here\n"


def test_a_run_whose_service_is_not_up_or_gone_is_one_line(opd: Opd, cluster: FakeJobs, job_file: Path) -> None:
    opd("submit", job_file)
    assert "its service is not up (Ray says PENDING)" in opd("tune", "sums", "learner.learning_rate=0.1").stderr
    cluster.run("sums", **{jobs.URL_KEY: "http://127.0.0.1:9", jobs.TOKEN_KEY: TOKEN})
    result = opd("pause", "sums")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "no answer" in result.stderr
    assert TOKEN not in result.stderr
    cluster.end("sums")
    assert "has ended (SUCCEEDED)" in opd("pause", "sums").stderr


def test_without_an_address_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 1
    assert result.stderr.startswith("opd: --address: missing; give the cluster's address")


# ---- tune


@pytest.fixture
def tunable(opd: Opd, cluster: FakeJobs, job_file: Path, service: Any) -> tuple[Opd, ConfigStore]:
    server, _, store = service()
    opd("submit", job_file)
    cluster.run("sums", **announcement(server))
    return opd, store


def test_tune_prints_old_new_and_generation(tunable: tuple[Opd, ConfigStore]) -> None:
    opd, store = tunable
    old = store.in_force()[1].rollout.max_new_tokens
    lines = opd("tune", "sums", "rollout.max_new_tokens=77", "learner.learning_rate=0.001").output.splitlines()
    assert lines[0].split() == ["SETTING", "OLD", "NEW"]
    assert lines[1].split() == ["rollout.max_new_tokens", str(old), "77"]
    assert lines[-1] == "generation 2"
    assert store.in_force()[1].rollout.max_new_tokens == 77
    assert " opd " in store.history()[-1].source
    assert opd("tune", "sums", "rollout.max_new_tokens=77").output == "nothing to change: generation 2 has these values\n"
    answer = json.loads(opd("tune", "sums", "rollout.max_new_tokens=null", "--json").output)
    assert answer == {"generation": 3, "dry_run": False, "changes": [{"key": "rollout.max_new_tokens", "old": 77, "new": old}]}


def test_a_dry_run_changes_nothing(tunable: tuple[Opd, ConfigStore]) -> None:
    opd, store = tunable
    output = opd("tune", "sums", "rollout.max_new_tokens=77", "--dry-run").output
    assert "77" in output
    assert output.endswith("dry run: generation 1 stays\n")
    assert store.generation == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["rollout.max_new_tokens=-1"], "rollout.max_new_tokens: "),
        (["rollout.max_new_token=8"], "rollout.max_new_token: not a tunable setting"),
        (["rollout.max_new_tokens"], "expected key=value"),
        (["rollout..top_k=1"], "expected key=value"),
        (["rollout.top_k=1", "rollout.top_k=2"], "given twice"),
        (["rollout=1", "rollout.top_k=2"], "a value of its own"),
        (["rollout.top_k=[1"], "no YAML value"),
    ],
)
def test_a_refused_change_names_its_field_in_one_line(tunable: tuple[Opd, ConfigStore], changes: list[str], said: str) -> None:
    opd, store = tunable
    result = opd("tune", "sums", *changes)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert said in result.stderr
    assert store.generation == 1


def test_a_change_made_by_somebody_else_in_the_same_moment_is_explained(service: Any) -> None:
    server, _, store = service()

    class Slow(RunClient):
        def _send(self, method: str, path: str, **options: Any) -> Any:
            if method == "PATCH":
                store.change({"rollout": {"top_k": 5}}, expected=None, source="rival")
            return super()._send(method, path, **options)

    with Slow(Endpoint("sums", server.url, TOKEN)) as client, pytest.raises(RemoteError, match=r"same moment.*changed by rival"):
        client.tune(parse_changes(["rollout.max_new_tokens=9"]))
    assert store.in_force()[1].rollout.max_new_tokens != 9


# ---- runs in the foreground


def test_a_foreground_run_is_reached_by_its_directory_and_by_its_url(
    opd: Opd, tmp_path: Path, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, run, _ = service()
    out = tmp_path / "runs/sums"
    out.mkdir(parents=True)
    (out / "job.yaml").write_text("name: sums\n")
    (out / "token").write_text(TOKEN + "\n")
    assert "the run has ended" in opd("pause", out).stderr
    (out / ADDRESS).write_text(server.url + "\n")
    assert opd("pause", "runs/sums").exit_code == 0
    assert json.loads(opd("status", out, "--json").output)["phase"] == "running"
    assert "refused the token" in opd("pause", server.url).stderr
    monkeypatch.setenv("OPD_TOKEN", TOKEN)
    assert opd("resume", server.url).exit_code == 0
    assert run.requested == ["pause", "resume"]
    assert "no run directory" in opd("pause", "runs/other").stderr


def test_a_port_that_another_run_has_taken_since_is_noticed(service: Any) -> None:
    server, run, _ = service("two")
    with pytest.raises(RemoteError, match="is run two now; one has ended"), RunClient(Endpoint("one", server.url, TOKEN)) as client:
        client.ask("stop")
    assert run.requested == []


@pytest.mark.parametrize("answer", [httpx.Response(404, text="nothing here"), httpx.Response(200, html="<h1>Ray</h1>")])
def test_an_address_that_is_no_run_is_one_line(answer: httpx.Response) -> None:
    client = RunClient(Endpoint(None, "http://127.0.0.1:8265", None), httpx.MockTransport(lambda request: answer))
    with pytest.raises(RemoteError, match="not from a run's service"), client:
        pass


# ---- the real client


def test_rays_client_has_the_methods_and_parameters_that_are_used() -> None:
    from ray.job_submission import JobSubmissionClient

    for name, method in inspect.getmembers(jobs.JobClient, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method).parameters.keys() <= inspect.signature(getattr(JobSubmissionClient, name)).parameters.keys()
            assert inspect.signature(method).parameters.keys() == inspect.signature(getattr(FakeJobs, name)).parameters.keys()


async def test_outside_a_ray_job_nothing_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(jobs.JOB_CONFIG_VARIABLE, raising=False)
    async with jobs.announced("sums", "http://127.0.0.1:1", TOKEN, tmp_path):
        pass
