"""Every query of a dashboard asks for what the gateway tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import PREFIX, Kind
from tests.docs import tables

GRAFANA = Path(__file__).parents[2] / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
SCRAPED = {"job", "instance", "le"}  # labels that Prometheus adds, and the bound of a bucket
SERIES = {  # every name a query may use -> the labels it has
    tables.metric_name(family) + suffix: set(family.labels) | SCRAPED
    for family in catalogue.FAMILIES
    for suffix in (("_bucket", "_sum", "_count") if family.kind is Kind.HISTOGRAM else ("",))
}
each_dashboard = pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)


def read(file: Path) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(file.read_text())
    return dashboard


def queries(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """Each query with its legend."""
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [(target["expr"], target["legendFormat"]) for target in targets]
    return asked + [(said["definition"], "") for said in dashboard["templating"]["list"] if "definition" in said]


@each_dashboard
def test_every_query_names_series_and_labels_that_exist(file: Path) -> None:
    for query, legend in queries(read(file)):
        names = re.findall(rf"\b{PREFIX}\w+", query)
        assert names, query
        assert SERIES.keys() >= set(names), query
        for name, selector in re.findall(rf"\b({PREFIX}\w+)\{{([^}}]*)\}}", query):
            assert SERIES[name] >= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)), query
        grouped = [label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")]
        assert set.intersection(*(SERIES[name] for name in names)) >= set(grouped), query
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= set(grouped), legend


@each_dashboard
def test_counters_stand_only_within_a_rate(file: Path) -> None:
    for query, _ in queries(read(file)):
        for name in re.findall(rf"\b{PREFIX}\w+(?:_total|_bucket|_sum|_count)\b", query):
            assert re.search(rf"(?:rate|increase)\({name}|label_values\({name}", query), query


@each_dashboard
def test_every_panel_says_what_it_shows_and_in_which_unit(file: Path) -> None:
    dashboard = read(file)
    panels = dashboard["panels"]
    assert dashboard["uid"].startswith("penstock-")
    assert len(panels) <= 25
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
