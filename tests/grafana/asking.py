"""Asks a Prometheus what Grafana would ask it for a page, and says what Grafana could not show."""

from __future__ import annotations

import http.client
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

Page = dict[str, Any]  # a dashboard's JSON
Series = dict[str, Any]  # one of the results of a query

STEP_SECONDS = 1  # between two points of a graph
SELECTOR = re.compile(r"[a-zA-Z_][\w:]*\{[^}]*\}")


class Refused(Exception):
    """Prometheus answered with an error."""


@dataclass(frozen=True)
class Prometheus:
    """A running one. `start` and `end` bound the time that is asked for, in seconds since the epoch."""

    port: int
    start: float
    end: float
    scrape_seconds: int

    def get(self, path: str, **said: object) -> Any:
        """The data of an answer of its API. Raises `Refused` with its error."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            line.request("GET", f"/api/v1/{path}?{urlencode(said)}")
            response = line.getresponse()
            body = response.read()
        finally:
            line.close()
        if response.status == http.client.SERVICE_UNAVAILABLE:  # it starts; this alone is not JSON
            raise Refused(body.decode())
        answer = json.loads(body)
        if answer["status"] != "success":
            raise Refused(answer["error"])
        return answer["data"]

    def series(self, query: str) -> list[Series]:
        """What a graph of this query shows."""
        said = {"start": self.start, "end": self.end, "step": STEP_SECONDS}
        found: list[Series] = self.get("query_range", query=query, **said)["result"]
        return found

    def exemplars(self, query: str) -> list[dict[str, Any]]:
        found = self.get("query_exemplars", query=query, start=self.start, end=self.end)
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def label_values(self, query: str) -> list[str]:
        """What Grafana makes of `label_values(selector, label)`."""
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
        assert asked is not None, query
        said = {"match[]": asked[1], "start": self.start, "end": self.end}
        found: list[str] = self.get(f"label/{asked[2]}/values", **said)
        return found


class Variables:
    """The variables of a page, each with all it has to choose from; `chosen` names what is chosen instead."""

    def __init__(self, page: Page, prometheus: Prometheus, **chosen: str) -> None:
        seconds = round(prometheus.end - prometheus.start)
        self._values = {
            "__interval": f"{STEP_SECONDS}s",
            "__rate_interval": f"{max(STEP_SECONDS + prometheus.scrape_seconds, 4 * prometheus.scrape_seconds)}s",
            "__range": f"{seconds}s",
        }
        for variable in page["templating"]["list"]:
            if variable["type"] == "query":
                name = variable["name"]
                self._values[name] = _escaped(chosen[name]) if name in chosen else variable["allValue"]

    def resolved(self, text: str) -> str:
        """Raises `KeyError` for a variable that the page does not have."""
        return re.sub(r"\$\{?(\w+)\}?", lambda found: self._values[found[1]], text)


def _escaped(value: str) -> str:
    """A chosen value, as Grafana writes it into a matcher by regular expression."""
    return re.sub(r"([\\^$.*+?()\[\]{}|])", r"\\\\\1", value)


def targets(page: Page) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every query of a page, by the title of its panel and its letter."""
    for panel in page["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target


def troubles(page: Page, prometheus: Prometheus, **chosen: str) -> dict[str, str]:
    """Each query that Grafana could not show as it is meant: which, and why."""
    variables = Variables(page, prometheus, **chosen)
    found = {}
    for name, target in targets(page):
        try:
            if trouble := _trouble(target, variables, prometheus):
                found[name] = trouble
        except KeyError as missing:
            found[name] = f"the page has no variable {missing}"
        except Refused as error:
            found[name] = str(error)
    for variable in page["templating"]["list"]:
        if variable["type"] == "query" and not prometheus.label_values(variables.resolved(variable["query"]["query"])):
            found[f"${variable['name']}"] = "there is nothing to choose from"
    return found


def _trouble(target: Mapping[str, Any], variables: Variables, prometheus: Prometheus) -> str:
    query = variables.resolved(target["expr"])
    series = prometheus.series(query)
    if not series:
        return "no series"
    if not any(math.isfinite(float(value)) for each in series for _, value in each["values"]):
        return "no value that is a number"
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        if not all(each["metric"].get(label) for each in series):
            return f"its legend names {label}, which not every series has"
    for selector in SELECTOR.findall(query):  # a part of the query that finds nothing can hide behind the rest of it
        if not prometheus.series(selector):
            return f"no series {selector}"
    return ""
