"""The figures of a report: step records -> inline SVG and PNG. Its colours read on light and on dark paper."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from opd_governor.actors.governor.actuators import movable
from opd_governor.services.record.rundir import Record

if TYPE_CHECKING:  # matplotlib takes most of a second to import, and `opd --help` should not wait for it
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MAX_POINTS = 1000
"""Points of a line; longer runs are averaged down to it."""
COLOURS = ("#2f7ed8", "#e07b00", "#1a9d6f", "#c8449b", "#7a6ff0", "#a68a00", "#d14b4b", "#5a9aa8")
STYLES: tuple[Literal["-", ":", "--"], ...] = ("-", ":", "--")
"""Of the first lines of a plot where runs are side by side; more would be a tangle."""
INK = "#123457"
"""Stands for the page's own text colour: SVG gets `currentColor` in its place."""
MARKS = {
    "tighten": ("^", "tightens"),
    "release": ("v", "releases"),
    "fallback": ("s", "falls back"),
    "rollback": ("X", "rolls back"),
    "stop": ("D", "stops the run"),
}
"""Decisions drawn on the pressure: action -> marker, label."""


@dataclass(frozen=True, slots=True)
class Line:
    """One field of the step records over the steps."""

    field: str
    label: str
    dots: bool = False
    """Measured at a few steps only."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines that share an axis."""

    title: str
    lines: tuple[Line, ...]
    share: bool = False
    """Values in 0..1, shown as per cent."""


LENGTH = Plot(
    "Rollout length, tokens",
    (Line("length_mean", "mean"), Line("length_max", "longest"), Line("cap_tokens", "cap"), Line("length_p95", "95th percentile")),
)
CUT = Plot("Truncated and looping rollouts", (Line("truncation", "truncated"), Line("loops", "looping")), share=True)
ACCURACY = Plot(
    "Held-out accuracy", (Line("eval_accuracy", "greedy", dots=True), Line("eval_sampled_accuracy", "sampled", dots=True)), share=True
)
PRESSURE = Plot("Governor pressure", (Line("pressure", "pressure"),), share=True)
KL = Plot("KL from student to teacher, nats per token", (Line("kl_nats", "KL"),))
PHASES = ("step_s", "wait_s", "rollout_s", "score_s", "learn_s", "sync_s")
STEP_TIME = Plot("Step time, s (rollouts overlap learning)", tuple(Line(field, field.removesuffix("_s")) for field in PHASES))
PLOTS = (LENGTH, CUT, ACCURACY, KL, PRESSURE, STEP_TIME)


def series(records: Sequence[Record], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a field where it was recorded, at most MAX_POINTS: means of neighbours, for length_max their maximum."""
    found = [(record["step"], record[field]) for record in records if record.get(field) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    if len(steps) <= MAX_POINTS:
        return steps, values
    reduce = np.max if field == "length_max" else np.mean
    groups = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return np.array([steps[group].mean() for group in groups]), np.array([reduce(values[group]) for group in groups])


def draw_run(records: Sequence[Record], decisions: Sequence[Record]) -> list[tuple[str, str]]:
    """(title, SVG) of every plot that has data, for one run."""
    drawn = []
    for plot in PLOTS:
        figure, axes = _new_figure()
        if not _draw(axes, plot, records):
            continue
        if plot is PRESSURE:
            _mark_decisions(axes, decisions)
        _finish(axes)
        drawn.append((plot.title, _svg(figure, plot.title)))
        if plot is PRESSURE:
            drawn += [figure for figure in (_draw_evidence(decisions), _draw_knobs(records)) if figure]
    return drawn


def colour_of(run: int) -> str:
    """The colour of the run with this index where runs are side by side."""
    return COLOURS[run % len(COLOURS)]


def draw_runs(runs: Sequence[Sequence[Record]]) -> list[tuple[str, str]]:
    """(title, SVG) of every plot that has data: one colour a run (the page names them), one line style a field."""
    from matplotlib.lines import Line2D

    drawn = []
    for plot in PLOTS:
        lines = [line for line in plot.lines if any(len(series(records, line.field)[0]) for records in runs)][: len(STYLES)]
        if not lines:
            continue
        figure, axes = _new_figure()
        for index, records in enumerate(runs):
            for line, style in zip(lines, STYLES, strict=False):
                axes.plot(*series(records, line.field), style, color=colour_of(index), marker="." if line.dots else "")
        _scale(axes, plot)
        _finish(axes, [Line2D([], [], linestyle=style, color=INK, label=line.label) for line, style in zip(lines, STYLES, strict=False)])
        drawn.append((plot.title, _svg(figure, plot.title)))
    return drawn


def draw_png(title: str, sentence: str, records: Sequence[Record], decisions: Sequence[Record]) -> bytes:
    """The run in one picture of 1200 x 700 pixels: lengths above, what was cut and the pressure in the middle, accuracy below."""
    import textwrap

    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained", facecolor="white")
    panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2, 2)})
    figure.suptitle(_plain(title), fontsize=15, fontweight="bold", color=INK)
    panels[0].set_title(textwrap.fill(_plain(sentence), 140), fontsize=9.5, color=INK)
    middle = Plot("Cut rollouts and pressure", (*CUT.lines, *PRESSURE.lines), share=True)
    for axes, plot in zip(panels, (LENGTH, middle, ACCURACY), strict=True):
        _prepare(axes)
        axes.set_ylabel(plot.title, color=INK, fontsize=9.5)
        if not _draw(axes, plot, records):
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=INK)
            continue
        if plot is middle:
            _mark_decisions(axes, decisions)
        _finish(axes, beside=True)
    panels[-1].set_xlabel("step", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: "Axes", plot: Plot, records: Sequence[Record]) -> bool:
    """Whether there was anything to draw."""
    drawn = False
    for index, line in enumerate(plot.lines):
        steps, values = series(records, line.field)
        if not len(steps):
            continue
        drawn = True
        is_cap = line.field == "cap_tokens"
        few = line.dots or len(steps) == 1
        axes.plot(
            steps,
            values,
            color=INK if is_cap else COLOURS[index % len(COLOURS)],
            linestyle="--" if is_cap else "-",
            marker="." if few else "",
            label=line.label,
        )
    _scale(axes, plot)
    return drawn


def _draw_knobs(records: Sequence[Record]) -> tuple[str, str] | None:
    """Every knob that moved, over its largest value, so that all share an axis."""
    figure, axes = _new_figure()
    moved = 0
    for index, (field, actuator) in enumerate(movable().items()):
        steps, values = series(records, field)
        if len(steps) and np.ptp(values) > 0:
            moved += 1
            axes.plot(
                steps,
                values / np.max(np.abs(values)),
                color=COLOURS[index % len(COLOURS)],
                label=f"{actuator.title} (1 = {values.max():.3g})",
            )
    if not moved:
        return None
    axes.set_ylim(bottom=0)
    _finish(axes)
    title = "Knobs that moved, over their largest value"
    return title, _svg(figure, title)


def _draw_evidence(decisions: Sequence[Record]) -> tuple[str, str] | None:
    """Each signal's evidence over its threshold: from 1 on it is pressure."""
    names = dict.fromkeys(name for decision in decisions for name in decision.get("readings", {}))
    if not names:
        return None
    figure, axes = _new_figure()
    for index, name in enumerate(names):
        points = [
            {"step": d["step"], name: d["readings"][name]["evidence"] / d["readings"][name]["threshold"]}
            for d in decisions
            if name in d.get("readings", {})
        ]
        axes.plot(*series(points, name), color=COLOURS[index % len(COLOURS)], label=name.replace("_", " "))
    axes.axhline(1.0, color=INK, linestyle=":", linewidth=0.8)
    axes.set_ylim(bottom=0)
    _finish(axes)
    title = "Evidence over its threshold"
    return title, _svg(figure, title)


def _mark_decisions(axes: "Axes", decisions: Sequence[Record]) -> None:
    """The first decision of each stretch of the same action, on the pressure it led to; rollbacks and stops through the whole panel."""
    for action, (marker, label) in MARKS.items():
        points = [
            (decision["step"], decision.get("pressure", 0.0))
            for before, decision in zip([{}, *decisions], decisions, strict=False)
            if decision.get("action") == action and before.get("action") != action
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker, color=INK, markersize=4.5, linestyle="", label=label)
        if action in ("rollback", "stop"):
            for step, _ in points:
                axes.axvline(step, color=INK, linewidth=0.8, linestyle=":")


def _new_figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    _prepare(axes)
    axes.set_xlabel("step", color=INK)
    return figure, axes


def _prepare(axes: "Axes") -> None:
    axes.patch.set_alpha(0)
    axes.grid(True, color="#8a8f98", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8a8f98")
    axes.tick_params(colors=INK, labelsize=9)


def _scale(axes: "Axes", plot: Plot) -> None:
    """From 0 up, unless a sampled estimate lies below; shares as per cent."""
    if plot.share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if all(np.min(line.get_ydata(), initial=0) >= 0 for line in axes.lines):
        axes.set_ylim(bottom=0)


def _finish(axes: "Axes", handles: "Sequence[Line2D] | None" = None, *, beside: bool = False) -> None:
    """Add the legend, above the axes or beside them, where there is more than one thing to tell apart."""
    shown: Sequence[Artist] = axes.get_legend_handles_labels()[0] if handles is None else handles
    if len(shown) < 2:
        return
    columns = 2 if any(len(str(handle.get_label())) > 20 for handle in shown) else 3
    place = (
        {"loc": "upper left", "bbox_to_anchor": (1.005, 1.0)}
        if beside
        else {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": columns}
    )
    axes.legend(handles=shown, frameon=False, fontsize=8.5, labelcolor=INK, borderaxespad=0.2, **place)


def _plain(text: str) -> str:
    """Text without the dollar signs that matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def _svg(figure: "Figure", title: str) -> str:
    """An <svg> element that stretches with the page and takes its text colour and font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # they repeat from figure to figure; what is referred to keeps its id
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', svg, count=1)
