"""HTTP beside a run: what it does, its tunable settings, its governor, its metrics, the live page.

person, CLI, dashboard --HTTP--> create_app --> RunView      (the main loop: status, records, verbs)
                                            --> ConfigStore  (tunable settings, taken into force at the next step border)
                                            --> registry     (prometheus_client)
"""

import hmac
import re
import secrets
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model
from starlette.concurrency import run_in_threadpool

from opd_governor.actors.settings import Settings
from opd_governor.services.control.problem import MAX_INTEGER, PROBLEM_SCHEMA, Problem, install, read_json, respond
from opd_governor.services.job.generations import ConfigError, Document, Generation, StaleConfigError, Store

STATIC = Path(__file__).parent / "static"
MERGE_PATCH = "application/merge-patch+json"
PAGE_POLICY = "default-src 'self'; style-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
MAX_RECORDS = 1000
# Step or decision records in one answer: a few MB.

Phase = Literal["starting", "running", "paused", "stopping", "finished", "failed"]
Responses = dict[int | str, dict[str, Any]]
Verb = Literal["pause", "resume", "stop", "checkpoint", "rollback"]


def _only_digits(value: str | int) -> str | int:
    if not re.fullmatch(r"-?[0-9]{1,16}", str(value)):
        raise ValueError("expected a whole number")
    return value


After = Annotated[int, Query(ge=-1, le=MAX_INTEGER, description="Only records of later steps."), BeforeValidator(_only_digits)]


class RunView(Protocol):
    """What the service needs of a run. Called from the HTTP threads; values are JSON's (NaN is shown as null)."""

    def status(self) -> Document:
        """name, phase, step, total_steps, weight_version, limits (in force), links, waiting_for, events; more keys are passed on."""

    def steps(self, after: int) -> list[Document]:
        """The step records (lines of metrics.jsonl) whose step is above `after`, ascending; MAX_RECORDS + 1 are enough."""

    def samples(self) -> list[Document]:
        """The newest rollouts kept in samples.jsonl, oldest first.

        step, prompt, response, finish_reason, length_tokens, loop_onset_char (index into response, None without a loop).
        """

    def governor(self) -> Document:
        """mode, pressure, signals, readings, limits; declared: what signals and actuators there are."""

    def decisions(self, after: int) -> list[Document]:
        """The decision records whose step is above `after`, ascending: step, reason and what the governor adds."""

    def request(self, verb: Verb) -> Document:
        """Ask for a verb at the next step border; asking twice is asking once. Raises ValueError when it cannot be done now."""


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class RunStatus(_Open):
    name: str
    phase: Phase
    step: int
    total_steps: int
    weight_version: int
    limits: Document
    links: Document
    waiting_for: str | None = None
    """What keeps the run from going on, where something does."""
    events: list[Document] = []
    """Newest lines of events.jsonl: time, step, text."""
    instance: str
    """Differs after every start of the service: a page that sees it change reads everything again."""
    restarts: dict[str, int]
    """Actors restarted so far, by role; roles without one are left out."""


class StepRecords(BaseModel):
    steps: list[Document]
    more: bool
    """Whether records after the last one were left out: ask again with `after` set to its step."""


class SampleRecords(BaseModel):
    samples: list[Document]


class DecisionRecords(BaseModel):
    decisions: list[Document]
    more: bool


class Change(BaseModel):
    model_config = ConfigDict(json_schema_extra={"properties": {"pointer": {"type": "string"}, "from": {}, "to": {}}})
    pointer: str


class _HistoryItem(BaseModel):
    generation: int
    time: float
    source: str
    patch: Document
    changes: list[Change]


def _config_models(settings: type[Settings]) -> tuple[type[BaseModel], type[BaseModel], type[BaseModel]]:
    """Answers about tunable settings of this model: the document with its generations, a change of it, its history.

    A merge patch may name the settings, not the generations. `observed_generation` is the one the running step obeys: lower than
    `generation` until the next step border.
    """
    document = create_model("ConfigDocument", __base__=settings, generation=(int, ...), observed_generation=(int, ...))
    change = create_model("ConfigChange", __base__=document, dry_run=(bool, ...), changes=(list[Change], ...))
    item: Any = create_model("HistoryItem", __base__=_HistoryItem, config=(settings, ...))
    return document, change, create_model("History", history=(list[item], ...))


def create_app(
    run: RunView, store: Store[Any], registry: CollectorRegistry, token: str | None, *, protect_metrics: bool = False
) -> FastAPI:
    """All routes. `token` None leaves the API open: for loopback only, which `bind` sees to."""
    app = FastAPI(title="OPD Governor", version="1", docs_url=None, redoc_url=None, generate_unique_id_function=lambda route: route.name)
    install(app)
    guard = [Depends(_bearer(token))] if token is not None else []
    strict = [*guard, Depends(_refuse_unknown_parameters)]
    unauthorised = _problems(401) if token is not None else {}
    api = APIRouter(prefix="/v1", dependencies=strict, responses=unauthorised | _problems(422))
    metrics = APIRouter(dependencies=guard, responses=unauthorised) if protect_metrics else APIRouter()
    _add_metrics(metrics, registry)
    _add_run_routes(api, run, registry)
    api.include_router(_config_routes(store))
    app.include_router(_health_routes(run))
    app.include_router(api)
    app.include_router(metrics)
    _add_page(app)
    return app


def _health_routes(run: RunView) -> APIRouter:
    """Open to everyone: what a load balancer or a kubelet asks."""
    router = APIRouter()

    @router.get("/healthz", responses=_answers(_Open))
    def healthz() -> Response:
        return respond({"status": "ok"})

    @router.get("/readyz", responses=_answers(_Open) | _problems(503))
    def readyz() -> Response:
        phase = run.status()["phase"]
        if phase not in ("running", "paused"):
            raise Problem(503, f"the run is {phase}")
        return respond({"status": phase})

    return router


def _add_metrics(router: APIRouter, registry: CollectorRegistry) -> None:
    @router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}, response_class=Response)
    def expose_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})


def _add_run_routes(api: APIRouter, run: RunView, registry: CollectorRegistry) -> None:
    """Status, records and verbs of the run."""
    instance = secrets.token_hex(8)

    @api.get("/run", responses=_answers(RunStatus))
    def show_run() -> Response:
        return respond(run.status() | {"instance": instance, "restarts": _restarts(registry)})

    @api.get("/steps", responses=_answers(StepRecords))
    def show_steps(after: After = -1) -> Response:
        records = run.steps(after)
        return respond({"steps": records[:MAX_RECORDS], "more": len(records) > MAX_RECORDS})

    @api.get("/samples", responses=_answers(SampleRecords))
    def show_samples() -> Response:
        return respond({"samples": run.samples()})

    @api.get("/governor", responses=_answers(_Open))
    def show_governor() -> Response:
        return respond(run.governor())

    @api.get("/governor/decisions", responses=_answers(DecisionRecords))
    def show_decisions(after: After = -1) -> Response:
        records = run.decisions(after)
        return respond({"decisions": records[:MAX_RECORDS], "more": len(records) > MAX_RECORDS})

    @api.post("/run/{verb}", status_code=202, responses=_answers(_Open, 202) | _problems(409))
    def request_verb(verb: Verb) -> Response:
        try:
            return respond(run.request(verb), 202)
        except ValueError as error:
            raise Problem(409, str(error)) from None


def _restarts(registry: CollectorRegistry) -> dict[str, int]:
    restarts: Counter[str] = Counter()
    for family in registry.restricted_registry(["opd_actor_restarts_total"]).collect():
        for sample in family.samples:
            restarts[sample.labels["role"]] += int(sample.value)
    return dict(+restarts)


def _config_routes(store: Store[Any]) -> APIRouter:
    router = APIRouter()
    config_document, config_change, config_history = _config_models(store.model)

    def document(generation: Generation) -> Document:
        return generation.config | {"generation": generation.generation, "observed_generation": store.observed_generation}

    def etag(number: int) -> dict[str, str]:
        return {"etag": f'"{number}"'}

    # The ETag of either answer goes into the next change: said as OpenAPI links, which clients and tests can follow.
    link = {"change": {"operationId": "patch_config", "parameters": {"header.If-Match": "$response.header.ETag"}}}
    tagged: dict[str, Any] = {"headers": {"ETag": {"required": True, "schema": {"type": "string"}}}, "links": link}

    @router.get("/config", responses={200: {"model": config_document, **tagged}})
    def show_config() -> Response:
        newest = store.history()[-1]
        return respond(document(newest), headers=etag(newest.generation))

    @router.get("/config/schema", responses=_answers(_Open))
    def show_schema() -> Response:
        return respond(store.model.model_json_schema())

    @router.get("/config/history", responses=_answers(config_history))
    def show_history() -> Response:
        return respond({"history": [generation.record() for generation in store.history()]})

    # Both are read by hand, to answer 428 and 415, and so are described by hand.
    if_match_header = {"name": "If-Match", "in": "header", "required": True, "schema": {"type": "string"}}
    described = {
        "parameters": [if_match_header],
        "requestBody": {"required": True, "content": {MERGE_PATCH: {"schema": patch_schema(store.model)}}},
    }
    refusals = _problems(400, 412, 413, 415, 428)

    @router.patch("/config", responses={**refusals, 200: {"model": config_change, **tagged}}, openapi_extra=described)
    async def patch_config(request: Request, dry_run: Literal["true", "false"] = "false") -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != MERGE_PATCH:
            raise Problem(415, f"send a merge patch (RFC 7396) as {MERGE_PATCH}", headers={"accept-patch": MERGE_PATCH})
        if_match = request.headers.get("if-match")
        if if_match is None:
            raise Problem(428, "send If-Match with the ETag of GET /v1/config, so that nobody's change is overwritten unseen")
        patch = await read_json(request)
        expected = _generation_of(if_match)
        source = f"{request.client.host if request.client else 'unknown'} {_program(request)}"
        try:
            change = await run_in_threadpool(store.change, patch, expected=expected, source=source, dry_run=dry_run == "true")
        except StaleConfigError as error:
            raise Problem(412, f"{error}; read it again and repeat the change", headers=etag(store.generation)) from None
        except ConfigError as error:
            raise Problem(422, str(error), error.errors) from None
        return respond(
            document(change) | {"dry_run": dry_run == "true", "changes": change.record()["changes"]}, headers=etag(change.generation)
        )

    return router


def patch_schema(settings: type[Settings]) -> Document:
    """JSON schema of a merge patch of tunable settings: every key may be left out or null."""
    schema = settings.model_json_schema()
    definitions = schema.pop("$defs", {})

    def loosen(node: Any) -> Any:
        if isinstance(node, list):
            return [loosen(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]] | {key: value for key, value in node.items() if key != "$ref"}
        if "properties" in node:
            loosened = {key: {"anyOf": [loosen(value), {"type": "null"}]} for key, value in node["properties"].items()}
            return {key: value for key, value in node.items() if key not in ("required", "default")} | {"properties": loosened}
        if node.get("type") == "integer":
            node = {"minimum": -MAX_INTEGER, "maximum": MAX_INTEGER} | node
        return {key: loosen(value) for key, value in node.items() if key != "default"}

    return loosen(schema)


def _generation_of(if_match: str) -> int | None:
    """None for `*`, which matches any; 0, which matches none, for a tag that is not ours."""
    if if_match.strip() == "*":
        return None
    tag = re.fullmatch(r'\s*("?)([0-9]{1,18})\1\s*', if_match, re.ASCII)
    return int(tag[2]) if tag else 0


def _program(request: Request) -> str:
    """The client as it names itself, cut to what fits a line."""
    return re.sub(r"[^ -~]", "?", request.headers.get("user-agent", ""))[:80]


def _bearer(token: str) -> Any:
    scheme = HTTPBearer(auto_error=False, description="OPD_TOKEN or the run's token file")

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise Problem(401, "send the run's token as `Authorization: Bearer TOKEN`", headers={"www-authenticate": "Bearer"})

    return check


def _refuse_unknown_parameters(request: Request) -> None:
    """`?dryrun=true` must not make a change for real."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    given = [name for name, _ in request.query_params.multi_items()]
    bad = {name: "unknown" for name in given if name not in known} | {name: "given twice" for name in given if given.count(name) > 1}
    if bad:
        allowed = ", ".join(sorted(known)) or "none"
        raise Problem(422, f"parameters of this route: {allowed}, each once", [(f"?{name}", detail) for name, detail in bad.items()])


def _add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=STATIC))
    page = (STATIC / "index.html").read_text()

    @app.get("/", include_in_schema=False)
    def show_page() -> Response:
        return Response(page, media_type="text/html", headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})


def _answers(model: type[BaseModel], status: int = 200) -> Responses:
    return {status: {"model": model}}


def _problems(*statuses: int) -> Responses:
    content = {"application/problem+json": {"schema": PROBLEM_SCHEMA}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}
