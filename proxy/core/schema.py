"""Does a JSON value fit a schema? The part of JSON Schema that providers' structured outputs know.

Every word of a schema is either asserted here, or says nothing of what fits (`title`, `description`, …). Any other word
is told by `strangers`, so that nobody relies on what is not looked at.

Source: JSON Schema 2020-12, "Validation"; OpenAI's guide to structured outputs, "Supported schemas".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]
Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems")
_CHOICES = ("enum", "anyOf")
_SILENT = ("title", "description", "default", "examples", "format", "$schema", "$comment", "deprecated")
KEYWORDS = frozenset(
    (
        "type",
        "const",
        "properties",
        "additionalProperties",
        "items",
        "required",
        *_CHOICES,
        *_BOUNDS,
        *_LENGTHS,
        *_SILENT,
    )
)


def strangers(schema: object, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """What in a schema is wrong or not known here, as where it is and what is the matter."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        yield path, "must be a schema: a mapping, as in {type: string}"
        return
    for word, said in schema.items():
        here = (*path, word)
        if word not in KEYWORDS:
            yield here, f"is not checked here; known: {', '.join(sorted(KEYWORDS - set(_SILENT)))}"
        elif (wrong := _misused(word, said)) is not None:
            yield here, wrong
        elif word == "properties":
            for name, below in said.items():
                yield from strangers(below, (*here, name))
        elif word == "anyOf":
            for index, below in enumerate(said):
                yield from strangers(below, (*here, index))
        elif word in ("items", "additionalProperties"):
            yield from strangers(said, here)


def misfit(value: object, schema: Schema | bool, at: str = "$") -> str | None:
    """Why `value` does not fit, and where, as in `$.items[2] must be a string, is null`; None if it fits.

    `schema` must be one that `strangers` has nothing to say of.
    """
    if isinstance(schema, bool):
        return None if schema else f"{at} is not allowed"
    for reason in (_of_any(value, schema), _of_objects(value, schema, at), _of_arrays(value, schema, at)):
        if reason:
            return reason if reason.startswith("$") else f"{at} {reason}"
    if "anyOf" in schema and all(misfit(value, below, at) for below in schema["anyOf"]):
        return f"{at} fits none of anyOf"
    return None


def _of_any(value: object, schema: Schema) -> str | None:
    if (kinds := schema.get("type")) is not None:
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        if not any(_is(value, name) for name in names):
            return f"must be of type {' or '.join(names)}, is {_kind(value)}"
    if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
        return "is none of enum"
    if "const" in schema and not _same(value, schema["const"]):
        return "is not what const says"
    if isinstance(value, str):
        return _within(len(value), schema.get("minLength"), schema.get("maxLength"), "characters")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _bounded(value, schema)
    return None


def _of_objects(value: object, schema: Schema, at: str) -> str | None:
    if not isinstance(value, dict):
        return None
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"has no `{name}`"
    others = schema.get("additionalProperties", True)
    for name, below in value.items():
        if others is False and name not in properties:
            return f"has `{name}`, which the schema does not know"
        if (reason := misfit(below, properties.get(name, others), f"{at}.{name}")) is not None:
            return reason
    return None


def _of_arrays(value: object, schema: Schema, at: str) -> str | None:
    if not isinstance(value, list):
        return None
    if (reason := _within(len(value), schema.get("minItems"), schema.get("maxItems"), "items")) is not None:
        return reason
    for index, item in enumerate(value):
        if (reason := misfit(item, schema.get("items", True), f"{at}[{index}]")) is not None:
            return reason
    return None


def _bounded(value: float, schema: Schema) -> str | None:
    if (least := schema.get("minimum")) is not None and value < least:
        return f"must be >= {least}"
    if (most := schema.get("maximum")) is not None and value > most:
        return f"must be <= {most}"
    if (below := schema.get("exclusiveMinimum")) is not None and value <= below:
        return f"must be > {below}"
    if (above := schema.get("exclusiveMaximum")) is not None and value >= above:
        return f"must be < {above}"
    return None


def _within(length: int, least: int | None, most: int | None, what: str) -> str | None:
    if least is not None and length < least:
        return f"must have at least {least} {what}, has {length}"
    if most is not None and length > most:
        return f"must have at most {most} {what}, has {length}"
    return None


def _misused(word: str, said: object) -> str | None:
    """What is wrong with what stands at a known word, or None."""
    if word == "type":
        names = said if isinstance(said, list | tuple) else [said]
        if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
            return f"must be one of {', '.join(_TYPES)}, or a list of them"
    elif word == "properties" and not isinstance(said, Mapping):
        return "must be a mapping from names to schemas"
    elif word in _CHOICES and not (isinstance(said, list | tuple) and said):
        return "must be a list that is not empty"
    elif word == "required" and not (isinstance(said, list | tuple) and all(isinstance(name, str) for name in said)):
        return "must be a list of names"
    elif word in _LENGTHS and (isinstance(said, bool) or not isinstance(said, int) or said < 0):
        return "must be a whole number >= 0"
    elif word in _BOUNDS and (isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said)):
        return "must be a number"
    return None


def _is(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES[name])


def _kind(value: object) -> str:
    return next(name for name in ("boolean", *_TYPES) if _is(value, name))


def _same(one: object, other: object) -> bool:
    """JSON's equality: 1 is 1.0 and is not true, within lists and objects too."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one == other
