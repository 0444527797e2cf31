"""The rules as files: promtool's word on them, and that they name what the gateway tells."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana import promql
from tests.grafana import missing
from tests.grafana.test_pages import CATALOGUE

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "grafana" / "prometheus"
RULES = [
    rule
    for file in sorted((PROMETHEUS / "rules").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in RULES if "alert" in rule}
SERIES = CATALOGUE | {"up": {"job", "instance"}} | {rule["record"]: {"job"} for rule in RULES if "record" in rule}
each_alert = pytest.mark.parametrize("name", ALERTS)


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        missing("promtool")
    done = subprocess.run([program, *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_configuration_and_its_rules() -> None:
    promtool("check", "config", "prometheus.yml")


def test_rules_do_what_their_tests_say() -> None:
    promtool("test", "rules", *sorted(str(file) for file in (PROMETHEUS / "tests").glob("*.yml")))


@each_alert
def test_every_alert_is_tested_where_it_fires(name: str) -> None:
    tests = [
        case
        for file in (PROMETHEUS / "tests").glob("*.yml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
    ]
    assert any(case["alertname"] == name and case["exp_alerts"] for case in tests)


@each_alert
def test_every_alert_says_how_bad_it_is_and_what_it_means(name: str) -> None:
    alert = ALERTS[name]
    assert name.startswith("Penstock")
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert not alert["annotations"]["summary"].endswith(".")
    assert alert["annotations"]["description"].endswith(".")


def test_every_rule_names_series_and_labels_that_exist() -> None:
    for rule in RULES:
        query = rule["expr"]
        names = re.findall(r"\b(?:job:)?penstock[_:][\w:]+|\bup\b", query)
        assert names or rule["expr"].startswith("vector("), query
        assert SERIES.keys() >= set(names), query
        for name, selector in re.findall(r"([a-z_][\w:]*)\{([^}]*)\}", query):
            assert SERIES[name] >= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)), query
        grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
        assert set[str]().union(*(SERIES[name] for name in names)) >= grouped, query


def test_what_is_recorded_is_what_the_pages_show() -> None:
    shown = {f"job:penstock_error_budget_burn:rate{window}" for window in promql.BURN_WINDOWS}
    assert {rule["record"] for rule in RULES if "record" in rule} == shown | {"penstock:error_budget:ratio"}


def test_the_documentation_lists_every_alert_with_its_severity() -> None:
    told = (ROOT / "docs" / "dashboards.md").read_text()
    listed = dict(re.findall(r"(?m)^\| `(Penstock\w+)` \| (\w+) \|", told))
    assert listed == {name: alert["labels"]["severity"] for name, alert in ALERTS.items()}
