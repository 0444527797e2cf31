"""The pages as files: what python -m grafana.build makes, and what Grafana and their readers may rely on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grafana import build, promql
from grafana.pages import overview, shared
from grafana.panels import MOST, WIDTH
from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import PREFIX, Kind
from proxy.telemetry.document import metric_name
from tests.grafana.asking import Page, targets

ROOT = Path(__file__).parents[2]
PAGES = sorted(build.DASHBOARDS.glob("*.json"))
SCRAPED = {"job", "instance", "le"}  # labels that Prometheus adds, and the bound of a bucket
CATALOGUE = {  # every name of the catalogue that a query may use -> the labels it has
    metric_name(family) + suffix: set(family.labels) | SCRAPED
    for family in catalogue.FAMILIES
    for suffix in (("_bucket", "_sum", "_count") if family.kind is Kind.HISTOGRAM else ("",))
}
SERIES = (
    CATALOGUE
    | dict.fromkeys(promql.PROCESS | promql.SCRAPE, SCRAPED)
    | {promql.GARBAGE: SCRAPED | {"generation"}}
    | {f"job:penstock_error_budget_burn:rate{window}": {"job"} for window in promql.BURN_WINDOWS}
)
UNSHOWN: dict[str, str] = {}  # families that are on no page -> why not
each_page = pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)


def read(file: Path) -> Page:
    page: Page = json.loads(file.read_text())
    return page


def queries(page: Page) -> list[tuple[str, str]]:
    """Each query with its legend, those of variables among them."""
    asked = [(target["expr"], target["legendFormat"]) for _, target in targets(page)]
    return asked + [(said["definition"], "") for said in page["templating"]["list"] if said["type"] == "query"]


def families(page: Page) -> set[str]:
    text = " ".join(target["expr"] for _, target in targets(page))
    return {
        family.name
        for family in catalogue.FAMILIES
        if re.search(rf"\b{metric_name(family)}(?:_bucket|_sum|_count)?\b", text)
    }


def test_what_is_committed_is_what_is_built() -> None:
    assert {file.name: file.read_text() for file in PAGES} == {
        f"{page.name}.json": build.written(page) for page in build.PAGES
    }, "run python -m grafana.build"


@each_page
def test_every_query_names_series_and_labels_that_exist(file: Path) -> None:
    for query, legend in queries(read(file)):
        names = re.findall(r"[a-z_][\w:]*(?=\{)", query) or re.findall(rf"\b{PREFIX}\w+", query)
        assert names, query
        assert SERIES.keys() >= set(names), query
        for name, selector in re.findall(r"([a-z_][\w:]*)\{([^}]*)\}", query):
            assert SERIES[name] >= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)), query
        grouped = [label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")]
        shown = re.findall(r"[a-z_][\w:]*(?=\{)", query.partition(" and ")[0]) or names  # what follows only filters
        assert set.intersection(*(SERIES[name] for name in shown)) >= set(grouped), query
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= (set(grouped) or SCRAPED), legend


@each_page
def test_counters_stand_only_within_a_rate_and_gauges_never(file: Path) -> None:
    for query, _ in queries(read(file)):
        for name in re.findall(r"[a-z_][\w:]*(?=\{)", query):
            grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
            rated = re.search(rf"(?:rate|increase)\({name}\{{", query) is not None
            assert "label_values(" in query or rated == grows, query
        assert set(re.findall(r"\[([^\]]*)\]", query)) <= {promql.WITHIN, promql.OVER_ALL}, query


@each_page
def test_every_panel_says_what_it_shows_and_in_which_unit(file: Path) -> None:
    panels = read(file)["panels"]
    assert len(panels) <= MOST
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]


@each_page
def test_panels_and_queries_have_names_that_stay(file: Path) -> None:
    page = read(file)
    assert page["uid"] == f"penstock-{file.stem}"
    assert "id" not in page  # Grafana's own, which differs from one Grafana to the next
    assert [panel["id"] for panel in page["panels"]] == list(range(1, len(page["panels"]) + 1))
    for panel in page["panels"]:
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))


@each_page
def test_no_panel_stands_on_another_or_beyond_the_edge(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in read(file)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < WIDTH
        taken |= cells


@each_page
def test_a_page_fits_any_grafana(file: Path) -> None:
    page = read(file)
    text = file.read_text()
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {said["name"]: said for said in page["templating"]["list"]}
    assert page["graphTooltip"] == 1  # a crosshair shared by all panels
    assert variables["datasource"]["type"] == "datasource"
    assert variables.keys() >= {"job", "instance"}
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range", "__all"}
    assert used == variables.keys()
    assert all(said.get("datasource", source) == source for said in variables.values())
    for panel in page["panels"]:
        assert all(asked["datasource"] == source for asked in [panel, *panel["targets"]])


@each_page
def test_every_query_is_for_the_chosen_gateways(file: Path) -> None:
    for _, target in targets(read(file)):
        for name, selector in re.findall(r"([a-z_][\w:]*)\{([^}]*)\}", target["expr"]):
            assert 'job=~"$job"' in selector
            assert 'instance=~"$instance"' in selector or name.startswith("job:")
            for label, variable in promql.CHOSEN.items():
                assert label not in SERIES[name] or re.search(rf'\b{label}(=~"\${variable}"|=)', selector), selector


def test_the_variables_that_a_choice_is_made_by_are_on_the_pages() -> None:
    offered = {said["name"] for file in PAGES for said in read(file)["templating"]["list"]}
    assert offered >= {"datasource", "job", "instance", "provider", "model", "key"}


def test_every_family_is_on_a_page() -> None:
    shown = set[str]().union(*(families(read(file)) for file in PAGES))
    assert {family.name for family in catalogue.FAMILIES} - shown == UNSHOWN.keys()


def test_one_page_shows_what_holds_calls_back_and_what_it_does_to_them() -> None:
    page = read(build.DASHBOARDS / "overview.json")
    assert families(page) >= {
        "gate_limit",
        "gate_in_use",
        "gate_queue_depth",
        "rate_limited",
        "backoff_seconds",
        "backoff_sleepers",
        "ratelimit_remaining",
        "overhead_seconds",
    }
    (refusals,) = [target for name, target in targets(page) if name.startswith("429")]
    assert "by (source, " in refusals["expr"]
    assert any("error_budget_burn" in target["expr"] for _, target in targets(page))
    with_exemplars = {name.rpartition(" ")[0] for name, target in targets(page) if target.get("exemplar")}
    assert with_exemplars == {"Duration", "Time to first token"}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("request", {}),
        ("requests", {"upshot": "ok"}),
        ("requests", {"outcome": "ok|fine"}),
        ("requests", {"part": "count"}),
    ],
)
def test_a_query_for_what_the_gateway_does_not_tell_is_not_built(family: str, wanted: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"request"):
        promql.rate(family, **wanted)


def test_a_configured_name_may_be_asked_for() -> None:
    assert 'model="gpt-4o"' in promql.rate("requests", model="gpt-4o")


def test_pages_and_alerts_draw_the_line_at_the_same_place() -> None:
    alerts = (ROOT / "grafana" / "prometheus" / "rules" / "alerts.yml").read_text()
    assert f"rate1h > {overview.FAST_BURN:g}" in alerts
    assert f"rate6h > {overview.SLOW_BURN:g}" in alerts
    assert f"ratelimit_observed_timestamp_seconds < {shared.FRESH_SECONDS})" in alerts


def test_the_documentation_names_every_page() -> None:
    told = (ROOT / "docs" / "dashboards.md").read_text()
    for page in build.PAGES:
        assert f"(../grafana/dashboards/{page.name}.json)" in told
