"""A run's HTTP service: open while it is entered, and nothing of it left afterwards, however it ends."""

from pathlib import Path

import httpx
import pytest

from opd_governor.services.control.server import bind
from opd_governor.services.run.service import RunService
from tests.services.run.loop import Loop


async def test_it_answers_tells_its_address_and_takes_it_back(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    job = loop.job.model_copy(update={"service": loop.job.service.model_copy(update={"port": 0, "file_sd_dir": str(tmp_path / "sd")})})
    with RunService.opened(job, loop.directory, loop.monitor, loop.store, loop.telemetry) as service:
        async with service.serving(loop.journal), httpx.AsyncClient() as client:
            assert (await client.get(f"{service.url}/healthz")).status_code == 200
            assert (loop.directory.path / "address").read_text() == service.url + "\n"
            assert (tmp_path / "sd/opd-x.json").exists()
        assert not (loop.directory.path / "address").exists()
        assert not (tmp_path / "sd/opd-x.json").exists()


def test_a_start_that_fails_after_the_port_was_bound_gives_it_back(tmp_path: Path) -> None:
    loop, ports = Loop(tmp_path / "run"), []

    def start() -> None:
        with RunService.opened(loop.job, loop.directory, loop.monitor, loop.store, loop.telemetry) as service:
            ports.append(int(service.url.rpartition(":")[2]))
            raise OSError("no room for job.yaml")

    with pytest.raises(OSError, match="no room"):
        start()
    bind("127.0.0.1", ports[0], None).close()
