"""Runs as Ray Jobs: submit, find by name, follow; and the announcement through which a run's HTTP service is found.

opd submit --Jobs API--> `opd run` on the cluster --announce--> metadata of its own job: URL and token of its service
opd tune RUN --Jobs API--> metadata of RUN's newest job --> RunClient (services/remote/steer.py) --HTTP--> the run

What travels: the job file alone, validated, with its relative paths made absolute, as the job's working directory. Data and models
named by path must lie at the same path for the cluster: true on one machine and on a shared volume; ids of models and datasets work
anywhere. The run directory is such a path too. The package is kept by the cluster, so the machine that submitted may go.

The announcement needs no port but the one of the Jobs API. It is void once its job has ended, however it ended, because Ray notes
that; an orderly end takes it back as well. It holds the run's token: anyone who may read the cluster's jobs may run code on the cluster
as the run's own user, so the cluster's own authentication guards both. The token is in no log and in no runtime environment.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml

from opd_governor.services.job.settings import Job
from opd_governor.services.remote.steer import Endpoint, RemoteError

RUN_KEY, URL_KEY, TOKEN_KEY, OUT_KEY, ENDING_KEY = "opd_run", "opd_url", "opd_token", "opd_out", "opd_ending"
"""Keys of a job's metadata."""
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job; its metadata names the submission."""
MAX_DRIVER_STARTS = 10
"""A driver that was killed this often will be killed again."""
STATUS_POLL_S = 0.5
"""Ray notes the end of a job a moment after its log has ended."""


class JobClient(Protocol):
    """What is used of ray.job_submission.JobSubmissionClient."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> str: ...
    def list_jobs(self) -> list[Any]: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def stop_job(self, job_id: str) -> bool: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Submission:
    """One Ray job of a run: its first, or a later one that went on from where an ended one stopped."""

    run: str
    id: str
    """The run's name; `NAME.2`, `NAME.3` when it was submitted again after it had ended (Ray wants no id twice)."""
    status: str
    """Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    started_s: float
    """Unix time."""
    ended_s: float | None
    message: str
    """Why it ended."""
    exit_code: int | None
    out: str | None
    """The run directory, a path on the cluster."""
    url: str | None
    """None until the run is announced, and after it has ended."""
    token: str | None = dataclasses.field(repr=False)
    ending: bool
    """The steps are over and the service is closed, its report is being written."""

    @property
    def live(self) -> bool:
        return self.status in ("PENDING", "RUNNING")

    def to_json(self) -> dict[str, Any]:
        """Without the token."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "token"}


def connect(address: str | None) -> JobClient:
    """The Jobs API of the cluster at `address`: http://HEAD:8265, or what `ray.init` takes. Raises RemoteError."""
    if not address:
        raise RemoteError("--address: missing; give the cluster's address such as http://127.0.0.1:8265, or set RAY_ADDRESS")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray lets these two win over the address it is given
            client: JobClient = JobSubmissionClient(address)
    except AuthenticationError:
        raise RemoteError(f"--address {address}: the cluster wants its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise RemoteError(f"--address {address}: no Ray cluster answers ({_first_line(error)}); is the dashboard's port right?") from None
    return client


@contextlib.contextmanager
def _without(*variables: str) -> Iterator[None]:
    """These environment variables are unset meanwhile."""
    held = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def submissions(client: JobClient) -> list[Submission]:
    """Every job on the cluster that is a run, oldest first."""
    return _runs(client.list_jobs())


def find(client: JobClient, run: str) -> Submission:
    """The live job of this run, else its newest. Raises RemoteError."""
    known = submissions(client)
    own = [submission for submission in known if submission.run == run]
    if not own:
        names = ", ".join(sorted({submission.run for submission in known})) or "none"
        raise RemoteError(f"{run}: no run of this name on the cluster (there: {names}), and no run directory here")
    return next((submission for submission in own if submission.live), own[-1])


def endpoint(submission: Submission) -> Endpoint:
    """The service of a live run. Raises RemoteError where there is none."""
    if not submission.live:
        raise RemoteError(f"{submission.run}: has ended ({submission.status}); `opd submit` goes on from its newest checkpoint")
    if submission.url is None:
        state = "ending" if submission.ending else "starting"
        raise RemoteError(f"{submission.run}: is {state}, its service is not up (Ray says {submission.status}); try again in some seconds")
    return Endpoint(submission.run, submission.url, submission.token)


def submit(client: JobClient, job: Job, out: Path) -> tuple[Submission, bool]:
    """Start the job, or find it running; returns its submission and whether it is new.

    A run that has ended is started again under the next free id, and goes on from the newest checkpoint in `out`.
    """
    there = client.list_jobs()
    if live := [submission for submission in _runs(there) if submission.run == job.name and submission.live]:
        return live[0], False
    taken = {details.submission_id for details in there}
    submission_id = next(i for i in (job.name, *(f"{job.name}.{n}" for n in range(2, len(taken) + 3))) if i not in taken)
    with tempfile.TemporaryDirectory(prefix="opd-") as folder:
        (Path(folder) / "job.yaml").write_text(yaml.safe_dump(_for_cluster(job).model_dump(mode="json"), sort_keys=False))
        try:
            client.submit_job(
                entrypoint=entrypoint(out),
                submission_id=submission_id,
                runtime_env={"working_dir": folder},
                metadata={RUN_KEY: job.name, OUT_KEY: str(out)},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise RemoteError(f"the cluster refused the job: {_first_line(error)}") from None
            return find(client, job.name), False  # somebody submitted it in the same moment
    return _submission(client.get_job_info(submission_id)), True


def entrypoint(out: Path) -> str:
    """What the cluster's shell runs: a driver that a signal ended (a crash, memory) is started again and goes on from its checkpoint.

    Ray Jobs starts an entrypoint once. A stop reaches shell and driver alike; the shell outlives it to hand on the driver's exit code.
    """
    run = f"opd run job.yaml --out {shlex.quote(str(out))} --resume"
    again = "|".join(str(128 + number) for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV))
    starts = " ".join(str(n) for n in range(1, MAX_DRIVER_STARTS + 1))
    return f"trap : TERM INT; for start in {starts}; do {run}; code=$?; case $code in {again}) ;; *) break;; esac; done; exit $code"


async def follow(client: JobClient, submission: Submission, write: Callable[[str], None]) -> Submission:
    """Hand on the log as it grows until the job ends; returns the ended submission."""
    async for chunk in client.tail_job_logs(submission.id):
        write(chunk)
    while (now := _submission(client.get_job_info(submission.id))).live:
        await asyncio.sleep(STATUS_POLL_S)
    return now


def _for_cluster(job: Job) -> Job:
    """The job as any machine that shares the paths can run it: the rest of its relative paths absolute, the cluster its own."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path else None

    golden = job.data.golden.model_copy(update={"cache_dir": absolute(job.data.golden.cache_dir)})
    return job.model_copy(
        update={
            "data": job.data.model_copy(update={"golden": golden}),
            "service": job.service.model_copy(update={"file_sd_dir": absolute(job.service.file_sd_dir)}),
            "cluster": job.cluster.model_copy(update={"address": None}),
        }
    )


def _runs(jobs: list[Any]) -> list[Submission]:
    found = [_submission(details) for details in jobs if RUN_KEY in (details.metadata or {})]
    return sorted(found, key=lambda submission: submission.started_s)


def _submission(details: Any) -> Submission:
    metadata = details.metadata or {}
    ended = bool(details.end_time)
    return Submission(
        run=metadata[RUN_KEY],
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        started_s=(details.start_time or 0) / 1000,
        ended_s=details.end_time / 1000 if ended else None,
        message=(details.message or "").split("\n")[0] if ended else "",
        exit_code=details.driver_exit_code,
        out=metadata.get(OUT_KEY),
        url=None if ended else metadata.get(URL_KEY),
        token=None if ended else metadata.get(TOKEN_KEY),
        ending=ENDING_KEY in metadata,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


# ---- the run's side


@contextlib.asynccontextmanager
async def announced(run: str, url: str, token: str, out: Path) -> AsyncIterator[None]:
    """The run's service stands in the metadata of the Ray job whose driver this process is; no-op outside a submitted job.

    A wildcard host is told as the node's own address. Needs a connected Ray at both ends.
    """
    import ray

    node = ray.util.get_node_ip_address()
    for wildcard in ("0.0.0.0", "[::]"):
        url = url.replace(f"//{wildcard}:", f"//{node}:")
    await _change_metadata({RUN_KEY: run, OUT_KEY: str(out.resolve()), URL_KEY: url, TOKEN_KEY: token})
    try:
        yield
    finally:
        await _change_metadata({URL_KEY: None, TOKEN_KEY: None, ENDING_KEY: "yes"})


async def _change_metadata(changes: dict[str, str | None]) -> None:
    """The Jobs API has no call for it, so the record is changed where Ray keeps it.

    Ray itself writes it before the driver starts and after it has ended, never in between.
    """
    submission_id = json.loads(os.environ.get(JOB_CONFIG_VARIABLE, "{}")).get("metadata", {}).get("job_submission_id")
    if submission_id is None:
        return
    import ray
    from ray._raylet import GcsClient
    from ray.dashboard.modules.job.common import JobInfoStorageClient

    records = JobInfoStorageClient(GcsClient(address=ray.get_runtime_context().gcs_address))
    info = await records.get_info(submission_id)
    assert info is not None, f"a driver of job {submission_id}, which the cluster does not know"
    metadata = {key: value for key, value in ((info.metadata or {}) | changes).items() if value is not None}
    await records.put_info(submission_id, dataclasses.replace(info, metadata=metadata))
