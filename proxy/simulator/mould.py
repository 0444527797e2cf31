"""JSON that fits a schema, with room for a text: what an answer looks like that must be of a given shape.

The schemas are those that providers take for structured outputs and for the arguments of tools. The text goes into the
first string that is free to hold any; everything else is the least that fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_ROOM = "\ue000"  # stands where the text goes; no schema of sense holds this character
_DEEP = 6  # from here on nothing is told that may be left out, so that a recursive schema has an end
_TOO_DEEP = 40
_LARGEST = 100_000  # values and characters of what fits
_FORMATS = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "email": "someone@example.com",
    "hostname": "example.com",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


@dataclass(frozen=True, slots=True)
class Mould:
    """What stands before and after a text; of JSON that has no room for one, everything stands before."""

    before: str = ""
    after: str = ""
    is_json: bool = False
    has_room: bool = True

    def piece(self, words: str) -> str:
        """A part of the text, as it stands in the whole."""
        if not self.is_json:
            return words
        return msgspec.json.encode(words).decode()[1:-1] if self.has_room else ""


PLAIN = Mould()
ANY_JSON = Mould('{"text":"', '"}', is_json=True)


def fitting(schema: Mapping[str, Any]) -> Mould:
    """
    Raises:
        ValueError: nothing fits that has an end, only what is too large, or a `$ref` leads nowhere.
        TypeError, AttributeError: it is no schema.
    """
    whole = msgspec.json.encode(_Filling(schema).value(schema, 0)).decode()
    before, room, after = whole.partition(_ROOM)
    return Mould(before, after, is_json=True, has_room=bool(room))


class _Filling:
    """One value that fits the schema `root`."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._has_room = False
        self._size = 0

    def value(self, schema: Mapping[str, Any], depth: int) -> object:
        self._grow(1)
        if depth > _TOO_DEEP:
            raise ValueError("nothing fits the schema that has an end")
        if "$ref" in schema:
            return self.value(self._resolved(schema["$ref"]), depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return _first(schema["enum"], None)
        if kinds := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(_null_last(kinds)[-1 if depth > _DEEP else 0], depth + 1)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        kind = _first(kind, "null") if isinstance(kind, list) else kind
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                count = max(schema.get("minItems", 0), 0 if depth > _DEEP else min(1, schema.get("maxItems", 1)))
                return [self.value(schema.get("items", {}), depth + 1) for _ in range(count)]
            case "integer" | "number":
                return _number(schema)
            case "boolean":
                return True
            case "null":
                return None
        return self._string(schema)

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, object]:
        wanted = schema.get("required", ()) if depth > _DEEP else schema.get("properties", {})
        return {name: self.value(schema.get("properties", {}).get(name, {}), depth + 1) for name in wanted}

    def _string(self, schema: Mapping[str, Any]) -> str:
        if "format" in schema:
            return _FORMATS.get(schema["format"], "")
        if self._has_room or "maxLength" in schema or "pattern" in schema:
            length = int(schema.get("minLength", 0))
            self._grow(length)
            return "a" * length
        self._has_room = True
        return _ROOM

    def _grow(self, by: int) -> None:
        self._size += by
        if self._size > _LARGEST:
            raise ValueError("what fits the schema is too large")

    def _resolved(self, reference: str) -> Mapping[str, Any]:
        found: Any = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            if not isinstance(found, Mapping) or name not in found:
                raise ValueError(f"the schema has nothing at {reference}")
            found = found[name]
        if not isinstance(found, Mapping):
            raise ValueError(f"the schema has no schema at {reference}")
        return found


def _first(values: Sequence[Any], null: Any) -> Any:
    """The first that is not `null`; that one, where there is nothing else."""
    return next((value for value in values if value != null), null)


def _null_last(kinds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(kinds, key=lambda kind: kind.get("type") == "null")


def _number(schema: Mapping[str, Any]) -> float:
    """The least that is allowed; 0, where there is no least."""
    if "exclusiveMinimum" in schema:
        return float(schema["exclusiveMinimum"]) + 1
    least: float = schema.get("minimum", 0)
    most: float = min(schema.get("maximum", least), schema.get("exclusiveMaximum", least + 1) - 1)
    return min(least, most)
