"""JSON that fits a schema, with room for a text."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator.mould import fitting

TEXT = 'echo: "quoted" \\ ünï\u2028 🏔'
LEAVES: Any = st.sampled_from(
    [
        {"type": "string"},
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "string", "format": "date-time"},
        {"type": "string", "enum": ["low", "high"]},
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


@given(schema=st.recursive(LEAVES, grown, max_leaves=12))
def test_whatever_the_schema_asks_for_is_given(schema: Any) -> None:
    mould = fitting(schema)
    whole = mould.before + mould.piece(TEXT) + mould.after
    jsonschema.validate(json.loads(whole), schema, cls=jsonschema.Draft202012Validator)
    assert (TEXT in json.dumps(json.loads(whole), ensure_ascii=False).replace("\\\\", "\\").replace('\\"', '"')) == (
        mould.has_room
    )


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
    ],
)
def test_a_schema_that_nothing_fits_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fitting(schema)
