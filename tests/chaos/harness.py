"""Kills processes of a real run at seeded random moments, and checks the run's records afterwards.

plan --> run (quickstart, few steps) --> wait a random moment --> kill or stop one process --> wait until the run went on --> next
                                                                                                                 |
Outcome <-- exit code, steps, prompts, restarts, processes left <----------- the run's end <---------------------+
"""

import contextlib
import hashlib
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.services.inputs.prompts import open_prompts
from opd_governor.services.inputs.resolve import resolve
from opd_governor.services.job.load import load_job
from opd_governor.services.record.rundir import read_records
from opd_governor.services.record.steps import CLOCK_FIELDS
from opd_governor.services.run.cluster import end_processes
from tests.live_run import JOB, LiveRun

TITLES = {
    "rollout": "ray::RolloutActor",
    "engine": "VLLM::EngineCore",
    "teacher": "ray::TeacherActor",
    "learner": "ray::Learner",
    "governor": "ray::Governor",
}
"""Role -> how its process calls itself."""
ROLES = {start: role for role, start in TITLES.items()} | {
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "ray::IDLE": "idle worker",
}
"""How a process calls itself -> role; others are known by their program's name."""
COUNTED_AS = {"engine": "rollout"}
"""An engine's own process: the rollout actor is replaced with it."""
MAX_WAIT_S = 3.0
"""A kill falls this long, at most, after the run went on from the one before."""
RECOVERY_S = 200.0
ORPHANS_S = 10.0
AGENTS_S = 90.0
"""Ray's two agents outlive a killed driver by 62 s: they try for a minute to tell its GCS, which is dead too."""
FLOOR_S = 20.0
"""Deadline floor of these runs: a tiny model's calls take less than a second, a busy machine stalls for several."""


def role_of(process: psutil.Process) -> str | None:
    """The role of a process of a run."""
    words = process.cmdline()
    if not words:
        return None
    named = next((role for start, role in ROLES.items() if words[0].startswith(start)), None)
    return named or next((Path(word).stem for word in words if word.endswith((".py", "gcs_server", "raylet"))), None)


@dataclass(frozen=True, slots=True)
class Kill:
    """One killed process, and the seconds until the run had finished the step it was in."""

    role: str
    signal: str
    step: int
    doing: str
    """The process' own title at that moment: Ray adds the method that it runs."""
    recovered_s: float


@dataclass(slots=True)
class Outcome:
    """What is checked after a run has ended."""

    seed: int
    staleness: int
    steps: int
    exit_code: int
    kills: list[Kill]
    restarts: dict[str, int]
    """As the run counted them."""
    steps_recorded_once: bool
    prompts_lost: int
    prompts_twice: int
    unscored: int
    processes_left: list[str]
    wall_s: float
    weights_sha256: str
    records_sha256: str
    """Of metrics.jsonl without the fields that tell time: strict runs (staleness 0) of one job have the same."""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ChaosRun(LiveRun):
    """A live run whose processes can be found by role, and its service read."""

    def __init__(self, out: Path, *sets: str, resume: bool = False) -> None:
        super().__init__(out, *sets, resume=resume)
        self.orphans: list[str] = []
        """What outlived the process that had started it: the run ends these, too, but only with itself."""

    def victims(self, role: str) -> list[psutil.Process]:
        if role == "driver":
            return [psutil.Process(self.process.pid)]
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(TITLES[role]):
                    found.append(process)
        return found

    def step(self, client: httpx.Client) -> int:
        return int(client.get("/v1/run").json()["step"])

    def restarts(self, client: httpx.Client) -> Counter[str]:
        return restarts_in(client.get("/metrics").text)

    def _wait_until_learner_runs(self, method: str) -> None:
        """Ray adds the method that an actor runs to its process' title."""
        ranks = self.victims("learner")
        until = time.monotonic() + RECOVERY_S
        while not any(rank.cmdline()[0].startswith(f"{TITLES['learner']}.{method}") for rank in ranks):
            assert time.monotonic() < until, f"no learner ran {method}"
            time.sleep(0.002)

    def kill(self, client: httpx.Client, role: str, number: signal.Signals, during: str | None = None) -> Kill:
        """Kill a process of this role, and wait until it is replaced and the run has continued. `during`: not before the learner is in
        this method."""
        self.remember()
        before, counted_as = self.restarts(client), COUNTED_AS.get(role, role)
        victim = self.victims(role)[0]
        doing, step, started = victim.cmdline()[0].strip(), self.step(client), time.monotonic()
        own = {process: process.name() for process in (victim, *victim.children(recursive=True))}
        if during:
            self._wait_until_learner_runs(during)
            doing = f"{doing} (learner: {during})"
        victim.send_signal(number)
        self.wait_for(lambda: self.restarts(client)[counted_as] > before[counted_as] and self.step(client) > step, RECOVERY_S)
        recovered_s = round(time.monotonic() - started, 1)
        _, left = psutil.wait_procs(own, timeout=ORPHANS_S)
        self.orphans += [f"{process.pid} {own[process]} of a {role}" for process in left]
        return Kill(role, number.name, step, doing, recovered_s)


def restarts_in(metrics: str) -> Counter[str]:
    families = text_string_to_metric_families(metrics)
    samples = (s for family in families for s in family.samples if s.name == "opd_actor_restarts_total")
    return Counter({s.labels["role"]: int(s.value) for s in samples if s.value})


def run_with_kills(
    out: Path,
    plan: Sequence[tuple[str, signal.Signals]],
    *,
    seed: int,
    steps: int,
    staleness: int,
    sets: Sequence[str] = (),
    during: str | None = None,
) -> Outcome:
    """One run of the quickstart with the kills of the plan, in its order, at moments drawn from the seed."""
    rng, started = random.Random(seed), time.monotonic()
    settings = [
        f"learner.total_steps={steps}",
        f"rollout.max_staleness={staleness}",
        "checkpoint.every_steps=5",
        "data.eval.path=null",
        "data.golden.num_prompts=32",
        f"cluster.deadline_floor_s={FLOOR_S}",
        *sets,
    ]
    live = ChaosRun(out, *settings)
    kills: list[Kill] = []
    client: httpx.Client | None = None
    try:
        client = live.client()
        live.wait_for(lambda: live.step(client) >= 2)
        for role, number in plan:
            time.sleep(rng.uniform(0, MAX_WAIT_S))
            if role == "driver":
                live, client, kill = _kill_driver(live, client, settings)
                kills.append(kill)
            else:
                kills.append(live.kill(client, role, number, during))
        exit_code = live.finish(RECOVERY_S)
    finally:
        if client is not None:
            client.close()
        end_processes(live.processes.items())
        if live.process.poll() is None:
            live.process.kill()
    return check(live, kills, exit_code, settings, seed, steps, staleness, time.monotonic() - started)


def _kill_driver(live: ChaosRun, client: httpx.Client, settings: Sequence[str]) -> tuple[ChaosRun, httpx.Client, Kill]:
    """Kill the whole run's driver and resume the run."""
    live.remember()
    step, started = live.step(client), time.monotonic()
    client.close()
    live.process.kill()
    live.process.wait(10)
    resumed = ChaosRun(live.out, *settings, resume=True)
    resumed.processes |= live.processes  # looked for at the end
    resumed.orphans += live.orphans
    client = resumed.client()
    resumed.wait_for(lambda: resumed.step(client) > step, RECOVERY_S)
    return resumed, client, Kill("driver", "SIGKILL", step, "opd run", round(time.monotonic() - started, 1))


def check(
    live: ChaosRun,
    kills: list[Kill],
    exit_code: int,
    settings: Sequence[str],
    seed: int,
    steps: int,
    staleness: int,
    wall_s: float,
) -> Outcome:
    """Check the records of a run that has ended against the stream of prompts of its job."""
    records = [record for record in read_records(live.out / "metrics.jsonl") if record["num_rollouts"]]
    used = [tuple(key) for record in records for key in record["prompts"]]
    due = prompts_due(tuple(settings), steps)
    events = [event["text"] for event in read_records(live.out / "events.jsonl")]
    restarts = Counter(text.split()[1] for text in events if text.startswith("restarted: "))
    outcome = Outcome(
        seed=seed,
        staleness=staleness,
        steps=steps,
        exit_code=exit_code,
        kills=kills,
        restarts={role: restarts[role] for role in ("rollout", "teacher", "learner", "governor")},
        steps_recorded_once=[record["step"] for record in records] == list(range(1, steps + 1)),
        prompts_lost=len(set(due) - set(used)),
        prompts_twice=len(used) - len(set(used)),
        unscored=sum(record["num_unscored"] for record in records),
        processes_left=live.orphans + live.left_over(AGENTS_S if any(kill.role == "driver" for kill in kills) else ORPHANS_S),
        wall_s=round(wall_s, 1),
        weights_sha256=_sha256((live.out / "final/model.safetensors").read_bytes()) if exit_code == 0 else "",
        records_sha256=_sha256(json.dumps([{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in records]).encode()),
    )
    wanted = Counter(COUNTED_AS.get(kill.role, kill.role) for kill in kills)
    found = {
        f"exit code {exit_code}": exit_code != 0,
        "steps missing or twice": not outcome.steps_recorded_once,
        f"{outcome.prompts_lost} prompts lost": outcome.prompts_lost > 0,
        f"{outcome.prompts_twice} prompts twice": outcome.prompts_twice > 0,
        f"{outcome.unscored} samples without a score": outcome.unscored > 0,
        f"restarts {outcome.restarts}, kills {dict(wanted)}": any(outcome.restarts[role] != wanted[role] for role in outcome.restarts),
        f"processes left: {outcome.processes_left}": bool(outcome.processes_left),
    }
    outcome.problems = [text for text, wrong in found.items() if wrong]
    return outcome


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def prompts_due(settings: tuple[str, ...], steps: int) -> list[tuple[int, int]]:
    """(epoch, index) of the prompts that a run of so many steps has to use, in order."""
    job = load_job(JOB, settings)
    models, tokenizer = resolve(job)
    stream = open_prompts(job, tokenizer, models.context_tokens)
    return [(p.epoch, p.index) for _ in range(steps) for p in stream.next(job.rollout.prompts_per_step, 1.0)]
