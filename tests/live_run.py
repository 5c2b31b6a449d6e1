"""A real run in its own process, watched from outside."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[1]
JOB = ROOT / "deploy/jobs/sums.yaml"


def _heed_ctrl_c() -> None:
    """Tests started in a shell's background inherit that Ctrl-C is ignored; a person's run has not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class LiveRun:
    """`opd run` in its own process, and its HTTP service once it is up."""

    def __init__(self, out: Path, *sets: str, resume: bool = False, job: Path = JOB) -> None:
        self.out = out
        command = [sys.executable, "-m", "opd_governor", "run", str(job), "--out", str(out)]
        command += [part for override in sets for part in ("--set", override)] + (["--resume"] if resume else [])
        self.log = out.parent / f"{out.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_heed_ctrl_c)
        self.processes: dict[int, float] = {}

    def url(self) -> str:
        self.wait_for(lambda: "http://" in self.log.read_text(), 60)
        return next(word for word in self.log.read_text().split() if word.startswith("http://"))

    def client(self) -> httpx.Client:
        url = self.url()
        token = (self.out / "token").read_text().strip()
        # Questions may lie far apart on a busy machine: a connection kept open would be closed by the server just as it is used.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, limits=limits)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 240) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.remember()
            if value := condition():
                return value
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        raise AssertionError(f"timed out:\n{self.log.read_text()[-3000:]}")

    def remember(self) -> None:
        """Every process that this run has started, directly or not."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.processes[child.pid] = child.create_time()

    def finish(self, timeout_s: float = 240) -> int:
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.remember()
            time.sleep(0.2)
        return self.process.wait(1)

    def left_over(self, grace_s: float = 10) -> list[str]:
        """Descendants that are still alive after a short wait."""
        deadline = time.monotonic() + grace_s
        while True:
            alive = []
            for pid, created in self.processes.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                        alive.append(f"{pid} {process.name()}")
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.5)
