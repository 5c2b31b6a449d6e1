"""A long run of the quickstart with a random kill every so many steps: does it end, and does anything grow?

    python -m tests.chaos.soak                 # 2000 steps, a kill every 50: about two hours on two cores
    python -m tests.chaos.soak --steps 300

Memory (resident less shared, so that the object store counts once) and open files of every process are looked at every few
seconds, by role. A role has grown when its median over the last fifth of the run is more than 10 % above that over the second
fifth; the first fifth is its warm-up. The figures go to tests/bench/soak.json.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import httpx
import psutil

from tests.chaos.harness import FLOOR_S, TITLES, ChaosRun, Kill, check

KEPT = Path(__file__).parents[1] / "bench/soak.json"
KILLED = ("rollout", "teacher", "learner", "governor")
SAMPLE_S = 5.0
SETTLE_S = 60.0
"""A process younger than this is still loading its model: it is not looked at."""
GROWTH = 1.10
OTHERS = {"gcs_server": "gcs", "raylet": "raylet"}
CHECKPOINT_STEPS = 25


class Samples:
    """(step, MiB, open files) by role."""

    def __init__(self) -> None:
        self.by_role: dict[str, list[tuple[int, float, int]]] = defaultdict(list)

    def take(self, live: ChaosRun, step: int) -> None:
        driver = psutil.Process(live.process.pid)
        for process in [driver, *driver.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                role = "driver" if process.pid == driver.pid else _role_of(process)
                if role and time.time() - process.create_time() > SETTLE_S:
                    memory = process.memory_info()
                    self.by_role[role].append((step, (memory.rss - memory.shared) / 2**20, process.num_fds()))

    def growth(self, steps: int) -> dict[str, dict[str, float]]:
        """Medians of the second and of the last fifth, by role."""
        found = {}
        for role, samples in sorted(self.by_role.items()):
            early = [s for s in samples if 0.2 * steps <= s[0] < 0.4 * steps]
            late = [s for s in samples if s[0] >= 0.8 * steps]
            if early and late:
                found[role] = {
                    f"{name}_{when}": round(statistics.median(s[column] for s in part), 1)
                    for name, column in (("mib", 1), ("files", 2))
                    for when, part in (("early", early), ("late", late))
                }
        return found


def _role_of(process: psutil.Process) -> str | None:
    title = (process.cmdline() or [""])[0]
    for role, start in TITLES.items():
        if title.startswith(start):
            return role
    return OTHERS.get(Path(title).name)


def soak(out: Path, steps: int, kill_every: int, seed: int) -> dict[str, Any]:
    settings = [
        f"learner.total_steps={steps}",
        "data.eval.path=null",
        f"checkpoint.every_steps={CHECKPOINT_STEPS}",
        f"cluster.deadline_floor_s={FLOOR_S}",
    ]
    rng, started, samples, kills = random.Random(seed), time.monotonic(), Samples(), list[Kill]()
    live = ChaosRun(out, *settings)
    client = live.client()
    live.wait_for(lambda: live.step(client) >= 1)
    next_kill, next_sample = kill_every, time.monotonic()
    while live.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):  # the service closes as the run ends
            step = live.step(client)
            live.remember()
            if time.monotonic() >= next_sample:
                samples.take(live, step)
                next_sample = time.monotonic() + SAMPLE_S
            if step >= next_kill and step < steps - 10:
                next_kill += kill_every
                time.sleep(rng.uniform(0, 2))
                kills.append(live.kill(client, rng.choice(KILLED), signal.SIGKILL))
                print(f"step {step}: {kills[-1]}", flush=True)
        time.sleep(0.3)
    outcome = check(live, kills, live.process.wait(), settings, seed, steps, 1, time.monotonic() - started)
    growth = samples.growth(steps)
    grown = [
        f"{role}: {what} {figures[f'{what}_early']} -> {figures[f'{what}_late']}"
        for role, figures in growth.items()
        for what in ("mib", "files")
        if figures[f"{what}_late"] > GROWTH * figures[f"{what}_early"]
    ]
    machine = {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()}
    return outcome.to_json() | {"kill_every": kill_every, "growth": growth, "grown": grown, "machine": machine}


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with random kills; see the module's docstring.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opd-soak-") as folder:
        result = soak(Path(folder) / "sums", options.steps, options.kill_every, options.seed)
    KEPT.write_text(json.dumps(result, indent=1) + "\n")
    for role, figures in result["growth"].items():
        print(f"{role:10} {figures}")
    print("problems:", result["problems"] or "none", "| grown:", result["grown"] or "nothing")
    return int(bool(result["problems"] or result["grown"]))


if __name__ == "__main__":
    sys.exit(main())
