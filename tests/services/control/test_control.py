"""The HTTP contract, route by route."""

import json
import os
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.services.control.app import create_app
from opd_governor.services.control.problem import MAX_BODY_BYTES
from opd_governor.services.control.server import ControlServer, bind
from opd_governor.services.job.tunables import ConfigStore
from tests.services.control.fake_run import FakeRun, make_job

NUM_BODIES = int(os.environ.get("OPD_FUZZ_EXAMPLES", "150"))
TOKEN = "a-token-for-tests"
PATCH_HEADERS = {"content-type": "application/merge-patch+json", "if-match": '"1"'}


@pytest.fixture
def run() -> FakeRun:
    return FakeRun()


@pytest.fixture
def store(tmp_path: Path) -> ConfigStore:
    return ConfigStore(make_job(), tmp_path / "config.jsonl")


@pytest.fixture
def client(run: FakeRun, store: ConfigStore) -> TestClient:
    app = create_app(run, store, run.registry, TOKEN)
    return TestClient(app, headers={"authorization": f"Bearer {TOKEN}"})


def patch(client: TestClient, body: object, generation: int = 1, **params: str) -> httpx.Response:
    return client.patch("/v1/config", content=json.dumps(body), headers=PATCH_HEADERS | {"if-match": f'"{generation}"'}, params=params)


def test_health_page_and_metrics_need_no_token_and_the_rest_does(client):
    del client.headers["authorization"]
    for path in ("/healthz", "/readyz", "/metrics", "/", "/static/page.js", "/openapi.json"):
        assert client.get(path).status_code == 200, path
    for path in ("/v1/run", "/v1/steps", "/v1/samples", "/v1/config", "/v1/config/schema", "/v1/config/history", "/v1/governor"):
        refused = client.get(path)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), path
    assert client.post("/v1/run/stop").status_code == 401
    assert patch(client, {}).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic YTpi", f"Bearer {TOKEN}x", b"Bearer \xff\xfe"])
def test_a_wrong_token_is_refused(client, header):
    assert client.get("/v1/run", headers={"authorization": header}).status_code == 401


def test_metrics_can_be_protected(run, store):
    client = TestClient(create_app(run, store, run.registry, TOKEN, protect_metrics=True))
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_metrics_are_the_runs_registry(client):
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert families["opd_governor_cap_tokens"].samples[0].value == 251


def test_a_run_is_ready_once_it_steps(client, run):
    run.phase = "starting"
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    run.phase = "running"
    assert client.get("/readyz").json() == {"status": "running"}


def test_the_run_shows_itself(client):
    shown = client.get("/v1/run").json()
    assert {"name", "phase", "step", "total_steps", "weight_version", "limits", "links", "instance"} <= shown.keys()


def test_restarts_are_those_of_the_metrics_by_role(client, run):
    assert client.get("/v1/run").json()["restarts"] == {}
    run.restarts.labels("sums", "teacher").inc(2)
    run.restarts.labels("sums", "learner").inc(0)
    assert client.get("/v1/run").json()["restarts"] == {"teacher": 2}


def test_step_records_come_after_the_step_asked_for_and_nan_is_null(client):
    steps = client.get("/v1/steps", params={"after": 2}).json()
    assert [record["step"] for record in steps["steps"]] == [3, 4, 5]
    assert steps["steps"][0]["loss"] is None
    assert steps["more"] is False


def test_many_step_records_come_in_pages(run, store):
    run.records = [{"step": step} for step in range(1, 2501)]
    client = TestClient(create_app(run, store, run.registry, None))
    seen, after, more = [], -1, True
    while more:
        page = client.get("/v1/steps", params={"after": after}).json()
        seen += [record["step"] for record in page["steps"]]
        after, more = seen[-1], page["more"]
    assert seen == list(range(1, 2501))


def test_samples_governor_and_decisions_are_shown(client):
    assert client.get("/v1/samples").json()["samples"][1]["loop_onset_char"] == 11
    assert client.get("/v1/governor").json()["signals"]["truncation"] is None
    assert [decision["step"] for decision in client.get("/v1/governor/decisions", params={"after": 2}).json()["decisions"]] == [3, 4, 5]


def test_verbs_are_passed_on_and_may_be_repeated(client, run):
    for verb in ("pause", "pause", "resume", "checkpoint", "rollback", "stop"):
        assert client.post(f"/v1/run/{verb}").status_code == 202
    assert run.requested == ["pause", "pause", "resume", "checkpoint", "rollback", "stop"]
    assert client.post("/v1/run/explode").status_code == 422
    run.healthy_checkpoint = False
    refused = client.post("/v1/run/rollback")
    assert (refused.status_code, refused.json()["detail"]) == (409, "there is no healthy checkpoint yet")


def test_config_carries_its_generation_as_etag(client, store):
    shown = client.get("/v1/config")
    assert shown.headers["etag"] == '"1"'
    assert (shown.json()["generation"], shown.json()["observed_generation"]) == (1, 0)
    assert shown.json()["rollout"]["max_new_tokens"] == 256
    store.observe(1)
    assert client.get("/v1/config").json()["observed_generation"] == 1


def test_a_patch_is_merged_answered_with_the_new_etag_and_recorded(client):
    changed = patch(client, {"rollout": {"max_new_tokens": 64}})
    assert (changed.status_code, changed.headers["etag"]) == (200, '"2"')
    assert changed.json()["changes"] == [{"pointer": "/rollout/max_new_tokens", "from": 256, "to": 64}]
    assert client.get("/v1/config").json()["rollout"]["max_new_tokens"] == 64
    first, second = client.get("/v1/config/history").json()["history"]
    assert (first["generation"], first["source"]) == (1, "job")
    assert (second["generation"], second["source"]) == (2, "testclient testclient")
    assert second["patch"] == {"rollout": {"max_new_tokens": 64}}


def test_a_dry_run_answers_like_the_change_and_changes_nothing(client):
    shown = patch(client, {"rollout": {"top_k": 7}}, dry_run="true")
    assert (shown.json()["dry_run"], shown.json()["rollout"]["top_k"], shown.headers["etag"]) == (True, 7, '"1"')
    assert client.get("/v1/config").json()["rollout"]["top_k"] == 0


def test_if_match_is_required_and_must_be_current(client):
    missing = client.patch("/v1/config", content="{}", headers={"content-type": "application/merge-patch+json"})
    assert missing.status_code == 428
    assert patch(client, {"rollout": {"top_k": 7}}).status_code == 200
    stale = patch(client, {"rollout": {"top_k": 8}})
    assert (stale.status_code, stale.headers["etag"]) == (412, '"2"')
    assert "generation 2" in stale.json()["detail"]
    for tag, status in (("*", 200), ("2", 200), ('W/"2"', 412), ('"2', 412), ("", 412), ("x" * 5000, 412)):
        headers = PATCH_HEADERS | {"if-match": tag}
        assert client.patch("/v1/config", content="{}", headers=headers).status_code == status, tag


def test_a_misspelt_parameter_does_not_make_a_dry_run_real(client):
    refused = patch(client, {"rollout": {"top_k": 7}}, dryrun="true")
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "?dryrun")
    assert client.get("/v1/steps?after=1&after=2").status_code == 422
    assert client.get("/v1/config").json()["generation"] == 1


def test_only_a_merge_patch_is_taken(client):
    for content_type in ("application/json", "application/json-patch+json", "text/plain", ""):
        refused = client.patch("/v1/config", content="{}", headers=PATCH_HEADERS | {"content-type": content_type})
        assert refused.status_code == 415
        assert refused.headers["accept-patch"] == "application/merge-patch+json"
    charset = PATCH_HEADERS | {"content-type": "Application/Merge-Patch+JSON; charset=utf-8"}
    assert client.patch("/v1/config", content="{}", headers=charset).status_code == 200


def test_errors_are_problem_documents_with_a_pointer_per_bad_field(client):
    refused = patch(client, {"rollout": {"top_k": -1, "num_actors": 3}})
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert (refused.status_code, problem["status"], problem["title"], problem["type"]) == (422, 422, "Unprocessable Entity", "about:blank")
    assert [error["pointer"] for error in problem["errors"]] == ["/rollout/top_k", "/rollout/num_actors"]
    for response in (client.get("/nothing"), client.delete("/v1/config"), client.get("/v1/steps", params={"after": "x"})):
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code


def test_a_fault_of_the_run_is_a_problem_document_too(run, store, monkeypatch):
    monkeypatch.setattr(run, "status", lambda: 1 / 0)
    client = TestClient(create_app(run, store, run.registry, None), raise_server_exceptions=False)
    assert client.get("/v1/run").json()["status"] == 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"rollout": {"top_k": 1, "top_k": 2}}',
        b'{"rollout": {"temperature": NaN}}',
        b'{"rollout": {"temperature": Infinity}}',
        b'{"rollout": {"temperature": 1e999}}',
        b'{"rollout": {"top_k": ' + b"9" * 5000 + b"}}",
        b'{"\\ud800": 1}',
        b"[" * 30000,
        b'{"a":' * 10000 + b"1" + b"}" * 10000,
    ],
)
def test_what_is_not_strict_json_is_a_bad_request(client, body):
    refused = client.patch("/v1/config", content=body, headers=PATCH_HEADERS)
    assert refused.status_code == 400
    assert refused.json()["detail"]
    assert client.get("/v1/config").json()["generation"] == 1


def test_no_body_brings_the_service_down_or_half_changes_anything(client):
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = st.recursive(
        leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
    )
    fields = st.sampled_from(["max_new_tokens", "top_k", "temperature", "mode", "learning_rate", "other"])
    group = st.dictionaries(fields, value, max_size=3) | value
    body = st.dictionaries(st.sampled_from(["rollout", "governor", "learner", "name"]), group, max_size=3) | value

    @settings(max_examples=NUM_BODIES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=50) | body.map(lambda tree: json.dumps(tree).encode()))
    def send(content: bytes) -> None:
        before = client.get("/v1/config")
        answer = client.patch("/v1/config", content=content, headers=PATCH_HEADERS | {"if-match": before.headers["etag"]})
        assert answer.status_code in (200, 400, 422)
        if answer.status_code != 200:
            assert client.get("/v1/config").content == before.content

    send()


def test_two_hundred_patches_with_one_etag_have_exactly_one_winner(run, store):
    server = ControlServer(create_app(run, store, run.registry, TOKEN), bind("127.0.0.1", 0, TOKEN))
    server.start()
    statuses: Counter[int] = Counter()
    headers = PATCH_HEADERS | {"authorization": f"Bearer {TOKEN}"}

    def send(top_ks: range) -> None:
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as own:
            for top_k in top_ks:
                statuses[own.patch("/v1/config", content=json.dumps({"rollout": {"top_k": top_k}})).status_code] += 1

    threads = [threading.Thread(target=send, args=(range(first, 201, 20),)) for first in range(1, 21)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.stop()
    assert statuses == {200: 1, 412: 199}
    assert [generation.generation for generation in store.history()] == [1, 2]


def test_a_body_of_ten_megabytes_is_refused_and_its_sender_gets_the_answer(run, store):
    server = ControlServer(create_app(run, store, run.registry, None), bind("127.0.0.1", 0, None))
    server.start()
    with httpx.Client(base_url=server.url, headers=PATCH_HEADERS, trust_env=False) as own:
        assert own.patch("/v1/config", content=b" " * (MAX_BODY_BYTES - 2) + b"{}").status_code == 200
        assert own.patch("/v1/config", content=b" " * (MAX_BODY_BYTES - 1) + b"{}").status_code == 413
        assert own.patch("/v1/config", content=b"x" * 10_000_000).status_code == 413
        assert own.patch("/v1/config", content=(b"x" * 100_000 for _ in range(100))).status_code == 413
        assert own.get("/healthz").status_code == 200
    server.stop()
