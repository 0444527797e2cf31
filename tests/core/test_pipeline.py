"""The rules of a pipeline's steps: templates, order, conditions, lists."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import pipeline
from proxy.core.pipeline import ITEMS_MAX, Unlisted, Written

TEXT = st.text(alphabet="ab{}. inputsteps", max_size=30)


def steps(**written: tuple[str, bool]) -> dict[str, Written]:
    return {name: Written((text,), parallel) for name, (text, parallel) in written.items()}


# ── templates ──


def test_a_variable_is_a_name_in_braces_and_every_other_brace_stays():
    said = 'Facts in {input}: {"a": 1} {} { input } {{item}} {1} ${steps.a-b.c}'
    assert pipeline.variables(said) == ["input", "item", "steps.a-b.c"]
    values = {"input": "I", "item": "J", "steps.a-b.c": "K"}
    assert pipeline.filled(said, values) == 'Facts in I: {"a": 1} {} { input } {J} {1} $K'


def test_what_is_put_in_is_never_looked_at_again():
    values = {"input": "{steps.secret} {item} {input}", "steps.secret": "S"}
    assert pipeline.filled("{input}|{steps.secret}", values) == "{steps.secret} {item} {input}|S"


@given(st.lists(TEXT, max_size=4), TEXT)
def test_a_template_of_one_variable_is_that_text_whatever_it_holds(before, text):
    assert pipeline.filled("{input}", dict.fromkeys(before, "x") | {"input": text}) == text


@given(TEXT)
def test_without_values_a_template_says_what_it_says(text):
    assert pipeline.filled(text, {}) == text


# ── order ──


def test_a_step_waits_for_all_before_it():
    assert pipeline.waits(steps(a=("{input}", False), b=("", False), c=("{steps.a}", False))) == {
        "a": (),
        "b": ("a",),
        "c": ("a", "b"),
    }


def test_a_parallel_step_waits_for_those_it_names_only():
    waits = pipeline.waits(steps(a=("", False), b=("", True), c=("{steps.b}", True), d=("", False)))
    assert waits == {"a": (), "b": (), "c": ("b",), "d": ("a", "b", "c")}
    assert pipeline.stages(waits) == [["a", "b"], ["c"], ["d"]]


def test_steps_that_wait_for_each_other_are_found():
    assert pipeline.cycle({"a": ["b"], "b": ["a"], "c": []}) == ("a", "b")
    assert pipeline.cycle({"a": ["a"]}) == ("a",)
    assert pipeline.cycle({"x": ["a"], "a": ["b"], "b": ["a"]}) == ("a", "b")
    assert pipeline.cycle({"a": [], "b": ["a"]}) == ()


NAMES = "abcdef"
GRAPHS = st.fixed_dictionaries({name: st.sets(st.sampled_from(NAMES), max_size=3) for name in NAMES})


@given(GRAPHS)
def test_either_all_steps_can_run_or_a_circle_says_why_not(waits):
    done: list[str] = []
    while runnable := pipeline.ready(waits, done, done):
        assert not set(runnable) & set(done)
        done += runnable
    circle = pipeline.cycle(waits)
    assert bool(circle) is (len(done) < len(waits))
    for one, other in zip(circle, (*circle[1:], *circle[:1]), strict=True):
        assert other in waits[one]
    if not circle:
        found = pipeline.stages(waits)
        depth = {name: index for index, stage in enumerate(found) for name in stage}
        assert all(depth[other] < depth[name] for name in waits for other in waits[name])


def test_a_step_is_ready_once_all_it_waits_for_is_done_and_begins_once():
    waits = {"a": [], "b": ["a"], "c": ["a", "b"]}
    assert pipeline.ready(waits, [], []) == ["a"]
    assert pipeline.ready(waits, ["a"], []) == []
    assert pipeline.ready(waits, ["a"], ["a"]) == ["b"]
    assert pipeline.ready(waits, ["a", "b"], ["a", "b"]) == ["c"]


# ── conditions ──


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ({"equals": ["urgent"]}, True),
        ({"equals": ["calm", "URGENT"]}, True),
        ({"equals": ["calm"]}, False),
        ({"differs": ["calm"]}, True),
        ({"differs": ["urgent"]}, False),
        ({"contains": ["gen"]}, True),
        ({"contains": ["calm"]}, False),
        ({"lacks": ["calm"]}, True),
        ({"lacks": ["URG"]}, False),
        ({"contains": ["gen"], "differs": ["urgent"]}, False),
    ],
)
def test_a_condition_minds_neither_case_nor_space_around(said, holds):
    nothing = {"equals": (), "differs": (), "contains": (), "lacks": ()}
    assert pipeline.holds("  Urgent\n", **nothing | said) is holds


# ── lists ──


def test_texts_of_a_list_are_items_as_they_are_and_all_else_is_json():
    assert pipeline.listed('["a {item}", 1, {"b": "ä"}, null]') == ["a {item}", "1", '{"b": "ä"}', "null"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("one, two", "is not JSON; it must be a list"),
        ('{"a": []}', "is JSON, but no list"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps([0] * (ITEMS_MAX + 1)), f"{ITEMS_MAX} are the most"),
    ],
)
def test_what_is_no_list_is_said_so(text, why):
    with pytest.raises(Unlisted, match=why):
        pipeline.listed(text)
