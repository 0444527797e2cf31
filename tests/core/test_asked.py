import json
from math import isfinite

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import asked
from proxy.core.asked import Asked, Unreadable
from proxy.core.usage import TOKENS_MAX

BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


def body(**fields):
    return json.dumps({"model": "m"} | fields).encode()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
requests = st.fixed_dictionaries(
    {"model": st.text(min_size=1)},
    optional={
        "stream": st.none() | st.booleans(),
        "stream_options": st.none() | st.dictionaries(st.sampled_from(("include_usage", "x", "é")), values),
        "max_tokens": st.none() | st.integers(-5, 10**6),
        "messages": values,
    },
).flatmap(lambda known: st.dictionaries(st.text(), values, max_size=4).map(lambda other: other | known))


# ── what is read ──


@given(requests, st.booleans())
@settings(max_examples=100)
def test_a_request_is_read_by_the_few_fields_that_decide(fields, is_ascii):
    raw = json.dumps(fields, ensure_ascii=is_ascii, indent=None if is_ascii else 1).encode()
    said = asked.read(raw)
    bound = fields.get("max_tokens")
    assert (said.body, said.model, said.stream) == (raw, fields["model"], bool(fields.get("stream")))
    assert said.max_tokens == (None if bound is None else max(0, bound))
    assert said.wants_usage is ((fields.get("stream_options") or {}).get("include_usage") is True)
    assert said.input_tokens == len(raw) / 4


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_on_the_answer_goes_by_several_names(name):
    assert asked.read(body(**{name: 7})).max_tokens == 7


def test_the_newer_name_of_the_bound_wins():
    assert asked.read(body(max_tokens=1, max_completion_tokens=2)).max_tokens == 2
    assert asked.read(body(max_tokens=1, max_completion_tokens=None)).max_tokens == 1


@pytest.mark.parametrize(("bound", "meant"), [(-1, 0), (-(10**30), 0), (10**400, TOKENS_MAX), (0, 0)])
def test_an_absurd_bound_is_the_nearest_one_that_can_be_reckoned_with(bound, meant):
    """The upstream will say what it thinks of it; the limits must not be credited by it, nor overflow."""
    said = asked.read(body(max_tokens=bound))
    assert said.max_tokens == meant
    assert isfinite(float(said.max_tokens))
    assert str(bound).encode() in said.rewritten("other", ask_usage=True)


# ── what is sent on ──


@given(requests, st.text(min_size=1), st.booleans())
@settings(max_examples=100)
def test_only_the_model_and_the_wish_for_usage_are_changed(fields, model, ask_usage):
    said = asked.read(json.dumps(fields, ensure_ascii=False).encode())
    wanted = fields | {"model": model}
    if ask_usage:
        wanted["stream_options"] = (fields.get("stream_options") or {}) | {"include_usage": True}
    assert json.loads(said.rewritten(model, ask_usage=ask_usage)) == wanted
    assert json.loads(said.rewritten(model, ask_usage=ask_usage)) == wanted  # and it can be asked again


@given(requests)
def test_what_need_not_change_is_the_same_bytes(fields):
    raw = json.dumps(fields).encode()
    assert asked.read(raw).rewritten(fields["model"], ask_usage=False) is raw


@given(values)
def test_values_that_are_not_changed_keep_their_bytes(value):
    for dumped in (json.dumps(value), json.dumps(value, indent=3), json.dumps(value, ensure_ascii=False)):
        raw = f'{{"model":"m", "x" : {dumped} , "n":1.50e+02}}'.encode()
        sent = asked.read(raw).rewritten("other", ask_usage=True)
        kept = msgspec.json.decode(sent, type=dict[str, msgspec.Raw])
        assert bytes(kept["x"]).strip() == dumped.encode()
        assert bytes(kept["n"]) == b"1.50e+02"


def test_a_client_that_said_no_to_usage_is_overruled_and_its_other_options_stay():
    sent = asked.read(body(stream_options={"include_usage": False, "x": [1]})).rewritten("m", ask_usage=True)
    assert json.loads(sent)["stream_options"] == {"include_usage": True, "x": [1]}


def test_a_request_without_a_body_has_none_upstream_either():
    """GET /v1/models through a wildcard."""
    listing = Asked(body=b"", model="*", stream=False, max_tokens=None, wants_usage=False)
    assert listing.rewritten("qwen3", ask_usage=False) == b""


def test_the_representation_shows_no_more_than_was_asked():
    assert "_fields" not in repr(asked.read(body()))


# ── what is refused ──


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *[("model", wrong) for wrong in (None, 5, True, ["m"], {"m": 1})],
        *[("stream", wrong) for wrong in (1, "true", [], {})],
        *[("stream_options", wrong) for wrong in (True, "x", 5, [1])],
        *[(name, wrong) for name in BOUNDS for wrong in ("5", 1.5, True, [5], {})],
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, wrong):
    with pytest.raises(Unreadable) as caught:
        asked.read(body(**{field: wrong}))
    assert (caught.value.code, caught.value.param) == ("invalid_request", field)
    assert f"`{field}` is of the wrong type" in str(caught.value)


@pytest.mark.parametrize("raw", [b"{}", b'{"messages":[]}', b'{"model":""}', b'{"Model":"m"}'])
def test_a_request_for_no_model_is_told_so(raw):
    with pytest.raises(Unreadable, match="name the model to call") as caught:
        asked.read(raw)
    assert (caught.value.code, caught.value.param) == ("missing_model", "model")


HOSTILE = {
    "nothing": b"",
    "white space": b" \n",
    "a word": b"hello",
    "an array": b"[]",
    "a string": b'"model"',
    "a number": b"5",
    "null": b"null",
    "cut short": b'{"model":"m","x":[1,2',
    "something behind": b'{"model":"m"}{}',
    "NaN": b'{"model":"m","x":NaN}',
    "Infinity": b'{"model":"m","x":-Infinity}',
    "a comment": b'{"model":"m"/**/}',
    "single quotes": b"{'model':'m'}",
    "UTF-16": '{"model":"m"}'.encode("utf-16"),
    "UTF-32": '{"model":"m"}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "an array 200,000 deep": b'{"model":"m","x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "an object 200,000 deep": b'{"model":"m","x":' + b'{"":' * 200_000 + b"1" + b"}" * 200_000 + b"}",
    "depth in stream_options": b'{"model":"m","stream_options":{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
    "depth that is never closed": b'{"model":' + b"[" * 200_000,
    "a key that is not UTF-8": b'{"model":"m","\xff":1}',
    "a model that is not UTF-8": b'{"model":"\xff"}',
    "half a surrogate pair as the model": b'{"model":"\\ud83d"}',
    "half a surrogate pair as a key": b'{"model":"m","\\ud83d":1}',
    "half a surrogate pair, raw": b'{"model":"\xed\xa0\xbd"}',
    "half a surrogate pair that nobody reads": b'{"model":"m","x":"\xed\xa0\xbd"}',
    "a string that is not UTF-8 and nobody reads": b'{"model":"m","x":["\xff"]}',
    "a bound of 5,000 digits": b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}",
    "a zero byte": b'{"model":"m\x00"}',
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_request_is_refused_and_no_more(raw):
    with pytest.raises(Unreadable):
        asked.read(raw)


@pytest.mark.parametrize("depth", range(900, 1010, 10))
def test_what_was_read_can_be_sent_on_however_deep_it_is(depth):
    """The relay stands deeper in the stack than who reads; what passed here must not fail there."""
    raw = b'{"model":"m","x":' + b"[" * depth + b"]" * depth + b"}"

    def deeper(levels, said):
        return deeper(levels - 1, said) if levels else said.rewritten("other", ask_usage=True)

    try:
        said = asked.read(raw)
    except Unreadable:
        return
    assert b"[" * depth in deeper(60, said)


PASSED_ON = {
    "a number of 5,000 digits": b"9" * 5000,
    "a float beyond all floats": b"1e999",
}


@pytest.mark.parametrize("value", PASSED_ON.values(), ids=PASSED_ON)
def test_what_does_not_concern_the_gateway_is_the_upstreams_to_judge(value):
    raw = b'{"model":"m","x":' + value + b"}"
    assert b'"x":' + value in asked.read(raw).rewritten("other", ask_usage=True)


fragments = st.sampled_from(
    [b'"model"', b":", b",", b"{", b"}", b'"m"', b"[", b"]", b"1e5", b"null", b'"\\u0000"', b"\xff"]
)


@given(
    st.binary(max_size=80)
    | st.lists(fragments, max_size=12).map(b"".join)
    | values.map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=100)
def test_any_bytes_are_read_or_refused(raw):
    try:
        said = asked.read(raw)
    except Unreadable:
        return
    assert json.loads(said.rewritten("x", ask_usage=True).decode(errors="replace"))["model"] == "x"


# ── a field that stands twice ──


@given(requests, st.sampled_from([(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n")]), st.booleans())
@settings(max_examples=200)
def test_whatever_the_spaces_and_escapes_a_field_that_stands_once_is_no_mistake(said, separators, ascii_only):
    written = json.dumps(said, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert asked.read(written).model == said["model"]


@given(requests, st.data(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
@settings(max_examples=200)
def test_a_field_that_stands_twice_is_refused_wherever_it_stands(said, data, separators):
    key = data.draw(st.sampled_from(sorted(said)))
    between, colon = separators
    written = [f"{json.dumps(name)}{colon}{json.dumps(value)}" for name, value in said.items()]
    again = "".join(f"\\u{ord(letter):04x}" for letter in key) if key.isascii() and data.draw(st.booleans()) else None
    value = data.draw(st.just(said[key]) | values)
    twice = f'"{again}"' if again else json.dumps(key)
    written.insert(data.draw(st.integers(0, len(written))), f"{twice}{colon}{json.dumps(value)}")
    with pytest.raises(Unreadable) as refused:
        asked.read(("{" + between.join(written) + "}").encode())
    assert refused.value.code in ("invalid_request", "invalid_json")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","model":"a"}',
        b'{"model":"a","mod\\u0065l":"b"}',
        b'{"x":[{"model":"b"}],"model":"a","x":1}',
        b'{"x":"\\",\\"model\\":\\"b\\"","model":"a","x":1}',
        b' { "stream" : true , "model" : "a" , "stream" : false } ',
    ],
)
def test_no_value_can_hide_that_a_field_stands_twice(body):
    with pytest.raises(Unreadable, match="more than once"):
        asked.read(body)
