"""The proxy in front of servers: the same bytes as without it, steps from weight updates, a lower cap when answers inflate."""

import asyncio
import concurrent.futures
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.services.sidecar.service import HEADERS, govern
from tests.teacher.vllm_server import vllm_server
from tests.tiny import build_tiny


class _Server(BaseHTTPRequestHandler):
    """Speaks like a generation server: as many tokens as `server.length` says, at most max_tokens; keeps what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        if "completions" not in self.path:
            self._send(b"weights taken", "text/plain")
            return
        request = json.loads(body)
        tokens = min(self.server.length, request["max_tokens"])  # type: ignore[attr-defined]
        end = "length" if tokens == request["max_tokens"] else "stop"
        if request.get("stream"):
            events = [{"choices": [{"index": 0, "text": "é", "finish_reason": None}]}] * (tokens - 1)
            events.append({"choices": [{"index": 0, "text": "é", "finish_reason": end}]})
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for event in [*map(json.dumps, events), "[DONE]"]:
                data = f"data: {event}\n\n".encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
            return
        answer = {"choices": [{"index": 0, "text": "é" * tokens, "finish_reason": end}], "usage": {"completion_tokens": tokens}}
        self._send(json.dumps(answer, ensure_ascii=False).encode(), "application/json")

    def do_GET(self) -> None:
        self._send(b"\x00\x01 not json", "application/octet-stream")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-own", "kept")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Listening(ThreadingHTTPServer):
    request_queue_size = 128


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    listening = _Listening(("127.0.0.1", 0), _Server)
    listening.asked, listening.length = [], 20  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield listening
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_answers_are_the_same_bytes_and_a_step_lies_between_weight_updates(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    direct = f"http://127.0.0.1:{server.server_port}"
    with govern(tmp_path, "--proxy", direct) as (url, _), httpx.Client(trust_env=False) as http:
        for body in ({"max_tokens": 64, "prompt": "é"}, {"max_tokens": 64, "stream": True}):
            ours, theirs = (http.post(f"{where}/v1/completions?a=%20b", json=body, headers={"x-a": "1"}) for where in (url, direct))
            assert ours.content == theirs.content
            assert {k: v for k, v in ours.headers.items() if k != "date"} == {k: v for k, v in theirs.headers.items() if k != "date"}
            (path, headers, sent), (_, wanted_headers, wanted) = server.asked[-2:]  # type: ignore[attr-defined]
            assert (path, sent) == ("/v1/completions?a=%20b", wanted)
            assert {k.lower(): v for k, v in headers.items() if k.lower() != "host"} == {
                k.lower(): v for k, v in wanted_headers.items() if k.lower() not in ("host", "connection")
            }
        assert http.get(f"{url}/anything").content == b"\x00\x01 not json"
        large = bytes(range(256)) * 20_000
        assert http.post(f"{url}/update_weights", content=large).content == b"weights taken"
        assert server.asked[-1][2] == large  # type: ignore[attr-defined]
        steps = http.get(f"{url}/governor/runs/proxy/v1/steps", headers=HEADERS).json()["steps"]
        assert [(step["num_rollouts"], step["length_mean"], step["truncation"]) for step in steps] == [(2, 20.0, 0.0)]


@pytest.mark.integration
def test_answers_that_inflate_are_asked_for_less(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    direct = f"http://127.0.0.1:{server.server_port}"
    with govern(tmp_path, "--proxy", direct) as (url, _), httpx.Client(trust_env=False) as http:
        caps = []
        for step in range(24):
            server.length = 20 if step < 12 else 64  # type: ignore[attr-defined]
            for _ in range(16):
                http.post(f"{url}/v1/completions", json={"max_tokens": 64, "prompt": "a"})
            sent = json.loads(server.asked[-1][2])  # type: ignore[attr-defined]
            caps.append(sent["max_tokens"])
            http.post(f"{url}/update_weights", content=b"w")
    assert set(caps[:13]) == {64}
    assert min(caps[13:]) < 40, caps
    assert sent["repetition_detection"]["min_count"] == 8


@pytest.mark.integration
def test_a_trainer_that_hangs_up_hangs_up_at_the_server(tmp_path: Path) -> None:
    """An aborted rollout must not go on in the engine."""

    async def scenario() -> bool:
        gone = asyncio.Event()

        async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"7\r\ndata: x\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)
            writer.close()
            gone.set()

        listening = await asyncio.start_server(endless, "127.0.0.1", 0)
        direct = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with contextlib.ExitStack() as stack:
            url, _ = await asyncio.to_thread(stack.enter_context, govern(tmp_path, "--proxy", direct))
            async with (
                httpx.AsyncClient(trust_env=False) as http,
                http.stream("POST", f"{url}/v1/completions", json={"max_tokens": 9}) as answer,
            ):
                await answer.aiter_raw().__anext__()
            await asyncio.wait_for(gone.wait(), 10)
            await asyncio.to_thread(stack.close)
        listening.close()
        return gone.is_set()

    assert asyncio.run(scenario())


def test_a_server_that_is_away_is_a_bad_gateway(tmp_path: Path) -> None:
    with govern(tmp_path, "--proxy", "http://127.0.0.1:9") as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json={"max_tokens": 4}, trust_env=False)
    assert (answer.status_code, answer.json()["title"]) == (502, "Bad Gateway")


@pytest.mark.integration
def test_before_a_real_vllm_server(tmp_path: Path) -> None:
    """Greedy answers through the proxy are vLLM's own, byte for byte but for their id and time; then a cap is lowered and loops stop."""
    model = build_tiny(tmp_path / "model")
    options = "step_answers: 16"
    num_tokens = json.loads((model / "config.json").read_text())["vocab_size"]
    with (
        vllm_server(model, "tiny", tmp_path / "vllm", "--max-model-len", "256") as direct,
        govern(tmp_path, "--proxy", direct, policy=options) as (url, _),
        httpx.Client(trust_env=False, timeout=120) as http,
    ):
        ask = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 128, "ignore_eos": True}

        def answer(where: str, **changes: object) -> dict[str, object]:
            got = http.post(f"{where}/v1/completions", json=ask | changes).raise_for_status().json()
            return {key: value for key, value in got.items() if key not in ("id", "created")}

        for changes in ({"temperature": 0, "max_tokens": 24, "logprobs": 2}, {"temperature": 1.0, "seed": 3, "max_tokens": 24}):
            assert answer(url, **changes) == answer(direct, **changes)
        lengths: list[int] = []
        for step in range(30):
            # Twelve steps of answers that end at once, then answers that would never end.
            stop = {"stop_token_ids": list(range(num_tokens)), "ignore_eos": False} if step < 12 else {}
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                changed = stop | {"temperature": 1.0}
                answers = list(pool.map(lambda _, changed=changed: answer(url, **changed), range(16)))
            lengths.append(max(one["usage"]["completion_tokens"] for one in answers))  # type: ignore[index]
        governor = http.get(f"{url}/governor/runs/proxy/v1/governor", headers=HEADERS).json()
    print(lengths, governor["limits"])
    assert governor["limits"]["cap_tokens"] < 128
    assert max(lengths[:12]) < 30
    assert lengths[-1] <= governor["limits"]["cap_tokens"]


@pytest.mark.integration
def test_many_streams_at_once_pass_in_order(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    direct = f"http://127.0.0.1:{server.server_port}"

    async def ask(url: str) -> list[bytes]:
        async with httpx.AsyncClient(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=64)) as http:
            answers = await asyncio.gather(
                *(http.post(f"{url}/v1/completions", json={"max_tokens": 64, "stream": True}) for _ in range(64))
            )
            return [answer.content for answer in answers]

    with govern(tmp_path, "--proxy", direct) as (url, _):
        assert asyncio.run(ask(url)) == asyncio.run(ask(direct))
