"""Scrape configuration, recording rules and alerts: promtool's own checks, and that they speak of what the code declares."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from opd_governor.services.job.settings import Job
from tests.deploy.metric_names import DECLARED_SERIES, names_in

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULE_TESTS = ROOT / "tests/deploy/rules.test.yml"
CONTRACT_RECORDS = {
    "run:opd_rollout_length_tokens:mean_5m",
    "run:opd_rollout_length_tokens:p95_5m",
    "run:opd_truncation:ratio_5m",
    "run:opd_loops:ratio_5m",
    "run:opd_stop_supervision:density_5m",
}
CONTRACT_ALERTS = {
    "OpdTruncationHigh",
    "OpdLoopsRising",
    "OpdStopSupervisionStarving",
    "OpdStopTokenMismatch",
    "OpdGovernorBlind",
    "OpdWeightSyncGap",
    "OpdLearnerStalled",
}


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((FOLDER / name).read_text()) for name in ("rules.yml", "alerts.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


RECORDS = {rule["record"]: rule for rule in rules() if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: tests/install-packages.sh")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", str(FOLDER / "prometheus.yml"))
    promtool("check", "rules", str(FOLDER / "rules.yml"), str(FOLDER / "alerts.yml"))


@pytest.mark.prometheus
def test_rules_do_what_they_say_on_both_sides_of_each_threshold() -> None:
    promtool("test", "rules", str(RULE_TESTS))


def test_every_rule_of_the_contract_is_there() -> None:
    assert set(RECORDS) >= CONTRACT_RECORDS
    assert set(ALERTS) == CONTRACT_ALERTS


def test_every_rule_has_a_test_and_every_alert_one_that_fires_it_for_one_run_and_not_for_another() -> None:
    cases = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    expressions = "\n".join(check["expr"] for case in cases for check in case["promql_expr_test"])
    assert [record for record in RECORDS if record not in expressions] == []
    for alert in ALERTS:
        mine = [case for case in cases if any(f'"{alert}"' in check["expr"] for check in case["promql_expr_test"])]
        fired = {
            run
            for case in mine
            for check in case["promql_expr_test"]
            for sample in check["exp_samples"]
            for run in re.findall(r'run="(\w+)"', sample["labels"])
        }
        fed = {run for case in mine for series in case["input_series"] for run in re.findall(r'run="(\w+)"', series["series"])}
        assert fired, f"{alert} fires in no test"
        assert fed - fired or any(check["exp_samples"] == [] for case in mine for check in case["promql_expr_test"]), alert


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule.get("alert"))
def test_a_rule_parses_and_names_only_declared_metrics(rule: dict[str, Any]) -> None:
    promql_parser.parse(rule["expr"])
    assert names_in(rule["expr"]) - DECLARED_SERIES - set(RECORDS) - {"up"} == set()


def test_the_series_in_the_rule_tests_are_declared_too() -> None:
    cases = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    fed = {series["series"].partition("{")[0] for case in cases for series in case["input_series"]}
    assert fed - DECLARED_SERIES - {"up"} == set()


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_tells_what_it_means_what_to_look_at_and_which_knob(alert: str) -> None:
    annotations = ALERTS[alert]["annotations"]
    assert "$labels.run" in annotations["summary"]
    assert re.search(r"Meaning: .*Look at: .*Knob", annotations["runbook"], re.S)
    assert ALERTS[alert]["labels"]["severity"] in ("info", "warning", "critical")


@pytest.mark.parametrize("alert", ALERTS)
def test_every_knob_and_recorded_series_in_a_runbook_exists(alert: str) -> None:
    runbook = ALERTS[alert]["annotations"]["runbook"]
    settings = re.findall(rf"\b((?:{'|'.join(Job.model_fields)})\.[a-z_]+)", runbook)
    assert settings, "a runbook names a knob"
    assert [path for path in settings if not is_setting(path)] == []
    assert [name for name in re.findall(r"run:[a-z0-9_:]+", runbook) if name not in RECORDS] == []


def is_setting(path: str) -> bool:
    group, field = path.split(".")
    return field in Job.model_fields[group].annotation.model_fields  # type: ignore[union-attr]


def test_runs_are_found_by_the_file_they_write() -> None:
    scrapes = {scrape["job_name"]: scrape for scrape in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    assert scrapes["opd"]["file_sd_configs"][0]["files"][0].endswith("/opd-*.json")
    assert scrapes["opd"]["honor_labels"] is True
    assert "opd-{self._job.name}.json" in (ROOT / "services/run/service.py").read_text()
