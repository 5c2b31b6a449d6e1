"""A Ray head of a test's own: free ports, its own folder, ended with everything that descends from it."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from services.fleet import end_processes

ROOT = Path(__file__).parents[2]
START_S = 90


@dataclass(frozen=True)
class RayHead:
    """A running head and the environment in which commands reach it."""

    address: str
    """Of the dashboard and its Jobs API."""
    gcs_address: str
    environment: dict[str, str]
    folder: Path

    def opd(self, *words: object) -> subprocess.CompletedProcess[str]:
        """One `opd` command as typed on a laptop."""
        command = [sys.executable, "-m", "services.cli", *map(str, words)]
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)


@contextlib.contextmanager
def ray_head(auth: bool) -> Iterator[RayHead]:
    """`ray start --head` in a process of its own, with token authentication on or off."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_A")} | {
        "RAY_AUTH_MODE": "token" if auth else "disabled",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if auth:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="opd-ray-") as folder:  # sockets need a short path
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port")
        ports = dict(zip((*names, "metrics-export-port", "runtime-env-agent-port"), free_ports(7), strict=True))
        command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += ["--num-cpus=2", f"--object-store-memory={256 * 2**20}", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += ["--resources", json.dumps({"opd_rollout": 1, "opd_teacher": 1, "opd_learner": 1})]
        command += [f"--{name}={port}" for name, port in ports.items()]
        log = Path(folder) / "head.log"
        with log.open("w") as file:
            head = subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        try:
            deadline = time.monotonic() + START_S
            while not _answers(address):
                assert head.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
            yield RayHead(address, f"127.0.0.1:{ports['port']}", environment, Path(folder))
        finally:
            process = psutil.Process(head.pid)
            end_processes([(p.pid, p.create_time()) for p in [*process.children(recursive=True), process]])
            head.wait(10)


def free_ports(num: int) -> list[int]:
    """Ports nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/api/version", trust_env=False).status_code in (200, 401)
    return False
