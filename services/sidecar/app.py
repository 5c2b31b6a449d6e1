"""HTTP of `opd govern`: posted steps in, limits out; below /runs/NAME/ each run's own page and routes, the same as a run of ours has.

trainer --POST /v1/runs/NAME/steps--> OutsideRun.post --> limits
person  --/runs/NAME/ ...-----------> control.create_app(RunPage(run), run.store, ...)
"""

import hmac
import html
import re
from collections import OrderedDict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import Receive, Scope, Send

from opd_governor.services.control.app import create_app as create_run_app
from opd_governor.services.control.problem import PROBLEM_SCHEMA, Problem, install, parse_json, respond
from opd_governor.services.sidecar.policy_file import RUN_NAME
from opd_governor.services.sidecar.post import StepPost
from opd_governor.services.sidecar.runs import OutsideRun, RunPage, Runs
from opd_governor.services.sidecar.totals import RunsCollector

MAX_BODY_BYTES = 2 << 20
"""A step of 65,536 answers with their ends."""
MAX_OPEN_PAGES = 64
"""Runs whose page and routes are kept in memory at once."""
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"

RunName = Annotated[str, Path(pattern=RUN_NAME, description="The run's name, the trainer's choice.")]


class StepAnswer(BaseModel):
    """What the trainer is told."""

    model_config = ConfigDict(extra="allow")
    step: int
    pressure: float
    limits: dict[str, Any]
    """cap_tokens (null: the trainer's own is not known), lr_scale, golden_weight, ... with their generation."""
    action: str
    """hold, tighten, release, fallback, rollback or stop."""
    reason: str
    asked: list[str]
    """What a person asked for since the last answer: stop, checkpoint, rollback."""


class RunLine(BaseModel):
    name: str
    phase: str
    step: int
    pressure: float


class RunList(BaseModel):
    runs: list[RunLine]


def create_app(runs: Runs, token: str | None) -> FastAPI:
    """All routes. `token` None leaves them open: for loopback only, which `bind` sees to."""
    app = FastAPI(title="OPD Governor for other trainers", version="1", docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    install(app)
    guard = [Depends(_bearer(token))] if token is not None else []
    problems = _problems(401, 422) if token is not None else _problems(422)
    api = APIRouter(prefix="/v1", dependencies=guard, responses=problems)
    registry = CollectorRegistry()
    registry.register(RunsCollector(lambda: [run.totals for run in runs.all().values()]))

    @app.get("/healthz", response_model=dict[str, str])
    def healthz() -> Response:
        return respond({"status": "ok"})

    @app.get("/readyz", response_model=dict[str, str])
    def readyz() -> Response:
        return respond({"status": "running"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}, response_class=Response)
    def expose_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    @api.get("/runs", response_model=RunList)
    def list_runs() -> Response:
        return respond({"runs": [_line(run) for run in runs.all().values()]})

    described = {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(StepPost.model_json_schema())}}}}

    @api.post("/runs/{name}/steps", responses={**_problems(400, 409, 413, 415), 200: {"model": StepAnswer}}, openapi_extra=described)
    async def post_step(name: RunName, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "send the step as application/json")
        body = await _read(request)
        post = _validate(parse_json(body))
        try:
            run = runs.open(name)
        except ValueError as error:
            raise Problem(409, str(error)) from None
        return respond(run.post(post, body))

    app.include_router(api)
    pages = _Pages(runs, token, registry)
    app.mount("/runs", pages)

    @app.get("/", include_in_schema=False)
    def index() -> Response:
        return HTMLResponse(
            _index(runs if token is None else None), headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        )

    return app


class _Pages:
    """ASGI below /runs: the first part of the path names the run, the rest goes to its own app."""

    def __init__(self, runs: Runs, token: str | None, registry: CollectorRegistry) -> None:
        self._runs, self._token, self._registry = runs, token, registry
        self._apps: OrderedDict[str, FastAPI] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["path"].removeprefix(scope.get("root_path", ""))
        name, slash, rest = inside.lstrip("/").partition("/")
        try:
            run = self._runs[name]
        except KeyError:
            await respond({"title": "Not Found", "status": 404, "detail": "no run of this name has posted a step"}, 404)(
                scope, receive, send
            )
            return
        if not slash:
            await RedirectResponse(f"{scope.get('root_path', '')}/{name}/")(scope, receive, send)
            return
        root = f"{scope.get('root_path', '')}/{name}"
        await self._app(run)({**scope, "root_path": root, "path": f"{root}/{rest}"}, receive, send)

    def _app(self, run: OutsideRun) -> FastAPI:
        if run.name not in self._apps:
            self._apps[run.name] = create_run_app(RunPage(run), run.store, self._registry, self._token)
            while len(self._apps) > MAX_OPEN_PAGES:
                self._apps.popitem(last=False)
        self._apps.move_to_end(run.name)
        return self._apps[run.name]


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Problem(413, f"the step is over {MAX_BODY_BYTES} bytes; send a length_histogram and finish_counts in place of lists")
    return bytes(body)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references into itself: inside an OpenAPI document they would lead nowhere."""
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(definitions[node["$ref"].rpartition("/")[2]])
        return {key: inline(value) for key, value in node.items()}

    return inline(schema)


def _validate(document: Any) -> StepPost:
    try:
        return StepPost.model_validate(document, strict=True)
    except ValidationError as error:
        bad = [("".join(f"/{part}" for part in item["loc"]), _plain(item)) for item in error.errors(include_url=False)[:20]]
        raise Problem(422, "; ".join(f"{pointer or '/'}: {detail}" for pointer, detail in bad), bad) from None


def _plain(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return "unknown field; GET /openapi.json lists the fields of a step"
    return re.sub(r"[^ -~]", "?", str(item["msg"]).removeprefix("Value error, "))


def _line(run: OutsideRun) -> dict[str, Any]:
    status = run.status()
    return {"name": run.name, "phase": status["phase"], "step": status["step"], "pressure": run.governor_document()["pressure"]}


def _index(runs: Runs | None) -> str:
    """A page with a link to each run's own page; None: names are told to those with the token only."""
    if runs is None:
        return _page("<p>Each run has its page at <code>/runs/NAME/</code>.</p>")
    rows = "".join(
        f'<tr><td><a href="runs/{html.escape(line["name"])}/">{html.escape(line["name"])}</a></td><td>{line["phase"]}</td>'
        f"<td>{line['step']}</td><td>{line['pressure']:.2f}</td></tr>"
        for line in map(_line, runs.all().values())
    )
    return _page(f"<table><tr><th>run</th><th>phase</th><th>step</th><th>pressure</th></tr>{rows}</table>")


def _page(inside: str) -> str:
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>OPD Governor</title>'
    return f"{head}<body><h1>Governed runs</h1>{inside}</body></html>"


def _bearer(token: str) -> Any:
    scheme = HTTPBearer(auto_error=False, description="OPD_TOKEN or the token file")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise Problem(401, "send the token as `Authorization: Bearer TOKEN`", headers={"www-authenticate": "Bearer"})

    return check


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": PROBLEM_SCHEMA}}
    return {status: {"description": "problem", "content": content} for status in statuses}
