"""The law on runs whose truth is known: false alarms, time to act, price; beside it the law before and what people write by hand.

    python -m tests.bench.governor.bench                    # 10 seeds a cell: under 3 minutes on one core
    python -m tests.bench.governor.bench --seeds 200        # the kept result: table.md, results.json, delay.png

The worlds are open loop: nothing that a law does changes the lengths it sees. Both sides read the same steps.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from opd_governor.actors.governor import law
from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import KL_FLOOR_NATS, Signals
from opd_governor.actors.trajectory import LengthLimits
from tests.bench.governor.before import law as law_before
from tests.bench.governor.before.policy import Policy as PolicyBefore
from tests.bench.governor.before.signals import Signals as SignalsBefore
from tests.bench.governor.worlds import ONSET, Run, Step, World, null_worlds, sick_worlds

HERE = Path(__file__).parent
ACTED = 0.05
"""Pressure from which an action counts."""
LATE_TRUNCATION = 0.1

Watcher = Callable[[Step], tuple[float, float]]
"""A step -> pressure, learning-rate scale."""


def this_law(run: Run, false_alarm_steps: float = 5000.0) -> Watcher:
    policy, base = Policy(mode="observe", false_alarm_steps=false_alarm_steps), LengthLimits(cap_tokens=run.cap_tokens)
    state, number = law.start(policy, base), 0

    def watch(step: Step) -> tuple[float, float]:
        nonlocal state, number
        number += 1
        state, _, decision = law.decide(state, signals_of(run, step), policy, base, number)
        return decision.after.pressure, decision.proposed.lr_scale

    return watch


def signals_of(run: Run, step: Step) -> Signals:
    """As the driver's counters would give them."""
    num = len(step.tokens_N)
    found = run.model.measure(step.tokens_N, np.full(num, run.cap_tokens), step.cut_N, step.mu_N)
    lengths = Observation(
        float(found.nats_N.mean()), num, spread=run.model.spread_nats, variance=float(found.nats_N.var()) if num > 1 else None
    )
    expected = float(found.tail_probability_N.mean())
    seen = {
        "length": lengths,
        "short": lengths,
        "tail": Observation(float(found.in_tail_N.mean()), num, expected),
        "loops": Observation(step.loops / num, num),
        "kl": Observation(math.log(max(KL_FLOOR_NATS, step.kl_nats)), 1.0, prompts=float(step.mu_N.mean())),
        "stop_mass": Observation(math.log(step.stop_mass_ratio), 1.0),
    }
    return Signals(
        steps_spanned=1.0,
        num_rollouts=num,
        observations=seen,
        truncation_rate=float(step.cut_N.mean()),
        governor_cut_rate=0.0,
        expected_cut_rate=expected,
        loop_rate=step.loops / num,
        reference_p99_tokens=run.p99_tokens,
    )


def the_law_before(run: Run) -> Watcher:
    policy, base = PolicyBefore(mode="observe"), LengthLimits(cap_tokens=run.cap_tokens)
    state, number = law_before.start(policy, base), 0

    def watch(step: Step) -> tuple[float, float]:
        nonlocal state, number
        number += 1
        mean, cut = float(step.tokens_N.mean()), float(step.cut_N.mean())
        signals = SignalsBefore(
            steps_spanned=1.0,
            num_rollouts=len(step.tokens_N),
            tail_share=float(np.mean(step.tokens_N > policy.tail_multiple * run.p99_tokens)),
            length_mean_tokens=mean,
            length_max_tokens=float(step.tokens_N.max()),
            reference_mean_tokens=run.mean_tokens,
            reference_p99_tokens=run.p99_tokens,
            truncation_rate=cut,
            governor_cut_rate=0.0,
            loop_rate=step.loops / len(step.tokens_N),
            kl_nats=step.kl_nats,
            stop_mass_student=step.stop_mass_ratio / run.mean_tokens,
            stop_mass_teacher=1 / run.mean_tokens,
            stop_density_per_token=(1 - cut) / mean,
        )
        state, _, decision = law_before.decide(state, signals, policy, base, number)
        return decision.after.pressure, decision.proposed.lr_scale

    return watch


def by_hand(value: Callable[[Run, Step], float], bound: float) -> Callable[[Run], Watcher]:
    """A threshold as a callback has it: over it, halve the learning rate."""
    return lambda run: lambda step: (1.0, 0.5) if value(run, step) > bound else (0.0, 1.0)


WATCHERS: dict[str, Callable[[Run], Watcher]] = {
    "this law": this_law,
    "law before": the_law_before,
    "truncation > .1": by_hand(lambda run, step: float(step.cut_N.mean()), 0.1),
    "mean > 1.5 x reference": by_hand(lambda run, step: float(step.tokens_N.mean()) / run.mean_tokens, 1.5),
    "longest > 2 x p99": by_hand(lambda run, step: float(step.tokens_N.max()) / run.p99_tokens, 1.99),
}


@dataclass(frozen=True)
class Found:
    """One watcher on one world, over seeds."""

    world: str
    watcher: str
    sick: bool
    pressed_share: float
    """Of steps (healthy ones, in a sick world those before the onset) with pressure over ACTED."""
    alarms_per_1000: float
    price: float
    """1 - mean learning-rate scale over those steps."""
    delay_steps: float | None
    """Median over seeds from the onset to the first action after it; None: more than half never acted."""
    delay_90_steps: float | None
    in_time: float | None
    """Share of seeds that acted before the true truncation passed LATE_TRUNCATION."""


def watch_world(world: World, seeds: Iterable[int], watchers: dict[str, Callable[[Run], Watcher]]) -> list[Found]:
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in watchers}
    late_at = world.num_steps
    for seed in seeds:
        run = Run(world, seed)
        watching = {name: start(run) for name, start in watchers.items()}
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in watchers}
        late_at = world.num_steps
        for number in range(world.num_steps):
            step = run.step(number)
            if step.truncation > LATE_TRUNCATION and number >= ONSET:
                late_at = min(late_at, number)
            for name, watch in watching.items():
                rows[name].append(watch(step))
            if world.sick and number > late_at + 15:
                break
        for name, row in rows.items():
            pressures, scales = np.array(row).T
            seen[name].append((pressures, scales))
    return [summarise(world, name, each, late_at) for name, each in seen.items()]


def summarise(world: World, name: str, seen: list[tuple[np.ndarray, np.ndarray]], late_at: int) -> Found:
    healthy = slice(0, ONSET) if world.sick else slice(0, None)
    pressed = [pressures[healthy] > ACTED for pressures, _ in seen]
    alarms = sum(int(np.sum(each[1:] & ~each[:-1])) + int(each[0]) for each in pressed)
    delays = []
    if world.sick:
        for pressures, _ in seen:
            acted = np.flatnonzero(pressures[ONSET:] > ACTED)
            delays.append(float(acted[0]) if len(acted) else math.inf)
    median, ninth = (np.quantile(delays, share, method="higher") for share in (0.5, 0.9)) if delays else (math.inf, math.inf)
    return Found(
        world=world.name,
        watcher=name,
        sick=world.sick,
        pressed_share=float(np.mean(np.concatenate(pressed))),
        alarms_per_1000=1000 * alarms / sum(map(len, pressed)),
        price=1 - float(np.mean(np.concatenate([scales[healthy] for _, scales in seen]))),
        delay_steps=float(median) if math.isfinite(median) else None,
        delay_90_steps=float(ninth) if math.isfinite(ninth) else None,
        in_time=float(np.mean([delay <= late_at - ONSET for delay in delays])) if delays else None,
    )


def write_table(found: list[Found], told: dict[str, Any]) -> str:
    names = list(WATCHERS)
    by = {(each.world, each.watcher): each for each in found}
    lines = [f"{told['seeds']} seeds a cell, {told['seconds']:.0f} s on one core, Python {told['python']}, numpy {told['numpy']}.", ""]
    lines += ["Healthy runs: share of steps with pressure over .05, false alarms per 1,000 steps, price in learning rate.", ""]
    lines += [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for world in dict.fromkeys(each.world for each in found if not each.sick):
        cells = [by[world, name] for name in names]
        lines.append(f"| {world} | " + " | ".join(f"{c.pressed_share:.1%}, {c.alarms_per_1000:.2f}, {c.price:.1%}" for c in cells) + " |")
    lines += [
        "",
        "Sick runs: steps from the onset to the first action (median / 90 %), share of seeds that acted before truncation passed .1.",
        "",
    ]
    lines += [f"| run | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for world in dict.fromkeys(each.world for each in found if each.sick):
        cells = [by[world, name] for name in names]
        lines.append(
            f"| {world} | " + " | ".join(f"{_steps(c.delay_steps)} / {_steps(c.delay_90_steps)}, {c.in_time:.0%}" for c in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def _steps(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def write_plot(path: Path, seeds: int) -> None:
    """Median delay against false alarms: this law over its one knob, the others over their thresholds' usual values."""
    quiet, sick = (
        World("healthy, 0.8 wide", sigma=0.8, batch=32),
        World("growth", sick=True, sigma=0.8, batch=32, shift=lambda s: 0.05 * max(0, s - ONSET)),
    )
    watchers: dict[str, Callable[[Run], Watcher]] = {
        f"this law@{steps:g}": lambda run, steps=steps: this_law(run, steps)
        for steps in (10, 100, 1000, 5000, 50000)  # type: ignore[misc]
    }
    watchers["law before@"] = the_law_before
    watchers |= {f"truncation@{b:g}": by_hand(lambda run, step: float(step.cut_N.mean()), b) for b in (0.02, 0.05, 0.1, 0.2)}
    watchers |= {f"mean@{b:g}": by_hand(lambda run, step: float(step.tokens_N.mean()) / run.mean_tokens, b) for b in (1.2, 1.35, 1.5, 2)}
    watchers |= {f"longest@{b:g}": by_hand(lambda run, step: float(step.tokens_N.max()) / run.p99_tokens, b) for b in (1.2, 1.5, 1.8, 1.99)}
    false = {each.watcher: each.alarms_per_1000 for each in watch_world(quiet, range(seeds), watchers)}
    delay = {each.watcher: each.delay_steps for each in watch_world(replace(sick, num_steps=120), range(seeds), watchers)}
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for family in dict.fromkeys(name.partition("@")[0] for name in watchers):
        points = [(false[n] + 0.05, delay[n], n.partition("@")[2]) for n in watchers if n.startswith(family + "@") and delay[n] is not None]
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", label=family)
        for x, y, text in points:
            axes.annotate(text, (x, y), fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("false alarms per 1,000 steps + .05 (student equal to its teacher, lengths .8 wide, 32 rollouts)")
    axes.set_ylabel("median steps from onset to action (lengths grow 5 % a step)")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write table.md, results.json and delay.png beside this file")
    parser.add_argument("--only", default="", help="worlds whose name has this")
    arguments = parser.parse_args()
    started = time.process_time()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    worlds = [world for world in (*null_worlds(), *sick_worlds()) if arguments.only in world.name]
    found = [each for world in worlds for each in watch_world(world, seeds, WATCHERS)]
    told = {
        "seeds": arguments.seeds,
        "seconds": time.process_time() - started,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    table = write_table(found, told)
    print(table)
    if arguments.keep:
        (HERE / "table.md").write_text(table)
        (HERE / "results.json").write_text(json.dumps(told | {"found": [asdict(each) for each in found]}, indent=1) + "\n")
        write_plot(HERE / "delay.png", max(20, arguments.seeds // 4))


if __name__ == "__main__":
    main()
