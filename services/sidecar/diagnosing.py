"""`opd diagnose`: from log files to verdicts, as text, JSON and one picture.

file --formats--> rows --trainers--> steps --verdict--> Diagnosis
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opd_governor.services.sidecar.formats import LogError, read_rows
from opd_governor.services.sidecar.seen import NUMBERS, StepSeen
from opd_governor.services.sidecar.trainers import LENGTH_FIELDS, TRAINERS, to_steps
from opd_governor.services.sidecar.verdict import Diagnosis, diagnose, with_truncation

KNOWN_FILES = ("trainer_state.json", "metrics.jsonl", "logging.jsonl", "events.out.tfevents.*")
"""What is looked for when a folder is named."""
WIDTH = 64
"""Columns of the picture."""
BARS = " ▁▂▃▄▅▆▇█"
SHOWN = (
    ("length_mean_tokens", "mean length"),
    ("length_max_tokens", "longest"),
    ("truncation", "truncation"),
    ("loops", "loops"),
    ("kl_nats", "KL"),
    ("reward", "reward"),
)


@dataclass(frozen=True, slots=True)
class Log:
    """One run's log, read."""

    paths: tuple[Path, ...]
    format: str
    trainer: str
    steps: tuple[StepSeen, ...]


def read_logs(paths: Sequence[Path]) -> list[Log]:
    """Each file a run, except that files without lengths join the one that has them (a trainer's and its orchestrator's log).

    Raises LogError: one line that names the file.
    """
    logs = [_read(path) for path in _expand(paths)]
    telling = [log for log in logs if _tells_length(log)]
    silent = [log for log in logs if not _tells_length(log)]
    if len(telling) == 1 and silent:
        joined = telling[0]
        for log in silent:
            joined = _join(joined, log)
        return [joined]
    for log in silent:
        held = sorted({name for seen in log.steps for name in seen.numbers()})
        raise LogError(
            f"{log.paths[0]}: {len(log.steps)} steps with {', '.join(held) or 'nothing known'}, and no length or truncation of answers: "
            "nothing can be said about length; name the log that has them too, or log them"
        )
    return telling


def _expand(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = [match for pattern in KNOWN_FILES for match in sorted(path.rglob(pattern)) if match.is_file()]
        if not inside:
            raise LogError(f"{path}: a folder without {', '.join(KNOWN_FILES)}; name the log file itself")
        states = [match for match in inside if match.name == "trainer_state.json"]
        # Every checkpoint holds the whole history up to it: the newest tells all.
        found += [max(states, key=lambda match: match.stat().st_mtime)] if states else inside
    return found


def _read(path: Path) -> Log:
    form, rows = read_rows(path)
    trainer, steps = to_steps(rows)
    if not steps:
        keys = sorted({key for row in rows[:100] for key in row})
        shown = ", ".join(keys[:6])[:120].encode("ascii", "backslashreplace").decode()
        raise LogError(f"{path}: {len(rows)} rows, and none of their keys is known ({shown}{', ...' if len(keys) > 6 else ''})")
    return Log((path,), form, trainer, tuple(steps))


def _tells_length(log: Log) -> bool:
    return any(getattr(seen, name) is not None for seen in log.steps for name in LENGTH_FIELDS)


def _join(log: Log, other: Log) -> Log:
    """What the other file adds to the same steps."""
    more = {seen.step: seen for seen in other.steps}
    steps = []
    for seen in log.steps:
        extra = more.get(seen.step)
        new = {} if extra is None else {name: getattr(extra, name) for name in NUMBERS if getattr(seen, name) is None}
        steps.append(replace(seen, **new))
    return Log((*log.paths, *other.paths), log.format, log.trainer, tuple(steps))


def judge(log: Log) -> Diagnosis:
    vocabulary = TRAINERS[log.trainer]
    return diagnose(log.steps, padded_clip_ratio=vocabulary.padded_clip_ratio, notes=vocabulary.notes)


def to_json(log: Log, diagnosis: Diagnosis) -> dict[str, Any]:
    return {"files": [str(path) for path in log.paths], "format": log.format, "trainer": log.trainer} | diagnosis.to_json()


def render(log: Log, diagnosis: Diagnosis) -> str:
    """Plain words and the picture."""
    words = TRAINERS[log.trainer].words
    lines = [
        f"{', '.join(map(str, log.paths))}: {words}, steps {diagnosis.first_step} to {diagnosis.last_step} ({diagnosis.num_steps} logged)",
        "",
        f"{'SICK' if diagnosis.sick else 'HEALTHY' if diagnosis.kind == 'healthy' else 'UNKNOWN'}: {diagnosis.sentence} ({diagnosis.sure})",
    ]
    lines += [f"  {text}" for text in diagnosis.evidence]
    lines += ["", *picture(log, diagnosis)]
    if (would := diagnosis.governor) is not None:
        before = would.steps_before
        when = "" if before is None or not diagnosis.sick else f", {before} steps before" if before > 0 else f", {-before} steps after"
        lines += [
            "",
            f"The governor would first have acted after step {would.step}{when}: {would.reason}",
            f"  reference: {would.reference}",
        ]
    elif diagnosis.sick:
        lines += ["", "The governor would not have acted on these figures: see what the log does not tell."]
    if diagnosis.advice:
        lines += ["", "Try first:"]
        for number, advice in enumerate(diagnosis.advice, start=1):
            lines += [f"  {number}. {advice.what}", f"     ({advice.why})"]
    if diagnosis.unknown:
        lines += ["", "This log cannot tell:", *(f"  - {text}" for text in diagnosis.unknown)]
    return "\n".join(lines)


def picture(log: Log, diagnosis: Diagnosis) -> list[str]:
    """One row of bars per figure, with its lowest and highest value; below them when it began and when the governor would have acted."""
    steps, _ = with_truncation(log.steps, TRAINERS[log.trainer].padded_clip_ratio)
    first, last = steps[0].step, steps[-1].step
    span = max(1, last - first)
    width = max(1, min(WIDTH, len(steps)))

    def column(step: int) -> int:
        return min(width - 1, (step - first) * width // (span + 1))

    lines = []
    for name, label in SHOWN:
        values: list[list[float]] = [[] for _ in range(width)]
        for seen in steps:
            value = getattr(seen, name)
            if value is not None:
                values[column(seen.step)].append(value)
        if not any(values):
            continue
        means = [sum(held) / len(held) if held else math.nan for held in values]
        known = [value for value in means if not math.isnan(value)]
        low, high = (0.0, 1.0) if name in ("truncation", "loops") else (min(0.0, min(known)), max(known))
        bars = "".join(" " if math.isnan(value) else BARS[_height(value, low, high)] for value in means)
        lines.append(f"  {label:>12} |{bars}| {_short(min(known))} to {_short(max(known))}")
    marks = [" "] * width
    if diagnosis.governor is not None:
        marks[column(diagnosis.governor.step)] = "g"
    if diagnosis.since_step is not None:
        marks[column(diagnosis.since_step)] = "^"
    legend = "  ^ began" * ("^" in marks) + "  g the governor acts" * ("g" in marks)
    lines.append(f"  {'step ' + str(first):>12} |{''.join(marks)}| {last}{legend}")
    return lines


def _height(value: float, low: float, high: float) -> int:
    share = (value - low) / (high - low) if high > low else 0.5
    return max(1, min(len(BARS) - 1, round(share * (len(BARS) - 1))))


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw(log: Log, diagnosis: Diagnosis, path: Path) -> None:
    """The picture as a file, in what matplotlib writes. Raises LogError without matplotlib or for an unknown ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LogError("--picture needs matplotlib: pip install matplotlib; the text output has the same picture") from None
    steps, cap = with_truncation(log.steps, TRAINERS[log.trainer].padded_clip_ratio)
    shown = [(name, label) for name, label in SHOWN if any(getattr(seen, name) is not None for seen in steps)]
    figure = Figure(figsize=(9, 1.8 * len(shown) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, label) in zip(axes, shown, strict=True):
        points = [(seen.step, value) for seen in steps if (value := getattr(seen, name)) is not None]
        axis.plot(*zip(*points, strict=True), color="C0", lw=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if name.startswith("length") and cap is not None:
            axis.axhline(cap, color="C1", lw=0.8, ls="--", label="cap")
        if diagnosis.since_step is not None:
            axis.axvline(diagnosis.since_step, color="C3", lw=1, label="began")
        if diagnosis.governor is not None:
            axis.axvline(diagnosis.governor.step, color="C2", lw=1, ls=":", label="the governor acts")
    axes[0].legend(fontsize=7)
    axes[0].set_title(diagnosis.sentence, fontsize=10)
    axes[-1].set_xlabel("step")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise LogError(f"--picture {path}: cannot be written ({error})") from None
