"""A real `opd govern` in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.integration.ray_head import free_ports

TOKEN = "secret"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


@contextlib.contextmanager
def govern(folder: Path, *options: str, policy: str = "{}", port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its address once it answers, and its process. Its records lie in `folder`/out."""
    port = port or free_ports(1)[0]
    (folder / "policy.yaml").write_text(policy)
    command = [
        sys.executable,
        "-m",
        "opd_governor",
        "govern",
        str(folder / "policy.yaml"),
        "--port",
        str(port),
        "--out",
        str(folder / "out"),
    ]
    log = (folder / "log").open("ab")
    process = subprocess.Popen([*command, *options], env=os.environ | {"OPD_TOKEN": TOKEN}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    inside = f"{url}/governor" if "--proxy" in options else url
    try:
        deadline_s = time.monotonic() + 180
        while not _answers(f"{inside}/healthz"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(20)
        log.close()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).is_success
    return False
