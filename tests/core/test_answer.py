import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import answer
from proxy.core.answer import Answer, BodyReader
from proxy.core.usage import Usage

ANSWERS = {
    "chat": (
        {
            "id": "c-1",
            "model": "m-1",
            "choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
        },
        Answer("c-1", "m-1", "stop", Usage(9, 12)),
    ),
    "several choices": (
        {"id": "c-1", "model": "m-1", "choices": [{"finish_reason": "length"}, {"finish_reason": "stop"}]},
        Answer("c-1", "m-1", "length", None),
    ),
    "responses": (
        {"id": "r-1", "model": "m-1", "status": "incomplete", "usage": {"input_tokens": 3, "output_tokens": 4}},
        Answer("r-1", "m-1", "incomplete", Usage(3, 4)),
    ),
    "Anthropic": (
        {
            "id": "a-1",
            "model": "claude",
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "output_tokens": 5},
        },
        Answer("a-1", "claude", "end_turn", Usage(30, 5, cached=20)),
    ),
    "embeddings": (
        {
            "object": "list",
            "data": [{"embedding": [0.1]}],
            "model": "e-1",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        },
        Answer("", "e-1", "", Usage(8, 0)),
    ),
    "models": ({"object": "list", "data": []}, Answer()),
}


@pytest.mark.parametrize(("body", "said"), ANSWERS.values(), ids=ANSWERS)
def test_every_dialects_answer_is_understood(body, said):
    assert answer.read(json.dumps(body).encode()) == said


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_is_read_as_it_passes_however_it_is_cut(size):
    body, said = ANSWERS["chat"]
    raw = json.dumps(body).encode()
    reader = BodyReader({})
    for at in range(0, len(raw), size):
        chunk = raw[at : at + size]
        assert reader.feed(chunk) is chunk
    assert reader.usage is None  # nothing is read before it has passed
    assert reader.close()
    assert reader.rest() == b""
    assert (reader.response_id, reader.response_model) == (said.id, said.model)
    assert (reader.finish_reason, reader.usage) == (said.finish_reason, said.usage)
    assert (reader.first_token, reader.error) == (False, "")
    assert reader.close()  # and once more changes nothing
    assert reader.usage == said.usage


def test_half_an_answer_tells_nothing():
    reader = BodyReader({})
    reader.feed(json.dumps(ANSWERS["chat"][0]).encode()[:-1])
    reader.close()
    assert (reader.usage, reader.finish_reason) == (None, "")


@pytest.mark.parametrize(
    ("body", "unread"),
    [
        (b'{"usage": {"prompt_tokens": 1}}', False),
        (b'{"usage": null}', False),
        (b"{}", False),
        (b"", False),
        (b'{"usage": {"tokens": 1}}', True),
        (b'{"usage": {"prompt_tokens": "1"}}', True),
        (b'{"usage": "much"}', True),
        (b'{"usage": {"prompt_tokens": 1}', True),
        (b"<html>", True),
    ],
)
def test_it_is_known_whether_usage_was_told_and_could_not_be_read(body, unread):
    reader = BodyReader({})
    reader.feed(body)
    reader.close()
    assert reader.usage_unread is unread


def test_an_answer_beyond_the_limit_passes_and_is_not_kept(monkeypatch):
    monkeypatch.setattr(answer, "BODY_LIMIT", 100)
    reader = BodyReader({})
    raw = json.dumps(ANSWERS["chat"][0]).encode()
    assert b"".join(reader.feed(raw[at : at + 10]) for at in range(0, len(raw), 10)) == raw
    assert reader.close()
    assert reader.usage is None
    assert reader.usage_unread


words = ["id", "model", "choices", "finish_reason", "usage", "prompt_tokens", "status", "stop_reason"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100)
def test_no_body_upsets_it(body):
    said = answer.read(body)
    assert all(isinstance(text, str) for text in (said.id, said.model, said.finish_reason))
    assert said.usage is None or isinstance(said.usage, Usage)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"id":' + b"[" * 100_000, b'{"id":"\xff"}', b"", b'{"usage":{"prompt_tokens":' + b"9" * 5000],
)
def test_hostile_bodies_tell_nothing(body):
    assert answer.read(body) == Answer()
