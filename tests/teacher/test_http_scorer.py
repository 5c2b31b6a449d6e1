"""HttpScorer against a server on loopback that has the interface of vLLM's and a script of faults."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import httpx
import numpy as np
import pytest
import torch

from opd_governor.actors.teacher.http_client import TeacherUnavailableError
from opd_governor.actors.teacher.http_scorer import HttpScorer
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.teacher.scoring import score_positions
from opd_governor.actors.teacher.settings import TeacherSettings

VOCABULARY = 30
STOP_IDS = (1, 3)
LOGP_VV = torch.log_softmax(2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)), -1)
"""The fake teacher is a bigram model."""


class FakeServer(ThreadingHTTPServer):
    """Answers like `vllm serve`; each request takes one fault from the list, "ok" when it is empty."""

    def __init__(self, max_logprobs: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.max_logprobs = max_logprobs
        self.faults: list[str] = []
        self.spoiled: dict[tuple[int, ...], str] = {}
        """Prompts whose every answer has this fault."""
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def scored(self) -> list[dict]:
        """The requests for a response's scores; those for stop ids after single prefixes are apart."""
        return [body for body in self.bodies if "logprob_token_ids" not in body]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status: int, text: str, headers: dict[str, str] | None = None, cut: int = 0) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        if cut:
            self.close_connection = True

    def next_token(self, index: int, prefix: list[int], body: dict) -> dict:
        assert body["logprobs"] is not None
        assert body["max_tokens"] == 1
        row = {f"token_id:{v}": LOGP_VV[prefix[-1]][v].item() for v in body["logprob_token_ids"]}
        return {"index": index, "logprobs": {"top_logprobs": [row]}}

    def do_GET(self):
        if self.path == "/v1/models":
            self.send(200, json.dumps({"data": [{"id": "big", "max_model_len": 99}]}))
        else:
            self.send(404, "{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.times.append(time.monotonic())
            if self.path == "/tokenize":
                fault = "tokenize"
            elif self.path != "/v1/completions":
                fault = "404"
            elif "logprob_token_ids" in body:
                fault = "ok"
            else:
                fault = self.server.spoiled.get(tuple(body["prompt"])) or (self.server.faults.pop(0) if self.server.faults else "ok")
        if fault in ("400", "401", "404", "500", "503"):
            self.send(int(fault), "no")
            return
        if fault == "tokenize":
            self.send(200, json.dumps({"tokens": [5, 6], "count": 2, "max_model_len": 99}))
            return
        if "logprob_token_ids" in body:
            self.send(200, json.dumps({"choices": [self.next_token(index, prefix, body) for index, prefix in enumerate(body["prompt"])]}))
            return
        prompt, wanted = body["prompt"], body.get("prompt_logprobs")
        if wanted is not None and (wanted == -1 or wanted > self.server.max_logprobs) and self.server.max_logprobs != -1:
            limit = self.server.max_logprobs
            self.send(400, json.dumps({"error": {"message": f"Requested prompt logprobs of {wanted}, which is greater than {limit}"}}))
            return
        if fault == "429":
            self.send(429, "slow down", {"Retry-After": "1"})
            return
        if fault == "timeout":
            time.sleep(0.6)
        if fault == "html":
            self.send(200, "<html>a proxy's page</html>")
            return
        if fault == "other request":
            prompt = prompt[::-1]
        rows: list[dict | None] = [None]
        for before, token in pairwise(prompt):
            logp_V = LOGP_VV[before]
            listed = range(VOCABULARY) if wanted in (None, -1) else [token, *logp_V.topk(wanted).indices.tolist()]
            row = {str(v): {"logprob": logp_V[v].item(), "rank": 1, "decoded_token": None} for v in listed}
            rows.append(dict(sorted(row.items(), reverse=True)) if fault == "reordered" else row)
        if fault == "token count":
            rows.pop()
        if fault == "wrong ids":
            rows[-1] = {str(int(k) + 100): v for k, v in rows[-1].items()}
        if fault in ("nan", "-9999"):
            rows[-1][str(prompt[-1])]["logprob"] = float(fault)
        if fault == "null":
            rows[-1] = None
        choice = {"index": 0, "token_ids": [7, 3, 9], "prompt_token_ids": prompt, "prompt_logprobs": rows}
        choices = [choice, choice] if fault == "two choices" else [] if fault == "no choice" else [choice]
        self.send(200, json.dumps({"choices": choices}), cut=40 if fault == "truncated" else 0)


@contextlib.contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module", params=[-1, 20], ids=["whole vocabulary", "most likely 20"])
def running(request):
    """A server and a scorer that has asked it what it allows."""
    with serving(FakeServer(request.param)) as server:
        scorer = HttpScorer(TeacherSettings(model="big", name="far", backend="http", url=server.url, timeout_s=8), STOP_IDS)
        scorer.score([ScoreRequest((5,), (6,))])
        yield server, scorer
        scorer.close()


@pytest.fixture
def server(running):
    server, _ = running
    for record in (server.faults, server.spoiled, server.bodies, server.times):
        record.clear()
    return server


@pytest.fixture
def scorer(running):
    return running[1]


def request(seed: int = 0, length: int = 6, **options) -> ScoreRequest:
    draw = np.random.default_rng(seed)
    return ScoreRequest(tuple(draw.integers(0, VOCABULARY, 3).tolist()), tuple(draw.integers(0, VOCABULARY, length).tolist()), **options)


def check(scored, sent: ScoreRequest) -> None:
    before = torch.tensor([sent.prompt_token_ids[-1], *sent.token_ids[:-1]])
    given = None if sent.support_ids_TK is None else torch.tensor(sent.support_ids_TK)
    expected = score_positions(LOGP_VV[before], lambda x: x, torch.tensor(sent.token_ids), STOP_IDS, top_k=sent.top_k, given_ids_NK=given)
    np.testing.assert_allclose(scored.sampled_logp_T, expected.sampled_logp_N, atol=1e-5)
    if sent.top_k or given is not None:
        np.testing.assert_array_equal(scored.support_ids_TK, expected.support_ids_NK)
        np.testing.assert_allclose(scored.support_logp_TK, expected.support_logp_NK, atol=1e-5)


def test_scores_are_the_models_own(server, scorer):
    sent = [request(seed, length, top_k=top_k) for seed, length, top_k in [(0, 6, 0), (1, 1, 4), (2, 40, 8)]]
    for scored, one in zip(scorer.score(sent), sent, strict=True):
        check(scored, one)
    assert [body["max_tokens"] for body in server.scored] == [1, 1, 1]
    assert {body["model"] for body in server.bodies} == {"big"}


def test_the_stop_class_is_exact(server, scorer):
    sent = request(3, 60)
    (scored,) = scorer.score([sent])
    before = torch.tensor([sent.prompt_token_ids[-1], *sent.token_ids[:-1]])
    np.testing.assert_allclose(scored.stop_logp_T, LOGP_VV[before][:, STOP_IDS].logsumexp(-1).numpy(), atol=1e-5)
    if server.max_logprobs != -1:
        listed = [set(STOP_IDS) <= {*LOGP_VV[b].topk(20).indices.tolist(), y} for b, y in zip(before, sent.token_ids, strict=True)]
        assert 0 < sum(listed) < 60
        asked = [tuple(prefix) for body in server.bodies if body not in server.scored for prefix in body["prompt"]]
        prompt = (*sent.prompt_token_ids, *sent.token_ids)
        assert asked == [prompt[: 3 + t] for t, known in enumerate(listed) if not known], "only what the list lacks is asked for"


def test_given_ids_need_the_whole_vocabulary(server, scorer):
    sent = request(0, 5, support_ids_TK=np.array([[4, -1]] * 5, np.int32), top_k=2)
    if server.max_logprobs == -1:
        check(scorer.score([sent])[0], sent)
    else:
        with pytest.raises(ValueError, match="teacher far: its server scores only its own most likely ids"):
            scorer.score([sent])


WRONG_ANSWERS = ["truncated", "html", "two choices", "no choice", "other request", "token count", "wrong ids", "null"]


@pytest.mark.parametrize("fault", ["500", "503", *WRONG_ANSWERS])
def test_failures_and_wrong_answers_are_asked_again(server, scorer, fault):
    server.faults = [fault]
    sent = request(5)
    check(scorer.score([sent])[0], sent)
    assert len(server.scored) == 2


def test_the_order_of_ids_in_an_answer_does_not_matter(server, scorer):
    server.faults = ["reordered"]
    sent = request(5, top_k=5)
    check(scorer.score([sent])[0], sent)
    assert len(server.scored) == 1


def test_retry_after_is_obeyed(server, scorer):
    server.faults = ["429"]
    sent = request(5)
    check(scorer.score([sent])[0], sent)
    assert server.times[1] - server.times[0] >= 1.0


def test_a_timeout_is_asked_again(server):
    settings = TeacherSettings(model="big", backend="http", url=server.url, timeout_s=1.6, max_attempts=3)
    scorer = HttpScorer(settings, STOP_IDS)
    scorer.score([request()])
    server.faults = ["timeout"]
    sent = request(5)
    check(scorer.score([sent])[0], sent)
    scorer.close()


@pytest.mark.parametrize("fault", ["nan", "-9999"])
def test_nonfinite_log_probs_stay_nonfinite_for_the_pool_to_refuse(server, scorer, fault):
    server.faults = [fault]
    (scored,) = scorer.score([request(5)])
    assert not np.isfinite(scored.sampled_logp_T[-1])
    assert np.isfinite(scored.sampled_logp_T[:-1]).all()


def test_a_sample_without_a_right_answer_is_none_and_the_others_are_kept(server, scorer):
    spoiled, sent = request(5), request(6)
    server.spoiled[spoiled.prompt_token_ids + spoiled.token_ids] = "token count"
    none, scored = scorer.score([spoiled, sent])
    assert none is None
    check(scored, sent)


def test_a_server_that_is_gone_is_an_error_for_the_pools_breaker(server, scorer):
    server.faults = ["500"] * 6
    with pytest.raises(TeacherUnavailableError, match="no usable answer to 2 requests: 500 no") as caught:
        scorer.score([request(5), request(6)])
    assert caught.value.__cause__ is not None
    assert len(server.bodies) == 6


def test_a_refused_request_is_the_users_mistake(server, scorer):
    server.faults = ["401"]
    with pytest.raises(ValueError, match=r"teacher far: http.* refused a request: 401 no"):
        scorer.score([request(5)])


def test_a_sample_that_the_server_refuses_is_that_samples_error(server, scorer):
    """As vLLM refuses a response that is longer than its window. Alone in a call it is no outage either."""
    refused, sent = request(5), request(6)
    server.spoiled[refused.prompt_token_ids + refused.token_ids] = "400"
    none, scored = scorer.score([refused, sent])
    assert none is None
    check(scored, sent)
    assert scorer.score([refused]) == [None]
    assert sum(body["prompt"] == [*refused.prompt_token_ids, *refused.token_ids] for body in server.scored) == 2, "asked once each"


def test_nothing_listening_says_so_and_why():
    settings = TeacherSettings(model="big", name="far", backend="http", url="http://127.0.0.1:9", timeout_s=2)
    with pytest.raises(TeacherUnavailableError, match=r"http://127.0.0.1:9: no answer: .*refused") as caught:
        HttpScorer(settings, STOP_IDS).score([request()])
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


def test_a_server_that_gives_no_stop_ids_log_prob_is_refused(server, monkeypatch):
    if server.max_logprobs == -1:
        pytest.skip("this server gives everything")
    monkeypatch.setattr(Handler, "next_token", lambda self, index, prefix, body: {"index": index, "logprobs": {"top_logprobs": [{}]}})
    scorer = HttpScorer(TeacherSettings(model="big", backend="http", url=server.url), STOP_IDS)
    with pytest.raises(ValueError, match=r"gives no log-prob of the stop ids .*use vLLM 0.32 or newer, SGLang"):
        scorer.score([request()])
    scorer.close()


def test_a_teacher_without_url_is_refused():
    with pytest.raises(ValueError, match="teacher far: backend http needs url"):
        HttpScorer(TeacherSettings(model="big", name="far", backend="http"), STOP_IDS)


def test_both_forms_of_an_address_work(server):
    scorer = HttpScorer(TeacherSettings(model="big", backend="http", url=f"{server.url}/v1/"), STOP_IDS)
    check(scorer.score([request(5)])[0], request(5))
    scorer.close()


def test_answers_are_cut_at_their_stop_id(server, scorer):
    assert scorer.generate([(5, 6), (7,)], GenerateOptions(max_new_tokens=8, seed=4)) == [(7, 3), (7, 3)]
    assert sorted(body["seed"] for body in server.bodies) == [4, 5]
    server.faults = ["500"] * 9
    with pytest.raises(TeacherUnavailableError):
        scorer.generate([(5, 6)], GenerateOptions(max_new_tokens=8))
