"""The catalogue as a page: `python -m proxy.telemetry.document > docs/metrics.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import PREFIX, Configured, Family, Kind, Section, Values

_HEAD = f"""\
# Metrics

<!-- Generated from proxy/telemetry/catalogue.py by `python -m proxy.telemetry.document > docs/metrics.md`. -->

`GET /metrics` on the admin port answers in the text format, and in OpenMetrics for those who ask for it; exemplars,
which name a trace that is kept, are in the latter only. Every name begins with `{PREFIX}`. Units are seconds, bytes,
tokens and US dollars. "provider" is the configured upstream's name, "model" the configured model's, wildcards as they
are written.

The values of a label come from the list below or from the configuration, never from a request. What is in neither
becomes `other`, and `{PREFIX}label_overflow_total` counts it; `none` says that there is no such thing. Names that a
reload takes out of the configuration take their series with them.

Some values never occur yet, and stand here so that a query for them is not a mistake: a pause is set by `retry_after`,
`computed` or `limit`, never by `reset_header`, because the reset that a header names moves the provider's limit, for
everybody; there is no `total_timeout` on a stream and no `budget` of money; and limits do not move by `success`: one
that is found by probing is learned from the refusal at its end.

The families of keys have no series unless `telemetry.per_caller` is true. What the default collectors of
prometheus-client tell of the process (`process_*`, `python_*`) comes besides.
"""
_TAIL = """\
## Where a scrape should stop

With 5 upstreams, 50 models and 200 keys there are some 20,000 series, and a test keeps them below 25,000. In the scrape
configuration: `sample_limit: 50000`, `label_limit: 12`, `label_value_length_limit: 128`.
"""


def page() -> str:
    parts = [_HEAD, *(_section(section) for section in catalogue.SECTIONS), _labels(), _buckets(), _TAIL]
    return "\n".join(parts)


def metric_name(family: Family) -> str:
    """As a counter or a gauge stands in the exposition; a histogram's has `_bucket`, `_sum` and `_count` behind it."""
    return family.full_name + ("_total" if family.kind is Kind.COUNTER else "")


def _section(section: Section) -> str:
    rows = (
        (f"`{metric_name(family)}`", family.kind.value, ", ".join(family.labels), family.help)
        for family in section.families
    )
    return f"## {section.title}\n\n" + _table(("family", "type", "labels", "meaning"), rows)


def _labels() -> str:
    users: dict[str, dict[Values, list[str]]] = {}
    for family in catalogue.FAMILIES:
        for label, values in family.labels.items():
            if values and family.name != "label_overflow":
                users.setdefault(label, {}).setdefault(values, []).append(family.name)
    rows = (
        (f"{label}{' of ' + ', '.join(families) if len(sets) > 1 else ''}", _values(values))
        for label, sets in users.items()
        for values, families in sets.items()
    )
    return "## Labels\n\n" + _table(("label", "values"), rows)


def _buckets() -> str:
    users: dict[tuple[float, ...], list[str]] = {}
    for family in catalogue.FAMILIES:
        if family.buckets:
            users.setdefault(family.buckets, []).append(f"`{family.full_name}`")
    rows = ((", ".join(names), " ".join(f"{bound:.10g}" for bound in bounds)) for bounds, names in users.items())
    return "## Buckets\n\n" + _table(("histogram", "upper bounds"), rows)


def _values(values: Values) -> str:
    if isinstance(values, Configured):
        return f"configured {values.field}, at most {values.cap}; `other`, `none`"
    return ", ".join(f"`{value}`" for value in values)


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
