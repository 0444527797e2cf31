"""What a realtime session's messages tell, read as they pass."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import realtime
from proxy.core.realtime import Reader
from proxy.core.usage import Usage


def told(*events):
    reader = Reader()
    for event in events:
        reader.hear(event if isinstance(event, bytes) else json.dumps(event).encode())
    return reader


def done(entered, left, status="completed", **details):
    used = {"total_tokens": entered + left, "input_tokens": entered, "output_tokens": left} | details
    return {"type": "response.done", "event_id": "e", "response": {"id": "r", "status": status, "usage": used}}


CREATED = {"type": "session.created", "session": {"id": "sess_1", "model": "gpt-realtime"}}
DELTA = {"type": "response.output_audio.delta", "delta": "AAAA"}


def test_whose_session_it_is_stands_in_the_message_that_opens_it():
    reader = told(CREATED, {"type": "session.created", "session": {"id": "another"}})
    assert (reader.session_id, reader.model) == ("sess_1", "gpt-realtime")


def test_the_usage_of_all_responses_is_summed_with_its_parts():
    details = {
        "input_token_details": {"cached_tokens": 64, "text_tokens": 100, "audio_tokens": 20},
        "output_token_details": {"text_tokens": 10, "audio_tokens": 30},
    }
    reader = told(CREATED, DELTA, done(120, 40, **details), done(7, 3), done(0, 0, "cancelled"))
    assert reader.usage == Usage(127, 43, cached=64)
    assert reader.finish_reason == "cancelled"


def test_a_session_without_a_response_has_no_usage():
    assert told(CREATED, {"type": "error", "error": {"message": "response.done"}}).usage is None


@pytest.mark.parametrize(
    "kind",
    [
        "response.output_text.delta",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        "response.function_call_arguments.delta",
        "response.text.delta",
    ],
)
def test_the_first_token_is_whatever_the_model_says_first(kind):
    assert told(CREATED, {"type": "response.created", "response": {}}, {"type": kind, "delta": "a"}).first_token


@pytest.mark.parametrize(
    "event",
    [
        {"type": "conversation.item.input_audio_transcription.delta", "delta": "what the user said"},
        {"type": "response.output_text.done", "text": '".delta"'},
        {"type": "session.updated", "session": {"instructions": 'say "response.output_text.delta"'}},
    ],
    ids=lambda event: event["type"],
)
def test_what_the_model_did_not_say_is_no_token(event):
    assert not told(event).first_token


def test_words_that_only_speak_of_an_end_are_none():
    reader = told({"type": "response.output_text.done", "text": "x", "also": ["response.done"]})
    assert (reader.usage, reader.finish_reason) == (None, "")


def test_a_message_too_long_to_look_at_tells_nothing():
    long = done(1, 1) | {"padding": "x" * realtime.MESSAGE_LIMIT}
    assert told(long, done(2, 3)).usage == Usage(2, 3)


@pytest.mark.parametrize(
    "raw",
    [
        b'"response.done"',
        b'{"type": "response.done"',
        b'{"type": "response.done", "response": [1]}',
        b'{"type": "response.done", "response": {"usage": {"input_tokens": -1}}}',
        b'{"type": "response.done", "response": {"usage": {"input_tokens": 1e999}}}',
        b'{"type": "response.done", "response":' + b"[" * 100_000,
        b'{"type": "session.created", "session": "\xff"}',
        b'{"type": ["session.created"]}',
        b'\x00\x01.delta"',
    ],
    ids=lambda raw: raw[:30],
)
def test_what_is_no_event_upsets_nothing(raw):
    reader = told(raw, done(2, 3))
    assert reader.usage == Usage(2, 3)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["response.done", "x.delta", "session.created"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "response", "session", "usage", "input_tokens"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.lists(anything, max_size=6))
def test_no_json_upsets_it(said):
    reader = told(*said)
    assert all(isinstance(text, str) for text in (reader.finish_reason, reader.session_id, reader.model))


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), max_size=8))
def test_every_response_is_counted_once(counts):
    used = told(*(done(*count) for count in counts)).usage
    if counts:
        assert used == Usage(sum(entered for entered, _ in counts), sum(left for _, left in counts))
    else:
        assert used is None
