import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import usage
from proxy.core.usage import TOKENS_MAX, Usage

DIALECTS = {
    "OpenAI chat": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 30, "accepted_prediction_tokens": 0},
        },
        Usage(100, 50, cached=60, reasoning=30),
    ),
    "OpenAI responses": (
        {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 60},
            "output_tokens": 50,
            "output_tokens_details": {"reasoning_tokens": 30},
            "total_tokens": 150,
        },
        Usage(100, 50, cached=60, reasoning=30),
    ),
    "OpenAI embeddings": ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8, 0)),
    "Anthropic, whose cached tokens come beside the input": (
        {
            "input_tokens": 10,
            "cache_creation_input_tokens": 3,
            "cache_read_input_tokens": 20,
            "cache_creation": {"ephemeral_5m_input_tokens": 3},
            "output_tokens": 5,
        },
        Usage(33, 5, cached=20, cache_write=3),
    ),
    "Anthropic, of whose output a part was thought": (
        {"input_tokens": 10, "output_tokens": 50, "output_tokens_details": {"thinking_tokens": 30}},
        Usage(10, 50, reasoning=30),
    ),
    "Anthropic, at the end of a stream": ({"output_tokens": 15}, Usage(0, 15)),
    "cache writes within the input": (
        {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cache_write_tokens": 4}},
        Usage(9, 1, cache_write=4),
    ),
    "llama.cpp": ({"completion_tokens": 2, "prompt_tokens": 4, "total_tokens": 6}, Usage(4, 2)),
    "floats": ({"prompt_tokens": 4.0, "completion_tokens": 2.0}, Usage(4, 2)),
    "details that are null": (
        {"prompt_tokens": 4, "completion_tokens": 2, "prompt_tokens_details": None, "completion_tokens_details": None},
        Usage(4, 2),
    ),
    "both ways of saying it": (
        {"prompt_tokens": 4, "input_tokens": 4, "completion_tokens": 2, "output_tokens": 2},
        Usage(4, 2),
    ),
    "zero, which is a count": ({"prompt_tokens": 0, "completion_tokens": 0}, Usage()),
    "the input alone": ({"prompt_tokens": 7}, Usage(7, 0)),
    "the largest count there can be": ({"prompt_tokens": TOKENS_MAX}, Usage(TOKENS_MAX, 0)),
}


@pytest.mark.parametrize(("said", "meant"), DIALECTS.values(), ids=DIALECTS)
def test_every_dialects_counts_are_understood(said, meant):
    assert usage.of(said) == meant


@pytest.mark.parametrize(
    "count", [None, True, "5", -1, TOKENS_MAX + 1, math.inf, math.nan, -math.inf, [5], {"tokens": 5}, 10**400], ids=repr
)
def test_what_is_no_count_is_not_counted(count):
    assert usage.of({"prompt_tokens": count}) is None
    assert usage.of({"prompt_tokens": count, "completion_tokens": 2}) == Usage(0, 2)


@pytest.mark.parametrize("said", [None, [], "usage", 5, True, {}, {"total_tokens": 5}], ids=repr)
def test_where_there_is_no_count_there_is_no_usage(said):
    assert usage.of(said) is None


names = st.sampled_from(
    [
        *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"),
        *("prompt_tokens_details", "output_tokens_details", "cache_read_input_tokens", "cache_creation_input_tokens"),
    ]
)
numbers = st.integers() | st.floats() | st.none() | st.booleans() | st.text(max_size=3)


@given(st.dictionaries(names, numbers | st.dictionaries(names, numbers)))
def test_no_count_is_below_zero_or_absurd(said):
    told = usage.of(said)
    if told is not None:
        for count in (told.input, told.output, told.cached, told.cache_write, told.reasoning):
            assert isinstance(count, int)
            assert 0 <= count <= 3 * TOKENS_MAX


# ── usage that is told more than once ──

PARTS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
counts = st.integers(0, 10**6)


def folded(*said):
    known = None
    for each in said:
        if (told := usage.of(each)) is not None:
            known = usage.later(known, told)
    return known


@given(st.tuples(*[counts] * 4), st.lists(st.dictionaries(st.sampled_from(PARTS), st.integers(1, 10**6)), max_size=4))
def test_in_a_stream_of_anthropic_s_the_last_word_on_each_count_holds(start, deltas):
    """message_start tells all of them, message_delta those that it likes, as totals; `output_tokens` always."""
    known = dict(zip(PARTS, start, strict=True))
    deltas = [delta | {"output_tokens": 1 + number} for number, delta in enumerate(deltas)]
    said = [known.copy(), *deltas]
    for delta in deltas:
        known |= delta
    fresh, cached, written, left = known.values()
    assert folded(*said) == Usage(fresh + cached + written, left, cached=cached, cache_write=written)


@given(counts, counts, counts)
def test_a_count_told_twice_is_counted_once(entered, cached, left):
    """vLLM's continuous_usage_stats, and OpenAI's whole usage at the end."""
    said = {"prompt_tokens": entered, "completion_tokens": left, "prompt_tokens_details": {"cached_tokens": cached}}
    assert folded(said, said) == usage.of(said)


@given(*[st.builds(Usage, *[counts] * 5)] * 2)
def test_whatever_is_told_twice_no_count_is_below_zero(before, told):
    known = usage.later(before, told)
    assert min(known.input, known.output, known.cached, known.cache_write, known.reasoning) >= 0
    assert usage.later(None, told) == told
