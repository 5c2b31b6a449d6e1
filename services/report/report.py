"""What a run did, for a person: report.html and length.png from a run directory, finished or not, and runs side by side."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import Record, read_records

MAX_DECISIONS = 200
"""Stretches of decisions listed; the file has all of them."""
MAX_SAMPLE_CHARS = 3000
"""Of a sample's text before the loop, and of the loop; the middle is left out."""
INFLATED = 0.3
"""Truncation from which a run counts as inflated."""
NOTABLE = 0.05
"""Truncation from which a healthy run's is spoken of."""
SHORT = 0.4
"""Mean length over the reference under which answers are too short."""
WINDOW_ROLLOUTS = 32.0
"""The verdict's rates are means over about as many rollouts."""
MIN_IDLE_S = 60.0
"""A run that wrote nothing for this long, and for ten times its usual step, no longer counts as running."""

NUMBERS = (
    ("held-out accuracy, greedy", "eval_accuracy", "{:.1%}"),
    ("held-out accuracy, sampled", "eval_sampled_accuracy", "{:.1%}"),
    ("held-out truncation, greedy", "eval_truncation", "{:.1%}"),
    ("mean length, tokens", "length_mean", "{:.1f}"),
    ("longest rollout, tokens", "length_max", "{:.0f}"),
    ("truncated", "truncation", "{:.1%}"),
    ("looping", "loops", "{:.1%}"),
    ("KL, nats per token", "kl_nats", "{:.4f}"),
    ("pressure", "pressure", "{:.2f}"),
    ("staleness, steps", "staleness_mean", "{:.2f}"),
    ("tokens per second", "tokens_per_s", "{:.0f}"),
    ("step, s", "step_s", "{:.2f}"),
    ("waited for rollouts, s", "wait_s", "{:.2f}"),
    ("rollout, s", "rollout_s", "{:.2f}"),
    ("score, s", "score_s", "{:.2f}"),
    ("learn, s", "learn_s", "{:.2f}"),
    ("weight sync, s", "sync_s", "{:.2f}"),
    ("waited for the governor, s", "govern_s", "{:.4f}"),
)
"""Rows of the table: what it is, field of the step record, format."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A run directory as read."""

    path: Path
    job: Record
    records: list[Record]
    decisions: list[Record]

    @classmethod
    def read(cls, path: Path) -> "RunFiles":
        """Raises JobError when the folder holds no run."""
        job = path / "job.yaml"
        if not job.is_file():
            raise JobError(f"{path}: no job.yaml in it; give the folder that a run was told to write to")
        settings = yaml.safe_load(job.read_text()) or {}
        return cls(path, settings, read_records(path / "metrics.jsonl"), read_records(path / "decisions.jsonl"))

    @property
    def name(self) -> str:
        return str(self.job.get("name", self.path.resolve().name))

    def verdict(self, ended: bool = False) -> str:
        written = self.records[-1].get("time") if self.records else None
        return verdict(self.records, self.decisions, self.job, ended=ended, idle_s=None if written is None else time.time() - written)


def write_report(run_dir: Path, *, ended: bool = False) -> Path:
    """Write report.html and length.png into a run directory, each whole or not at all; returns the page's path.

    `ended`: the caller knows that the run is over. Raises JobError when the folder holds no run.
    """
    from opd_governor.services.report.figures import colour_of, draw_png, draw_run

    run = RunFiles.read(run_dir)
    sentence = run.verdict(ended)
    _replace(run_dir / "length.png", draw_png(run.name, sentence, run.records, run.decisions))
    page = _render(
        title=f"Run {run.name}",
        verdicts=[(run.name, sentence, colour_of(0))],
        plots=draw_run(run.records, run.decisions),
        tables=[
            ("Numbers", _numbers(run.records)),
            ("Decisions of the governor", _list_decisions(run.decisions)),
            ("Changes of the settings", _list_changes(read_records(run_dir / "config.jsonl"), run.records)),
        ],
        samples=_choose_samples(read_records(run_dir / "samples.jsonl")),
        settings=[(run.name, yaml.safe_dump(run.job, sort_keys=False))],
    )
    return _replace(run_dir / "report.html", page.encode())


def compare_reports(dirs: Sequence[Path], out: Path) -> Path:
    """Several runs in one page: the same plots with a colour a run, their numbers first -> last, the settings that differ.

    Raises JobError when a folder holds no run.
    """
    from opd_governor.services.report.figures import colour_of, draw_runs

    runs = [RunFiles.read(path) for path in dirs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(path) for path in dirs]
    columns = [{row[0]: f"{row[1]} -> {row[2]}" for row in _numbers(run.records)[1:]} for run in runs]
    numbers = [[label, *(column.get(label, "") for column in columns)] for label, _, _ in NUMBERS]
    trees = [_flatten(run.job) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    settings = [[key, *(str(tree.get(key, "")) for tree in trees)] for key in keys if len({str(tree.get(key)) for tree in trees}) > 1]
    page = _render(
        title="Runs " + ", ".join(names),
        verdicts=[(name, run.verdict(), colour_of(index)) for index, (name, run) in enumerate(zip(names, runs, strict=True))],
        plots=draw_runs([run.records for run in runs]),
        tables=[
            ("Numbers, first -> last", [["", *names], *(row for row in numbers if any(row[1:]))]),
            ("Settings that differ", [["", *names], *settings]),
        ],
        samples=[],
        settings=[(name, yaml.safe_dump(run.job, sort_keys=False)) for name, run in zip(names, runs, strict=True)],
    )
    return _replace(out, page.encode())


def summarise_run(run_dir: Path, records: Sequence[Record]) -> list[str]:
    """The lines that end a run in the terminal: the verdict and where to look. Raises JobError when the folder holds no run."""
    run = replace(RunFiles.read(run_dir), records=list(records))
    final = [f"student  {run_dir / 'final'}"] if (run_dir / "final").is_dir() else []
    return [run.verdict(ended=True), *final, f"report   {run_dir / 'report.html'}", f"picture  {run_dir / 'length.png'}"]


# ---- the verdict


def verdict(
    records: Sequence[Record], decisions: Sequence[Record], job: Record, *, ended: bool = False, idle_s: float | None = None
) -> str:
    """The run in one sentence. Pure.

    `job` is the tree of job.yaml. Rates are averaged over `WINDOW_ROLLOUTS`. `ended`: known to be over; `idle_s`: since the last record.

    >>> verdict(records, decisions, {"learner": {"total_steps": 120}})
    'Finished: held-out accuracy .21 -> .84 in 120 steps; lengths stayed healthy (truncation at most 0 %); the governor acted at 0 steps.'
    """
    steps = [record for record in records if record.get("length_mean") is not None]
    if not steps:
        return "No data: the run ended before its first step." if ended else "No data yet: no step has been recorded."
    state = _state(steps, decisions, (job.get("learner") or {}).get("total_steps"), ended, idle_s)
    trouble, lengths = _judge_lengths(steps, decisions)
    head = f"{trouble} ({state[0].lower()}{state[1:]})" if trouble else state
    parts = [_judge_accuracy(records, steps[-1]["step"]), lengths, _count_actions(decisions)]
    if trouble:
        parts = [parts[1], parts[0], parts[2]]
    return f"{head}: {'; '.join(part for part in parts if part)}."


def _state(steps: Sequence[Record], decisions: Sequence[Record], total_steps: int | None, ended: bool, idle_s: float | None) -> str:
    step = steps[-1]["step"]
    where = f"step {step} of {total_steps}" if total_steps else f"step {step}"
    if decisions and decisions[-1].get("action") == "stop" and decisions[-1].get("mode") == "enforce":
        return f"Stopped by the guard rail, {where}"
    if total_steps and step >= total_steps:
        return "Finished"
    if ended:
        return f"Ended early, {where}"
    usual_s = float(np.median([record.get("step_s") or 0.0 for record in steps[-20:]]))
    if idle_s is not None and idle_s > max(MIN_IDLE_S, 10 * usual_s):
        return f"Ended early or stuck, {where}, nothing written for {_duration(idle_s)}"
    return f"Running, {where}"


def _judge_accuracy(records: Sequence[Record], last_step: int) -> str:
    measured = [(record["step"], record["eval_accuracy"]) for record in records if record.get("eval_accuracy") is not None]
    if not measured:
        return f"no held-out evaluation in {_count(last_step, 'step')}"
    if len(measured) == 1:
        return f"held-out accuracy {_ratio(measured[0][1])} at step {measured[0][0]}"
    return f"held-out accuracy {_ratio(measured[0][1])} -> {_ratio(measured[-1][1])} in {_count(last_step, 'step')}"


def _judge_lengths(steps: Sequence[Record], decisions: Sequence[Record]) -> tuple[str, str]:
    """(trouble in a word, empty when there is none; what the lengths did)."""
    rates = _average(steps, "truncation")
    limit, highest, last = INFLATED, max(rates), rates[-1]
    crossed = next((i for i, (before, rate) in enumerate(pairwise(rates), start=1) if before < limit <= rate), None)
    if crossed is not None:
        passed = f"truncation passed {_percent(limit)} at step {steps[crossed]['step']}"
        if last >= limit / 2:
            return "Inflated", f"{passed} and stands at {_percent(last)}"
        return "Inflated and recovered", f"{passed}, reached {_percent(max(rates[crossed:]))} and fell to {_percent(last)}"
    lengths = _average(steps, "length_mean")
    reference = next((d["signals"]["reference_mean_tokens"] for d in reversed(decisions) if _reference_of(d)), None)
    floor = SHORT * (reference or lengths[0])
    if lengths[-1] < floor:
        healthy = [i for i, mean in enumerate(lengths) if mean >= floor]
        since = steps[healthy[-1] + 1 if healthy else 0]["step"]
        whose = "of the reference" if reference else "at the start"
        return "Collapsed short", (
            f"mean length fell to {lengths[-1]:.1f} tokens against {reference or lengths[0]:.1f} {whose}, short from step {since} on"
        )
    if last >= limit:
        return "Truncated from the start", f"truncation was never below {_percent(limit)} and stands at {_percent(last)}"
    if highest > NOTABLE:
        return "", f"lengths did not inflate (truncation at most {_percent(highest)}, {_percent(last)} at the end)"
    return "", f"lengths stayed healthy (truncation at most {_percent(highest)})"


def _reference_of(decision: Record) -> float | None:
    return (decision.get("signals") or {}).get("reference_mean_tokens")


def _count_actions(decisions: Sequence[Record]) -> str:
    if not decisions:
        return ""
    acted = _count(sum(decision.get("action") not in ("hold", "release") for decision in decisions), "step")
    mode = decisions[-1].get("mode")
    if mode == "off":
        return "the governor was off"
    return f"the governor only observed and would have acted at {acted}" if mode == "observe" else f"the governor acted at {acted}"


def _average(steps: Sequence[Record], field: str) -> list[float]:
    """At each step the mean over the newest steps that hold `WINDOW_ROLLOUTS` rollouts together."""
    means = []
    for end in range(1, len(steps) + 1):
        total = weight = 0.0
        for record in reversed(steps[:end]):
            num = record.get("num_rollouts") or 1
            total, weight = total + num * (record.get(field) or 0.0), weight + num
            if weight >= WINDOW_ROLLOUTS:
                break
        means.append(total / weight)
    return means


# ---- the tables


def _numbers(records: Sequence[Record]) -> list[list[str]]:
    rows = [["", "first", "last", "lowest", "highest"]]
    for label, field, form in NUMBERS:
        found = [(record[field], record["step"]) for record in records if record.get(field) is not None]
        if found:
            lowest, highest = min(found, key=lambda pair: pair[0]), max(found, key=lambda pair: pair[0])
            extremes = [f"{form.format(value)} (step {step})" for value, step in (lowest, highest)]
            rows.append([label, form.format(found[0][0]), form.format(found[-1][0]), *extremes])
    return rows


def _list_decisions(decisions: Sequence[Record]) -> list[list[str]]:
    """Everything but holds; neighbours of the same action and signal in one row, with the first one's sentence."""
    rows: list[list[str]] = []
    previous: Record = {}
    first = 0
    for decision in decisions:
        same = all(decision.get(key) == previous.get(key) for key in ("action", "signal", "mode"))
        previous = decision
        if decision.get("action", "hold") == "hold":
            continue
        pressure = f"{decision.get('pressure', 0.0):.2f}"
        if same and rows:
            rows[-1][0], rows[-1][2] = f"{first}-{decision['step']}", pressure
            continue
        first = decision["step"]
        action = decision["action"] + (" (observed only)" if decision.get("mode") == "observe" else "")
        rows.append([str(first), action, pressure, decision.get("reason", "")])
    more = [[f"{len(rows) - MAX_DECISIONS} more", "", "", "in decisions.jsonl"]] if len(rows) > MAX_DECISIONS else []
    return [["step", "action", "pressure after", "why"], *rows[:MAX_DECISIONS], *more]


def _list_changes(generations: Sequence[Record], records: Sequence[Record]) -> list[list[str]]:
    rows = [["generation", "when", "by", "setting", "from", "to", "rollouts from step"]]
    for generation in generations:
        number = generation["generation"]
        since = next((str(r["step"]) for r in records if (r.get("config_generation") or 0) >= number), "not yet")
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(generation["time"]))
        rows += [
            [str(number), when, generation["source"], change["pointer"], str(change["from"]), str(change["to"]), since]
            for change in generation.get("changes", ())
        ]
    return rows


def _choose_samples(samples: Sequence[Record]) -> list[Record]:
    """One of the first step, the last two that loop, two of the last step: text before the loop and the loop, shortened."""
    if not samples:
        return []
    looping = [i for i, sample in enumerate(samples) if sample.get("loop_onset_char") is not None][-2:]
    chosen = sorted({0, *looping, *range(max(0, len(samples) - 2), len(samples))})
    return [samples[i] | _split_loop(samples[i]) for i in chosen]


def _split_loop(sample: Record) -> Record:
    text, onset = sample["response"], sample.get("loop_onset_char")
    onset = len(text) if onset is None else onset
    return {"before": _shorten(text[:onset]), "loop": _shorten(text[onset:])}


def _shorten(text: str) -> str:
    half = MAX_SAMPLE_CHARS // 2
    return text if len(text) <= MAX_SAMPLE_CHARS else f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """`{"learner.total_steps": 120, "teacher.0.model": ...}`."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if children is None:
        return {path: tree}
    return {key: value for name, child in children for key, value in _flatten(child, f"{path}.{name}" if path else str(name)).items()}


# ---- words and files


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _ratio(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _render(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["arrows"] = lambda text: str(text).replace("->", "→")  # no line breaks inside it; terminals keep ASCII
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template("report.html.j2").render(written=written, **content)


def _replace(path: Path, content: bytes) -> Path:
    """Write beside, then rename: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
    return path
