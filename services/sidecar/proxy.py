"""In front of a generation server: every byte passes as it came, but for the cap, loop stop and thinking budget of a generation request.

trainer --request--> Proxy --request, its max_tokens lowered--> vLLM, SGLang
        <--answer---       <--answer, counted on its way------
        --weight update--> what was generated since the last one is a step --> OutsideRun.observe

Lowering max_tokens leaves the distribution of the tokens that are kept alone, so importance ratios stay right. Logits are never touched.
"""

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any

import aiohttp
from starlette.types import ASGIApp, Receive, Scope, Send
from yarl import URL

from opd_governor.services.sidecar.answers import Ended, read_answer
from opd_governor.services.sidecar.requests import GENERATION, Turned, turn
from opd_governor.services.sidecar.runs import OutsideRun
from opd_governor.services.sidecar.seen import StepSeen

log = logging.getLogger(__name__)

INSIDE = "/governor"
"""Below it the proxy's own routes: /governor/v1/runs/..., /governor/metrics, /governor/."""
WEIGHT_UPDATES = (
    "/update_weights", "/start_weight_update", "/finish_weight_update", "/update_weight_version", "/reload_weights",
    "/update_named_param", "/batch_update_named_params", "/init_communicator", "/load_lora_adapter", "/v1/load_lora_adapter",
    "/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor", "/collective_rpc",
)  # fmt: skip
"""Requests with which trainers bring new weights to vLLM (its own routes and TRL's server) or SGLang."""
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"})
MAX_COUNTED_BYTES = 64 << 20
"""Of one answer; what is longer passes uncounted."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The generation server, and when a step ends where no weight update is ever seen."""

    url: str
    step_answers: int


class Proxy:
    """ASGI: one generation server, one run."""

    def __init__(self, upstream: Upstream, run: OutsideRun, inside: ASGIApp) -> None:
        """`inside`: the governor's own app, answered below /governor."""
        self._upstream, self._run, self._inside = upstream, run, inside
        self._session: aiohttp.ClientSession | None = None
        self._ended: list[Ended] = []
        self._cap: float | None = None
        self._update_seen = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["path"] == INSIDE or scope["path"].startswith(INSIDE + "/"):
            path = scope["path"] if scope["path"] != INSIDE else INSIDE + "/"
            await self._inside({**scope, "root_path": INSIDE, "path": path}, receive, send)
        else:
            await self._pass(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
                    auto_decompress=False,
                    trust_env=False,
                )
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                if self._session is not None:
                    await self._session.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/") or "/"
        route = GENERATION.get(path) if scope["method"] == "POST" else None
        if scope["method"] == "POST" and path in WEIGHT_UPDATES:
            self._update_seen = True
            self._close_step()
        if route is None:
            body = _stream(receive) if scope["method"] not in ("GET", "HEAD") else None
            await self._forward(scope, body, None, send)
            return
        # Only here the whole body is needed before the first byte of it can go on.
        turned = turn(await _whole(receive), route, self._run.governor.limits, self._run.governor.cap_tokens)
        if turned.asked_tokens is not None:
            self._cap = float(turned.asked_tokens)
        # A trainer that hangs up aborts its request: the server must see that too.
        forwarding = asyncio.create_task(self._forward(scope, turned.body, turned, send))
        gone = asyncio.create_task(_hung_up(receive))
        await asyncio.wait((forwarding, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not forwarding.done():
            forwarding.cancel()
            await asyncio.wait((forwarding,))
            return
        forwarding.result()

    async def _forward(self, scope: Scope, body: Any, turned: Turned | None, send: Send) -> None:
        dropped = HOP_BY_HOP | {b"host"} | ({b"content-length"} if turned is not None or body is None else set())
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"] if name not in dropped]
        query = scope["query_string"].decode("latin-1")
        target = self._upstream.url + scope.get("raw_path", scope["path"].encode()).decode("latin-1") + (f"?{query}" if query else "")
        assert self._session is not None
        asked = self._session.request(
            scope["method"],
            URL(target, encoded=True),
            headers=headers,
            data=body,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            allow_redirects=False,
        )
        try:
            answer = await asked
        except aiohttp.ClientError as error:
            await _bad_gateway(send, f"{self._upstream.url} does not answer: {type(error).__name__}")
            return
        async with answer:
            await self._answer(answer, turned, send)

    async def _answer(self, answer: aiohttp.ClientResponse, turned: Turned | None, send: Send) -> None:
        headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in HOP_BY_HOP]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        counted: list[bytes] | None = [] if turned is not None and answer.status == 200 else None
        size = 0
        async for chunk in answer.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if counted is not None:
                counted.append(chunk)
                size += len(chunk)
                if size > MAX_COUNTED_BYTES:
                    counted = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if counted is not None and turned is not None:
            self._count(b"".join(counted), turned, answer.headers.get("content-type", ""))

    def _count(self, data: bytes, turned: Turned, content_type: str) -> None:
        try:
            self._ended += read_answer(data, turned, "event-stream" in content_type)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("an answer could not be counted: %s: %s", type(error).__name__, error)
        if not self._update_seen and len(self._ended) >= self._upstream.step_answers:
            self._close_step()

    def _close_step(self) -> None:
        """What was generated since the last weight update is one step."""
        ended, self._ended = [one for one in self._ended if one.reason != "error"], []
        if not ended:
            return
        cap = max((one.cap_tokens for one in ended if one.cap_tokens is not None), default=self._cap)
        seen = StepSeen.of_completions(self._run.step + 1, [one.tokens for one in ended], [one.reason for one in ended], cap_tokens=cap)
        answer = self._run.observe(seen)
        log.info("step %d: %d answers, %s", seen.step, len(ended), answer["reason"])


async def _whole(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(receive: Receive) -> Any:
    while True:
        message = await receive()
        if message.get("body"):
            yield message["body"]
        if not message.get("more_body", False):
            return


async def _bad_gateway(send: Send, detail: str) -> None:
    body = json.dumps({"title": "Bad Gateway", "status": 502, "detail": detail}).encode()
    await send({"type": "http.response.start", "status": 502, "headers": [(b"content-type", b"application/problem+json")]})
    await send({"type": "http.response.body", "body": body})
