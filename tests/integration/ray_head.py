"""A Ray head, and workers that join it, of a test's own: free ports, own folders, ended with everything that descends from them."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from opd_governor.services.run.cluster import end_processes

ROOT = Path(__file__).parents[2]
START_S = 90
ROLES = ("rollout", "teacher", "learner")


@dataclass(frozen=True)
class RayHead:
    """A running head and the environment in which commands reach it."""

    address: str
    """Of the dashboard and its Jobs API."""
    gcs_address: str
    environment: dict[str, str]
    folder: Path

    def opd(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run one `opd` command, as typed on another machine."""
        command = [sys.executable, "-m", "opd_governor", *map(str, words)]
        environment = self.environment | {"RAY_ADDRESS": self.address}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)


@contextlib.contextmanager
def ray_head(auth: bool, roles: Sequence[str] = ROLES) -> Iterator[RayHead]:
    """`ray start --head` in a process of its own, with token authentication on or off. `roles`: whose actors may stand on it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_A")} | {
        "RAY_AUTH_MODE": "token" if auth else "disabled",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    if auth:
        environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory(prefix="opd-ray-") as folder:  # sockets need a short path
        port, dashboard, client = free_ports(3)
        options = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        options += [f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--disable-usage-stats"]
        address, log = f"http://127.0.0.1:{dashboard}", Path(folder) / "head.log"
        with _ray_start([*options, *_room(roles)], environment, log) as process:
            deadline = time.monotonic() + START_S
            while not _answers(address):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
            yield RayHead(address, f"127.0.0.1:{port}", environment, Path(folder))


@contextlib.contextmanager
def ray_worker(head: RayHead, roles: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Another node for the actors of these roles; it joins while its caller goes on. Gives its `ray start`: all of it descends from that.

    It has an address of its own, so that no driver takes it for the head.
    """
    options = [f"--address={head.gcs_address}", *_room(roles)]
    with _ray_start(options, head.environment, head.folder / "worker.log", "127.0.0.2") as process:
        yield process


def _room(roles: Sequence[str]) -> list[str]:
    """Options of a node."""
    resources = json.dumps({f"opd_{role}": 1 for role in roles})
    return ["--num-cpus=2", f"--object-store-memory={256 * 2**20}", "--resources", resources]


@contextlib.contextmanager
def _ray_start(options: Sequence[str], environment: dict[str, str], log: Path, ip: str = "127.0.0.1") -> Iterator[subprocess.Popen[bytes]]:
    names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
    ports = [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]
    command = ["ray", "start", "--block", f"--node-ip-address={ip}", *options, *ports]
    with log.open("a") as file:
        process = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # a node that was lost
            descendants = psutil.Process(process.pid).children(recursive=True)
            end_processes([(p.pid, p.create_time()) for p in [*descendants, psutil.Process(process.pid)]])
        process.wait(10)


def free_ports(num: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/api/version", trust_env=False).status_code in (200, 401)
    return False
