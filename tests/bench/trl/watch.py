"""What a command and all its processes used: memory (PSS), CPU, and how busy other programs kept the cores meanwhile."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[3]


@dataclass
class Usage:
    """What a process tree took, and how busy the cores were with others meanwhile."""

    peak_pss_gib: float = 0.0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    others_cores: float = 0.0
    """Mean cores taken by processes outside the tree: above a tenth the timings are not to be trusted."""


class Watch:
    """Samples a process tree from a thread until it ends."""

    PERIOD_S = 1.0

    def __init__(self, pid: int) -> None:
        self._root, self._started = psutil.Process(pid), time.monotonic()
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._busy_at_start = _busy_s()
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        try:
            tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        pss = 0
        for process in tree:
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
                pss += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        self._peak_bytes = max(self._peak_bytes, pss)

    def finish(self) -> Usage:
        self._stop.set()
        self._thread.join()
        wall_s, cpu_s = time.monotonic() - self._started, sum(self._cpu_s.values())
        others = max(0.0, _busy_s() - self._busy_at_start - cpu_s) / wall_s
        return Usage(self._peak_bytes / 2**30, cpu_s, wall_s, others)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def watched(command: Sequence[str], environment: dict[str, str], log: Path) -> Usage:
    """Run to the end on two cores. Exits with the log's tail when the command fails."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["taskset", "-c", "0,1", *command], cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        )
        watch = Watch(process.pid)
        code = process.wait()
    usage = watch.finish()
    if code:
        sys.exit(f"{' '.join(command[:3])} ended with {code}:\n{log.read_text()[-3000:]}")
    return usage
