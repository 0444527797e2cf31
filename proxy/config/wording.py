"""Pydantic's errors in plain words. Of a value only its kind is told, and the value itself where it is a number or a
boolean that cannot be secret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from proxy.config import shape
from proxy.config.problems import Path, near_miss, nearest
from proxy.config.settings import Limits

_SHOWN_MAX = 10**15  # a longer number says nothing that "far too large" does not


def mistakes(error: ValidationError, is_hidden: Callable[[Path], bool]) -> Iterator[tuple[Path, str]]:
    """Where each mistake is, and what is wrong, then what to do.

    Args:
        error: of `Settings`.
        is_hidden: whether a value came out of a variable or belongs to a secret, so that it is never told.
    """
    for detail in error.errors(include_url=False):
        path = detail["loc"]
        if path[-1:] == ("[key]",) and path[-2:-1] == (detail["input"],):  # about the name itself
            path = path[:-1]
        at = shape.wanted(path)
        hidden = is_hidden(path) or shape.is_secret(at)
        yield path, _worded(detail["type"], detail["msg"], path, at, detail["input"], detail.get("ctx", {}), hidden)


def _worded(kind: str, said: str, path: Path, at: Any, value: Any, bounds: dict[str, Any], hidden: bool) -> str:
    found = _found(value, hidden)
    match kind:
        case "wrong":
            return said
        case "missing":
            return f"is missing; give it: {_meaning(path)}"
        case "extra_forbidden":
            return f"unknown key{nearest(str(path[-1]), shape.fields_of(shape.wanted(path[:-1])))}"
        case "int_type" | "int_from_float":
            return f"must be a whole number, {found}{_unquote(value)}"
        case "float_type":
            return f"must be a number, {found}{_unquote(value)}"
        case "bool_type":
            return f"must be true or false, {found}{_unquote(value)}"
        case "string_type":
            hint = "; put it in quotes" if isinstance(value, int | float) else _or_out(value)
            return f"must be text, {found}{hint}"
        case "dict_type" | "mapping_type":
            return f"must be a mapping from names, {found}; write `NAME: …` below it{_or_out(value)}"
        case "model_type" | "model_attributes_type":
            auto = " or the word auto" if at is Limits else ""
            return f"must be a mapping{auto}, {found}; known: {', '.join(shape.fields_of(at))}{_or_out(value)}"
        case "tuple_type" | "list_type":
            return f"must be a list, {found}; write [NAME, …]"
        case "literal_error":
            words = shape.words(at)
            meant = near_miss(value, words) if isinstance(value, str) else None
            return f"must be {' or '.join(words)}{f'; did you mean {meant}?' if meant else ''}"
        case "greater_than_equal":
            return f"must be >= {_number(bounds['ge'])}, {found}"
        case "less_than_equal":
            return f"must be <= {_number(bounds['le'])}, {found}"
        case "greater_than":
            return f"must be > {_number(bounds['gt'])}, {found}"
        case "finite_number":
            return "must be a finite number"
        case "too_short" | "string_too_short":
            return "must not be empty; give at least one" if isinstance(value, list | tuple) else "must not be empty"
        case "string_too_long":
            return f"must be at most {bounds['max_length']} characters"
    return said  # pydantic's own words for it; they quote no value


def _found(value: Any, hidden: bool) -> str:
    match value:
        case None:
            return "is empty"
        case str():
            return "is text"
        case list() | tuple():
            return "is a list"
        case dict():
            return "is a mapping"
        case bool() if not hidden:
            return f"is {str(value).lower()}"
        case int() | float() if not hidden:
            return f"is {_number(value) if isinstance(value, int) else repr(value)}"
        case int() | float():
            return "is a number"
    return "is something else"


def _number(value: float) -> str:
    if abs(value) >= _SHOWN_MAX:
        return "far too large"
    return str(int(value)) if value == int(value) else repr(value)


def _or_out(value: Any) -> str:
    return "; or take the line out" if value is None else ""


def _unquote(value: Any) -> str:
    numeric = isinstance(value, str) and value.strip().replace(".", "", 1).isdecimal()
    return "; take the quotes away" if numeric else ""


def _meaning(path: Path) -> str:
    field = shape.fields_of(shape.wanted(path[:-1])).get(str(path[-1]))
    told = (field.description if field else None) or "it has no default"
    return told.split(";")[0].split(".")[0]
