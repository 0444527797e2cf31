"""The numbers as Prometheus reads them: families made at the scrape, rendered off the event loop, once for all who ask.

Recorder (counters, histograms) + levels read from the live objects -> Collector -> text 0.0.4 or OpenMetrics 1.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from itertools import accumulate
from threading import Lock

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as render_plain
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as render_openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as Example
from prometheus_client.utils import floatToGoString

from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import Family, Kind
from proxy.telemetry.children import Key
from proxy.telemetry.recorder import Recorder

Live = Callable[[], Mapping[str, Iterable[tuple[Key, float]]]]  # all levels, by name, as they stand together


class Families(Collector):
    """The catalogue's families, in its order, each with the children it has now."""

    def __init__(self, recorder: Recorder, live: Live) -> None:
        self._recorder = recorder
        self._live = live

    def collect(self) -> Iterator[Metric]:
        live = self._live()
        for family in catalogue.FAMILIES:
            if family.kind is Kind.HISTOGRAM:
                yield self._histogram(family)
            elif family.kind is Kind.COUNTER and not family.live:
                yield self._counter(family)
            else:
                yield _level(family, live[family.name])

    def _counter(self, family: Family) -> Metric:
        metric = CounterMetricFamily(family.full_name, family.help, labels=tuple(family.labels))
        for key, child in self._recorder.counters[family.name].snapshot():
            metric.add_metric(key, child.value / family.per)
        return metric

    def _histogram(self, family: Family) -> Metric:
        metric = HistogramMetricFamily(family.full_name, family.help, labels=tuple(family.labels))
        bounds = [*map(floatToGoString, family.buckets), "+Inf"]
        for key, child in self._recorder.histograms[family.name].snapshot():
            buckets: list[tuple[str, float] | tuple[str, float, Example]] = []
            for index, (bound, count) in enumerate(zip(bounds, accumulate(child.counts.copy()), strict=True)):
                found = child.exemplars.get(index)
                if found is None:
                    buckets.append((bound, count))
                else:
                    example = Example({"trace_id": found.trace_id}, found.value, found.time)
                    buckets.append((bound, count, example))
            metric.add_metric(key, buckets, child.sum)
        return metric


class Exposition:
    """Renders what a scrape is answered with. Thread-safe; takes 10 to 100 ms, so never on the event loop."""

    def __init__(self, recorder: Recorder, live: Live) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(Families(recorder, live))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._lock = Lock()
        self._running: dict[str, Future[bytes]] = {}  # by content type

    def render(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type: OpenMetrics for those who ask for it, with exemplars; else text 0.0.4.

        Who asks while another is served is given the same body.
        """
        openmetrics = _asks_for_openmetrics(accept)
        content_type = CONTENT_TYPE_OPENMETRICS if openmetrics else CONTENT_TYPE_PLAIN_0_0_4
        mine: Future[bytes] = Future()
        with self._lock:
            shared = self._running.setdefault(content_type, mine)
        if shared is not mine:
            return shared.result(), content_type
        try:
            render = render_openmetrics if openmetrics else render_plain
            mine.set_result(render(self._registry))
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[content_type]
        return mine.result(), content_type


def _level(family: Family, values: Iterable[tuple[Key, float]]) -> Metric:
    made = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    metric = made(family.full_name, family.help, labels=tuple(family.labels))
    for key, value in values:
        metric.add_metric(key, value)
    return metric


def _asks_for_openmetrics(accept: str) -> bool:
    """By hand, because the library's own choice takes any version asked for at its word."""
    for said in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in said.split(";"))
        if kind == "application/openmetrics-text" and "q=0" not in parameters:
            return True
    return False
