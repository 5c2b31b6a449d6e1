"""The governor's law over a run's recorded signals: is the record what the law says, and what would another policy have done?

A counterfactual is open loop: it shows what the other policy would have decided on the signals as they were. The rollouts
it would have changed are not simulated.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from opd_governor.actors.governor.actuators import movable
from opd_governor.actors.governor.law import decide
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import SIGNALS, Signals
from opd_governor.actors.governor.state import State
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.job.load import describe_errors, use_extensions_of


@dataclass(frozen=True)
class ReplayRow:
    """One recorded decision and the replayed one."""

    step: int
    recorded: dict[str, Any]
    """As in decisions.jsonl."""
    replayed: dict[str, Any]
    """The same keys, from the law."""
    differences: tuple[str, ...] = field(default=())
    """Keys whose values differ, nested ones joined by dots; empty: bit for bit equal."""

    def to_json(self) -> dict[str, Any]:
        """Both decisions without the signals they share."""
        kept = ("mode", "action", "signal", "reason", "pressure", "limits")
        recorded, replayed = ({key: side.get(key) for key in kept} for side in (self.recorded, self.replayed))
        return {"step": self.step, "recorded": recorded, "replayed": replayed, "differences": list(self.differences)}


def replay(run_dir: Path, policy: Policy | None = None) -> list[ReplayRow]:
    """Decide again on the signals in `run_dir`/decisions.jsonl.

    Without `policy` under the recorded policies, each from the recorded state before it; with one, that policy carries its own
    state from the first record on. The run's own extensions are imported first. Raises ValueError with file and line for a record that
    cannot be read, and for an extension that does not load.
    """
    _use_extensions(run_dir / "job.yaml")
    rows = []
    own: State | None = None
    for record, recorded_policy, base in _records(run_dir / "decisions.jsonl"):
        state = State.from_json(record["before"]) if policy is None or own is None else own
        own, _, decision = decide(
            state, Signals.from_json(record["signals"]), policy or recorded_policy, base, record["step"], record["news"]
        )
        # Through JSON as the record went: tuples are lists, nothing else changes.
        replayed = json.loads(json.dumps(decision.to_json()))
        rows.append(ReplayRow(record["step"], record, replayed, tuple(_differences(record, replayed))))
    return rows


def load_policy(path: Path) -> Policy:
    """Governor settings from YAML: alone, or under `governor` as in a job file, whose extensions are imported.

    Raises ValueError, one line per mistake.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a YAML file with governor settings") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {getattr(error, 'problem', error)}") from None
    if isinstance(tree, dict) and "governor" in tree:
        use_extensions_of(tree, path.resolve().parent)
        tree = tree["governor"]
    try:
        return Policy.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(f"{path}: {line}" for line in describe_errors(error, Policy))) from None


def render(rows: Sequence[ReplayRow]) -> str:
    """A line where the record and the law part, and one that sums up."""
    lines = []
    for row in rows:
        if row.differences:
            sides = [f"{side['action']} {side['pressure']:.2f} cap {side['limits']['cap_tokens']}" for side in (row.recorded, row.replayed)]
            lines.append(f"step {row.step}: recorded {sides[0]} | replayed {sides[1]} | {row.replayed['reason']}")
    if not lines:
        return f"{len(rows)} decisions: every one is what the law says, bit for bit"
    return "\n".join([*lines, f"{len(lines)} of {len(rows)} decisions differ"])


def explain(rows: Sequence[ReplayRow], step: int) -> str:
    """One decision in full: its sentence, and every signal with its value, bound and evidence. Raises ValueError without that step."""
    found = next((row for row in rows if row.step == step), None)
    if found is None:
        raise ValueError(f"--explain {step}: no decision of that step among {len(rows)}; give the step of one")
    decision = found.replayed
    lines = [f"step {step}, {decision['mode']}: {decision['action']}, pressure {decision['pressure']:.2f}", decision["reason"], ""]
    lines.append(f"{'signal':<12}{'value':>9}{'bound':>9}{'evidence':>10}{'threshold':>11}{'pressure':>10}  what it is")
    for name, reading in decision["readings"].items():
        value, bound = (f"{reading[key]:.3f}" if reading[key] is not None else "-" for key in ("value", "bound"))
        numbers = f"{reading['evidence']:>10.2f}{reading['threshold']:>11.2f}{reading['pressure']:>10.2f}"
        lines.append(f"{name:<12}{value:>9}{bound:>9}{numbers}  {SIGNALS[name].title}, {SIGNALS[name].unit}")
    after = decision["after"]
    lines += [
        "",
        f"course {after['course']}, severity {after['severity']:.2f}, healthy for {after['healthy_steps']:g} steps",
        f"{after['rollbacks']} rollbacks",
    ]
    limits = decision["limits"] | decision["limits"]["extra"]
    lines += [f"{each.title} {limits[name]:g}" for name, each in movable().items() if limits.get(name) is not None]
    return "\n".join(lines)


def _use_extensions(job_file: Path) -> None:
    """Raises ValueError."""
    try:
        tree = yaml.safe_load(job_file.read_text())
    except FileNotFoundError:  # decisions replay without a job
        return
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{job_file}: {' '.join(str(error).split())}") from None
    use_extensions_of(tree if isinstance(tree, dict) else {}, job_file.resolve().parent)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], Policy, LengthLimits]]:
    policy: Policy | None = None
    base: LengthLimits | None = None
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the directory of a run that had its governor on") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"step", "signals", "before"} <= record.keys():
                raise ValueError("not a decision record")
            if "policy" in record:
                policy, base = Policy.model_validate(record["policy"]), LengthLimits(**record["base"])
            if policy is None or base is None:
                raise ValueError("no policy in this record or before it")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        yield record, policy, base


def _differences(recorded: dict[str, Any], replayed: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in replayed.items():
        before = recorded.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from _differences(before, value, f"{prefix}{key}.")
        elif before != value:
            yield f"{prefix}{key}"
