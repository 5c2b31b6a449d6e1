"""A run's HTTP service: port, token, the thread that answers, and the files that tell others the address.

open --> port bound, token written --> serving --> address files --> closed
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, bind, load_or_create_token
from opd_governor.services.job.settings import Job
from opd_governor.services.job.tunables import ConfigStore
from opd_governor.services.record.journal import Journal
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import ADDRESS, RunDirectory
from opd_governor.services.record.telemetry import Telemetry

LOOK_S = 1.0
"""How often the run looks whether its HTTP thread lives."""


class RunService:
    """The service of one run. Made by `opened`; answers while `serving` is entered."""

    def __init__(self, job: Job, directory: RunDirectory, server: ControlServer, token: str) -> None:
        self._job, self._directory, self._server, self.token = job, directory, server, token
        self.url = server.url

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, job: Job, directory: RunDirectory, monitor: RunMonitor, store: ConfigStore, telemetry: Telemetry
    ) -> Iterator["RunService"]:
        """Bind the port and write the token; the port is closed at the end, however that comes. Raises ServiceError."""
        token = load_or_create_token(directory.path)
        with bind(job.service.host, job.service.port, token) as listener:
            app = create_app(monitor, store, telemetry.registry, token, protect_metrics=job.service.protect_metrics)
            service = cls(job, directory, ControlServer(app, listener), token)
            monitor.update(links={"page": service.url, "metrics": f"{service.url}/metrics"})
            yield service

    @contextlib.asynccontextmanager
    async def serving(self, journal: Journal) -> AsyncIterator[None]:
        """Answer requests, and keep the address where others look for it."""
        self._server.start()
        keeping = asyncio.create_task(self._keep_serving(journal))
        try:
            with self._address_files():
                yield
        finally:
            keeping.cancel()
            self._server.stop()

    async def _keep_serving(self, journal: Journal) -> None:
        """HTTP is a thread of this process; if it ends, another one takes over its socket."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._server.alive:
                self._server.start()
                journal.restarted("service", "crash")

    @contextlib.contextmanager
    def _address_files(self) -> Iterator[None]:
        """The address in the run directory and, if asked for, in Prometheus' file discovery; withdrawn at the end."""
        written = {self._directory.path / ADDRESS: self.url + "\n"}
        if folder := self._job.service.file_sd_dir:
            targets = [{"targets": [self.url.removeprefix("http://")], "labels": {"run": self._job.name}}]
            written[Path(folder) / f"opd-{self._job.name}.json"] = json.dumps(targets)
        try:
            for path, text in written.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                scratch = path.with_suffix(".tmp")
                scratch.write_text(text)
                scratch.replace(path)
            yield
        finally:
            for path in written:
                path.unlink(missing_ok=True)
