"""Requests to a teacher's server: asked again with jitter within a deadline; refusals, wrong answers and silence told apart."""

import os
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.teacher.settings import TeacherSettings

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.25, 10.0
REFUSALS_FOR_ALL = (401, 403, 404)
"""No key, a wrong key, no such model: refusals of every request. Other 4xx refuse one request, such as one beyond the window."""
T = TypeVar("T")


class TeacherUnavailableError(RuntimeError):
    """No usable answer. The last failure is its cause, and its words are in the message."""


class BadAnswerError(RuntimeError):
    """The server answered with something else than what it was asked; asked again."""


class RefusedError(RuntimeError):
    """The server refuses this request (4xx): another try would not help, another request may be taken."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status} {text[:500]}")
        self.status = status


class Client:
    """One teacher's server. VLLM_API_KEY (or OPENAI_API_KEY, SGLANG_API_KEY), where set, is sent as bearer token."""

    def __init__(self, settings: TeacherSettings, seed: int = 0) -> None:
        if not settings.url:
            raise CallerError(f"teacher {settings.name}: backend http needs url, such as http://127.0.0.1:8000")
        self.settings = settings
        self._random = random.Random(seed)
        self.address = settings.url.rstrip("/").removesuffix("/v1")  # people write both forms
        self._client = httpx.Client(base_url=self.address, headers=_authorization())

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T], deadline: float) -> T:
        """`read` over the answer's JSON. Raises RefusedError, or TeacherUnavailableError when attempts or time ran out."""
        last: Exception = TimeoutError("no time left to ask")
        for attempt in range(self.settings.max_attempts):
            # Shares of the time left, so that a server that hangs can be asked again before the deadline.
            timeout_s = max(deadline - time.monotonic(), 0.0) / (self.settings.max_attempts - attempt + 1)
            wait_s = self._random.uniform(0.5, 1.0) * min(FIRST_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
            try:
                response = self._client.post(path, json=body, timeout=timeout_s)
                if response.is_success:
                    return read(_json(response))
                last = RefusedError(response.status_code, _refusal(response))
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise last
                wait_s = max(wait_s, _retry_after_s(response))
            except (httpx.RequestError, BadAnswerError) as error:
                last = error
            if attempt + 1 == self.settings.max_attempts or time.monotonic() + wait_s > deadline:
                break
            time.sleep(wait_s)
        raise TeacherUnavailableError(f"{self.settings.url}: no usable answer to {path}: {words(last)}") from last

    def get(self, path: str, timeout_s: float = 5.0) -> Any:
        """The JSON at a path; None where the server has no such path. Raises TeacherUnavailableError where nothing answers."""
        try:
            response = self._client.get(path, timeout=timeout_s)
            return _json(response) if response.is_success else None
        except BadAnswerError:
            return None
        except httpx.RequestError as error:
            raise TeacherUnavailableError(f"{self.settings.url}: no answer: {words(error)}") from error

    def close(self) -> None:
        self._client.close()


def words(error: BaseException) -> str:
    """What an error says; its class where it says nothing."""
    return str(error) or type(error).__name__


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(f"not JSON: {error}") from None


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; its other form, a date, counts as no wish."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _refusal(response: httpx.Response) -> str:
    """The server's words; where it sends the caller on, to what place."""
    return f"redirects to {response.headers['Location']}" if response.has_redirect_location else response.text


def _authorization() -> dict[str, str]:
    """Raises CallerError for a key that no header can carry, without showing it."""
    for name in ("VLLM_API_KEY", "SGLANG_API_KEY", "OPENAI_API_KEY"):
        if key := os.environ.get(name):
            if not (key.isascii() and key.isprintable()):
                raise CallerError(f"{name}: holds a line break or letters that no header can carry; set it again")
            return {"Authorization": f"Bearer {key}"}
    return {}
