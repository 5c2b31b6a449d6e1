"""A Ray cluster's Jobs API without Ray: the same methods as JobSubmissionClient, and a driver that announces when told to."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FakeJobs:
    """Jobs stay PENDING until `run` or `end` is called. `files` holds what travelled with each."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.files: dict[str, dict[str, str]] = {}
        self.logs: dict[str, list[str]] = {}

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> str:
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: Job with submission_id {submission_id} already exists.")
        self.files[submission_id] = {path.name: path.read_text() for path in Path(runtime_env["working_dir"]).iterdir()}
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, entrypoint=entrypoint, runtime_env=runtime_env, metadata=dict(metadata), status="PENDING",
            message=None, start_time=1_760_000_000_000 + len(self.jobs), end_time=None, driver_exit_code=None,
        )  # fmt: skip
        self.logs[submission_id] = [f"log of {submission_id}\n"]
        return submission_id

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def get_job_info(self, job_id: str) -> Any:
        return self.jobs[job_id]

    def get_job_logs(self, job_id: str) -> str:
        return "".join(self.logs[job_id])

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for line in self.logs[job_id]:
            yield line
        if self.jobs[job_id].status in ("PENDING", "RUNNING"):
            self.end(job_id)

    def stop_job(self, job_id: str) -> bool:
        self.end(job_id, "STOPPED", None)
        return True

    # ---- the cluster's side

    def run(self, job_id: str, **announcement: str) -> None:
        self.jobs[job_id].status = "RUNNING"
        self.jobs[job_id].metadata |= announcement

    def end(self, job_id: str, status: str = "SUCCEEDED", exit_code: int | None = 0, message: str | None = None) -> None:
        job = self.jobs[job_id]
        job.status, job.driver_exit_code, job.message, job.end_time = status, exit_code, message, job.start_time + 60_000

    def add_foreign(self, job_id: str) -> None:
        """A job on the cluster that is not a run."""
        self.jobs[job_id] = SimpleNamespace(submission_id=job_id, metadata=None, status="RUNNING", start_time=1)
