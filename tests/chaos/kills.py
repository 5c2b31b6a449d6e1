"""The long chaos suite: 10 kills of every role at seeded moments, and strict runs held bit for bit against one never killed.

    python -m tests.chaos.kills            # all pieces (about 25 minutes), table printed, tests/bench/chaos.json written
    python -m tests.chaos.kills learner-0  # these pieces only, the others kept as they are

A piece is one run that several kills share.
"""

import json
import os
import platform
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.chaos.harness import run_with_kills  # after the environment that torch and ray read

KEPT = Path(__file__).parents[1] / "bench/chaos.json"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
STEPS_PER_KILL = 12
"""A kill waits up to three seconds, some nine steps of an idle machine, and the run must outlast the last one."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One run and the roles that are killed in it, in order."""

    roles: tuple[str, ...]
    seed: int
    staleness: int = 1
    stopped: tuple[str, ...] = ()
    """Roles whose process is stopped (SIGSTOP) rather than killed: it hangs."""
    steps: int | None = None
    sets: tuple[str, ...] = ()
    during: str | None = None
    """A kill waits until a learner's rank runs this method."""

    def run(self, out: Path) -> dict[str, Any]:
        plan = [(role, STOP if role in self.stopped else KILL) for role in self.roles]
        steps = self.steps or 8 + STEPS_PER_KILL * len(plan)
        return run_with_kills(
            out, plan, seed=self.seed, steps=steps, staleness=self.staleness, sets=self.sets, during=self.during
        ).to_json()


BROADCAST = ("cluster.weight_transfer=gloo", "rollout.num_actors=2", "learner.num_ranks=2")
STRICT_STEPS = 48
PIECES = {
    "governor-0": Piece(("governor",) * 10, 1),
    "learner-0": Piece(("learner",) * 5, 2),
    "learner-1": Piece(("learner",) * 5, 3),
    "teacher-0": Piece(("teacher",) * 5, 4),
    "teacher-1": Piece(("teacher",) * 5, 5),
    "rollout-0": Piece(("rollout",) * 4, 6),
    "rollout-1": Piece(("rollout", "engine", "rollout"), 7),
    "rollout-2": Piece(("rollout",) * 3, 8),
    "driver-0": Piece(("driver",) * 3, 9),
    "driver-1": Piece(("driver",) * 4, 15),
    "driver-2": Piece(("driver",) * 3, 16),
    "hang-0": Piece(("learner", "teacher", "governor", "engine"), 10, stopped=("learner", "teacher", "governor", "engine")),
    "broadcast-0": Piece(("rollout", "learner"), 17, sets=BROADCAST, during="send_weights"),
    "strict-none": Piece((), 0, staleness=0, steps=STRICT_STEPS),
    "strict-0": Piece(("learner", "governor", "teacher"), 11, staleness=0, steps=STRICT_STEPS),
    "strict-1": Piece(("rollout", "learner", "governor"), 12, staleness=0, steps=STRICT_STEPS),
    "strict-2": Piece(("teacher", "rollout", "learner"), 13, staleness=0, steps=STRICT_STEPS),
    "strict-3": Piece(("governor", "teacher", "rollout"), 14, staleness=0, steps=STRICT_STEPS),
}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line per role: kills, seconds to recovery, and whether any of their runs had a problem."""
    rows: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for run in runs.values():
        for kill in run["kills"]:
            rows[kill["role"], kill["signal"]].append((kill["recovered_s"], bool(run["problems"])))
    lines = ["| role | signal | kills | back within, s (mean, max) | in runs with a problem |", "|---|---|---|---|---|"]
    for (role, name), kills in sorted(rows.items()):
        seconds = [s for s, _ in kills]
        lines.append(
            f"| {role} | {name} | {len(kills)} | {sum(seconds) / len(seconds):.1f}, {max(seconds):.1f} | {sum(bad for _, bad in kills)} |"
        )
    lines += [f"{name}: {problem}" for name, run in runs.items() for problem in run["problems"]]
    strict = {name: run for name, run in runs.items() if name.startswith("strict")}
    if baseline := strict.pop("strict-none", None):
        same = [all(run[key] == baseline[key] for key in ("weights_sha256", "records_sha256")) for run in strict.values()]
        lines.append(f"strict runs with kills whose weights and records equal those of the run never killed: {sum(same)} of {len(same)}")
    return "\n".join(lines)


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - PIECES.keys():
        print(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
        return 2
    kept = json.loads(KEPT.read_text()) if names and KEPT.exists() else {"runs": {}}
    for name in names or PIECES:
        with tempfile.TemporaryDirectory(prefix="opd-chaos-") as folder:
            out = Path(folder) / "sums"
            try:
                kept["runs"][name] = PIECES[name].run(out)
            finally:
                print((out.parent / "sums.log").read_text()[-4000:] if os.environ.get("CHAOS_LOG") else "", end="")
        print(f"{name}: {kept['runs'][name]['problems'] or 'as it should be'}", flush=True)
        kept["machine"] = {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()}
        kept["versions"] = {package: version(package) for package in ("ray", "torch", "transformers")}
        kept["runs"] = {name: kept["runs"][name] for name in PIECES if name in kept["runs"]}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(kept["runs"]))
    return int(any(run["problems"] for run in kept["runs"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
