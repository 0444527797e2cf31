"""The tables of docs/operating.md that say nothing the code does not: its settings and its metric families.

    .venv/bin/python -m tests.docs.tables      writes them into the page

Each stands between `<!-- name -->` and `<!-- end -->`. `test_docs` fails where the page says something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy import config
from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import Configured, Family, Kind

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
NAMED = {"upstreams", "pools", "models", "callers"}  # sections whose keys are names that the operator gives


def settings() -> str:
    rows = "\n".join(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _settings())
    return f"| key | default | meaning |\n|---|---|---|\n{rows}"


def metrics() -> str:
    rows = "\n".join(
        f"| `{metric_name(family)}` | {family.kind.value} | {', '.join(family.labels)} | {family.help} |"
        for family in catalogue.FAMILIES
    )
    return f"| family | type | labels | meaning |\n|---|---|---|---|\n{rows}"


def labels() -> str:
    """The values that labels can have. Where a label has other values in other families, they are named."""
    users: dict[str, dict[catalogue.Values, list[str]]] = {}
    for family in catalogue.FAMILIES:
        for label, values in family.labels.items():
            if values and family.name != "label_overflow":
                users.setdefault(label, {}).setdefault(values, []).append(family.name)
    rows = "\n".join(
        f"| {label}{' of ' + ', '.join(families) if len(sets) > 1 else ''} | {_told(values)} |"
        for label, sets in users.items()
        for values, families in sets.items()
    )
    return f"| label | values |\n|---|---|\n{rows}"


TABLES: Mapping[str, Callable[[], str]] = {"settings": settings, "metrics": metrics, "labels": labels}


def metric_name(family: Family) -> str:
    """As it stands in the exposition; a histogram's has `_bucket`, `_sum` and `_count` behind it."""
    return family.full_name + ("_total" if family.kind is Kind.COUNTER else "")


def renewed(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, table in TABLES.items():
        between = rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
        page, found = re.subn(between, lambda _, table=table: f"\n{table()}\n\n", page)
        assert found == 1, f"the page has {found} tables between <!-- {name} --> and <!-- end -->"
    return page


def _settings() -> Iterator[tuple[str, str, str]]:
    schema = config.json_schema()
    for section, said in schema["properties"].items():
        below = said["additionalProperties"] if section in NAMED else said
        key = f"{section}.NAME" if section in NAMED else section
        fields = _resolved(below, schema).get("properties", {})
        if not fields:  # a caller's key is a text and nothing below it
            yield key, "", _line(said["description"])
        for field, told in fields.items():
            told = _resolved(told, schema) | told
            yield f"{key}.{field}", _default(told), _line(told["description"])


def _resolved(said: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """What is said, with what it refers to; of alternatives the one that has keys."""
    if "$ref" in said:
        return _resolved(schema["$defs"][said["$ref"].rpartition("/")[2]], schema) | {
            key: value for key, value in said.items() if key != "$ref"
        }
    for other in said.get("anyOf", ()):
        if "properties" in (found := _resolved(other, schema)):
            return found
    return dict(said)


def _default(told: Mapping[str, Any]) -> str:
    default = told.get("default")
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:g}"
    return "" if default is None else f"`{default}`"


def _told(values: catalogue.Values) -> str:
    if isinstance(values, Configured):
        return f"configured {values.field}, at most {values.cap}; `other`, `none`"
    return ", ".join(f"`{value}`" for value in values)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
