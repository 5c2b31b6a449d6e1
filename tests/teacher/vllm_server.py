"""A real `vllm serve` on loopback."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from opd_governor.services.run.cluster import end_processes
from tests.integration.ray_head import free_ports

START_S = 300
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def vllm_server(model: Path, name: str, log: Path, *options: str) -> Iterator[str]:
    """Its address once it answers. It gives log-probs of the whole vocabulary, in float32."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1", "--served-model-name", name, *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
    url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(process.pid)
            end_processes([(p.pid, p.create_time()) for p in [*server.children(recursive=True), server]])
        process.wait(30)


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", trust_env=False).is_success
    return False
