"""JSON that fits a schema, with room for a text."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator.asks import BadAsk, Format, shaped
from proxy.simulator.mould import fitting

TEXT = 'echo: "quoted" \\ ünï\u2028 🏔'
LEAVES: Any = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "string", "format": "date-time"},
        {"type": "string", "enum": ["low", "high"]},
        {"enum": [None, "null"]},
        {"enum": [None]},
        {"const": 7},
        {"type": "integer", "minimum": 3},
        {"type": "integer", "maximum": -2},
        {"type": "number", "exclusiveMinimum": 1.5, "exclusiveMaximum": 4},
        {"type": ["null", "integer"]},
        {"type": "boolean"},
        {"type": "null"},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
    ]
)


def grown(of: Any) -> Any:
    objects = st.dictionaries(st.text("abc", min_size=1, max_size=2), of, max_size=3).map(
        lambda found: {
            "type": "object",
            "properties": found,
            "required": list(found),
            "additionalProperties": False,
        }
    )
    arrays = st.builds(lambda items, least: {"type": "array", "items": items, "minItems": least}, of, st.integers(0, 2))
    return objects | arrays


def leaves(told: Any) -> list[Any]:
    """All values that hold no others."""
    if isinstance(told, dict | list):
        return [leaf for held in (told.values() if isinstance(told, dict) else told) for leaf in leaves(held)]
    return [told]


@given(schema=st.recursive(LEAVES, grown, max_leaves=12))
def test_whatever_the_schema_asks_for_is_given(schema: Any) -> None:
    mould = fitting(schema)
    told = json.loads(mould.before + mould.piece(TEXT) + mould.after)
    jsonschema.validate(told, schema, cls=jsonschema.Draft202012Validator)
    assert (TEXT in leaves(told)) == mould.has_room


def test_a_text_in_pieces_is_the_text() -> None:
    mould = fitting({"type": "object", "properties": {"n": {"type": "integer"}, "said": {"type": "string"}}})
    told = mould.before + "".join(map(mould.piece, TEXT)) + mould.after
    assert json.loads(told) == {"n": 0, "said": TEXT}


def test_a_schema_that_holds_itself_comes_to_an_end() -> None:
    node = {
        "type": "object",
        "properties": {"value": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["value", "next"],
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    mould = fitting(schema)
    jsonschema.validate(json.loads(mould.before + mould.piece("x") + mould.after), schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "#"}, "has an end"),
        ({"$ref": "#/$defs/nothing"}, "nothing at"),
        ({"$ref": "#/title", "title": "a string"}, "no schema at"),
        ({"type": "array", "minItems": 10**12}, "too large"),
        ({"type": "string", "maxLength": 10**12, "minLength": 10**12}, "too large"),
        ({"type": "object", "properties": {str(number): {"$ref": "#"} for number in range(100)}}, "too large"),
    ],
)
def test_a_schema_that_nothing_fits_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fitting(schema)


WORDS = st.sampled_from(["type", "properties", "required", "items", "enum", "anyOf", "$ref", "format", "minimum", "x"])
NO_SCHEMA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 99)
    | st.sampled_from(["object", "array", "string", "number", "#/x", ""]),
    lambda held: st.lists(held, max_size=3) | st.dictionaries(WORDS, held, max_size=4),
    max_leaves=10,
)


@given(schema=st.dictionaries(WORDS, NO_SCHEMA, max_size=4))
def test_whatever_is_said_to_be_a_schema_is_filled_or_refused(schema: Any) -> None:
    with suppress(BadAsk):
        _, mould = shaped(None, None, Format("json_schema", schema=schema))
        json.loads(mould.before + mould.piece(TEXT) + mould.after)
