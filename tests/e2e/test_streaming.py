"""Answers on their way through: every byte as the upstream sent it, however it cuts, breaks, stalls or floods."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from proxy.config import Limits, Model, Retry
from tests.e2e.running import ASK, CHAT, House, at, serving, settings, until, until_still
from tests.e2e.scripted import (
    DONE,
    ECHO,
    EVENT_STREAM,
    LAST,
    TELLING,
    USAGE,
    Act,
    Play,
    Scripted,
    Step,
    answer,
    chunk,
    event,
    scripted,
    stream,
    words,
)
from tests.e2e.wire import request, wire

NO_LIMITS = Limits(learn=False)
ONCE = Retry(attempts=1)
STREAM = ASK | {"stream": True}
WITH_USAGE = STREAM | {"stream_options": {"include_usage": True}}
ODD = b"".join(  # all that a stream may hold: comments, CRLF, CR, a BOM, U+2028, characters of four bytes, half a pair
    (
        b"\xef\xbb\xbf: keep-alive\n\n",
        words("Zürich \u2028 🏔"),
        words("crlf").replace(b"\n", b"\r\n"),
        words("cr").replace(b"\n", b"\r"),
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n',
        b"event: ping\nid: 7\nretry: 10\ndata: {}\n\n",
        b"data: " + json.dumps({"choices": [], "pad": "x" * 3000}).encode() + b"\n\n",
        words("", "stop"),
    )
)
JSON_CHUNKED = EVENT_STREAM.replace(b"text/event-stream", b"application/json")
JSON_SHORT = JSON_CHUNKED.replace(b"transfer-encoding: chunked", b"content-length: 999")
COMPRESSED = EVENT_STREAM.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
HEAD_CLOSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def in_band(told: bytes) -> dict[str, object]:
    """The error that ends a broken stream: one event, and no end mark."""
    assert told.startswith(b"event: error\ndata: ")
    assert told.endswith(b"\n\n")
    assert told.count(b"\n") == 3
    error = json.loads(told.partition(b"data: ")[2])["error"]
    assert isinstance(error, dict)
    return error


# ── bytes ──


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    edges = [0, *sorted(cuts), len(data)]
    return (data[begin:end] for begin, end in itertools.pairwise(edges) if end > begin)


@pytest.mark.parametrize("usage", ["wanted", "hidden"])
@pytest.mark.parametrize("cut", ["whole", "each byte", *range(5)])
async def test_bytes_pass_unchanged_however_they_are_cut(
    upstream: Scripted, house: House, cut: str | int, usage: str
) -> None:
    body = ODD + USAGE + DONE
    chance = random.Random(f"{cut} {usage}")
    if cut == "whole":
        cuts: Iterable[int] = ()
    elif cut == "each byte":
        cuts = range(1, len(body))
    else:
        cuts = chance.sample(range(1, len(body)), chance.randint(1, 200))
    framed = EVENT_STREAM + b"".join(chunk(piece) for piece in pieces(body, cuts)) + LAST
    writes = list(pieces(framed, chance.sample(range(1, len(framed)), 60)))  # cuts between chunks and within them
    upstream.plays(writes)
    answered = await house.ask(WITH_USAGE if usage == "wanted" else STREAM)
    assert answered.body == (body if usage == "wanted" else ODD + DONE)
    metrics = await house.metrics()
    assert metrics("requests_total", outcome="ok", stream="true") == 1
    assert metrics("tokens_total", type="output") == 2


async def test_what_the_network_brought_goes_on_at_once(upstream: Scripted, house: House) -> None:
    steps: list[Step] = [EVENT_STREAM]
    gates = []
    for number in range(20):
        gates.append(asyncio.Event())
        steps += [chunk(words(str(number))), gates[-1]]
    upstream.plays([*steps, chunk(TELLING[2] + DONE), LAST])
    async with wire(house.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        for number, gate in enumerate(gates):
            assert await line.chunk() == words(str(number))
            gate.set()
        assert await line.chunk() == TELLING[2] + DONE
        assert await line.chunk() == b""


async def test_an_event_longer_than_any_sane_one_passes(upstream: Scripted, house: House) -> None:
    long = event({"choices": [{"index": 0, "delta": {"content": "x" * (3 << 20)}}]})
    body = words("one") + long + words("", "stop") + DONE
    upstream.plays([EVENT_STREAM, *(chunk(piece) for piece in pieces(body, range(50_000, len(body), 50_000))), LAST])
    assert (await house.ask(STREAM)).body == body


@pytest.mark.parametrize("framing", ["length", "until closed"])
async def test_streams_that_are_not_chunked_pass_too(upstream: Scripted, house: House, framing: str) -> None:
    body = b"".join(TELLING)
    if framing == "length":
        upstream.plays(answer(body, headers={"content-type": "text/event-stream"}))
    else:
        upstream.plays([HEAD_CLOSE + body, Act.FIN])
    answered = await house.ask(STREAM)
    assert answered.body == body
    assert (await house.metrics())("requests_total", outcome="ok") == 1


async def test_a_compressed_stream_passes_as_it_is(upstream: Scripted, house: House) -> None:
    body = gzip.compress(b"".join(TELLING))
    upstream.plays([COMPRESSED, chunk(body[:30]), chunk(body[30:]), LAST])
    answered = await house.ask(STREAM)
    assert answered.headers["content-encoding"] == "gzip"
    assert answered.body == body
    assert upstream.exchanges[0].headers["accept-encoding"] == "identity"


async def test_a_large_answer_that_is_not_streamed_passes(upstream: Scripted, house: House) -> None:
    body = json.dumps(ECHO | {"pad": "x" * (12 << 20)}).encode()
    upstream.plays(answer(body))
    answered = await house.ask()
    assert answered.body == body
    assert answered.headers["content-length"] == str(len(body))


async def test_an_error_told_in_the_stream_passes_and_nothing_is_added(upstream: Scripted, house: House) -> None:
    body = words("one") + event({"error": {"message": "overheated", "type": "server_error", "code": None}})
    upstream.plays(stream(body), stream(body, DONE))
    assert (await house.ask(STREAM)).body == body
    assert (await house.ask(STREAM)).body == body + DONE
    assert (await house.metrics())("requests_total", outcome="failed", code="200") == 2


async def test_a_connection_serves_the_next_call_after_a_whole_answer_only(upstream: Scripted, house: House) -> None:
    upstream.plays(stream(*TELLING), answer(ECHO), [EVENT_STREAM, chunk(words("one")), Act.SILENCE], answer(ECHO))
    await house.ask(STREAM)
    await house.ask()
    assert upstream.connections == 1
    async with wire(house.port) as line:
        line.send(request(STREAM))
        await line.head()
        await line.chunk()
    await (await upstream.exchange(2)).gone.wait()
    assert upstream.connections == 0
    assert (await house.ask()).status == 200


# ── broken off ──


async def told_at_the_end(upstream: Scripted, house: House, begun: bytes, end: list[Step]) -> bytes:
    """What the client hears after the first event; `end` is played once it has heard that."""
    seen = asyncio.Event()
    upstream.plays([begun, seen, *end])
    async with wire(house.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == words("one")
        seen.set()
        return await line.rest()  # the answer itself is well-formed


CHUNKED = EVENT_STREAM + chunk(words("one"))
SHORT = EVENT_STREAM.replace(b"transfer-encoding: chunked", b"content-length: 999") + words("one")


@pytest.mark.parametrize(
    ("begun", "end", "reason"),
    [
        (CHUNKED, [b"400\r\ndata: half", Act.FIN], "upstream_reset"),
        (CHUNKED, [chunk(words("two")[:20]), Act.FIN], "upstream_reset"),
        (CHUNKED, [Act.RST], "upstream_reset"),
        (CHUNKED, [LAST], "upstream_eof"),
        (CHUNKED, [chunk(words("two")[:20]), LAST], "upstream_eof"),
        (HEAD_CLOSE + words("one"), [Act.FIN], "upstream_eof"),
        (SHORT, [Act.FIN], "upstream_reset"),
    ],
    ids=[
        "FIN in a chunk",
        "FIN in an event",
        "RST",
        "end without a mark",
        "end in an event",
        "close without a mark",
        "short of its length",
    ],
)
async def test_a_stream_that_breaks_off_says_so_in_band(
    upstream: Scripted, house: House, begun: bytes, end: list[Step], reason: str
) -> None:
    error = in_band(await told_at_the_end(upstream, house, begun, end))
    assert error["code"] == "stream_truncated"
    assert error["type"] == "upstream_error"
    assert len(upstream.exchanges) == 1
    metrics = await house.metrics()
    assert metrics("requests_total", outcome="truncated", code="200") == 1
    assert metrics("stream_aborts_total", reason=reason) == 1
    assert metrics("usage_missing_total", reason="aborted") == 1


async def test_a_stream_that_falls_silent_says_so_in_band(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url, idle_seconds=0.1))) as house:
        told = await told_at_the_end(upstream, house, CHUNKED, [Act.SILENCE])
        metrics = await house.metrics()
    assert in_band(told)["code"] == "stream_truncated"
    assert upstream.exchanges[0].gone.is_set()
    assert metrics("stream_aborts_total", reason="idle_timeout") == 1


@pytest.mark.parametrize("then", [b"zz\r\n", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["no size", "a head"])
async def test_a_stream_that_goes_on_with_what_is_no_chunk_is_broken_at_once(
    upstream: Scripted, house: House, then: bytes
) -> None:
    told = await told_at_the_end(upstream, house, CHUNKED, [then, Act.SILENCE])
    assert in_band(told)["code"] == "stream_truncated"
    assert upstream.exchanges[0].gone.is_set()
    assert (await house.metrics())("stream_aborts_total", reason="malformed_sse") == 1


@pytest.mark.parametrize("end", [Act.FIN, Act.RST])
@pytest.mark.parametrize("half", [b'{"id":"c', json.dumps(ECHO).encode()[:-1]], ids=["little", "nearly all"])
async def test_a_cut_answer_without_a_length_is_known_by_its_json(
    upstream: Scripted, house: House, half: bytes, end: Act
) -> None:
    seen = asyncio.Event()
    head = b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n"
    upstream.plays([head + half, seen, end], [head + json.dumps(ECHO).encode(), Act.FIN])
    async with wire(house.port) as line:
        line.send(request())
        assert await line.head() == 200
        assert await line.chunk() == half
        seen.set()
        assert await line.until_closed() == b""  # no last chunk
    assert (await house.ask()).json == ECHO
    metrics = await house.metrics()
    assert metrics("requests_total", outcome="truncated") == 1
    assert metrics("requests_total", outcome="ok") == 1


async def test_an_answer_without_a_length_of_which_nothing_comes_is_tried_again(
    upstream: Scripted, house: House
) -> None:
    upstream.plays([b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n", Act.FIN], answer(ECHO))
    assert (await house.ask()).json == ECHO
    assert len(upstream.exchanges) == 2


@pytest.mark.parametrize("left", [b"data: [DONE]", b"data: [DONE]\n"])
async def test_an_end_mark_without_its_blank_line_is_no_end_when_the_connection_breaks(
    upstream: Scripted, house: House, left: bytes
) -> None:
    """No client would see it: the answer is not whole for whoever waits for it."""
    told = await told_at_the_end(upstream, house, CHUNKED, [chunk(TELLING[2] + left), Act.RST])
    before, _, error = told.partition(b"event: error")
    assert before == TELLING[2]
    assert in_band(b"event: error" + error)["code"] == "stream_truncated"


async def test_a_compressed_answer_that_lasts_until_its_connection_closes_is_cut_by_a_reset(
    upstream: Scripted, house: House
) -> None:
    seen = asyncio.Event()
    upstream.plays(
        [HEAD_CLOSE.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n") + b"\x1f\x8b", seen, Act.RST]
    )
    async with wire(house.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == b"\x1f\x8b"
        seen.set()
        assert await line.until_closed() == b""
    assert (await house.metrics())("requests_total", outcome="truncated") == 1


@pytest.mark.parametrize("end", [Act.FIN, Act.RST, Act.SILENCE])
@pytest.mark.parametrize("after", [b"", chunk(b": late\n\n"), chunk(words("late") * 2000)], ids=["", "little", "much"])
async def test_a_stream_is_over_with_its_end_mark_whatever_follows(
    upstream: Scripted, house: House, after: bytes, end: Act
) -> None:
    body = b"".join(TELLING)
    upstream.plays([EVENT_STREAM + chunk(body) + after, end])
    async with wire(house.port) as line:
        line.send(request(STREAM))
        await line.head()
        assert await line.rest() == body
    await upstream.exchanges[0].gone.wait()
    await house.until_idle(seconds=1.0)
    assert (await house.metrics())("requests_total", outcome="ok") == 1


async def test_an_upstream_that_is_slow_to_end_its_stream_keeps_its_connection(
    upstream: Scripted, house: House
) -> None:
    told = asyncio.Event()
    upstream.plays([EVENT_STREAM + chunk(b"".join(TELLING)), told, LAST], answer(ECHO))
    async with wire(house.port) as line:
        line.send(request(STREAM))
        await line.head()
        assert (await line.rest()).endswith(DONE)
        told.set()
        await house.until_idle()
        assert (await house.ask()).status == 200
    assert upstream.connections == 1


async def test_a_finish_reason_ends_a_stream_as_well_as_a_mark(upstream: Scripted, house: House) -> None:
    body = words("one") + words("", "stop")
    upstream.plays(stream(body), stream(body + b"data: [DONE]"))  # no mark at all; no blank line behind it
    assert (await house.ask(STREAM)).body == body
    assert (await house.ask(STREAM)).body == body + b"data: [DONE]"
    assert (await house.metrics())("requests_total", outcome="ok") == 2


@pytest.mark.parametrize("head", [JSON_CHUNKED, JSON_SHORT, COMPRESSED], ids=["chunked", "length", "gzip"])
@pytest.mark.parametrize("end", [Act.FIN, Act.RST])
async def test_a_cut_answer_that_no_error_can_be_told_in_comes_short_to_the_client(
    upstream: Scripted, house: House, head: bytes, end: Act
) -> None:
    chunked = b"chunked" in head
    seen = asyncio.Event()
    half = json.dumps(ECHO).encode()[:100]
    upstream.plays([head, chunk(half) if chunked else half, seen, end])
    async with wire(house.port) as line:
        line.send(request())
        assert await line.head() == 200
        assert (await line.chunk() if chunked else await line.reader.readexactly(100)) == half
        seen.set()
        assert await line.until_closed() == b""  # neither the rest, nor a last chunk
    assert len(upstream.exchanges) == 1
    await house.until_idle()
    assert (await house.metrics())("requests_total", outcome="truncated") == 1


# ── before the first byte ──


@pytest.mark.parametrize(
    "broken",
    [
        [Act.FIN],
        [Act.RST],
        [b"HTTP/1.1 200 O", Act.FIN],
        [EVENT_STREAM, Act.FIN],
        [EVENT_STREAM, chunk(words("one")[:30]), Act.RST],
        [EVENT_STREAM, LAST],
        [b"SSH-2.0-OpenSSH_9.6\r\n", Act.FIN],
    ],
    ids=["FIN", "RST", "half a head", "a head alone", "half an event", "nothing", "garbage"],
)
async def test_what_breaks_before_the_first_byte_is_tried_again(upstream: Scripted, house: House, broken: Play) -> None:
    upstream.plays(broken, broken, stream(*TELLING))
    answered = await house.ask(STREAM)
    assert (answered.status, answered.body) == (200, b"".join(TELLING))
    assert len(upstream.exchanges) == 3
    metrics = await house.metrics()
    assert metrics("requests_total", outcome="ok") == 1
    assert metrics("upstream_retries_total") == 2


async def test_a_connection_that_went_stale_in_the_pool_is_no_failure(upstream: Scripted, house: House) -> None:
    upstream.otherwise = [*answer(ECHO), Act.FIN]  # promises to keep the connection, and closes it
    for _ in range(10):
        assert (await house.ask()).status == 200


@pytest.mark.parametrize(
    ("play", "status", "code"),
    [
        ([Act.SILENCE], 504, "upstream_timeout"),
        ([b"HTTP/1.1 200 OK\r\ncontent-", Act.SILENCE], 504, "upstream_timeout"),
        ([EVENT_STREAM, Act.SILENCE], 504, "upstream_timeout"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n", Act.SILENCE], 502, "upstream_garbage"),
        ([b"\x16\x03\x01\x00\xa5\x01", Act.FIN], 502, "upstream_garbage"),
        ([Act.FIN], 502, "upstream_broke"),
        ([Act.RST], 502, "upstream_broke"),
    ],
    ids=["silence", "half a head", "a head alone", "another protocol", "TLS", "FIN", "RST"],
)
async def test_an_upstream_that_never_answers_is_told_apart_by_code(
    upstream: Scripted, play: Play, status: int, code: str
) -> None:
    upstream.otherwise = play
    hasty = at(upstream.base_url, connect_seconds=0.1, first_byte_seconds=0.1, idle_seconds=0.1)
    async with serving(settings(hasty, retry=ONCE)) as house:
        answered = await house.ask(STREAM)
        metrics = await house.metrics()
    assert (answered.status, answered.error["code"]) == (status, code)
    assert answered.headers["x-should-retry"] == "false"
    assert upstream.exchanges[0].gone.is_set()
    assert metrics("requests_total", outcome="failed", code=str(status)) == 1


async def test_the_wait_for_the_first_byte_begins_with_the_connection(upstream: Scripted) -> None:
    """And not before it: a server that takes connections and says nothing is late after `first_byte_seconds`."""
    upstream.otherwise = [Act.SILENCE]
    patient = at(upstream.base_url, connect_seconds=60.0, first_byte_seconds=0.1)
    async with asyncio.timeout(30.0), serving(settings(patient, retry=ONCE)) as house:
        answered = await house.ask()
    assert (answered.status, answered.error["code"]) == (504, "upstream_timeout")


async def test_a_server_that_never_shakes_hands_is_no_connection(upstream: Scripted) -> None:
    upstream.otherwise = [Act.SILENCE]
    tls = at(upstream.base_url.replace("http:", "https:"), connect_seconds=0.1, first_byte_seconds=60.0)
    async with asyncio.timeout(30.0), serving(settings(tls, retry=ONCE)) as house:
        answered = await house.ask()
        metrics = await house.metrics()
    assert (answered.status, answered.error["code"]) == (502, "upstream_unreachable")
    assert metrics("upstream_connect_errors_total", reason="timeout") == 1


@contextmanager
def deaf() -> Iterator[int]:
    """A port whose queue of connections is full: who connects hears nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for each in waiting:
            each.close()


async def test_no_connection_is_told_apart_from_no_answer() -> None:
    with deaf() as port, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else takes it; not listening, so that it refuses
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        upstreams = {
            "refusing": at(refusing),
            "deaf": at(f"http://127.0.0.1:{port}/v1", connect_seconds=0.2),
            "nowhere": at("http://penstock.invalid/v1"),
        }
        models = {name: Model(upstreams=(name,)) for name in upstreams}
        async with serving(settings(upstreams, models=models, retry=ONCE)) as house:
            answers = [await house.ask(ASK | {"model": name}) for name in upstreams]
            metrics = await house.metrics()
    assert [answer.status for answer in answers] == [502, 502, 502]
    assert {answer.error["code"] for answer in answers} == {"upstream_unreachable"}
    assert metrics("upstream_attempts_total", result="connect") == 3


async def test_a_redirect_is_not_followed(upstream: Scripted, house: House) -> None:
    async with scripted() as elsewhere:
        upstream.plays(answer(b"", 307, {"location": f"{elsewhere.base_url}/chat/completions", "set-cookie": "a=b"}))
        async with house.http.post(house.origin + CHAT, json=ASK, allow_redirects=False) as answered:
            assert "set-cookie" not in answered.headers
            assert answered.headers["location"] == "/v1/chat/completions", "the gateway's own, not the upstream's"
    assert elsewhere.exchanges == []
    assert "cookie" not in (await house.ask(), upstream.exchanges[-1])[1].headers


# ── back-pressure ──


async def test_a_client_that_does_not_read_stops_the_upstream(upstream: Scripted, house: House) -> None:
    data = words("x" * 65_000)
    count = 600
    upstream.plays(
        itertools.chain([EVENT_STREAM], itertools.repeat(chunk(data), count), [chunk(TELLING[2] + DONE), LAST])
    )
    async with wire(house.port, receive_buffer=1 << 16) as line:
        line.send(request(STREAM))
        exchange = await upstream.exchange()
        stalled_at = await until_still(lambda: exchange.sent)
        assert stalled_at < count * len(data) / 2  # what fits into four sockets' buffers, and hardly more
        assert await line.head() == 200
        received = len(await line.rest())
    assert received == count * len(data) + len(TELLING[2] + DONE)
    await until(lambda: not house.in_flight)


async def test_a_slow_reader_is_not_the_upstream_s_silence(upstream: Scripted) -> None:
    data = words("x" * 65_000)
    play = [EVENT_STREAM, *itertools.repeat(chunk(data), 400), chunk(TELLING[2] + DONE), LAST]
    upstream.plays(play)
    async with serving(settings(at(upstream.base_url, idle_seconds=0.2))) as house:
        async with wire(house.port, receive_buffer=1 << 16) as line:
            line.send(request(STREAM))
            exchange = await upstream.exchange()
            await until_still(lambda: exchange.sent, for_seconds=0.5)
            assert await line.head() == 200
            received = await line.rest()
        metrics = await house.metrics()
    assert received.endswith(DONE)
    assert metrics("requests_total", outcome="ok") == 1
