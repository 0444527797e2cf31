"""The table of docs/operating.md that says nothing the code does not: its settings.

    .venv/bin/python -m tests.docs.tables      writes it into the page

It stands between `<!-- settings -->` and `<!-- end -->`. `test_docs` fails where the page says something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy import config

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
NAMED = {
    "upstreams",
    "pools",
    "models",
    "pipelines",
    "callers",
}  # sections whose keys are names that the operator gives


def settings() -> str:
    rows = "\n".join(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _settings())
    return f"| key | default | meaning |\n|---|---|---|\n{rows}"


def renewed(page: str) -> str:
    """The page with its table as the code has it."""
    between = r"(?s)(?<=<!-- settings -->\n).*?(?=<!-- end -->)"
    page, found = re.subn(between, lambda _: f"\n{settings()}\n\n", page)
    assert found == 1, f"the page has {found} tables between <!-- settings --> and <!-- end -->"
    return page


def _settings() -> Iterator[tuple[str, str, str]]:
    schema = config.json_schema()
    for section, said in schema["properties"].items():
        below = said["additionalProperties"] if section in NAMED else said
        key = f"{section}.NAME" if section in NAMED else section
        fields = _resolved(below, schema).get("properties", {})
        if not fields:  # a caller's key is a text and nothing below it
            yield key, "", _line(said["description"])
        yield from _fields(key, fields, schema)


def _fields(key: str, fields: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for field, told in fields.items():
        told = _resolved(told, schema) | told
        yield f"{key}.{field}", _default(told), _line(told["description"])
        if field == "steps":
            below = _resolved(told["additionalProperties"], schema)
            yield from _fields(f"{key}.{field}.NAME", below["properties"], schema)


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


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
