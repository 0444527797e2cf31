"""Our own check of structured outputs agrees with the reference implementation on all that it takes."""

from __future__ import annotations

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import schema

NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, 2.0]) | st.text("xy", max_size=3),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
    max_leaves=6,
)
TYPES = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])


def _with(below: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "properties": st.dictionaries(NAMES, below, max_size=3),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": st.booleans() | below,
            "items": below,
            "anyOf": st.lists(below, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(0, 2),
            "minLength": st.integers(0, 2),
            "maxLength": st.integers(0, 2),
            "minimum": st.integers(-2, 2),
            "maximum": st.integers(-2, 2),
            "exclusiveMinimum": st.integers(-2, 2),
            "exclusiveMaximum": st.integers(-2, 2),
            "description": st.just("…"),
        },
    )


SCHEMAS = st.recursive(st.booleans() | _with(st.booleans()), _with, max_leaves=4)


@settings(max_examples=100)
@given(SCHEMAS, VALUES)
def test_a_value_fits_exactly_where_the_reference_says_so(said, value):
    assert list(schema.strangers(said)) == []
    reference = jsonschema.Draft202012Validator(said)
    assert (schema.misfit(value, said) is None) is reference.is_valid(value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"topics": ["a", None]}, "$.topics[1] must be of type string, is null"),
        ({}, "$ has no `topics`"),
        ({"topics": [], "x": 1}, "$ has `x`, which the schema does not know"),
        ([], "$ must be of type object, is array"),
        ({"topics": ["a", "b", "c"]}, "$.topics must have at most 2 items, has 3"),
    ],
)
def test_a_misfit_says_where_and_why(value, why):
    said = {
        "type": "object",
        "properties": {"topics": {"type": "array", "items": {"type": "string"}, "maxItems": 2}},
        "required": ["topics"],
        "additionalProperties": False,
    }
    assert schema.misfit(value, said) == why


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ({"oneOf": []}, ("oneOf",)),
        ({"properties": {"a": {"pattern": "x"}}}, ("properties", "a", "pattern")),
        ({"type": "text"}, ("type",)),
        ({"items": [1]}, ("items",)),
        ({"anyOf": [{"type": "string"}, {"typ": "string"}]}, ("anyOf", 1, "typ")),
        ({"required": "a"}, ("required",)),
        ({"minLength": -1}, ("minLength",)),
        ({"minimum": "1"}, ("minimum",)),
        ({"properties": []}, ("properties",)),
        ("string", ()),
    ],
)
def test_what_is_not_looked_at_is_told(said, where):
    ((place, message),) = schema.strangers(said)
    assert place == where
    assert message
