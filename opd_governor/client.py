"""A client of `opd govern` for any trainer: one file, no dependency, synchronous, with a time limit.

    from opd_governor.client import GovernorClient

    governor = GovernorClient("http://127.0.0.1:9400", run="mine", token="...")
    answer = governor.step(12, lengths=[41, 260], finish_reasons=["stop", "length"], cap_tokens=512)
    answer["limits"]["cap_tokens"], answer["limits"]["lr_scale"], answer["reason"]

When the service is away or slow the trainer goes on with its last limits: `step` answers with them and `governor.trouble` says why.
A mistake in what was posted is another matter: it raises GovernorError.
"""

import json
import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    import http.client

AT_REST: dict[str, Any] = {
    "cap_tokens": None,
    "generation": 0,
    "golden_weight": 0.0,
    "lr_scale": 1.0,
    "reference_kl_weight": 0.0,
    "stop_tilt_nats": 0.0,
    "loop_tail_weight": 1.0,
    "admission_quota": 1.0,
    "unfinished_quota": None,
}
"""Limits before the service was ever reached: they leave the trainer alone. A cap of None is the trainer's own."""


class GovernorError(ValueError):
    """The service refused a step: a wrong token, or a field that cannot be."""


class GovernorClient:
    """One run's line to the governor. Not for use from several threads at once.

    >>> governor = GovernorClient("http://127.0.0.1:1", run="mine")
    >>> governor.step(1)["limits"]["lr_scale"], governor.trouble is not None
    (1.0, True)
    """

    def __init__(self, url: str, *, run: str, token: str | None = None, timeout_s: float = 2.0, retry_after_s: float = 10.0) -> None:
        """`token`: None takes OPD_TOKEN. `timeout_s` bounds each call; a service that was away is asked again after `retry_after_s`."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GovernorError(f"{url!r} is no address of a governor; give http://HOST:PORT")
        self._parts = parts
        self._path = f"{parts.path.rstrip('/')}/v1/runs/{quote(run, safe='')}/steps"
        self._token = token if token is not None else os.environ.get("OPD_TOKEN", "").strip()
        self._timeout_s, self._retry_after_s = timeout_s, retry_after_s
        self._connection: http.client.HTTPConnection | None = None
        self._asleep_until_s = 0.0
        self.trouble: str | None = None
        """Why the last answer is an old one; None: it is the service's own."""
        self.answer: dict[str, Any] = {
            "step": None,
            "pressure": 0.0,
            "limits": dict(AT_REST),
            "action": "hold",
            "signal": "",
            "reason": "the governor was never reached",
            "healthy": False,
        }
        """The newest answer of the service."""

    def step(self, step: int, **fields: Any) -> dict[str, Any]:
        """Tell what a step was like; get {pressure, limits, action, reason}. Fields that are None are left out.

        lengths, finish_reasons, reference_lengths, cap_tokens, loops, kl_nats, learning_rate and the rest of the service's schema.
        Raises GovernorError when the service refuses the step.
        """
        import http.client  # with what it pulls most of this module's import time

        if time.monotonic() < self._asleep_until_s:
            return self._old()
        body = json.dumps({"step": step} | {name: value for name, value in fields.items() if value is not None}).encode()
        try:
            status, answer = self._post(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            return self._away(f"{type(error).__name__}: {error}")
        if status == 200:
            self.trouble, self.answer = None, answer
            return answer
        if status >= 500:
            return self._away(f"the service answered {status}")
        raise GovernorError(f"step {step}: {answer.get('detail', f'the service answered {status}')}")

    def close(self) -> None:
        """Drop the connection; the next step opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> "GovernorClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()

    def _post(self, body: bytes) -> tuple[int, dict[str, Any]]:
        import http.client

        headers = {"content-type": "application/json"}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        for fresh in (self._connection is None, True):
            if self._connection is None:
                kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
                self._connection = kind(str(self._parts.hostname), self._parts.port, timeout=self._timeout_s)
            try:
                self._connection.request("POST", self._path, body, headers)
                response = self._connection.getresponse()
                answer = json.loads(response.read())
                if not isinstance(answer, dict):
                    raise ValueError("the answer is not an object")
                return response.status, answer
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                # A kept connection that the service closed meanwhile; steps may be posted twice.
                self.close()
                if fresh:
                    raise
        raise AssertionError("the second try ends the loop")

    def _away(self, why: str) -> dict[str, Any]:
        self.trouble = why
        self._asleep_until_s = time.monotonic() + self._retry_after_s
        return self._old()

    def _old(self) -> dict[str, Any]:
        """The last limits; a rollback or stop is not asked for twice."""
        return self.answer | {"action": "hold", "reason": f"the governor is away ({self.trouble}): the last limits hold"}
