"""Dashboards without a Grafana: generated as committed, sound in structure, and every query answered by a real Prometheus."""

import importlib.util
import itertools
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from deploy.grafana.dashboards import BOARDS, dashboards, render
from deploy.grafana.panels import FOREIGN_METRICS, GRID_COLUMNS, RECORDED, Panel, of
from opd_governor.services.record.telemetry import declared
from tests.deploy.foreign_exporter import ForeignExporter
from tests.deploy.metric_names import DECLARED_SERIES, names_in, substituted
from tests.deploy.observed_run import ObservedRun, Prometheus

GRAFANA = BOARDS.parent
RULES = GRAFANA.parent / "prometheus/rules.yml"
COMMITTED = {path.name: json.loads(path.read_text()) for path in BOARDS.glob("*.json")}
PANELS = [(name, panel) for name, board in COMMITTED.items() for panel in board["panels"]]
QUERIES = [(f"{name}: {panel['title']}", target["expr"]) for name, panel in PANELS for target in panel["targets"]]
MARKS = [(mark["name"], mark["expr"]) for mark in COMMITTED["lengths.json"]["annotations"]["list"]]

EXPRESSIONS = sorted({expression for _, expression in (*QUERIES, *MARKS)})


# ---- structure


def test_the_files_are_what_the_program_writes() -> None:
    assert {path.name: path.read_text() for path in BOARDS.iterdir()} == {name: render(board) for name, board in dashboards().items()}, (
        "run: python -m deploy.grafana.dashboards"
    )


@pytest.mark.parametrize("name", COMMITTED)
def test_panels_have_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    board = COMMITTED[name]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in board["panels"]
        for x, y in itertools.product(
            range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"]),
            range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"]),
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < GRID_COLUMNS


def test_dashboards_have_uids_and_titles_of_their_own() -> None:
    for key in ("uid", "title"):
        assert len({board[key] for board in COMMITTED.values()}) == len(COMMITTED) == 4


@pytest.mark.parametrize("panel", [panel for _, panel in PANELS], ids=[f"{name}: {panel['title']}" for name, panel in PANELS])
def test_a_panel_says_what_it_shows_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert len(panel["description"]) > 20
    references = [target["refId"] for target in panel["targets"]]
    assert references
    assert len(set(references)) == len(references)
    assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_parses_and_asks_only_for_what_is_declared(expression: str) -> None:
    text = substituted(expression)
    promql_parser.parse(text)
    assert names_in(text) - DECLARED_SERIES - set(RECORDED) - set(FOREIGN_METRICS) == set()


def test_ranges_follow_the_scrape_interval_and_the_window() -> None:
    assert {found for expression in EXPRESSIONS for found in re.findall(r"\[([^:].*?)\]", expression)} == {"$__rate_interval"}


def test_a_query_is_about_the_chosen_runs_or_about_the_cluster() -> None:
    for expression in EXPRESSIONS:
        names = names_in(substituted(expression))
        assert names <= set(FOREIGN_METRICS) or expression.count('run=~"$run"') >= len(names), expression


def test_others_metrics_are_on_the_fleet_board_alone() -> None:
    shown = {name: names_in(substituted(target["expr"])) for name, panel in PANELS for target in panel["targets"] if name != "fleet.json"}
    assert not set(FOREIGN_METRICS) & set().union(*shown.values())


def test_every_declared_metric_is_shown() -> None:
    rules = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    shown = set().union(*(names_in(substituted(expression)) for _, expression in QUERIES), *map(names_in, rules))
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert {metric.name for metric in declared()} - bare == set()


def test_recorded_series_are_the_rules() -> None:
    rules = [rule["record"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert set(RECORDED) == set(rules)


def test_an_undeclared_metric_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="opd_rollouts is not declared"):
        of("opd_rollouts")
    with pytest.raises(ValueError, match="opd_rollouts_total_sum"):
        of("opd_rollouts_total_sum")


def test_a_panel_describes_its_series_in_the_words_of_their_declaration() -> None:
    panel = Panel("t", "", "s", ((of("opd_step_seconds_sum"), ""),)).to_json(1, 0, 0)
    assert panel["description"] == "`opd_step_seconds`: Time of a step by phase."


def test_names_of_others_are_known_to_the_installed_ray_and_vllm() -> None:
    """By their source: importing them would take longer than all other tests here."""
    ray, vllm = (Path(importlib.util.find_spec(name).origin).parent for name in ("ray", "vllm"))  # type: ignore[union-attr,arg-type]
    ray_text = (ray / "dashboard/modules/reporter/reporter_agent.py").read_text()
    ray_text += (ray / "dashboard/modules/metrics/dashboards/default_dashboard_panels.py").read_text()
    vllm_text = (vllm / "v1/metrics/loggers.py").read_text()
    for name in FOREIGN_METRICS:
        if name.startswith("ray_"):
            assert f'"{name.removeprefix("ray_")}"' in ray_text or name in ray_text, name
        else:
            assert f'"{name.removesuffix("_total")}"' in vllm_text, name


def test_the_data_source_is_asked_at_the_interval_prometheus_scrapes_at() -> None:
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    config = yaml.safe_load((GRAFANA.parent / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


# ---- data


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has found and scraped a run for a dozen steps; in the middle settings change and it rolls back."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: tests/install-packages.sh")
    server = Prometheus(tmp_path_factory.mktemp("prometheus"))
    run, others = ObservedRun("sums"), ForeignExporter()
    try:
        others.announce(server.targets)
        run.target.announce(server.targets)
        run.step([30, 38, 40, 44])
        server.wait_for(lambda: server.value('up{run="sums"}'))
        for step in range(26):
            if step == 14:
                run.change_settings(2)
                run.decide("rollback")
            run.step([30, 38, 40, 192] if step % 3 else [30, 38, 40, 44])
            time.sleep(0.5)
        yield server
    finally:
        run.close()
        others.close()
        server.stop()


@pytest.mark.prometheus
def test_every_query_of_every_dashboard_returns_data(watched: Prometheus) -> None:
    assert unanswered(watched) == []


@pytest.mark.prometheus
def test_a_rollback_and_a_change_of_settings_leave_marks(watched: Prometheus) -> None:
    for title, expression in MARKS:
        marked = watched.query(f"max_over_time(({substituted(expression)})[60s:1s])")
        assert [result["metric"]["run"] for result in marked] == ["sums"], title


@pytest.mark.prometheus
def test_numbers_on_the_wall_are_those_of_the_run(watched: Prometheus) -> None:
    mean = watched.value("run:opd_rollout_length_tokens:mean_5m")
    assert mean is not None
    assert 38 < mean < 80
    assert 0.1 < (watched.value("run:opd_truncation:ratio_5m") or 0) < 0.25
    # In one query: between two of them the rules may be evaluated anew.
    assert watched.query("run:opd_loops:ratio_5m == run:opd_truncation:ratio_5m")


@pytest.mark.prometheus
def test_a_new_run_is_found_and_one_that_withdrew_is_let_go_without_a_restart(watched: Prometheus) -> None:
    second = ObservedRun("second")
    try:
        announcement = second.target.announce(watched.targets)
        second.step([10, 20])
        watched.wait_for(lambda: watched.value('opd_learner_steps_total{run="second"}') == 1)
        assert {r["metric"]["run"] for r in watched.query("opd_learner_steps_total")} == {"sums", "second"}
        assert watched.query('{exported_run!=""}') == []
        announcement.unlink()
        watched.wait_for(lambda: watched.query('opd_learner_steps_total{run="second"}') == [])
        assert watched.query('up{run="second"}') == []
    finally:
        second.close()


def unanswered(server: Prometheus, without: frozenset[str] = frozenset()) -> list[str]:
    """Queries that this server has no data for; boards named in `without` are left out."""
    asked = [(title, expression) for title, expression in QUERIES if title.partition(":")[0] not in without]
    return [f"{title}: {expression}" for title, expression in asked if not server.query(substituted(expression))]
