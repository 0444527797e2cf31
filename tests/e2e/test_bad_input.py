"""Whatever is sent: a clear error in OpenAI's shape, one record, nothing leaked, and the gateway lives on."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.config import Limits, Model, Server
from tests.e2e.running import ASK, CHAT, UPSTREAM_KEY, Answer, House, at, serving, settings
from tests.e2e.scripted import Scripted
from tests.e2e.wire import request, wire

DEEP = 200_000
LARGEST = 2 << 20  # bytes
CREATING = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
LEAKS = re.compile(rb"Traceback|\.py\b|line \d+, in|/proxy/|asyncio|aiohttp|msgspec|object at 0x")


@pytest.fixture
async def house(upstream: Scripted) -> AsyncIterator[House]:
    """Only the model `m-large` is configured, and bodies are bounded."""
    said = settings(
        at(upstream.base_url, limits=Limits(learn=False)),
        models={"m-large": Model(upstreams=("up",))},
        server=Server(port=0, admin_port=0, max_body_bytes=LARGEST),
    )
    async with serving(said) as running:
        yield running


@asynccontextmanager
async def one_record(house: House, status: int) -> AsyncIterator[None]:
    """What is asked within makes exactly one record, of that status, and the gateway answers as well after it."""
    before = await house.metrics()
    yield
    after = await house.metrics()
    assert after("requests_total") == before("requests_total") + 1
    assert after("requests_total", code=str(status)) == before("requests_total", code=str(status)) + 1
    assert after("requests_in_flight") == 0
    assert (await house.ask(ASK | {"model": "m-large"})).status == 200


def refused(answered: Answer, status: int, code: str | None = None, param: str | None = None) -> str:
    """The message of an error of ours; fails unless it has OpenAI's shape in every part."""
    assert answered.status == status
    assert answered.headers["content-type"] == "application/json"
    assert answered.headers["x-request-id"]
    assert answered.headers["server-timing"]
    assert set(answered.json) == {"error"}
    assert set(answered.error) == {"message", "type", "param", "code"}
    assert answered.error["type"] == "invalid_request_error"
    if code:
        assert answered.error["code"] == code
    assert answered.error["param"] == param
    assert LEAKS.search(answered.body) is None, answered.body
    assert UPSTREAM_KEY.encode() not in answered.body
    assert len(answered.body) < 1000
    message = answered.error["message"]
    assert isinstance(message, str)
    assert message
    return message


# ── bodies ──

NOT_JSON = {
    "empty": b"",
    "a space": b" ",
    "words": b"hello there",
    "cut off": b'{"model": "m-large", "messages": [',
    "trailing comma": b'{"model": "m-large",}',
    "two objects": b'{"model": "m-large"}{"model": "m-large"}',
    "single quotes": b"{'model': 'm-large'}",
    "bytes of no text": b"\x00\xff\xfe\x80" * 10,
    "a form": b"model=m-large&messages=",
    "UTF-16": '{"model": "m-large"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"model": "m-large"}'.encode("utf-16-be"),
    "a BOM": b'\xef\xbb\xbf{"model": "m-large"}',
    "Latin-1": '{"model": "modèle"}'.encode("latin-1"),
    "half a character": b'{"model": "m-large\xc3"}',
    "a lone surrogate": b'{"model": "m-large\\ud83d"}',
    "half a character in a message": b'{"model": "m-large", "messages": ["\xc3"]}',
    "a lone surrogate in a message": b'{"model": "m-large", "messages": ["\\ud83d"]}',
    "a control character": b'{"model": "m-large\x01"}',
    "NaN": b'{"model": "m-large", "temperature": NaN}',
    "infinity": b'{"model": "m-large", "temperature": -Infinity}',
    "a leading zero": b'{"model": "m-large", "n": 01}',
    "deep arrays": b'{"model": "m-large", "messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"model": "m-large", "metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * (DEEP + 1),
    "depth alone": b"[" * DEEP,
    "deep options": b'{"model": "m-large", "stream": true, "stream_options": {"x": '
    + b"[" * DEEP
    + b"]" * DEEP
    + b"}}",
}


@pytest.mark.parametrize("name", NOT_JSON)
async def test_a_body_that_is_not_json_is_refused(upstream: Scripted, house: House, name: str) -> None:
    async with one_record(house, 400):
        refused(await house.ask(NOT_JSON[name]), 400, "invalid_json")
    assert len(upstream.exchanges) == 1  # the call that shows the gateway to be alive


NO_REQUEST = {
    "an array": (b"[]", "invalid_json", None),
    "an array of objects": (b'[{"model": "m-large"}]', "invalid_json", None),
    "a string": (b'"m-large"', "invalid_json", None),
    "null": (b"null", "invalid_json", None),
    "a number": (b"7", "invalid_json", None),
    "no model": (b'{"messages": []}', "missing_model", "model"),
    "an empty object": (b"{}", "missing_model", "model"),
    "an empty model": (b'{"model": ""}', "missing_model", "model"),
    "a null model": (b'{"model": null}', "invalid_request", "model"),
    "two models": (b'{"model": "m-large", "model": "m-other"}', "invalid_request", "model"),
    "two models, one in disguise": (b'{"model": "m-large", "mod\\u0065l": "m-large"}', "invalid_request", "model"),
    "stream said twice": (b'{"model": "m-large", "stream": true, "stream": false}', "invalid_request", "stream"),
    "a numeric model": (b'{"model": 4}', "invalid_request", "model"),
    "a model in an array": (b'{"model": ["m-large"]}', "invalid_request", "model"),
    "a model in an object": (b'{"model": {"name": "m-large"}}', "invalid_request", "model"),
    "a stream in words": (b'{"model": "m-large", "stream": "yes"}', "invalid_request", "stream"),
    "a numeric stream": (b'{"model": "m-large", "stream": 1}', "invalid_request", "stream"),
    "options in an array": (b'{"model": "m-large", "stream_options": []}', "invalid_request", "stream_options"),
    "tokens in words": (b'{"model": "m-large", "max_tokens": "many"}', "invalid_request", "max_tokens"),
    "a fraction of a token": (b'{"model": "m-large", "max_tokens": 1.5}', "invalid_request", "max_tokens"),
    "absurd tokens": (b'{"model": "m-large", "max_tokens": 1' + b"0" * 5_000 + b"}", "invalid_request", "max_tokens"),
}


@pytest.mark.parametrize("name", NO_REQUEST)
async def test_json_that_is_no_request_is_refused_by_field(upstream: Scripted, house: House, name: str) -> None:
    body, code, param = NO_REQUEST[name]
    async with one_record(house, 400):
        refused(await house.ask(body), 400, code, param)
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("path", CREATING)
async def test_every_endpoint_refuses_alike(house: House, path: str) -> None:
    refused(await house.ask(b"{", path), 400, "invalid_json")
    refused(await house.ask({"input": "x"}, path), 400, "missing_model", "model")
    refused(await house.ask({"model": "nobody"}, path), 404, "model_not_found", "model")
    refused(await house.ask(path=path, method="PUT"), 405, "method_not_allowed")


@pytest.mark.parametrize("tokens", ["0", "-1000000", "1" + "0" * 30, "1" + "0" * 400])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
async def test_as_many_tokens_as_no_model_has_are_the_upstream_s_matter(
    upstream: Scripted, tokens: str, field: str
) -> None:
    limited = Model(upstreams=("up",), limits=Limits(tokens_per_minute=1000, learn=False))
    body = b'{"model": "m", "%b": %b}' % (field.encode(), tokens.encode())
    async with serving(settings(at(upstream.base_url), models={"m": limited})) as house:
        for _ in range(2):
            assert (await house.ask(body)).status == 200
    assert [exchange.body for exchange in upstream.exchanges] == [body, body]


HUGE_NUMBERS = [b"1" + b"0" * 5_000, b"1e99999", b"0." + b"1" * 5_000, b"-1" + b"0" * 400]


@pytest.mark.parametrize("number", HUGE_NUMBERS, ids=["integer", "exponent", "fraction", "negative"])
@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_that_nobody_can_count_to_are_the_upstream_s_matter_or_refused(
    upstream: Scripted, house: House, number: bytes, stream: bool
) -> None:
    body = b'{"model": "m-large", "seed": %b, "stream": %b}' % (number, b"true" if stream else b"false")
    answered = await house.ask(body)
    assert answered.status in (200, 400)
    if answered.status == 400:
        refused(answered, 400, "invalid_json")
    else:
        assert number in upstream.exchanges[0].body
    assert (await house.ask(ASK | {"model": "m-large"})).status == 200


@pytest.mark.parametrize("near", ["m-larg", "mlarge", "m_large", "m-large-2"])
async def test_an_unknown_model_is_not_found_and_the_nearest_is_named(house: House, near: str) -> None:
    async with one_record(house, 404):
        message = refused(await house.ask(ASK | {"model": near}), 404, "model_not_found", "model")
    assert "`m-large`" in message


async def test_a_model_like_no_other_is_not_found(house: House) -> None:
    async with one_record(house, 404):
        message = refused(await house.ask(ASK | {"model": "zzz" * 5_000}), 404, "model_not_found", "model")
    assert "m-large" not in message
    hostile = "<script>\r\nset-cookie: a=b\x00'; DROP TABLE models;--🏔{{7*7}}${HOME}"
    refused(await house.ask(ASK | {"model": hostile}), 404, "model_not_found", "model")
    metrics = await house.metrics()
    assert metrics("requests_total", model="other", code="404") == 2
    assert "DROP" not in metrics.text
    assert "zzz" not in metrics.text


# ── sizes ──


async def test_a_body_of_the_largest_size_is_taken(upstream: Scripted, house: House) -> None:
    body = b'{"model": "m-large", "pad": "%b"}' % (b"x" * (LARGEST - 31))
    assert len(body) == LARGEST
    assert (await house.ask(body)).status == 200
    assert upstream.exchanges[0].body == body
    refused(await house.ask(body + b" "), 413, "request_too_large")


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(upstream: Scripted, house: House) -> None:
    async with one_record(house, 413), wire(house.port) as line:
        line.send(request(b"", headers={"content-length": str(1 << 40)}))
        refused(await line.answer(), 413, "request_too_large")
    assert len(upstream.exchanges) == 1


async def test_a_body_that_grows_too_large_is_refused(upstream: Scripted, house: House) -> None:
    async with one_record(house, 413), wire(house.port) as line:
        line.send(request(b"").replace(b"content-length: 0", b"transfer-encoding: chunked"))
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range((LARGEST >> 16) + 1):
            line.send(piece)
        refused(await line.answer(), 413, "request_too_large")
    assert len(upstream.exchanges) == 1


async def test_a_chunked_body_that_fits_is_taken(upstream: Scripted, house: House) -> None:
    body = json.dumps(ASK | {"model": "m-large"}).encode()

    async def slowly() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes((byte,))

    async with house.http.post(house.origin + CHAT, data=slowly()) as answered:
        assert answered.status == 200
    assert upstream.exchanges[0].body == body


async def test_a_compressed_body_is_not_understood_and_says_so(house: House) -> None:
    body = gzip.compress(json.dumps(ASK | {"model": "m-large"}).encode())
    async with one_record(house, 400):
        refused(await house.ask(body, headers={"content-encoding": "gzip"}), 400, "invalid_json")


# ── paths and methods ──


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/chat/completions", "POST, GET"),
        ("DELETE", "/v1/responses", "POST"),
        ("PATCH", "/v1/embeddings", "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/v1/models/m-large", "GET, DELETE"),
        ("OPTIONS", "/v1/completions", "POST"),
    ],
)
async def test_a_wrong_method_is_refused_with_the_right_one(house: House, method: str, path: str, allowed: str) -> None:
    async with one_record(house, 405):
        answered = await house.ask(method=method, path=path)
        assert allowed in refused(answered, 405, "method_not_allowed")
    assert answered.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v1/chat/completions/",
        "/V1/chat/completions",
        "/v2/chat/completions",
        "/chat/completions",
        "/metrics",
        "/healthz",
        "/admin/reload",
        "/.env",
    ],
)
async def test_an_unknown_path_is_not_found_and_never_reaches_an_upstream(
    upstream: Scripted, house: House, path: str
) -> None:
    async with one_record(house, 404), wire(house.port) as line:
        line.send(request(ASK | {"model": "m-large"}, path))
        message = refused(await line.answer(), 404, "unknown_path")
    assert ("base_url ends in /v1" in message) is not path.startswith("/v1/")
    assert len(upstream.exchanges) == 1


async def test_a_query_is_passed_on_and_changes_nothing_here(upstream: Scripted, house: House) -> None:
    path = f"{CHAT}?api-version=1&x=%2F..%2F"
    async with wire(house.port) as line:
        line.send(request(ASK | {"model": "m-large"}, path))
        assert (await line.answer()).status == 200
    assert upstream.exchanges[0].path == path
    assert (await house.metrics())("requests_total", operation="chat") == 1


async def test_a_model_s_path_without_a_name_names_none(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url))) as house, wire(house.port) as line:
        for name in ("", "a/"):
            line.send(request(b"", f"/v1/models/{name}", method="GET"))
            refused(await line.answer(), 404, "model_not_found", "model")
    assert upstream.exchanges == []


async def test_a_model_with_a_slash_or_an_odd_letter_is_asked_for_by_its_name(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url))) as house, wire(house.port) as line:
        for name in ("org/model:7b", "org%2Fmodel:7b", "mod%C3%A8le%3F"):
            line.send(request(b"", f"/v1/models/{name}", method="GET"))
            assert (await line.answer()).status == 200
    paths = [exchange.path for exchange in upstream.exchanges]
    assert paths == ["/v1/models/org/model%3A7b"] * 2 + ["/v1/models/mod%C3%A8le%3F"]


# ── headers ──


@pytest.mark.parametrize("said", ["urgent", "", "0", "batch, interactive", "интерактив", "x" * 500])
async def test_an_unknown_class_is_refused(upstream: Scripted, house: House, said: str) -> None:
    async with one_record(house, 400):
        answered = await house.ask(ASK | {"model": "m-large"}, headers={"x-penstock-priority": said})
        message = refused(answered, 400, "invalid_request", "priority")
    assert "interactive, default or batch" in message
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("said", ["soon", "", "0", "-1", "nan", "inf", "1e400", "0x10", "5s", "9" * 400])
async def test_a_deadline_that_is_none_is_refused(upstream: Scripted, house: House, said: str) -> None:
    async with one_record(house, 400):
        answered = await house.ask(ASK | {"model": "m-large"}, headers={"x-request-timeout": said})
        refused(answered, 400, "invalid_request", "timeout")
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("said", ["not given", "NotGiven", "-1", "nan", "", "9" * 400])
async def test_an_sdk_s_timeout_that_is_none_is_overlooked(house: House, said: str) -> None:
    answered = await house.ask(ASK | {"model": "m-large"}, headers={"x-stainless-read-timeout": said})
    assert answered.status == 200


@pytest.mark.parametrize(
    "said",
    ["", "x" * 65, "x" * 4_000, "a b", "a\tb", "a;b", "a/../b", "<b>", "é", '"', "a,b", "{}", "../../etc/passwd"],
)
async def test_a_request_id_that_could_do_harm_is_replaced(house: House, said: str) -> None:
    async with wire(house.port) as line:
        line.send(request(ASK | {"model": "m-large"}, headers={"x-request-id": said}))
        assert await line.head() == 200
    assert re.fullmatch(r"req_[0-9a-f]{32}", line.headers["x-request-id"])


async def test_a_request_id_that_is_one_is_kept(house: House) -> None:
    for said in ("a", "x" * 64, "A-b_9"):
        answered = await house.ask(ASK | {"model": "m-large"}, headers={"x-request-id": said})
        assert answered.headers["x-request-id"] == said


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-bad\x01: 1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: a\x01b\r\ncontent-length: 0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"GET http://169.254.169.254/latest HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"BREW /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_hardly_http_harms_nobody(
    upstream: Scripted, house: House, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with wire(house.port) as line:
        line.send(raw)
        line.writer.write_eof()
        async with asyncio.timeout(5.0):
            said = await line.until_closed()
    assert not said or re.match(rb"HTTP/1\.[01] [45]\d\d ", said), said[:200]
    assert LEAKS.search(said.partition(b"\r\n\r\n")[2]) is None, said
    assert upstream.exchanges == []
    assert (await house.ask(ASK | {"model": "m-large"})).status == 200
    assert (await house.metrics())("requests_in_flight") == 0
    assert not [record for record in caplog.records if record.name == "penstock.edge"]  # it was refused before that
    caplog.clear()


async def test_nothing_that_was_refused_had_a_place_or_an_attempt(house: House) -> None:
    for body in NOT_JSON.values():
        await house.ask(body)
    metrics = await house.metrics()
    count = len(NOT_JSON)
    assert metrics("requests_total", outcome="rejected", code="400") == count
    assert metrics("request_errors_total", source="client", error_type="invalid_request") == count
    assert metrics("upstream_attempts_total") == 0
    assert metrics("gate_admissions_total") == 0
