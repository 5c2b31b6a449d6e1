"""A running run as seen from outside: its HTTP service behind the verbs a person types.

opd tune RUN key=value --> endpoint of RUN (directory, URL or cluster: jobs.py) --> RunClient --HTTP--> services/control/app.py
"""

import contextlib
import getpass
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import ADDRESS

if TYPE_CHECKING:
    from opd_governor.services.control.app import Verb  # at run time it would bring the whole of FastAPI into every command

TIMEOUT_S = 15.0
"""A service that answers at all answers in milliseconds; a step border never holds it up."""

Document = dict[str, Any]


class RemoteError(JobError):
    """A run or a cluster that cannot be reached, or said no: one line for the user."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a run's service listens and what opens it.

    >>> Endpoint("sums", "http://10.0.0.7:41213", "s3cr3t")
    Endpoint(name='sums', url='http://10.0.0.7:41213')
    """

    name: str | None
    """None: whatever run answers there."""
    url: str
    token: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a change of the tunable settings did, or with `dry_run` would do."""

    generation: int
    """The generation that holds the new values; the present one for a dry run and where nothing differs."""
    dry_run: bool
    changes: tuple[tuple[str, Any, Any], ...]
    """(key, old, new): ("rollout.max_new_tokens", 256, 128)."""


def local_endpoint(run: str) -> Endpoint | None:
    """The service of a run given as a URL or a run directory; None for a name, which is the cluster's to know."""
    if run.startswith(("http://", "https://")):
        return Endpoint(None, run.rstrip("/"), os.environ.get("OPD_TOKEN"))
    directory = Path(run)
    if not (directory / "job.yaml").is_file():
        if len(directory.parts) > 1:
            raise RemoteError(f"{run}: no run directory (it has no job.yaml); give a run's name, directory or URL")
        return None
    address = directory / ADDRESS
    if not address.is_file():
        raise RemoteError(f"{run}: the run has ended (no file {ADDRESS}); `opd report {run}` shows how")
    token = os.environ.get("OPD_TOKEN") or (directory / "token").read_text().strip()
    return Endpoint(yaml.safe_load((directory / "job.yaml").read_text())["name"], address.read_text().strip(), token)


def parse_changes(assignments: Sequence[str]) -> Document:
    """`["rollout.max_new_tokens=128"]` -> `{"rollout": {"max_new_tokens": 128}}`; values are YAML, null is the job file's own value.

    Raises RemoteError.
    """
    patch: Document = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise RemoteError(f"{assignment}: expected key=value, such as rollout.max_new_tokens=128")
        *parents, leaf = key.split(".")
        node = patch
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RemoteError(f"{assignment}: {parent} is given a value of its own too; name each setting once")
        if leaf in node:
            raise RemoteError(f"{assignment}: {key} is given twice; name each setting once")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RemoteError(f"{assignment}: {text!r} is no YAML value; quote text with odd characters") from None
    return patch


class RunClient:
    """The verbs of one run. Every method raises RemoteError with one line when the run is gone or refuses.

    >>> with RunClient(Endpoint("sums", "http://127.0.0.1:41213", token)) as client:
    ...     client.tune({"rollout": {"max_new_tokens": 128}})
    Tuning(generation=2, dry_run=False, changes=(('rollout.max_new_tokens', 256, 128),))
    """

    def __init__(self, endpoint: Endpoint, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"user-agent": f"opd {getpass.getuser()}@{socket.gethostname()}"}
        if endpoint.token:
            headers["authorization"] = f"Bearer {endpoint.token}"
        self._endpoint = endpoint
        # No proxy of the environment: the token is for the run alone.
        self._http = httpx.Client(base_url=endpoint.url, headers=headers, timeout=TIMEOUT_S, trust_env=False, transport=transport)
        self.name = endpoint.name

    def __enter__(self) -> "RunClient":
        """Reads the run's status once, so that a port another run has taken since is noticed before anything is asked of it."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._http.close)
            self.name = self.status()["name"]
            if self._endpoint.name not in (None, self.name):
                raise RemoteError(f"{self._endpoint.url} is run {self.name} now; {self._endpoint.name} has ended")
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def status(self) -> Document:
        """GET /v1/run: name, phase, step, total_steps, weight_version, limits, links."""
        return dict(self._send("GET", "/v1/run").json())

    def governor(self) -> Document:
        """GET /v1/governor: mode, pressure, signals, limits."""
        return dict(self._send("GET", "/v1/governor").json())

    def ask(self, verb: "Verb") -> Document:
        """POST /v1/run/VERB: taken at the next step border; asking twice is asking once."""
        return dict(self._send("POST", f"/v1/run/{verb}").json())

    def tune(self, patch: Document, *, dry_run: bool = False) -> Tuning:
        """PATCH /v1/config over the settings as they are now: whole or not at all."""
        etag = self._send("GET", "/v1/config").headers["etag"]
        headers = {"if-match": etag, "content-type": "application/merge-patch+json"}
        answer = self._send("PATCH", "/v1/config", params={"dry_run": str(dry_run).lower()}, headers=headers, json=patch).json()
        changes = tuple((change["pointer"][1:].replace("/", "."), change["from"], change["to"]) for change in answer["changes"])
        return Tuning(answer["generation"], answer["dry_run"], changes)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        url = self._endpoint.url
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise RemoteError(
                f"{url}: no answer ({why}); the run has ended, or listens on its own machine only: "
                f"set service.host in the job file, or forward the port and give RUN as that URL with OPD_TOKEN"
            ) from None
        if "json" not in response.headers.get("content-type", ""):
            raise RemoteError(f"{url}: HTTP {response.status_code}, and not from a run's service; is the address right?")
        if response.status_code == 401:
            raise RemoteError(f"{url}: refused the token; set OPD_TOKEN to the run's (file `token` in its run directory)")
        if response.status_code == 412:
            raise RemoteError(f"somebody changed the settings at the same moment, nothing of yours was applied: {_detail(response)}")
        if response.is_error:
            raise RemoteError(_detail(response))
        return response


def _detail(response: httpx.Response) -> str:
    """One line out of a problem document (RFC 9457): fields in the job file's spelling where it names any."""
    problem = response.json()
    errors = problem.get("errors") or []
    lines = [f"{error['pointer'][1:].replace('/', '.')}: {error['detail']}" for error in errors if error["pointer"].startswith("/")]
    return "; ".join(lines) or str(problem["detail"])
