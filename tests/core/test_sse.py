"""What passes through the reader, and what it has seen of it, must not depend on where the network cut the bytes.

Numbers in docstrings are those of the module's rules.
"""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import sse
from proxy.core.sse import Reader
from proxy.core.usage import Usage

BOM = b"\xef\xbb\xbf"
ENDINGS = {"LF": "\n", "CRLF": "\r\n", "CR": "\r"}
DONE = re.compile(rb"(\A|\A\xef\xbb\xbf|[\r\n])data:[ \t]*\[DONE\][ \t]*(\r\n|\n|\r){2}\Z")
ODD = "\u2028\u2029\x85\x1c\x0b \\n naïve 日本 🌊"  # what str.splitlines cuts at, and characters of several bytes


def data(*events):
    return [f"data: {each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)}" for each in events]


def chat(delta=None, finish=None, **more):
    choice = {"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice]} | more


def named(*events):
    """As Anthropic and OpenAI's responses write them: the type twice."""
    return [f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}" for event in events]


OPENAI_USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 12,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
OPENAI_CHAT = data(
    chat({"role": "assistant", "content": ""}, usage=None),
    chat({"content": ODD}, usage=None),
    chat({"content": 'say "error" and "usage"'}, usage=None),
    chat(finish="stop", usage=None),
    {"id": "c-1", "model": "m-1", "choices": [], "usage": OPENAI_USAGE},
    "[DONE]",
)
AZURE_CHAT = data(
    {"id": "", "model": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]},
    chat({"role": "assistant", "content": ""}),
    chat({"content": ODD}),
    chat(finish="content_filter"),
    "[DONE]",
)
TOOL_CALL = data(
    chat({"role": "assistant", "content": None}),
    chat({"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": ""}}]}),
    chat({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}),
    chat(finish="tool_calls"),
    "[DONE]",
)
COMPLETIONS = data(
    {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "text": "", "finish_reason": None}]},
    {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "text": ODD, "finish_reason": None}]},
    {"id": "c-1", "model": "m-1", "choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"id": "c-1", "model": "m-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    "[DONE]",
)
RESPONSES = named(
    {"type": "response.created", "response": {"id": "r-1", "model": "m-1", "status": "in_progress", "error": None}},
    {"type": "response.output_item.added", "item": {"type": "message"}},
    {"type": "response.output_text.delta", "delta": ODD},
    {"type": "response.output_text.done", "text": ODD},
    {
        "type": "response.completed",
        "response": {
            "id": "r-1",
            "model": "m-1",
            "status": "completed",
            "error": None,
            "usage": {
                "input_tokens": 7,
                "input_tokens_details": {"cached_tokens": 1},
                "output_tokens": 6,
                "output_tokens_details": {"reasoning_tokens": 2},
            },
        },
    },
)
ANTHROPIC = named(
    {
        "type": "message_start",
        "message": {
            "id": "a-1",
            "model": "claude",
            "stop_reason": None,
            "usage": {
                "input_tokens": 10,
                "cache_creation_input_tokens": 3,
                "cache_read_input_tokens": 20,
                "output_tokens": 1,
            },
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ODD}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
    {"type": "message_stop"},
)
ANTHROPIC_THINKING = named(
    {
        "type": "message_start",
        "message": {"id": "a-1", "model": "claude", "usage": {"input_tokens": 9, "output_tokens": 0}},
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": ODD}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "tool_use", "id": "t-1", "name": "f", "input": {}},
    },
    {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a": "b"}'}},
    {"type": "content_block_stop", "index": 1},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"input_tokens": 9, "cache_read_input_tokens": 30, "output_tokens": 15},
    },
    {"type": "message_stop"},
)
LLAMA_CPP = data(
    chat({"role": "assistant", "content": None}),
    chat({"reasoning_content": ODD}),
    chat({"content": "b"}),
    chat(finish="stop", timings={"prompt_n": 4}),
    {"choices": [], "id": "c-1", "model": "m-1", "usage": {"completion_tokens": 2, "prompt_tokens": 4}, "timings": {}},
    "[DONE]",
)
TRANSFORMERS = data(
    chat({"role": "assistant", "content": "a"}),
    chat({"content": ODD}),
    chat(finish="length", usage={"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}),
)
COMMENTED = [": ping", *OPENAI_CHAT[:2], ": ping\n: pong", *OPENAI_CHAT[2:4], "retry: 10", *OPENAI_CHAT[4:]]

# Events; the first with content, the one with the finish reason; usage, finish reason, and whether an end mark comes.
DIALECTS = {
    "OpenAI chat": (OPENAI_CHAT, 1, 3, Usage(9, 12, cached=4, reasoning=5), "stop", True),
    "Azure": (AZURE_CHAT, 2, 3, None, "content_filter", True),
    "a tool call": (TOOL_CALL, 1, 3, None, "tool_calls", True),
    "completions": (COMPLETIONS, 1, 2, Usage(3, 2), "length", True),
    "responses": (RESPONSES, 2, 4, Usage(7, 6, cached=1, reasoning=2), "completed", True),
    "Anthropic, thinking": (ANTHROPIC_THINKING, 2, 7, Usage(39, 15, cached=30), "tool_use", True),
    "Anthropic": (ANTHROPIC, 3, 5, Usage(33, 15, cached=20, cache_write=3), "end_turn", True),
    "llama.cpp": (LLAMA_CPP, 1, 3, Usage(4, 2), "stop", True),
    "transformers": (TRANSFORMERS, 0, 2, Usage(5, 2), "length", False),
    "comments": (COMMENTED, 2, 5, Usage(9, 12, cached=4, reasoning=5), "stop", True),
}
IDS = {"responses": ("r-1", "m-1"), "Anthropic": ("a-1", "claude"), "Anthropic, thinking": ("a-1", "claude")}

dialects = pytest.mark.parametrize("dialect", DIALECTS)
endings = pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)


def written(events, ending="\n"):
    return [(event.replace("\n", ending) + 2 * ending).encode() for event in events]


def read(*chunks, hide_usage=False):
    """Feed all, and end: what came out, what is known, and whether it was whole."""
    reader = Reader(hide_usage=hide_usage)
    out = b"".join([reader.feed(chunk) for chunk in chunks])
    whole = reader.close()
    return out + reader.rest(), seen(reader), whole


def seen(reader):
    names = ("done", "error", "first_token", "usage", "finish_reason", "response_id", "response_model")
    return {name: getattr(reader, name) for name in names}


def expected(dialect):
    _, _, _, usage, finish_reason, done = DIALECTS[dialect]
    response_id, response_model = IDS.get(dialect, ("c-1", "m-1"))
    return {
        "done": done,
        "error": "",
        "first_token": True,
        "usage": usage,
        "finish_reason": finish_reason,
        "response_id": response_id,
        "response_model": response_model,
    }


def cut(body, at):
    edges = [0, *sorted(min(place, len(body)) for place in at), len(body)]
    return [body[begin:end] for begin, end in pairwise(edges)]


cuts = st.lists(st.integers(0, 3000), max_size=12)


# ── however it is cut ──


@dialects
@endings
def test_every_dialect_is_understood_wherever_it_is_cut_in_two(dialect, ending):
    body = b"".join(written(DIALECTS[dialect][0], ending))
    for at in range(len(body) + 1):
        assert read(body[:at], body[at:]) == (body, expected(dialect), True), at


@dialects
@endings
def test_every_dialect_is_understood_byte_by_byte(dialect, ending):
    body = b"".join(written(DIALECTS[dialect][0], ending))
    assert read(*(body[at : at + 1] for at in range(len(body)))) == (body, expected(dialect), True)


@given(st.sampled_from(list(DIALECTS)), st.sampled_from(list(ENDINGS.values())), st.booleans(), cuts)
@settings(max_examples=150)
def test_every_dialect_is_understood_however_it_is_cut(dialect, ending, bom, at):
    body = BOM * bom + b"".join(written(DIALECTS[dialect][0], ending))
    assert read(*cut(body, at)) == (body, expected(dialect), True)


@given(st.sampled_from(list(DIALECTS)), st.lists(st.sampled_from(list(ENDINGS.values())), min_size=9, max_size=9), cuts)
@settings(max_examples=150)
def test_line_endings_may_change_from_event_to_event(dialect, endings, at):
    events = DIALECTS[dialect][0]
    body = b"".join(written([event], ending)[0] for event, ending in zip(events, endings, strict=False))
    assert read(*cut(body, at)) == (body, expected(dialect), True)


@dialects
def test_the_last_blank_line_may_be_missing(dialect):
    body = b"".join(written(DIALECTS[dialect][0])).rstrip(b"\n")
    assert read(body) == (body, expected(dialect), True)


def test_a_byte_order_mark_hides_nothing():
    body = BOM + b"".join(written(data(chat({"content": "a"}, finish="stop"))))
    _, known, whole = read(body)
    assert (known["first_token"], known["finish_reason"], whole) == (True, "stop", True)


def test_a_usage_without_a_count_is_known_to_be_unread():
    for said, unread in (
        ({"usage": None}, False),
        ({"usage": {"prompt_tokens": 1}}, False),
        ({"usage": {"a": 1}}, True),
    ):
        reader = Reader()
        reader.feed(f"data: {json.dumps({'choices': [], **said})}\n\ndata: [DONE]\n\n".encode())
        assert reader.close()
        assert reader.usage_unread is unread


# ── what may go on ──


@dialects
@endings
def test_what_has_gone_on_is_always_whole_events(dialect, ending):
    """So whatever the gateway has to tell comes between two events."""
    events = written(DIALECTS[dialect][0], ending)
    body = b"".join(events)
    between = {b"".join(events[:count]) for count in range(len(events) + 1)}
    reader, out = Reader(), b""
    for at in range(len(body)):
        out += reader.feed(body[at : at + 1])
        assert out in between
    assert (out, reader.rest()) == (body, b"")


@dialects
def test_a_chunk_of_whole_events_goes_on_as_it_is(dialect):
    for event in written(DIALECTS[dialect][0]):
        assert Reader().feed(event) is event


@given(st.lists(st.binary(max_size=60) | st.sampled_from([b"\n", b"\r", b"\n\n", b"\r\n\r\n", b"data: ", b"data: {}"])))
@settings(max_examples=100)
def test_no_bytes_are_lost_or_refused(chunks):
    """Rule 1, for bytes that are no events at all; and rule 4, should they say that they end."""
    out, body = read(*chunks)[0], b"".join(chunks)
    assert out == body or (body.startswith(out) and DONE.search(out))


words = ["choices", "delta", "content", "text", "finish_reason", "usage", "error", "message", "type", "response", "id"]
words += ["prompt_tokens", "prompt_tokens_details", "cached_tokens", "output_tokens", "stop_reason", "status", "model"]
kinds = ["error", "message_delta", "message_stop", "response.completed", "content_block_delta"]
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(kinds)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=5),
    max_leaves=12,
)


@given(st.lists(anything, max_size=6), cuts, st.booleans())
@settings(max_examples=100)
def test_no_json_upsets_it(said, at, hide_usage):
    body = b"".join(written(data(*map(json.dumps, said))))
    out, known, _ = read(*cut(body, at), hide_usage=hide_usage)
    assert hide_usage or out == body
    assert all(isinstance(known[name], str) for name in ("error", "finish_reason", "response_id", "response_model"))
    assert known == read(body, hide_usage=hide_usage)[1]


@pytest.mark.parametrize(
    "said",
    [
        "[" * 100_000,
        '{"choices":' + "[" * 100_000,
        '{"error":{"message":' + "[" * 400 + "]" * 400 + "}}",
        '{"usage":{"prompt_tokens":' + "9" * 5000 + "}}",
        '{"usage":{"prompt_tokens":1e999,"completion_tokens":-1}}',
        '{"choices":[{"delta":{"content":"\\ud83d"}}]}',
        '{"id":NaN}',
        "\ufeff{}",
        b'{"id":"\xff"}',
    ],
    ids=lambda said: said[:20],
)
def test_hostile_json_upsets_nothing(said):
    raw = said if isinstance(said, bytes) else said.encode()
    body = b"data: " + raw + b"\n\n" + b"".join(written(OPENAI_CHAT))
    out, known, whole = read(body)
    assert (out, known["usage"], whole) == (body, expected("OpenAI chat")["usage"], True)


# ── the first token ──


@dialects
def test_the_first_token_is_the_first_content_and_not_the_first_event(dialect):
    events, first, *_ = DIALECTS[dialect]
    reader = Reader()
    for index, event in enumerate(written(events)):
        assert reader.first_token == (index > first)
        reader.feed(event)


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "a"},
        {"reasoning": "a"},
        {"refusal": "a"},
        {"tool_calls": [{"index": 0}]},
        {"function_call": {"name": "f"}},
        {"audio": {"data": "AA=="}},
    ],
    ids=lambda delta: next(iter(delta)),
)
def test_content_is_whatever_the_model_says(delta):
    assert read(*written(data(chat(delta))))[1]["first_token"]


@pytest.mark.parametrize(
    "delta", [{"role": "assistant"}, {"content": ""}, {"content": None}, {"tool_calls": []}], ids=str
)
def test_what_says_nothing_is_no_content(delta):
    assert not read(*written(data(chat(delta))))[1]["first_token"]


# ── usage that the client did not ask for ──


@pytest.mark.parametrize("dialect", ["OpenAI chat", "completions", "llama.cpp"])
@endings
def test_the_usage_event_is_taken_out_and_nothing_else(dialect, ending):
    events = DIALECTS[dialect][0]
    body = b"".join(written(events, ending))
    visible = b"".join(written([event for event in events if '"choices": []' not in event], ending))
    assert visible != body
    for at in range(len(body) + 1):
        assert read(body[:at], body[at:], hide_usage=True) == (visible, expected(dialect), True), at


@pytest.mark.parametrize("dialect", ["Azure", "a tool call", "transformers", "responses", "Anthropic"])
def test_an_event_that_tells_more_than_usage_is_left_in(dialect):
    body = b"".join(written(DIALECTS[dialect][0]))
    assert read(body, hide_usage=True) == (body, expected(dialect), True)


def test_usage_in_every_event_is_left_in():
    """vLLM's continuous_usage_stats."""
    events = [chat({"content": "a"}, usage={"prompt_tokens": 3, "completion_tokens": count}) for count in range(1, 10)]
    usage_only = chat(usage={"prompt_tokens": 3, "completion_tokens": 9}) | {"choices": []}
    *rest, last = written(data(*events, chat(finish="stop"), usage_only))
    for chunks in ([*rest, last], [b"".join([*rest, last])]):
        out, known, _ = read(*chunks, hide_usage=True)
        assert (out, known["usage"]) == (b"".join(rest), Usage(3, 9))


def test_an_event_without_choices_that_tells_something_else_is_left_in():
    """Azure's content filter."""
    filtered, *rest, done = written(AZURE_CHAT)
    (usage,) = written(data({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}))
    out, known, _ = read(filtered + b"".join(rest) + usage + done, hide_usage=True)
    assert (out, known["usage"]) == (filtered + b"".join(rest) + done, Usage(3, 2))


def test_the_usage_event_is_found_without_spaces_too():
    event = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    assert read(event, hide_usage=True)[:2] == (b"", read(event)[1])


def test_whoever_asked_for_usage_gets_it():
    body = b"".join(written(OPENAI_CHAT))
    assert read(body) == (body, expected("OpenAI chat"), True)


# ── streams that break ──


def test_an_event_after_the_finish_reason_does_not_take_it_back():
    body = b"".join(written(data(chat(finish="stop"), chat({"content": ""}))))
    *_, known, whole = read(body)
    assert (known["finish_reason"], whole) == ("stop", True)


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "comments"])
@endings
def test_a_stream_that_ends_before_its_finish_reason_is_not_whole(dialect, ending):
    """Wherever it was cut off; and from there on it is, at the end of an event, with its blank line or without."""
    events, _, finish, *_ = DIALECTS[dialect]
    told = written(events, ending)
    body = b"".join(told)
    ends = [len(b"".join(told[:count])) for count in range(finish + 1, len(told) + 1)]
    for at in range(len(body) + 1):
        assert read(body[:at])[2] == any(end - 2 * len(ending) <= at <= end for end in ends), at


@pytest.mark.parametrize("left", [b"", b"\n", b": pi", b'data: {"usage":{}}', b"data: [DONE]", b"event: x\ndata: {}"])
def test_what_a_server_leaves_unfinished_behind_the_finish_reason_is_no_cut(left):
    assert read(b"".join(written(OPENAI_CHAT[:4])) + left)[2]


@endings
@pytest.mark.parametrize("begun", ["", "\ufeff"], ids=["", "BOM"])
def test_nothing_passes_after_the_end_mark(ending, begun):
    told = begun.encode() + b"".join(written(OPENAI_CHAT, ending))
    after = b"".join(written(data(chat({"content": "more"})), ending)) + b"data: {"
    for at in range(len(told) + len(after)):
        reader = Reader()
        passed = reader.feed((told + after)[:at])
        assert reader.is_over == (at >= len(told))
        passed += reader.feed((told + after)[at:])
        assert reader.is_over
        assert reader.close()
        assert passed + reader.rest() == told


@pytest.mark.parametrize(
    "event",
    [
        'data: {"choices":[{"index":0,"delta":{"content":"data: [DONE]"}}]}',
        'data: {"choices":[{"index":0,"delta":{"content":"\\n\\ndata: [DONE]\\n\\n"}}]}',
        "data: [DONE]x",
        ": data: [DONE]",
        "event: data: [DONE]",
    ],
)
@endings
def test_only_the_end_mark_ends_a_stream(event, ending):
    reader = Reader()
    body = b"".join(written([OPENAI_CHAT[0], event], ending))
    assert reader.feed(body) == body
    assert not reader.is_over


def test_how_much_has_streamed_is_told_by_the_size_of_its_events():
    reader = Reader()
    body = b"".join(written(data(*(chat({"content": f"word {number}"}) for number in range(10, 60)))))
    assert Reader().output_events(100) == 0
    for at in range(0, len(body), 100):
        reader.feed(body[at : at + 100])
    assert abs(reader.output_events(len(body)) - 50) <= 1


def test_a_broken_stream_has_told_what_it_had_told():
    *_, known, whole = read(b"".join(written(ANTHROPIC[:4])))
    assert (known["usage"], known["finish_reason"], whole) == (Usage(33, 1, cached=20, cache_write=3), "", False)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ('data: {"error": {"message": "overloaded", "code": 500}}', "overloaded"),
        ('data: {"error": {"code": 500}}', "error"),
        ('data: {"error": "it broke"}', "it broke"),
        ('data: {"error": {"message": ["deep"]}}', "error"),
        ('data: {"type": "error", "message": "server_error", "code": null}', "server_error"),
        (
            'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}',
            "Overloaded",
        ),
        ('data: {"type": "response.failed", "response": {"error": {"message": "no luck"}}}', "no luck"),
        ('data: {"choices": [], "error": null}', ""),
        ('data: {"choices": [{"delta": {"content": "the \\"error\\" key"}}]}', ""),
        ("data: error", ""),
    ],
)
@endings
def test_an_error_told_in_the_stream_is_seen_and_passed_on(event, message, ending):
    body = b"".join(written([OPENAI_CHAT[0], event], ending))
    for at in range(0, len(body), 7):
        out, known, _ = read(body[:at], body[at:])
        assert (out, known["error"]) == (body, message)


def test_an_error_message_is_kept_short():
    assert len(read(*written(data({"error": {"message": "x" * 10_000}})))[1]["error"]) == 200


# ── events that are too long ──


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(sse, "EVENT_LIMIT", 300)


@pytest.mark.usefixtures("short_limit")
@endings
@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_a_long_event_is_forwarded_and_those_around_it_are_understood(ending, size):
    """Rule 4."""
    long = "data: " + json.dumps(chat({"content": 1000 * "x"}))
    before, after = written(OPENAI_CHAT[:2], ending), written(OPENAI_CHAT[2:], ending)
    body = b"".join([*before, *written([long], ending), *after])
    reader, out, most = Reader(hide_usage=True), b"", 0
    for at in range(0, len(body), size):
        out += reader.feed(body[at : at + size])
        most = max(most, min(at + size, len(body)) - len(out))
    assert most <= 300 + size + len(after[-2])  # that is the usage event, taken out
    assert reader.close()
    assert out + reader.rest() == body.replace(after[-2], b"")
    assert seen(reader) == expected("OpenAI chat")


@pytest.mark.usefixtures("short_limit")
@given(st.sampled_from(list(ENDINGS.values())), cuts)
@settings(max_examples=100)
def test_a_long_event_may_be_cut_anywhere(ending, at):
    long = "data: " + json.dumps(chat({"content": 1000 * "x"}))
    body = b"".join(written([*OPENAI_CHAT[:2], long, *OPENAI_CHAT[2:]], ending))
    assert read(*cut(body, at)) == (body, expected("OpenAI chat"), True)


@pytest.mark.usefixtures("short_limit")
@endings
def test_a_long_last_event_ends_the_stream_once_it_has_ended(ending):
    """OpenAI's response.completed repeats the whole answer, images among it."""
    last = {"type": "response.completed", "response": {"status": "completed", "output": 1000 * "x"}}
    body = b"".join(written([*RESPONSES[:4], *named(last)], ending))
    for at in range(len(body) - 1100, len(body) + 1):
        for size in (50, 2000):
            whole = read(*(body[:at][begin : begin + size] for begin in range(0, at, size)))[2]
            assert whole == (at == len(body))


@pytest.mark.usefixtures("short_limit")
@endings
def test_a_long_event_in_the_middle_ends_nothing(ending):
    body = b"".join(written([*OPENAI_CHAT[:2], "data: " + 1000 * "x", OPENAI_CHAT[2]], ending))
    for size in (1, 50, 700):
        assert not read(*(body[at : at + size] for at in range(0, len(body), size)))[2]


def test_the_longest_event_looked_at_is_a_mebibyte():
    assert sse.EVENT_LIMIT == 1 << 20
