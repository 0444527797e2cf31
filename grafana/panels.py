"""What a panel and a page look like: our vocabulary over Grafana's builders."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TypeVar

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import promql

with warnings.catch_warnings():  # on import it advises the schema v2, which only the newest Grafana takes
    warnings.filterwarnings("ignore", "Prefer using dashboardv2", DeprecationWarning)
    from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, statetimeline, timeseries
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.models import common as options
    from grafana_foundation_sdk.models import dashboard as model

MOST = 25  # panels on a page; more of them nobody reads, and each refresh asks Prometheus for all
WIDTH = 24  # of a page, in Grafana's columns
TAG = "penstock"  # what all pages are linked by
SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")
# Every variable but the data source: its label, and what its values are read from. A page has those it asks for.
VARIABLES = {
    "job": ("Job", "label_values(penstock_build_info, job)"),
    "instance": ("Instance", 'label_values(penstock_build_info{job=~"$job"}, instance)'),
    "gate": ("Gate", 'label_values(penstock_gate_limit{job=~"$job", instance=~"$instance"}, gate)'),
    "provider": ("Provider", 'label_values(penstock_upstream_in_flight{job=~"$job", instance=~"$instance"}, provider)'),
    "model": ("Model", 'label_values(penstock_requests_total{job=~"$job", instance=~"$instance"}, model)'),
    "key": ("Key", 'label_values(penstock_key_requests_total{job=~"$job", instance=~"$instance"}, key)'),
}


@dataclass(frozen=True, slots=True)
class Query:
    """
    Attributes:
        legend: with `{{label}}` for what the query groups by.
        exemplars: ask for the traces of single calls as well.
    """

    expression: str
    legend: str = ""
    exemplars: bool = False


def percentiles(name: str, *, exemplars: bool = False, **wanted: str) -> tuple[Query, ...]:
    """The median of a histogram, and the values that one in 20 and one in 100 observations exceed."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return tuple(Query(promql.quantile(share, name, **wanted), said, exemplars) for said, share in shares.items())


@dataclass(frozen=True, slots=True)
class Page:
    """
    Attributes:
        name: of its file; its uid is made of it and never changes, because links and bookmarks name it.
        rows: from above; the panels of one share the width.
    """

    name: str
    title: str
    description: str
    rows: tuple[Row, ...]


Panel = timeseries.Panel | stat.Panel | bargauge.Panel | statetimeline.Panel
Kind = TypeVar("Kind", timeseries.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel)


@dataclass(frozen=True, slots=True)
class Row:
    height: int
    panels: tuple[Panel, ...]


def figures(*panels: Panel) -> Row:
    return Row(4, panels)


def row(*panels: Panel) -> Row:
    return Row(8, panels)


def figure(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *,
    decimals: int | None = None,
    steps: tuple[tuple[float, str], ...] = (),
    names: str = "",
    words: dict[int, tuple[str, str]] | None = None,
) -> stat.Panel:
    """The present value, with its course behind it.

    Args:
        steps: from which value on it has which colour; blue below them, green if there are any.
        names: show this legend in the place of the value.
        words: value -> (what it is shown as, colour).
    """
    panel = _told(stat.Panel(), title, description, unit, (Query(expression, names),))
    first = model.Threshold(value=None, color="green" if steps else "blue")
    colours = [first, *(model.Threshold(value=value, color=colour) for value, colour in steps)]
    panel.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(colours))
    panel.color_mode(options.BigValueColorMode.VALUE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.graph_mode(options.BigValueGraphMode.NONE if names or words else options.BigValueGraphMode.AREA)
    panel.text_mode(options.BigValueTextMode.NAME if names else options.BigValueTextMode.VALUE)
    if words:
        panel.mappings([_mapping(words)])
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def graph(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    stacked: bool = False,
    most: float | None = None,
    lines: tuple[tuple[float, str], ...] = (),
) -> timeseries.Panel:
    """Values over time.

    Args:
        stacked: the values are parts of a whole.
        most: where the axis ends.
        lines: thresholds to draw: (value, colour).
    """
    panel = _told(timeseries.Panel(), title, description, unit, queries)
    panel.min(0).line_width(1).fill_opacity(25 if stacked else 5).show_points(options.VisibilityMode.NEVER)
    panel.legend(
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(options.LegendDisplayMode.LIST)
        .placement(options.LegendPlacement.BOTTOM)
    )
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if most is not None:
        panel.max(most)
    if lines:
        steps = [model.Threshold(value=None, color="transparent")]
        steps += [model.Threshold(value=value, color=colour) for value, colour in lines]
        panel.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    return panel


def bars(title: str, description: str, unit: str, query: Query) -> bargauge.Panel:
    """The present value of each series, as bars that compare them."""
    panel = _told(bargauge.Panel(), title, description, unit, (query,))
    panel.min(0).orientation(options.VizOrientation.HORIZONTAL).display_mode(options.BarGaugeDisplayMode.BASIC)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    panel.color_scheme(build.FieldColor().mode(model.FieldColorModeId.FIXED).fixed_color("blue"))
    return panel


def states(title: str, description: str, words: dict[int, tuple[str, str]], query: Query) -> statetimeline.Panel:
    """Which state each series was in; `words` is value -> (state, colour)."""
    panel = _told(statetimeline.Panel(), title, description, "short", (query,))
    panel.mappings([_mapping(words)]).show_value(options.VisibilityMode.AUTO).merge_values(True)
    return panel


def _told(panel: Kind, title: str, description: str, unit: str, queries: tuple[Query, ...]) -> Kind:
    panel.title(title).description(description).unit(unit).datasource(SOURCE)
    for reference, query in zip(ascii_uppercase, queries, strict=False):
        target = prometheus.Dataquery().datasource(SOURCE).ref_id(reference).expr(query.expression).range()
        target.legend_format(query.legend or title)
        if query.exemplars:
            target.exemplar(True)
        panel.with_target(target)
    return panel


def _mapping(words: dict[int, tuple[str, str]]) -> model.ValueMap:
    results = {
        str(value): model.ValueMappingResult(text=text, color=colour, index=index)
        for index, (value, (text, colour)) in enumerate(words.items())
    }
    return model.ValueMap(options=results)


def assembled(page: Page) -> model.Dashboard:
    """The page with its panels numbered and in their places, and the variables that they ask for."""
    board = (
        build.Dashboard(page.title)
        .uid(f"{TAG}-{page.name}")
        .description(page.description)
        .tags([TAG])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .annotations([])
        .link(
            build.DashboardLink("Penstock")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
    )
    number, top = 0, 0
    asked: set[str] = set(promql.TARGET)
    for each in page.rows:
        width = WIDTH // len(each.panels)
        for place, panel in enumerate(each.panels):
            number += 1
            panel.id(number).grid_pos(model.GridPos(h=each.height, w=width, x=place * width, y=top))
            board.with_panel(panel)
            asked.update(re.findall(r"\$(\w+)", JSONEncoder().encode(panel.build())))
        top += each.height
    board.with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    for name in VARIABLES:
        if name in asked:
            board.with_variable(_variable(name))
    return board.build()


def _variable(name: str) -> build.QueryVariable:
    label, query = VARIABLES[name]
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .definition(query)
        .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(text=["All"], value=["$__all"]))
    )
