"""Servers that answer oddly: what `opd check` says of each, and what scoring makes of it. One row a server."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.teacher.http_client import TeacherUnavailableError
from opd_governor.actors.teacher.http_scorer import HttpScorer
from opd_governor.actors.teacher.scorers import ScoreRequest
from opd_governor.services.inputs.check_servers import check_server
from opd_governor.services.inputs.resolve import ModelFacts, student_facts
from opd_governor.services.job.settings import Job
from tests.tiny import build_tiny

IDS = 85
LOGP = -float(np.log(IDS))
Answer = tuple[int, Any, dict[str, str]]
Odd = Callable[[str, Any], Answer | None]
"""(path, the right answer) -> another one, or None for the right one."""


@dataclass(frozen=True)
class Case:
    """A server, what check must say of it (its first line), and whether scoring gives the right scores."""

    name: str
    words: str
    scores: bool
    odd: Odd


def always(status: int, body: Any, **headers: str) -> Odd:
    return lambda path, right: (status, body, headers) if path == "/v1/completions" else None


def rows(change: Callable[[dict[str, Any]], Any]) -> Odd:
    """Each position's log-probs, changed."""

    def odd(path: str, right: Any) -> Answer | None:
        if path != "/v1/completions" or "choices" not in right:
            return None
        (choice,) = right["choices"]
        given = [None, *(change(row) for row in choice["prompt_logprobs"][1:])]
        return 200, {"choices": [choice | {"prompt_logprobs": given}]}, {}

    return odd


def logps(value: Any) -> Odd:
    return rows(lambda row: {token: {"logprob": value} for token in row})


def models(body: Any) -> Odd:
    return lambda path, right: (200, body, {}) if path == "/v1/models" else None


def tokenize(status: int, body: Any) -> Odd:
    return lambda path, right: (status, body, {}) if path == "/tokenize" else None


def once(status: int, **headers: str) -> Odd:
    """The first request is refused so."""
    seen: list[str] = []

    def odd(path: str, right: Any) -> Answer | None:
        if path != "/v1/completions" or seen:
            return None
        seen.append(path)
        return status, {"error": "busy"}, headers

    return odd


HTML = b"<html>please log in</html>"
NO_LOGPROBS = "which are no log-probs"
CASES = [
    Case("an honest one", "one probe scored", True, lambda path, right: None),
    Case("HTML with 200", "not JSON", False, always(200, HTML)),
    Case("HTML with 502", "502 <html>", False, always(502, HTML)),
    Case("a list", "not a completion with one choice", False, always(200, [1])),
    Case("null", "not a completion with one choice", False, always(200, None)),
    Case("choices of strings", "not a completion with one choice", False, always(200, {"choices": ["x"]})),
    Case("an error with 200", "not a completion with one choice", False, always(200, {"object": "error", "message": "boom"})),
    Case("nested without end", "not JSON", False, always(200, b"[" * 100_000)),
    Case("no content", "not JSON", False, always(204, b"")),
    Case("gzip that is none", "while decompressing data", False, always(200, b"plain", **{"Content-Encoding": "gzip"})),
    Case("a redirect", "redirects to /login", False, always(302, b"", Location="/login")),
    Case("a wrong key", "401", False, always(401, {"error": "key"})),
    Case("NaN for log-probs", NO_LOGPROBS, False, logps(float("nan"))),
    Case("log-probs above 0", "gives no log-prob of the stop ids", False, logps(2.0)),
    Case("zeros for log-probs", "gives no log-prob of the stop ids", False, logps(0.0)),
    Case("probabilities for log-probs", "gives no log-prob of the stop ids", False, logps(1 / IDS)),
    Case("log-probs to base 2", "gives no log-prob of the stop ids", False, logps(-float(np.log2(IDS)))),
    Case("the twenty likeliest for all", "gives no log-prob", False, rows(lambda row: dict(list(row.items())[:20]))),
    Case("nulls for rows", "log-probs in another form", False, rows(lambda row: None)),
    Case("words for ids", "log-probs in another form", False, rows(lambda row: {f"tok{token}": value for token, value in row.items()})),
    Case("another model", "serves small, not big", True, models({"data": [{"id": "small"}]})),
    Case("five hundred models", "and 495 more, not big", True, models({"data": [{"id": f"m{i}"} for i in range(500)]})),
    Case("models as null", "one probe scored", True, models({"data": None})),
    Case("models with numbers for names", "one probe scored", True, models({"data": [{"id": 5}, {"id": ["big"]}]})),
    Case("a window in words", "one probe scored", True, models({"data": [{"id": "big", "max_model_len": "many"}]})),
    Case("a window below zero", "one probe scored", True, models({"data": [{"id": "big", "max_model_len": -1}]})),
    Case("busy once, in lower case", "one probe scored", True, once(429, **{"retry-after": "0"})),
    Case("busy until a date", "one probe scored", True, once(429, **{"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"})),
    Case("busy for a strange while", "one probe scored", True, once(429, **{"Retry-After": "\u00b2"})),
    Case("a list for tokens", "one probe scored", True, tokenize(200, [1])),
    Case("no tokens", "one probe scored", True, tokenize(200, {"tokens": None})),
    Case("a tokenizer that is broken", "one probe scored", True, tokenize(500, {})),
]


class Handler(BaseHTTPRequestHandler):
    """Scores every id alike, as vLLM's server would say it, but for what `odd` makes of it."""

    odd: Odd = staticmethod(lambda path, right: None)

    def log_message(self, *terms: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._send(200 if self.path == "/v1/models" else 404, {"data": [{"id": "big", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("prompt")
        if self.path != "/v1/completions" or not isinstance(prompt, list) or isinstance(prompt[0], list):
            self._send(404, {"error": "no such path"})
            return
        row = {str(i): {"logprob": LOGP} for i in range(IDS)}
        self._send(
            200,
            {
                "choices": [
                    {"index": 0, "prompt_token_ids": prompt, "token_ids": [5], "prompt_logprobs": [None, *[row] * (len(prompt) - 1)]}
                ]
            },
        )

    def _send(self, status: int, right: Any) -> None:
        status, body, headers = type(self).odd(self.path, right) or (status, right, {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    folder = build_tiny(tmp_path_factory.mktemp("models") / "student")
    return student_facts(job_of("http://127.0.0.1:9", str(folder)).student)


def job_of(url: str, student: str = "student") -> Job:
    teacher = {"model": "big", "name": "far", "backend": "http", "url": url, "timeout_s": 20.0, "max_attempts": 2}
    data = {"prompts": {"path": "p.jsonl"}}
    return Job.model_validate({"name": "x", "student": {"model": student}, "teacher": teacher, "data": data})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_server_is_taken_or_refused_in_one_line(case: Case, url: str, student: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_governor.services.inputs.check_servers.PAUSE_S", 0.0)
    monkeypatch.setattr(Handler, "odd", staticmethod(case.odd))
    job = job_of(url)
    found = list(check_server(job.teacher[0], student, job))
    assert case.words in found[0].line(), [one.line() for one in found]
    assert all("\n" not in one.line() for one in found)
    assert (found[0].status == "pass") == (case.words == "one probe scored")
    scorer = HttpScorer(job.teacher[0], (1,))
    try:
        (scores,) = scorer.score([ScoreRequest((5, 6), (7, 8, 1))])
    except (TeacherUnavailableError, CallerError):
        scores = None
    finally:
        scorer.close()
    right = scores is not None and np.allclose([scores.sampled_logp_T, scores.stop_logp_T], LOGP, atol=1e-4)
    assert right == case.scores, scores
    assert right or scores is None or np.isnan(scores.sampled_logp_T).all(), "neither refused nor marked"


def test_a_key_that_no_header_can_carry_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, student: ModelFacts) -> None:
    job = job_of("http://127.0.0.1:9")
    for key in ("secret\nkey", "clé-secret"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        (found,) = check_server(job.teacher[0], student, job)
        assert found.line().startswith("VLLM_API_KEY: holds a line break or letters that no header can carry")
        assert "secret" not in found.line()
