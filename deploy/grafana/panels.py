"""What a Grafana panel is made of: PromQL over declared metrics, the panel, and dashboards that lay panels out.

A metric that services/record/telemetry.py does not declare (nor FOREIGN_METRICS) is refused here, so a rename cannot leave a dead panel.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opd_governor.services.record.telemetry import Metric, declared

FOREIGN_METRICS = {
    "ray_actors": "Ray: actors by state.",
    "ray_node_cpu_utilization": "Ray: CPU in use on a node, percent.",
    "ray_node_disk_free": "Ray: free disk on a node, bytes.",
    "ray_node_gpus_utilization": "Ray: GPU in use, percent.",
    "ray_node_gram_used": "Ray: GPU memory in use, MiB.",
    "ray_node_mem_total": "Ray: memory of a node, bytes.",
    "ray_node_mem_used": "Ray: memory in use on a node, bytes.",
    "ray_node_network_receive_speed": "Ray: bytes a second into a node.",
    "ray_object_store_memory": "Ray: object store memory in use, bytes.",
    "vllm:generation_tokens_total": "vLLM server: tokens generated.",
    "vllm:kv_cache_usage_perc": "vLLM server: share of the KV cache in use.",
    "vllm:num_requests_running": "vLLM server: requests in the batch.",
    "vllm:num_requests_waiting": "vLLM server: requests in the queue.",
    "vllm:prompt_tokens_total": "vLLM server: prompt tokens, which is what scoring costs.",
}
"""Names that others export; on the Fleet board alone. vLLM's come from teachers behind `backend: http`: a run's engines export none."""

RECORDED = {
    "run:opd_rollout_length_tokens:mean_5m": "Mean length over 5 minutes (recording rule).",
    "run:opd_rollout_length_tokens:p95_5m": "95th percentile of length over 5 minutes (recording rule).",
    "run:opd_truncation:ratio_5m": "Share of rollouts cut before they stopped, over 5 minutes (recording rule).",
    "run:opd_governor_cut:ratio_5m": "The part of it cut by a cap that the governor had lowered (recording rule).",
    "run:opd_loops:ratio_5m": "Share of rollouts that end in a loop, over 5 minutes (recording rule).",
    "run:opd_stop_supervision:density_5m": "Sampled stops per token over 5 minutes (recording rule).",
}
GRID_COLUMNS = 24
HOUR_MS = 3_600_000
TOKENS = "suffix: tokens"
NATS = "suffix: nats"
Kind = Literal["timeseries", "stat", "heatmap"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


# ---- PromQL


def _declared() -> dict[str, Metric]:
    """By name; read when a panel is made, so that parts of extensions are among them."""
    return {metric.name: metric for metric in declared()}


def of(name: str, **labels: str) -> str:
    """A selector over the chosen runs: of("opd_weight_version", role="rollout"). A histogram's part is named by its suffix."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    metrics = _declared()
    if name not in metrics and not (base in metrics and metrics[base].kind == "histogram"):
        raise ValueError(f"{name} is not declared in services/record/telemetry.py: declare it or correct the name")
    matchers = ['run=~"$run"', *(f'{key}="{value}"' for key, value in labels.items())]
    return f"{name}{{{','.join(matchers)}}}"


def recorded(name: str) -> str:
    """A recording rule's series over the chosen runs."""
    if name not in RECORDED:
        raise ValueError(f"{name} is no recording rule listed in RECORDED")
    return f'{name}{{run=~"$run"}}'


def foreign(name: str) -> str:
    """A name that Ray or a vLLM server exports.

    The colon in vLLM's names is an underscore where its prometheus_client escapes names for a Prometheus before version 3.
    """
    if name not in FOREIGN_METRICS:
        raise ValueError(f"{name} is not listed in FOREIGN_METRICS")
    return f'{{__name__=~"{name.replace(":", "[:_]")}"}}' if ":" in name else name


def rate(name: str, *by: str, **labels: str) -> str:
    """Per second, summed by run and `by`."""
    return f"sum by ({', '.join(('run', *by))}) (rate({of(name, **labels)}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    """No sample where there is nothing to divide by."""
    return f"{part} / ({whole} > 0)"


def shares(name: str, by: str) -> str:
    """Of a counter's growth, what part has which value of the label `by`."""
    return f"{rate(name, by)} / on (run) group_left () ({rate(name)} > 0)"


def mean(histogram: str, *by: str) -> str:
    """Of a histogram's observations."""
    return ratio(rate(f"{histogram}_sum", *by), rate(f"{histogram}_count", *by))


def quantile(share: float, histogram: str, *by: str, **labels: str) -> str:
    """`> -Inf` drops the NaN of a window without observations."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', 'le', *by, **labels)}) > -Inf"


# ---- panels


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `queries` are (expression, legend). `thresholds` are (from, colour), the first from minus infinity."""

    title: str
    description: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    height: int = 8
    kind: Kind = "timeseries"
    thresholds: tuple[tuple[float | None, str], ...] = ()
    stacked: bool = False
    top: float | None = None

    def to_json(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana keeps it."""
        steps = [{"color": colour, "value": value} for value, colour in self.thresholds or ((None, "green"),)]
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": steps}}
        if self.top is not None:
            defaults |= {"min": 0, "max": self.top}
        if self.kind == "timeseries":
            defaults["custom"] = self._lines()
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self._described(),
            "datasource": DATASOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": self._options(),
            "targets": [self._target(index, *query) for index, query in enumerate(self.queries)],
        }

    def _lines(self) -> dict[str, Any]:
        return {
            "drawStyle": "line",
            "lineWidth": 2,
            "fillOpacity": 40 if self.stacked else 0,
            "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
            # Steps may lie further apart than scrapes: a line goes on to the next one.
            "spanNulls": HOUR_MS,
            "showPoints": "auto",
            "thresholdsStyle": {"mode": "dashed" if self.thresholds else "off"},
        }

    def _options(self) -> dict[str, Any]:
        if self.kind == "stat":
            reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": reduce, "colorMode": "background", "graphMode": "area", "textMode": "auto"}
        if self.kind == "heatmap":
            return {"calculate": False, "yAxis": {"unit": self.unit}, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 32}}
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}

    def _target(self, index: int, expression: str, legend: str) -> dict[str, Any]:
        target = {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend, "range": True}
        return target | {"format": "heatmap"} if self.kind == "heatmap" else target

    def _described(self) -> str:
        """The panel's own words, then what each of its series is by its declaration."""
        text = " ".join(expression for expression, _ in self.queries).replace("[:_]", ":")
        helps = {name: metric.help for name, metric in _declared().items()} | RECORDED | FOREIGN_METRICS
        used = [name for name in helps if re.search(rf"(?<![\w:]){name}(_bucket|_sum|_count)?(?![\w:])", text)]
        return "\n\n".join([self.description] * bool(self.description) + [f"`{name}`: {helps[name]}" for name in used])


# ---- dashboards


def dashboard(uid: str, title: str, panels: Sequence[Panel], *, of_runs: bool = True) -> dict[str, Any]:
    """Panels from left to right, a new line where one does not fit; a line is as high as its highest panel."""
    placed, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > GRID_COLUMNS:
            x, y, height = 0, y + height, 0
        placed.append(panel.to_json(number, x, y))
        x, height = x + panel.width, max(height, panel.height)
    return {
        "uid": uid,
        "title": f"OPD {title}",
        "tags": ["opd"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "title": "OPD", "tags": ["opd"], "asDropdown": False, "keepTime": True, "includeVars": True}],
        "templating": {"list": [_datasource_variable(), *([_run_variable()] if of_runs else [])]},
        "annotations": {"list": _annotations() if of_runs else []},
        "panels": placed,
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _run_variable() -> dict[str, Any]:
    query = "label_values(opd_weight_version, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "run"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _annotations() -> list[dict[str, Any]]:
    rollbacks = of("opd_governor_decisions_total", action="rollback")
    # The first rollback brings its series into being: neither changes() nor increase() would see it, so absence is made 0.
    before = f"(sum by (run) ({rollbacks} offset $__rate_interval) or 0 * sum by (run) ({of('opd_governor_pressure')}))"
    marks = (
        ("Settings changed", "blue", f"changes({of('opd_config_generation')}[$__rate_interval]) > 0", "{{run}}: settings changed"),
        ("Rollback", "red", f"sum by (run) ({rollbacks}) - {before} > 0", "{{run}}: rolled back"),
    )
    return [
        {
            "name": name,
            "enable": True,
            "iconColor": colour,
            "datasource": DATASOURCE,
            "expr": expression,
            "titleFormat": title,
            "step": "5s",
        }
        for name, colour, expression, title in marks
    ]
