"""Is this tree slower than the commit before? The quickstart on both sides, alternating, in one go.

    python -m tests.bench.speed.guard [--against REF] [--rounds 3] [--steps 60]    # three rounds: five minutes on 2 idle cores

Both sides run on this tree's environment. For each measure: this tree over the other, by round, and their median. It ends with 1 where a
measure is worse by more than a tenth in every round. A busy machine shows in the spread.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.bench.speed.bench import ROOT, Run, run_job

JOB = "deploy/jobs/sums.yaml"
WORSE = 1.1
Measures = Mapping[str, float]
"""Name -> value; less is better."""


def measures(run: Run) -> Measures:
    """Seconds and CPU seconds of a run's steps after warm-up, and of its start."""
    seconds = [record["seconds"] for record in run.records]
    tokens = sum(sum(record["lengths"]) for record in run.records)
    found = {"step, s": statistics.median(seconds), "token, ms": 1000 * sum(seconds) / tokens, "start-up, s": run.start_up_s}
    return found | {f"CPU of {role}, s a step": cpu_s for role, cpu_s in sorted(run.cpu_s.items()) if cpu_s > 0.001}


def ratios(rounds: Sequence[tuple[Measures, Measures]]) -> dict[str, list[float]]:
    """Of each measure that every run has: this side over the other, by round. `rounds`: (this, other).

    >>> ratios([({"step, s": 2.0}, {"step, s": 1.0}), ({"step, s": 3.0}, {"step, s": 3.0})])
    {'step, s': [2.0, 1.0]}
    """
    shared = [name for name in rounds[0][0] if all(name in side for pair in rounds for side in pair)]
    return {name: [this[name] / other[name] for this, other in rounds] for name in shared}


def worse(found: Mapping[str, Sequence[float]]) -> list[str]:
    """What every round finds worse."""
    return [name for name, by_round in found.items() if min(by_round) > WORSE]


def compare(other: Path, rounds: int, steps: int) -> dict[str, list[float]]:
    """The ratios, printed as they come. The side that begins changes from round to round."""
    sides, pairs = (ROOT, other), []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        found = {side: measures(run_job(JOB, steps, tree=sides[side])) for side in order}
        pairs.append((found[0], found[1]))
        print(f"round {number + 1}: " + ", ".join(f"{name} {r[-1]:.2f}" for name, r in ratios(pairs).items()), flush=True)
    return ratios(pairs)


@contextlib.contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A tree of another commit."""
    with tempfile.TemporaryDirectory(prefix="opd-guard-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), ref], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="HEAD~1", help="the other side's commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(f"this tree over {options.against}, {options.steps} steps a run, {os.cpu_count()} cores, {platform.machine()}", flush=True)
    with checked_out(options.against) as other:
        found = compare(other, options.rounds, options.steps)
    print("| measure | median | by round |\n|---|---|---|")
    for name, by_round in found.items():
        print(f"| {name} | {statistics.median(by_round):.2f} | {', '.join(f'{ratio:.2f}' for ratio in by_round)} |")
    if slower := worse(found):
        sys.exit(f"worse by more than a tenth in every round: {', '.join(slower)}")


if __name__ == "__main__":
    main()
