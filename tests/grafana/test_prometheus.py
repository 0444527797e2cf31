"""A real Prometheus scrapes the running gateway, and is asked what Grafana asks: every query of every page has an
answer, every rule runs, and what was broken on purpose is found."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvloop
import yaml

from tests.grafana import missing, scene
from tests.grafana.asking import Page, Prometheus, Variables, targets, troubles

GRAFANA = Path(__file__).parents[2] / "grafana"
PAGES = sorted((GRAFANA / "dashboards").glob("*.json"))
RULES = [
    rule
    for file in sorted((GRAFANA / "prometheus" / "rules").glob("*.yml"))
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
]
each_page = pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)


def read(file: Path) -> Page:
    page: Page = json.loads(file.read_text())
    return page


@dataclass
class World:
    """What was seen of the scene, and the ids of the traces that the gateway sent away."""

    prometheus: Prometheus
    traces: set[str]

    @property
    def busy(self) -> str:
        """The instance that calls went through; the other had none."""
        (instance,) = self.prometheus.label_values("label_values(penstock_requests_total, instance)")
        return instance


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    binary = shutil.which("prometheus")
    if binary is None:
        missing("prometheus")
    directory = tmp_path_factory.mktemp("prometheus")
    with scene.collecting() as traces, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        process, prometheus = runner.run(scene.play(binary, directory))
        yield World(prometheus, traces)
        scene.end(process)


@each_page
def test_every_query_of_a_page_has_an_answer(world: World, file: Path) -> None:
    assert troubles(read(file), world.prometheus) == {}


@each_page
def test_a_page_for_one_gateway_has_all_that_the_page_for_all_has(world: World, file: Path) -> None:
    instance = world.busy
    assert troubles(read(file), world.prometheus, job="penstock", instance=instance) == {}
    nobody = troubles(read(file), world.prometheus, instance=instance + "0")
    assert nobody.keys() >= {name for name, target in targets(read(file)) if "$instance" in target["expr"]}


def test_two_gateways_are_told_apart_by_their_instance(world: World) -> None:
    both = world.prometheus.label_values("label_values(penstock_build_info, instance)")
    assert len(both) == 2
    page = read(GRAFANA / "dashboards" / "process.json")
    query = dict(targets(page))["CPU A"]["expr"]
    for instance in both:
        shown = world.prometheus.series(Variables(page, world.prometheus, instance=instance).resolved(query))
        assert [each["metric"]["instance"] for each in shown] == [instance]
    together = world.prometheus.series(Variables(page, world.prometheus).resolved(query))
    assert sorted(each["metric"]["instance"] for each in together) == sorted(both)


@pytest.mark.parametrize(
    ("page", "panel", "variable", "choice"),
    [
        ("streaming", "Tokens by model A", "model", "priced"),
        ("gate", "Attempts in flight A", "provider", "local"),
        ("gate", "Failovers A", "provider", "broke"),
        ("gate", "Places taken A", "gate", "model/few"),
        ("cost", "Tokens by key A", "key", "team-a"),
    ],
)
def test_a_choice_leaves_only_what_is_chosen(world: World, page: str, panel: str, variable: str, choice: str) -> None:
    board = read(GRAFANA / "dashboards" / f"{page}.json")
    query = dict(targets(board))[panel]["expr"]
    label = "from_provider" if "from_provider" in query else variable
    every = world.prometheus.series(Variables(board, world.prometheus).resolved(query))
    chosen = world.prometheus.series(Variables(board, world.prometheus, **{variable: choice}).resolved(query))
    assert len({each["metric"][label] for each in every}) > 1
    assert {each["metric"][label] for each in chosen} == {choice}


def test_exemplars_lead_to_traces_that_were_sent(world: World) -> None:
    asked = 0
    for file in PAGES:
        page = read(file)
        for name, target in targets(page):
            if not target.get("exemplar"):
                continue
            asked += 1
            found = world.prometheus.exemplars(Variables(page, world.prometheus).resolved(target["expr"]))
            assert found, name
            assert {each["labels"]["trace_id"] for each in found} <= world.traces, name
    assert asked


def test_every_rule_is_loaded_and_well(world: World) -> None:
    told = [rule for group in world.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in told] == [rule.get("alert") or rule["record"] for rule in RULES]
    assert {rule["name"]: rule.get("lastError", "") for rule in told if rule["health"] != "ok"} == {}


def test_rules_name_only_what_is_told_or_recorded(world: World) -> None:
    known = set(world.prometheus.get("label/__name__/values"))
    for rule in RULES:
        names = set(re.findall(r"\b(?:job:)?penstock[_:][\w:]+", rule["expr"]))
        assert names <= known, rule


def test_what_is_recorded_has_values(world: World) -> None:
    for rule in RULES:
        assert "record" not in rule or world.prometheus.series(rule["record"]), rule["record"]


def test_what_goes_wrong_in_the_scene_raises_its_alert(world: World) -> None:
    """Those that are to stand for some minutes first are pending."""
    raised = {(each["metric"]["alertname"], each["metric"]["alertstate"]) for each in world.prometheus.series("ALERTS")}
    assert raised >= {
        ("PenstockErrorBudgetBurnFast", "firing"),
        ("PenstockCredentialOutOfMoney", "firing"),
        ("PenstockQueueRejecting", "pending"),
        ("PenstockCircuitOpen", "pending"),
    }
    well = {"PenstockConfigReloadFailed", "PenstockTelemetryDropped"}
    assert not well & {name for name, _ in raised}


# ── the test of the test ──


def _renamed(expression: str) -> str:
    return expression.replace("penstock_requests_total", "penstock_request_total")


def _grouped_by_nothing(expression: str) -> str:
    return expression.replace("by (outcome)", "by (upshot)")


def _filtered_by_nothing(expression: str) -> str:
    return expression.replace('job=~"$job"', 'job=~"$job", upshot="ok"')


def _unfinished(expression: str) -> str:
    return expression.removesuffix(")")


def _without_its_variable(expression: str) -> str:
    return expression.replace("$model", "$family")


def _over_no_time(expression: str) -> str:
    return expression.replace("[$__rate_interval]", "")


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_renamed, "no series"),
        (_grouped_by_nothing, "its legend names outcome"),
        (_filtered_by_nothing, "no series"),
        (_unfinished, "parse error"),
        (_without_its_variable, "no variable 'family'"),
        (_over_no_time, "parse error"),
    ],
)
def test_a_planted_fault_is_found_where_it_is(world: World, broken: Callable[[str], str], said: str) -> None:
    page = copy.deepcopy(read(GRAFANA / "dashboards" / "overview.json"))
    target = dict(targets(page))["Requests by outcome A"]
    assert isinstance(target, dict)
    whole, target["expr"] = target["expr"], broken(target["expr"])
    assert target["expr"] != whole
    found = troubles(page, world.prometheus)
    assert found.keys() == {"Requests by outcome A"}
    assert said in found["Requests by outcome A"]


def test_a_fault_in_a_part_of_a_query_is_found(world: World) -> None:
    """`or vector(0)` has a value, whatever stands before it."""
    page = copy.deepcopy(read(GRAFANA / "dashboards" / "overview.json"))
    target = dict(targets(page))["Errors that are not the client's A"]
    assert isinstance(target, dict)
    target["expr"] = target["expr"].replace("request_errors_total", "request_mistakes_total")
    (trouble,) = troubles(page, world.prometheus).values()
    assert trouble.startswith("no series penstock_request_mistakes_total{")


def test_a_variable_that_finds_nothing_is_found(world: World) -> None:
    page = copy.deepcopy(read(GRAFANA / "dashboards" / "overview.json"))
    variable = next(each for each in page["templating"]["list"] if each["name"] == "model")
    variable["query"]["query"] = variable["query"]["query"].replace(", model)", ", family)")
    assert troubles(page, world.prometheus) == {"$model": "there is nothing to choose from"}
