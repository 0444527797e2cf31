"""What is no HTTP, has two readings or comes too slowly: answered once, recorded once, and nothing behind it runs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest

from proxy.config import Limits, Server
from tests.e2e.running import ASK, CHAT, Answer, House, at, serving, settings, until
from tests.e2e.scripted import ECHO, TELLING, Scripted, answer
from tests.e2e.scripted import stream as streamed
from tests.e2e.wire import Wire, request, wire

HURRY = 0.3  # seconds that a client may take here
BODY = json.dumps(ASK).encode()
HIDDEN = request(ASK | {"model": "hidden"})  # a second request, where a parser may find one


@pytest.fixture
async def house(upstream: Scripted) -> AsyncIterator[House]:
    said = settings(
        at(upstream.base_url, limits=Limits(learn=False)), server=Server(port=0, admin_port=0, read_seconds=HURRY)
    )
    async with serving(said) as running:
        yield running


def post(*lines: str, body: bytes = BODY, version: str = "1.1", target: str = CHAT, host: str = "penstock") -> bytes:
    """A chat request with these header lines; its length is told unless one of them tells how long it is."""
    told = [f"POST {target} HTTP/{version}", *([f"host: {host}"] if host else []), *lines]
    if not any(line.lower().startswith(("transfer-encoding", "content-length")) for line in lines):
        told.append(f"content-length: {len(body)}")
    return "\r\n".join((*told, "", "")).encode("latin-1") + body


def chunked(*parts: bytes, extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in (*parts, b""))


CHUNKED = "transfer-encoding: chunked"

MALFORMED = {
    "not HTTP": b"hello there\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "empty lines and words": b"\r\n\r\nx\r\n",
    "a method of no standard": b"BREW / HTTP/1.1\r\nhost: x\r\n\r\n",
    "a method in small letters": post().replace(b"POST", b"post"),
    "a path in the host": post(host="penstock/v1"),
    "a user in the host": post(host="user@penstock"),
    "a space in the host": post(host="pen stock"),
    "two ports in the host": post(host="penstock:80:80"),
    "two hosts": post("host: other"),
    "no host": post(host=""),
    "version 1.2": post(version="1.2"),
    "HTTP/1.0 with chunks": post(CHUNKED, body=chunked(BODY), version="1.0"),
    "HTTP/1.0 with chunks, kept alive": post(CHUNKED, "connection: keep-alive", body=chunked(BODY), version="1.0"),
    "length and chunks": post("content-length: 5", CHUNKED, body=chunked(BODY)),
    "chunks and length": post(CHUNKED, "content-length: 5", body=chunked(BODY)),
    "two lengths": post("content-length: 5", "content-length: 6"),
    "a length twice": post(f"content-length: {len(BODY)}", f"content-length: {len(BODY)}"),
    "a list of lengths": post("content-length: 5, 5"),
    "a signed length": post("content-length: +5"),
    "a negative length": post("content-length: -5"),
    "a length of 400 digits": post("content-length: " + "1" * 400),
    "a length in hexadecimal": post("content-length: 0x5"),
    "chunks within gzip": post("transfer-encoding: gzip, chunked", body=chunked(BODY)),
    "chunks, then gzip": post("transfer-encoding: chunked, gzip", body=chunked(BODY)),
    "chunks twice": post(CHUNKED, CHUNKED, body=chunked(BODY)),
    "a transfer-encoding of no standard": post("transfer-encoding: xchunked", body=chunked(BODY)),
    "a space before the colon": post("x-request-id : a"),
    "a space before the colon of the length": post("content-length : 5"),
    "a folded header": post("x-request-id: a\r\n b"),
    "NUL in a header": post("x-request-id: a\0b"),
    "a bell in a header": post("x-request-id: a\ab"),
    "a lone CR in a header": post("x-request-id: a\rx-evil: b"),
    "NUL in a header's name": post("x-\0id: a"),
    "a header without a name": post(": a"),
    "lines that end in LF": post().replace(b"\r\n", b"\n"),
    "NUL in the target": post(target=CHAT + "\0"),
    "a tab in the target": post(target=CHAT + "\t"),
    "bytes beyond ASCII in the target": post(target=CHAT + "\xff"),
    "a fragment": post(target=CHAT + "#x"),
    "a fragment behind the query": post(target=CHAT + "?a=b#x"),
    "chunk extensions of 64 KiB": post(CHUNKED, body=chunked(BODY, extension=b";" + b"x" * 65_536)),
    "a chunk whose size is no number": post(CHUNKED, body=b"zz\r\nabc\r\n0\r\n\r\n"),
    "a chunk whose size overflows": post(CHUNKED, body=b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n"),
    "a space behind a chunk's size": post(CHUNKED, body=b"3 \r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than it says": post(CHUNKED, body=b"2\r\nabc\r\n0\r\n\r\n"),
}
OTHERWISE = {
    "HTTP/2.0 in words": (post(version="2.0"), 505, "http_version_not_supported"),
    "HTTP/0.9 in words": (post(version="0.9"), 505, "http_version_not_supported"),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed_request"),
    "TRACE": (post().replace(b"POST", b"TRACE"), 501, "method_not_implemented"),
    "CONNECT": (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nhost: x\r\n\r\n", 501, "method_not_implemented"),
    "an absolute target": (post(target="http://169.254.169.254/latest"), 400, "invalid_path"),
    "an absolute target of ours": (post(target=f"http://penstock{CHAT}"), 400, "invalid_path"),
    "the server itself": (post(target="*").replace(b"POST", b"OPTIONS"), 400, "invalid_path"),
    "too many headers": (post(*["x: y"] * 127), 431, "headers_too_large"),
    "headers too large together": (post(*["x: " + "y" * 1_000] * 17), 431, "headers_too_large"),
    "a header too large": (post("x: " + "y" * 8_192), 431, "headers_too_large"),
    "a name too large": (post("x" * 8_192 + ": y"), 431, "headers_too_large"),
    "a target too large": (post(target="/v1/" + "x" * 8_192), 431, "headers_too_large"),
}
ALL = {name: (raw, 400, "malformed_request") for name, raw in MALFORMED.items()} | OTHERWISE


def refusal(answered: Answer, status: int, code: str) -> None:
    """It is an error of ours, in OpenAI's shape."""
    assert (answered.status, answered.error["code"]) == (status, code), answered.body
    assert set(answered.error) == {"message", "type", "param", "code"}
    assert answered.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{32}", answered.headers["x-request-id"])
    assert len(answered.body) < 400, "it quotes nothing of the request"


@pytest.mark.parametrize("name", ALL)
async def test_it_is_refused_with_one_answer_and_one_record_and_nothing_behind_it_runs(
    upstream: Scripted, house: House, name: str
) -> None:
    raw, status, code = ALL[name]
    async with wire(house.port) as line:
        line.send(raw if status == 505 else raw + HIDDEN)  # its connection would end anyway, so more is malformed
        async with asyncio.timeout(5.0):
            refusal(await line.answer(), status, code)
            if "path" not in code:
                assert await line.until_closed() == b""
    if "path" not in code:
        assert upstream.exchanges == []
        metrics = await house.metrics()
        assert metrics("requests_total") == metrics("requests_total", outcome="rejected") == 1
        assert metrics("requests_total", operation="chat") == (1 if "extensions" in name else 0)
        assert metrics("request_errors_total", error_type="invalid_request", source="client") == 1
        assert metrics("requests_in_flight") == 0
    await until(lambda: not connections(house), "the connection is gone")


def connections(house: House) -> int:
    [server] = [runner.server for runner in house.gateway._runners[1:]]
    assert server is not None
    return len(server.connections)


# ── paths: one decoding, one reading ──

TWO_READINGS = [
    "/v1//chat/completions",
    "//v1/chat/completions",
    "/v1/../v1/chat/completions",
    "/v1/./chat/completions",
    "/v1/chat/%2e%2e/completions",
    "/v1/chat/.%2E/completions",
    "/v1/chat/completions%00",
    "/v1/chat/completions%0d%0a",
    "/v1/chat%2fcompletions",
    "/v1/chat%2Fcompletions",
    "/v1/chat%5ccompletions",
    "/v1/chat\\completions",
    "/v1/chat/completions%",
    "/v1/chat/completions%zz",
    "/v1/chat/completions%ff",
    "/v1/chat/completions%c0%af",
    "/v1/chat/completions%ed%a0%80",
    "/v1/chat/completions%7f",
    '/v1/chat/"completions"',
    "/v1/models/..",
    "/v1/models/../chat/completions",
    "/v1/models/%2e%2e%2fadmin",
    "/v1/models/a/../../admin",
    "/v1/models/a//b",
    "/v1/models//a",
    "/v1/models/a%2f%2fb",
    "/v1/models/a%0d%0ab",
    "/v1/models/a%00",
    "/v1/models/..%5Ca",
    "/..;/admin",
    "/v1/..%252f..%252fadmin/..",
]


@pytest.mark.parametrize("path", TWO_READINGS)
async def test_a_path_with_two_readings_is_refused_and_reaches_no_upstream(
    upstream: Scripted, house: House, path: str
) -> None:
    async with wire(house.port) as line:
        line.send(request(b"", path, method="GET") + request(path=f"{CHAT}?x=/../%2f"))
        answered = await line.answer()
        if answered.status == 404:  # `..;` is a name like any other here
            assert path == "/..;/admin"
        else:
            refusal(answered, 400, "invalid_path")
        assert (await line.answer()).status == 200, "it was framed as it should be: the connection lives"
    assert [exchange.path for exchange in upstream.exchanges] == [f"{CHAT}?x=/../%2f"]


async def test_a_path_is_decoded_once(upstream: Scripted, house: House) -> None:
    async with wire(house.port) as line:
        for path in ("/v1/%63hat/completions", "/v1/chat/completion%73?a=%2F"):
            line.send(request(path=path))
            assert (await line.answer()).status == 200
        line.send(request(b"", "/v1/models/a%2541%3F", method="GET"))
        assert (await line.answer()).status == 200
        line.send(request(path="/v1/%2563hat/completions"))  # which is no endpoint of ours
        assert (await line.answer()).status == 200
    paths = [CHAT, f"{CHAT}?a=%2F", "/v1/models/a%2541%3F", "/v1/%2563hat/completions"]
    assert [exchange.path for exchange in upstream.exchanges] == paths
    assert (await house.metrics())("requests_total", operation="chat") == 2


@pytest.mark.parametrize("host", ["penstock", "penstock:8080", "127.0.0.1:80", "[::1]:8080", "a_b.example", ""])
async def test_whatever_host_is_named_decides_nothing(house: House, host: str) -> None:
    async with wire(house.port) as line:
        line.send(post().replace(b"host: penstock", b"host: " + host.encode()))
        assert (await line.answer()).status == 200


# ── a second request is only ever one that stands behind the first ──


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_request_within_a_body_does_not_run(upstream: Scripted, house: House, framing: str) -> None:
    body = json.dumps(ASK | {"pad": HIDDEN.decode()}).encode() + b"\n" + b" " * 10
    raw = post(body=body) if framing == "length" else post(CHUNKED, body=chunked(body[:50], body[50:]))
    async with wire(house.port) as line:
        line.send(raw)
        assert (await line.answer()).status == 200
    assert [exchange.json["model"] for exchange in upstream.exchanges] == ["m"]


async def test_a_body_of_a_request_that_has_none_is_not_taken_for_the_next(upstream: Scripted, house: House) -> None:
    async with wire(house.port) as line:
        line.send(b"GET /v1/models/m HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)
        assert (await line.answer()).status == 200
        line.send(request())
        assert (await line.answer()).status == 200
    assert [exchange.path for exchange in upstream.exchanges] == ["/v1/models/m", CHAT]


async def test_pipelined_requests_are_answered_in_their_order(upstream: Scripted, house: House) -> None:
    upstream.plays(*(answer(ECHO | {"id": f"a{index}"}) for index in range(20)))
    async with wire(house.port) as line:
        line.send(b"".join(request(ASK | {"model": f"m{index}"}) for index in range(20)))
        assert [(await line.answer()).json["id"] for _ in range(20)] == [f"a{index}" for index in range(20)]
    assert [exchange.json["model"] for exchange in upstream.exchanges] == [f"m{index}" for index in range(20)]


async def test_what_is_malformed_behind_a_request_ends_the_connection_after_its_answer(
    upstream: Scripted, house: House
) -> None:
    go = asyncio.Event()
    upstream.plays([go, *answer(ECHO)])
    async with wire(house.port) as line:
        line.send(request())
        await upstream.exchange()
        line.send(b"\0" + HIDDEN)
        go.set()
        assert (await line.answer()).status == 200
        refusal(await line.answer(), 400, "malformed_request")
        assert await line.until_closed() == b""
    assert len(upstream.exchanges) == 1


async def test_a_body_that_turns_malformed_is_refused_once(upstream: Scripted, house: House) -> None:
    async with wire(house.port) as line:
        line.send(post(CHUNKED, body=b'5\r\n{"mod\r\n'))
        await until(lambda: house.gateway._edge._in_flight, "it has begun")
        line.send(b"nonsense\r\n" + HIDDEN)
        refusal(await line.answer(), 400, "malformed_request")
        assert await line.until_closed() == b""
    metrics = await house.metrics()
    assert metrics("requests_total") == metrics("requests_total", operation="chat", code="400") == 1
    assert upstream.exchanges == []


async def test_small_chunks_are_no_mischief_and_large_extensions_are(upstream: Scripted, house: House) -> None:
    pad = b" " * 100_000
    async with wire(house.port) as line:
        line.send(post(CHUNKED, body=chunked(BODY, *(pad[i : i + 1] for i in range(len(pad))), extension=b";a=b")))
        assert (await line.answer()).status == 200
        line.send(post(CHUNKED, body=b"1;" + b"x" * 30_000))
        await until(lambda: house.gateway._edge._in_flight, "it has begun")
        for _ in range(4):
            line.send(b"x" * 30_000)
        refusal(await line.answer(), 400, "malformed_request")
        assert await line.until_closed() == b""


# ── slowness ──


async def test_a_head_that_does_not_end_is_refused_in_time(upstream: Scripted, house: House) -> None:
    async with wire(house.port) as line:
        line.send(request())
        assert (await line.answer()).status == 200, "a head on a connection that was used counts from its own beginning"
        began = asyncio.get_running_loop().time()
        trickle = asyncio.create_task(trickled(line, request()[:-40], every=HURRY / 10))
        refusal(await line.answer(), 408, "request_too_slow")
        assert HURRY * 0.9 < asyncio.get_running_loop().time() - began < HURRY + 2.0
        assert await line.until_closed() == b""
        trickle.cancel()
    assert len(upstream.exchanges) == 1
    metrics = await house.metrics()
    assert metrics("requests_total", operation="other", code="408") == 1


async def trickled(line: Wire, data: bytes, *, every: float) -> None:
    """One byte after the other."""
    for byte in data:
        line.send(bytes((byte,)))
        await asyncio.sleep(every)


async def test_a_head_without_end_is_refused_by_its_size(house: House) -> None:
    async with wire(house.port) as line:
        line.send(b"GET / HTTP/1.1\r\nhost: x\r\n")
        for index in range(26):
            line.send(b"x%d: " % index + b"y" * 1_000 + b"\r\n")
            await asyncio.sleep(0)
        refusal(await line.answer(), 431, "headers_too_large")


async def test_a_body_that_trickles_is_refused_in_time(upstream: Scripted, house: House) -> None:
    async with wire(house.port) as line:
        line.send(post("content-length: 100000", body=b""))
        began = asyncio.get_running_loop().time()
        trickle = asyncio.create_task(trickled(line, b" " * 1_000, every=HURRY / 20))
        refusal(await line.answer(), 408, "request_too_slow")
        assert HURRY * 0.9 < asyncio.get_running_loop().time() - began < HURRY + 2.0
        trickle.cancel()
    metrics = await house.metrics()
    assert metrics("requests_total", operation="chat", code="408") == 1
    assert upstream.exchanges == []


async def test_a_body_that_comes_fast_enough_may_take_long(upstream: Scripted, house: House) -> None:
    pad = b" " * 3_000
    async with wire(house.port) as line:
        line.send(post(f"content-length: {8 * len(pad) + len(BODY)}", body=b""))
        for _ in range(8):  # 20 kB a second, for four times as long as a head may take
            line.send(pad)
            await asyncio.sleep(HURRY / 2)
        line.send(BODY)
        assert (await line.answer()).status == 200
    assert len(upstream.exchanges) == 1


async def test_a_connection_on_which_nothing_begins_is_closed_without_a_word(upstream: Scripted) -> None:
    server = Server(port=0, admin_port=0, idle_seconds=HURRY)
    async with serving(settings(at(upstream.base_url), server=server)) as house:
        async with wire(house.port) as idle, wire(house.port) as used:
            used.send(request())
            assert (await used.answer()).status == 200
            assert await idle.until_closed() == await used.until_closed() == b""
        assert (await house.metrics())("requests_total") == 1


# ── Expect ──


async def test_a_body_is_asked_for_when_the_key_and_its_size_are_known_to_be_right(house: House) -> None:
    async with wire(house.port) as line:
        line.send(post("expect: 100-continue", f"content-length: {len(BODY)}", body=b""))
        assert await line.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.send(BODY)
        assert (await line.answer()).status == 200


async def test_a_body_that_would_be_refused_is_not_asked_for(upstream: Scripted) -> None:
    server = Server(port=0, admin_port=0, max_body_bytes=1000)
    keys = {"team": "sk-team-0123456789abcdef"}
    async with serving(settings(at(upstream.base_url), server=server, callers=keys)) as house:
        bearer = f"authorization: Bearer {keys['team']}"
        for lines, status, code in (
            (("content-length: 500",), 401, "invalid_api_key"),
            (("content-length: 5000", bearer), 413, "request_too_large"),
        ):
            async with wire(house.port) as line:
                line.send(post("expect: 100-continue", *lines, body=b""))
                refusal(await line.answer(), status, code)
                assert line.headers["connection"] == "close", "else what comes may be the body, or the next request"


async def test_another_expectation_is_refused(house: House) -> None:
    async with wire(house.port) as line:
        line.send(post("expect: tea", "content-length: 5", body=b""))
        refusal(await line.answer(), 417, "expectation_failed")


# ── HTTP/1.0 ──


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_a_client_of_http_1_0_is_answered_without_chunks(
    upstream: Scripted, house: House, stream: bool, keep: bool
) -> None:
    if stream:
        upstream.plays(streamed(*TELLING))
    lines = ["connection: keep-alive"] if keep else []
    async with wire(house.port) as line:
        line.send(post(*lines, body=json.dumps(ASK | {"stream": stream}).encode(), version="1.0"))
        assert await line.head() == 200
        assert "transfer-encoding" not in line.headers
        if stream:
            assert await line.until_closed() == b"".join(TELLING)
        else:
            assert json.loads(await line.reader.readexactly(int(line.headers["content-length"]))) == ECHO
            if not keep:
                assert await line.until_closed() == b""


# ── too many connections ──


async def test_beyond_their_number_connections_are_told_so_and_closed(
    upstream: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(port=0, admin_port=0, max_connections=2)
    async with serving(settings(at(upstream.base_url), server=server)) as house:
        async with wire(house.port) as first, wire(house.port) as second:
            for line in (first, second):
                line.send(request())
                assert (await line.answer()).status == 200
            for _ in range(2):
                async with wire(house.port) as third:
                    told = await third.answer()
                    assert (told.status, told.error["code"]) == (503, "too_many_connections")
                    assert (told.headers["x-should-retry"], await third.reader.read()) == ("true", b"")
            first.send(request())
            assert (await first.answer()).status == 200
        assert (await house.ask()).status == 200
    said = [record.getMessage() for record in caplog.records if record.name == "penstock.connections"]
    assert said == ["clients are turned away: they have 2 connections, which is server.max_connections"]
