"""Queries over the families of the catalogue, filtered by the variables of the page.

    rate("requests", "outcome")
    ->  sum by (outcome) (rate(penstock_requests_total{job=~"$job", instance=~"$instance", ...}[$__rate_interval]))

A family is named as in the catalogue. A family, label or value that is not there raises `ValueError`: pages cannot ask
for what the gateway does not tell. `by` is one label or several, as in `"provider, reason"`. A keyword is a label with
the value that is wanted, or alternatives as `a|b`; a variable does not filter a label that is wanted.
"""

from __future__ import annotations

from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import NONE, OTHER, Family, Kind

TARGET = ("job", "instance")  # the labels that a scrape adds
CHOSEN = {  # label -> the variable of the page that filters it
    "provider": "provider",
    "from_provider": "provider",
    "model": "model",
    "key": "key",
    "gate": "gate",
}
PROCESS = frozenset(  # what prometheus-client's default collectors tell, without labels
    {
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_open_fds",
        "process_max_fds",
    }
)
GARBAGE = "python_gc_collections_total"  # theirs too, by generation
SCRAPE = frozenset({"scrape_duration_seconds", "scrape_samples_scraped"})  # what Prometheus tells of a scrape
BURN_WINDOWS = ("5m", "30m", "1h", "6h")
WITHIN = "$__rate_interval"
OVER_ALL = "$__range"


def rate(name: str, by: str = "", *, part: str = "", over: str = WITHIN, **wanted: str) -> str:
    """How much a counter grows a second. `part` is sum or count, of a histogram."""
    return _sum(by, f"rate({_series(name, part, **wanted)}[{over}])")


def increase(name: str, by: str = "", *, part: str = "", over: str = OVER_ALL, **wanted: str) -> str:
    """How much a counter grew, over the time that the page shows."""
    return _sum(by, f"increase({_series(name, part, **wanted)}[{over}])")


def quantile(share: float, name: str, by: str = "", **wanted: str) -> str:
    """What `share` of a histogram's observations do not exceed."""
    buckets = _series(name, "bucket", **wanted)
    return f"histogram_quantile({share:g}, {_sum(f'le, {by}' if by else 'le', f'rate({buckets}[{WITHIN}])')})"


def mean(name: str, by: str = "", **wanted: str) -> str:
    """The mean of a histogram's observations."""
    return f"{rate(name, by, part='sum', **wanted)} / {rate(name, by, part='count', **wanted)}"


def level(name: str, by: str = "", *, how: str = "sum", **wanted: str) -> str:
    """A gauge; `how` is the aggregation over what `by` leaves out."""
    return _over(how, by, _series(name, **wanted))


def gauge(name: str, **wanted: str) -> str:
    """A gauge as it is, to reckon with."""
    return _series(name, **wanted)


def most(by: str, expression: str) -> str:
    return _over("max", by, expression)


def least(by: str, expression: str) -> str:
    return _over("min", by, expression)


def target(name: str) -> str:
    """What is told of a target beside the catalogue: of its process, or of its scrape."""
    if name not in PROCESS | SCRAPE | {GARBAGE}:
        raise ValueError(f"neither the default collectors nor a scrape tell {name}")
    return f"{name}{{{_chosen_target()}}}"


def burn(window: str) -> str:
    """How many times as fast as it may the error budget is used, as prometheus/rules/slo.yml records it."""
    if window not in BURN_WINDOWS:
        raise ValueError(f"no burn is recorded over {window}")
    return f'max(job:penstock_error_budget_burn:rate{window}{{job=~"$job"}})'


def or_zero(expression: str) -> str:
    """For sums over series that begin with the first event: nothing happened, so 0."""
    return f"({expression} or vector(0))"


def _series(name: str, part: str = "", **wanted: str) -> str:
    family = catalogue.BY_NAME.get(name)
    if family is None:
        raise ValueError(f"the catalogue has no family {name}")
    if (family.kind is Kind.HISTOGRAM) != bool(part):
        raise ValueError(f"{name} is a {family.kind.value}, which has no part {part!r}")
    free = [label for label in family.labels if label in CHOSEN and label not in wanted]
    matchers = [_chosen_target(), *(f'{label}=~"${CHOSEN[label]}"' for label in free)]
    for label, values in wanted.items():
        _check(family, label, values)
        matchers.append(f'{label}{"=~" if "|" in values else "="}"{values}"')
    suffix = "_total" if family.kind is Kind.COUNTER else f"_{part}" if part else ""
    return f"{family.full_name}{suffix}{{{', '.join(matchers)}}}"


def _check(family: Family, label: str, values: str) -> None:
    if label not in family.labels:
        raise ValueError(f"{family.name} has no label {label}")
    known = family.labels[label]
    if isinstance(known, tuple) and not set(values.split("|")) <= {*known, OTHER, NONE}:
        raise ValueError(f"{label} of {family.name} is never {values}")


def _chosen_target() -> str:
    return ", ".join(f'{label}=~"${label}"' for label in TARGET)


def _sum(by: str, expression: str) -> str:
    return _over("sum", by, expression)


def _over(how: str, by: str, expression: str) -> str:
    return f"{how} by ({by}) ({expression})" if by else f"{how}({expression})"
