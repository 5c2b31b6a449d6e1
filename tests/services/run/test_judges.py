"""Verifiers in real processes of their own: a response costs no more than itself."""

import asyncio
import http.server
import json
import sys
import threading
import time

import pytest

from opd_governor.services.inputs.verdicts import Verdict
from opd_governor.services.job.settings import VerifierProcesses
from opd_governor.services.run.judges import Judges

SOLUTION = "Here:\n```python\ndef double(x):\n    return {}\n```\n"
TESTS = "assert double(4) == 8\n"
WRONG_CODE = {
    "wrong": SOLUTION.format("x + 1"),
    "no code": "I do not know",
    "ends early": "```python\nimport os\nos._exit(0)\n```",
    "hangs": SOLUTION.format("[x for _ in iter(int, 1)]"),
    "takes memory": SOLUTION.format("len(bytearray(10**10)) and 8"),
    "reads the network": "```python\nimport socket\nsocket.socket()\ndef double(x):\n    return 2 * x\n```",
}


def judged(spec: str, pairs: list[tuple[str, str]], **settings: object) -> list[Verdict]:
    async def run() -> list[Verdict]:
        judges = Judges(spec, VerifierProcesses.model_validate(settings))
        try:
            return await judges(pairs)
        finally:
            await judges.close()

    return asyncio.run(run())


def test_whatever_a_verifier_does_on_a_response_costs_that_response_alone(tmp_path) -> None:
    path = tmp_path / "moody.py"
    path.write_text(
        "import os, time\n"
        "def verify(response, answer):\n"
        "    print('said to nobody')\n"
        "    match response:\n"
        "        case 'hang': time.sleep(60)\n"
        "        case 'die': os._exit(3)\n"
        "        case 'raise': raise ZeroDivisionError('no')\n"
        "        case 'exit': raise SystemExit(1)\n"
        "        case 'eat': return len(bytearray(10**10))\n"
        "        case 'nan': return float('nan')\n"
        "        case 'text': return 'yes'\n"
        "    return response == answer\n"
    )
    kinds = ["7", "hang", "8", "die", "raise", "exit", "eat", "nan", "text", "7"]
    started = time.monotonic()
    found = judged(f"{path}:verify", [(kind, "7") for kind in kinds], processes=2, timeout_s=1, memory_mib=512)
    assert time.monotonic() - started < 20
    assert [(v.score, v.reason) for v in found] == [
        (1.0, None), (None, "timeout"), (0.0, None), (None, "died"), (None, "raised"), (None, "raised"), (None, "memory"),
        (None, "nonsense"), (None, "nonsense"), (1.0, None),
    ]  # fmt: skip
    assert found[1].trouble == "answer '7': no verdict within 1 s (data.verifiers.timeout_s)"
    assert found[3].trouble == "answer '7': its process ended with exit code 3"
    assert found[4].trouble == "answer '7': ZeroDivisionError: no"
    assert found[8].trouble == "answer '7': it gives 'yes', neither true, false nor a finite number"


def test_code_is_right_only_where_its_tests_end_and_it_sees_no_network() -> None:
    right = SOLUTION.format("2 * x")
    found = judged("unit-tests", [(code, TESTS) for code in (right, *WRONG_CODE.values())], timeout_s=2.5, memory_mib=300)
    assert [verdict.score for verdict in found] == [1.0, *[0.0] * len(WRONG_CODE)]


def test_a_server_judges_and_its_failure_is_the_responses_own() -> None:
    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            task = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(500 if task["response"] == "boom" else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"score": 0.25 if task["response"] == task["answer"] else "none"}).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = judged(f"http://127.0.0.1:{server.server_port}/judge", [("a", "a"), ("boom", "a"), ("b", "a")])
    finally:
        server.shutdown()
        server.server_close()
    assert [(v.score, v.reason) for v in found] == [(0.25, None), (None, "raised"), (None, "nonsense")]
    assert "500" in found[1].trouble


@pytest.mark.parametrize(
    ("spec", "response", "answer", "score"),
    [
        ("math-verify", r"so it is $\frac{1}{2}$", "$0.5$", 1.0),
        ("math-verify", r"so it is $\frac{1}{3}$", "$0.5$", 0.0),
        ("json-schema", 'It is\n```json\n{"a": 1}\n```', '{"required": ["a"]}', 1.0),
        ("json-schema", '{"b": 1}', '{"required": ["a"]}', 0.0),
        ("json-schema", "{", "{}", 0.0),
        ("json-schema", "1", '{"type": "no such"}', None),
        ("json-schema", "1", '{"$ref": "http://127.0.0.1:9/schema.json"}', None),
    ],
)
def test_library_verifiers(spec: str, response: str, answer: str, score: float | None) -> None:
    from opd_governor.services.inputs.verdicts import judge
    from opd_governor.services.inputs.verifiers import load_verifier

    assert judge(load_verifier(spec), response, answer).score == score


def test_a_verifier_that_does_not_load_is_named() -> None:
    (found,) = judged("absent_module:f", [("a", "b")], processes=1)
    assert (found.score, found.reason) == (None, "died")
    assert "No module named 'absent_module'" in found.trouble


def test_a_process_that_does_not_start_or_says_nonsense_costs_responses_and_keeps_nobody_waiting(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    (verdict,) = judged("exact", [("7", "7")])
    assert (verdict.score, verdict.reason) == (None, "died")
    assert "its process does not start: " in verdict.trouble
    (tmp_path / "chatty").write_text("#!/bin/sh\necho '{\"ready\": true}'\nwhile read -r line; do echo hello; done\n")
    (tmp_path / "chatty").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "chatty"))
    assert [v.reason for v in judged("exact", [("7", "7"), ("8", "7")], processes=1)] == ["nonsense", "nonsense"]
