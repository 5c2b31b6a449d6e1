"""A proxy in front of a teacher's server that spoils some answers, as networks and servers do."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

HANG_S = 30.0
"""Longer than any client here waits."""
CURED = ("500", "429", "dropped", "timeout", "truncated", "reordered", "token count")
"""Faults that a second question cures."""
Choose = Callable[[tuple[int, ...], int], str]
"""(token ids of a request for scores, how often they were asked about before) -> fault, or "" for none."""


class FaultyProxy(ThreadingHTTPServer):
    """Hands requests on to `upstream`; `choose` says what becomes of those for scores."""

    daemon_threads = True

    def __init__(self, upstream: str, choose: Choose) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.choose = httpx.Client(base_url=upstream, timeout=HANG_S, trust_env=False), choose
        self.asked, self.faults = Counter[tuple[int, ...]](), Counter[str]()
        self.other = b""
        """The answer to some other request."""
        self.lock, self.ending = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, prompt: tuple[int, ...]) -> str:
        with self.lock:
            fault = self.choose(prompt, self.asked[prompt])
            self.asked[prompt] += 1
            self.faults[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def do_GET(self) -> None:
        response = self.server.upstream.get(self.path)
        self._send(response.status_code, response.content, {})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(data)
        scores = "prompt_logprobs" in body or bool(body.get("return_logprob"))
        prompt = tuple(body["input_ids"] if "input_ids" in body else body["prompt"]) if scores else ()
        fault = self.server.fault(prompt) if scores else ""
        if fault == "timeout":
            self.server.ending.wait(HANG_S)
        if fault in ("timeout", "dropped"):
            self.close_connection = True
            return
        if fault in ("500", "429"):
            self._send(int(fault), b"no", {"Retry-After": "1"} if fault == "429" else {})
            return
        response = self.server.upstream.post(self.path, content=data, headers={"Content-Type": "application/json"})
        content = response.content
        if fault == "reordered":
            content = self.server.other
        elif fault in ("token count", "non-finite"):
            answer = json.loads(content)
            choice = answer["choices"][0] if "choices" in answer else answer["meta_info"]
            rows = choice["prompt_logprobs" if "choices" in answer else "input_token_logprobs"]
            if fault == "token count":
                rows.pop()
            elif "choices" in answer:
                rows[-1][str(prompt[-1])]["logprob"] = float("nan")
            else:
                rows[-1][0] = float("nan")
            content = json.dumps(answer).encode()
        elif scores and not fault:
            self.server.other = content
        self._send(response.status_code, content, {}, cut=len(content) // 2 if fault == "truncated" else 0)

    def _send(self, status: int, data: bytes, headers: dict[str, str], cut: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        if cut:
            self.close_connection = True


@contextlib.contextmanager
def faulty_proxy(upstream: str, choose: Choose) -> Iterator[FaultyProxy]:
    server = FaultyProxy(upstream, choose)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()
        server.upstream.close()


def cured(every: int) -> Choose:
    """Each of the faults in turn, for every so many requests that are asked for the first time."""
    first_time = Counter[str]()

    def choose(prompt: tuple[int, ...], times: int) -> str:
        if times:
            return ""
        number = first_time["requests"]
        first_time["requests"] += 1
        return CURED[number // every % len(CURED)] if number % every == every - 1 else ""

    return choose
