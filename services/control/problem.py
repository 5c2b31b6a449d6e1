"""Errors over HTTP as application/problem+json (RFC 9457), and JSON bodies read strictly."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

MAX_BODY_BYTES = 65536
# A whole tunable document is under 4 KiB.
MAX_DRAINED_BYTES = 32 * 2**20
# What is read and thrown away of a larger body, so that its sender gets to see the answer instead of a reset connection.
MAX_INTEGER = 2**53 - 1
# RFC 7493: larger ones change on their way through JavaScript.


PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail"],
                "properties": {
                    "pointer": {
                        "type": "string",
                        "description": "RFC 6901 pointer into the body, or `?name` for a parameter of the query or path.",
                    },
                    "detail": {"type": "string"},
                },
            },
        },
    },
}


class Problem(HTTPException):
    """Ends a request with a problem document."""

    def __init__(self, status: int, detail: str, errors: Sequence[tuple[str, str]] = (), headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.errors = errors


def respond(value: Any, status: int = 200, headers: dict[str, str] | None = None, media_type: str = "application/json") -> Response:
    """JSON in which NaN and the infinities, which JSON does not have, are null."""
    return Response(to_json(value, inf_nan_mode="null"), status, headers, media_type)


def install(app: FastAPI) -> None:
    """Every error of the app becomes a problem document."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        errors = error.errors if isinstance(error, Problem) else ()
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Starlette names the methods of the first route with this path only.
            headers["allow"] = ", ".join(sorted(_methods_at(app, request)))
        return _problem(error.status_code, error.detail, errors, headers)

    async def answer_validation(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [(f"?{item['loc'][-1]}", item["msg"].removeprefix("Value error, ")) for item in error.errors()]
        return _problem(422, "; ".join(f"{pointer}: {detail}" for pointer, detail in errors), errors)

    async def answer_fault(_request: Request, _error: Exception) -> Response:
        return _problem(500, "a fault of the service; its log has the traceback", ())

    app.add_exception_handler(Exception, answer_fault)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)


def _methods_at(app: FastAPI, request: Request) -> set[str]:
    routes = [route for route in app.routes if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods or ()}


def _problem(status: int, detail: str, errors: Sequence[tuple[str, str]], headers: dict[str, str] | None = None) -> Response:
    document: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if errors:
        document["errors"] = [{"pointer": pointer, "detail": detail} for pointer, detail in errors]
    return respond(document, status, headers, "application/problem+json")


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises Problem 413 above MAX_BODY_BYTES, 400 for what RFC 8259 and 7493 (I-JSON) do not allow."""
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > MAX_DRAINED_BYTES:
            break
        if received <= MAX_BODY_BYTES:
            body += chunk
    if received > MAX_BODY_BYTES:
        raise Problem(413, f"the body is over {MAX_BODY_BYTES} bytes; send only the keys that change")
    return parse_json(bytes(body))


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no key twice, no integer beyond MAX_INTEGER, no lone surrogate. Raises Problem 400."""
    try:
        value = json.loads(
            body.decode(), parse_constant=_refuse_number, parse_float=_finite, parse_int=_safe_integer, object_pairs_hook=_unique
        )
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {_printable(str(error))}") from None
    return value


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text[:40]} is out of JSON's range")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _refuse_number(text)


def _safe_integer(text: str) -> float:
    return int(text) if len(text) < 20 and abs(int(text)) <= MAX_INTEGER else _refuse_number(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)[:40]!r} stands twice in one object")
    return tree


def _printable(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
