"""`opd govern` for real: a process, HTTP, kill -9, the client, schemathesis."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from opd_governor.actors.governor.actuators import metric_of, movable
from opd_governor.client import GovernorClient, GovernorError
from opd_governor.services.cli.app import app
from opd_governor.services.record.telemetry import METRICS
from tests.integration.ray_head import free_ports
from tests.services.sidecar.service import HEADERS, TOKEN, govern

NUM_EXAMPLES = int(os.environ.get("OPD_SCHEMATHESIS_EXAMPLES", "10"))


def healthy(step: int) -> dict[str, Any]:
    return {"lengths": [40 + (step * 7 + i) % 20 for i in range(32)], "finish_reasons": ["stop"] * 32, "cap_tokens": 512}


def inflating(step: int) -> dict[str, Any]:
    lengths = [min(512, 60 + 40 * i) for i in range(32)]
    return {"lengths": lengths, "finish_reasons": ["length" if length == 512 else "stop" for length in lengths], "cap_tokens": 512}


def test_inflation_is_answered_with_limits_and_a_reason(tmp_path: Path) -> None:
    with govern(tmp_path) as (url, _):
        client = GovernorClient(url, run="mine", token=TOKEN)
        for step in range(1, 13):
            answer = client.step(step, **healthy(step))
        assert answer["limits"]["cap_tokens"] == 512
        assert answer["limits"]["lr_scale"] == 1.0
        for step in range(13, 22):
            answer = client.step(step, **inflating(step))
        assert answer["pressure"] > 0.5
        assert answer["limits"]["cap_tokens"] < 512
        assert answer["limits"]["golden_weight"] > 0.0
        assert answer["reason"]
        assert client.trouble is None


@pytest.mark.integration
def test_killed_in_the_middle_the_next_answer_goes_on(tmp_path: Path) -> None:
    """The same steps to a service that is killed and to one that is not: the same answers."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    steps = [(step, healthy(step) if step <= 12 else inflating(step)) for step in range(1, 22)]
    with govern(whole) as (url, _):
        client = GovernorClient(url, run="a", token=TOKEN)
        expected = [client.step(step, **fields) for step, fields in steps]
    answers = []
    (port,) = free_ports(1)
    for start in range(0, len(steps), 7):
        with govern(parts, port=port) as (url, process):
            client = GovernorClient(url, run="a", token=TOKEN)
            answers += [client.step(step, **fields) for step, fields in steps[start : start + 7]]
            assert client.step(steps[start + 6][0], **steps[start + 6][1]) == answers[-1], "a step posted twice counts once"
            process.send_signal(signal.SIGKILL)
            process.wait(10)
    assert answers == expected
    recorded = [json.loads(line) for line in (parts / "out/runs/a/decisions.jsonl").read_text().splitlines()]
    assert [record["step"] for record in recorded] == [step for step, _ in steps]


@pytest.mark.integration
def test_what_a_kill_left_half_written_is_dropped(tmp_path: Path) -> None:
    with govern(tmp_path) as (url, _):
        client = GovernorClient(url, run="a", token=TOKEN)
        for step in range(1, 4):
            client.step(step, **healthy(step))
    folder = tmp_path / "out/runs/a"
    for name in ("metrics.jsonl", "decisions.jsonl", "state.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 4, "half')
    with govern(tmp_path) as (url, _):
        GovernorClient(url, run="a", token=TOKEN).step(4, **healthy(4))
        steps = httpx.get(f"{url}/runs/a/v1/steps", headers=HEADERS).json()["steps"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]


@pytest.mark.integration
def test_each_run_has_the_routes_of_our_own_runs(tmp_path: Path) -> None:
    with govern(tmp_path) as (url, _):
        for name in ("a", "b"):
            client = GovernorClient(url, run=name, token=TOKEN)
            for step in range(1, 4):
                client.step(step, **healthy(step))
        with httpx.Client(base_url=f"{url}/runs/a", headers=HEADERS, trust_env=False) as http:
            assert http.get("/v1/run").json()["name"] == "a"
            assert [d["step"] for d in http.get("/v1/governor/decisions", params={"after": 1}).json()["decisions"]] == [2, 3]
            assert http.get("/v1/governor").json()["mode"] == "enforce"
            assert "Settings" in http.get("/").text
            assert http.get("/static/page.js").is_success
            before = http.get("/v1/config")
            patch = {"content-type": "application/merge-patch+json", "if-match": before.headers["etag"]}
            assert http.patch("/v1/config", json={"governor": {"mode": "observe"}, "cap_tokens": 256}, headers=patch).is_success
            assert http.patch("/v1/config", json={"rollout": {}}, headers=patch | {"if-match": "*"}).status_code == 422
            assert http.post("/v1/run/stop").status_code == 202
            assert http.post("/v1/run/pause").status_code == 409
        answer = GovernorClient(url, run="a", token=TOKEN).step(4, **healthy(4))
        assert answer["limits"]["cap_tokens"] == 256
        assert answer["asked"] == ["stop"]
        other = GovernorClient(url, run="b", token=TOKEN).step(4, **healthy(4))
        assert (other["limits"]["cap_tokens"], other["asked"]) == (512, [])
        assert httpx.get(f"{url}/runs/nobody/v1/run", headers=HEADERS).status_code == 404
        assert httpx.get(f"{url}/runs/a/v1/run").status_code == 401
        assert {run["name"] for run in httpx.get(f"{url}/v1/runs", headers=HEADERS).json()["runs"]} == {"a", "b"}


@pytest.mark.integration
def test_metrics_have_the_names_and_labels_of_our_own_runs(tmp_path: Path) -> None:
    labels = {metric.name: metric.labels for metric in METRICS} | {metric_of(name): () for name in movable()}
    with govern(tmp_path) as (url, _):
        client = GovernorClient(url, run="a", token=TOKEN)
        for step in range(1, 4):
            client.step(step, **healthy(step), loops=0.1, kl_nats=0.2, learning_rate=1e-6)
        text = httpx.get(f"{url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert samples
    for sample in samples:
        name = re.sub(r"_(bucket|count|sum)$", "", sample.name) if "length_tokens" in sample.name else sample.name
        assert name in labels, name
        assert set(sample.labels) - {"le"} == {"run", *labels[name]}, name
    total = {s.labels["finish_reason"]: s.value for s in samples if s.name == "opd_rollouts_total"}
    assert total["stop"] == 96


@pytest.mark.integration
def test_a_client_whose_governor_dies_goes_on_with_its_last_limits(tmp_path: Path) -> None:
    with govern(tmp_path) as (url, process):
        client = GovernorClient(url, run="a", token=TOKEN, timeout_s=1.0, retry_after_s=0.0)
        for step in range(1, 13):
            client.step(step, **healthy(step))
        for step in range(13, 22):
            answer = client.step(step, **inflating(step))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        after = client.step(22, **healthy(22))
    assert after["limits"] == answer["limits"]
    assert after["action"] == "hold"
    assert client.trouble
    with govern(tmp_path, port=int(url.rpartition(":")[2])):
        assert client.step(23, **healthy(23))["step"] == 23
        assert client.trouble is None


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"lengths": [1], "finish_reasons": ["stop", "stop"]}, "finish_reasons"),
        ({"lengths": [1], "finish_reasons": ["bored"]}, "bored"),
        ({"lengths": [-1]}, "/lengths/0"),
        ({"truncation": 1.5}, "/truncation"),
        ({"lenghts": [1]}, "/lenghts"),
        ({"length_histogram": {"edges": [8, 4], "counts": [1, 1]}}, "rise"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields: dict[str, Any], pointer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from pydantic import ValidationError

    from opd_governor.services.control.problem import Problem
    from opd_governor.services.sidecar.app import _validate

    with pytest.raises((Problem, ValidationError)) as caught:
        _validate({"step": 1} | fields)
    assert pointer in str(caught.value.detail) + str(getattr(caught.value, "errors", ""))


@pytest.mark.integration
def test_a_wrong_token_is_told(tmp_path: Path) -> None:
    with govern(tmp_path) as (url, _), pytest.raises(GovernorError, match="token"):
        GovernorClient(url, run="a", token="wrong").step(1)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("governor: {length_facter: 1}", ["length_facter", "length_factor"]),
        ("cap_tokens: 0", ["cap_tokens"]),
        ("governer: {}", ["governer", "governor"]),
        ("- a\n- b", ["dictionary"]),
        ("a: [", ["YAML"]),
        ("scrape: [{run: a, url: 'http://x', step: s, names: {colour: c}}]", ["colour"]),
    ],
)
def test_a_mistake_in_the_policy_file_is_one_line(policy: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(policy)
    result = CliRunner().invoke(app, ["govern", str(tmp_path / "policy.yaml"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    for word in (*words, "policy.yaml"):
        assert word in result.stderr


@pytest.mark.integration
@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    config = (
        '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "4xx"]\n\n[[operations]]\ninclude-name = "POST /v1/runs/{name}/steps"\n'
    )
    # Two fields that are fine each may contradict each other: as many reasons as lengths.
    config += 'checks.positive_data_acceptance.expected-statuses = ["2xx", "409", "422"]\n'
    (tmp_path / "schemathesis.toml").write_text(config)
    with govern(tmp_path) as (url, _):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", f"{url}/openapi.json"]
        options = [
            "-H",
            f"Authorization: Bearer {TOKEN}",
            "--checks",
            "all",
            "--max-examples",
            str(NUM_EXAMPLES),
            "--seed",
            "1",
            "--no-color",
        ]
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        done = subprocess.run(command + options, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
