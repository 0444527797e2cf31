"""Silence: comments keep a stream alive from the queue to its end, and whoever takes nothing more is cut off."""

from __future__ import annotations

import asyncio
import resource
import socket
from contextlib import ExitStack

import pytest
from openai import APIError

from proxy.api.answering import Streams
from proxy.app import allow_descriptors
from proxy.config import Gate, Limits, Retry, Server
from tests.e2e.running import ASK, HELLO, at, serving, settings, until
from tests.e2e.scripted import (
    DONE,
    ECHO,
    EVENT_STREAM,
    LAST,
    TELLING,
    Act,
    Scripted,
    answer,
    chunk,
    event,
    refusal,
    scripted,
    stream,
    words,
)
from tests.e2e.test_streaming import in_band
from tests.e2e.wire import request, wire

STREAM = ASK | {"stream": True}
PING = b": ping\n\n"
HASTY = Server(port=0, admin_port=0, ping_seconds=0.1)
FREE = Limits(learn=False)
ONCE = Retry(attempts=1)


def unpinged(told: bytes) -> bytes:
    return told.replace(PING, b"")


async def test_a_silent_stream_is_kept_alive_between_its_events(upstream: Scripted) -> None:
    going = asyncio.Event()
    half = words("two")
    upstream.plays(
        [EVENT_STREAM + chunk(words("one")) + chunk(half[:20]), going, chunk(half[20:] + TELLING[2] + DONE), LAST]
    )
    async with serving(settings(at(upstream.base_url), server=HASTY)) as house, wire(house.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == words("one")
        began = asyncio.get_running_loop().time()
        assert [await line.chunk() for _ in range(3)] == [PING] * 3  # between events, though half of one is there
        assert asyncio.get_running_loop().time() - began > 0.2
        going.set()
        assert unpinged(await line.rest()) == half + TELLING[2] + DONE
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("stream_pings_total", operation="chat") >= 3
    assert metrics("requests_total", outcome="ok") == 1


async def test_a_stream_that_waits_in_the_queue_begins_with_comments(upstream: Scripted) -> None:
    going = asyncio.Event()
    upstream.plays([going, *answer(ECHO)], stream(*TELLING))
    one_place = settings(at(upstream.base_url, limits=FREE), server=HASTY, gate=Gate(concurrency=1))
    async with serving(one_place) as house, wire(house.port) as first, wire(house.port) as second:
        first.send(request())
        await upstream.exchange()
        second.send(request(STREAM))
        assert await second.head() == 200
        assert second.headers["content-type"].startswith("text/event-stream")
        assert [await second.chunk() for _ in range(2)] == [PING] * 2
        assert house.waiting == 1
        going.set()
        assert unpinged(await second.rest()) == b"".join(TELLING)
        assert await first.head() == 200  # who did not ask for a stream gets nothing before its answer
        assert first.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("play", "code"),
    [
        (refusal(400, "context_length_exceeded", message="too long"), "context_length_exceeded"),
        (refusal(503, "model_loading"), "model_loading"),
        ([Act.FIN], "upstream_broke"),
        (answer(b"gone fishing\n", 500), "upstream_garbage"),
        (answer(ECHO), "upstream_garbage"),
    ],
    ids=["400", "503", "broke", "plain text", "not a stream"],
)
async def test_what_fails_after_the_first_comment_is_told_in_band(
    upstream: Scripted, play: list[bytes | Act], code: str
) -> None:
    going = asyncio.Event()
    upstream.plays([going, *play])
    async with (
        serving(settings(at(upstream.base_url), server=HASTY, retry=ONCE)) as house,
        wire(house.port) as line,
    ):
        line.send(request(STREAM))
        assert await line.head() == 200
        assert await line.chunk() == PING
        going.set()
        assert in_band(unpinged(await line.rest()))["code"] == code
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("requests_total", code="200", outcome="ok") == (play == answer(ECHO))
    assert metrics("requests_total", code="200") == 1


async def test_a_comment_does_not_keep_the_next_upstream_from_being_asked(upstream: Scripted) -> None:
    async with scripted(stream(*TELLING)) as second:
        going = asyncio.Event()
        upstream.plays([going, Act.RST])
        both = {"up": at(upstream.base_url), "second": at(second.base_url)}
        async with serving(settings(both, server=HASTY)) as house, wire(house.port) as line:
            line.send(request(STREAM))
            assert await line.head() == 200
            assert await line.chunk() == PING
            going.set()
            assert unpinged(await line.rest()) == b"".join(TELLING)


async def test_the_sdk_skips_comments_and_raises_what_is_told_in_band(upstream: Scripted) -> None:
    going = asyncio.Event()
    upstream.plays(
        [going, EVENT_STREAM + chunk(words("one")), going, chunk(words("", "stop") + DONE), LAST],
        [going, *refusal(400, "context_length_exceeded", message="too long")],
    )
    async with serving(settings(at(upstream.base_url), server=HASTY)) as house, house.sdk() as sdk:
        asked = asyncio.ensure_future(sdk.chat.completions.create(model="m", messages=HELLO, stream=True))
        told = await asked  # its headers came with a comment
        going.set()
        assert [part.choices[0].delta.content async for part in told] == ["one", None]
        going.clear()
        told = await sdk.chat.completions.create(model="m", messages=HELLO, stream=True)
        going.set()
        with pytest.raises(APIError, match="too long") as raised:
            _ = [part async for part in told]
        assert raised.value.code == "context_length_exceeded"


async def test_a_stream_that_ends_while_another_is_pinged_gets_no_comment_behind_its_end() -> None:
    class Answer:
        """Ends the other one when it is pinged."""

        pinged = 0

        def is_silent(self) -> bool:
            return True

        async def ping(self) -> None:
            Answer.pinged += 1
            streams.open -= streams.open - {self}  # type: ignore[arg-type]

    streams = Streams(0.04, 60.0)
    streams.open = {Answer(), Answer()}  # type: ignore[arg-type]
    keeping = asyncio.ensure_future(streams.keep_alive())
    await until(lambda: Answer.pinged)
    await asyncio.sleep(0)
    assert (Answer.pinged, len(streams.open)) == (1, 1)
    keeping.cancel()


async def test_without_ping_seconds_nothing_leaves_before_the_first_byte(upstream: Scripted) -> None:
    upstream.plays([Act.SILENCE])
    quiet = Server(port=0, admin_port=0, ping_seconds=0)
    hasty = at(upstream.base_url, connect_seconds=0.1, first_byte_seconds=0.3)
    async with serving(settings(hasty, server=quiet, retry=ONCE)) as house:
        assert (await house.stream()).status == 504


@pytest.mark.parametrize("encoding", ["", "content-encoding: gzip\r\n"])
async def test_what_is_no_readable_stream_gets_no_comments(upstream: Scripted, encoding: str) -> None:
    """A compressed one, or one event that is longer than any that is held back."""
    head = EVENT_STREAM.replace(b"\r\n\r\n", f"\r\n{encoding}\r\n".encode())
    first = b"data: " + b"x" * (3 << 19)
    going = asyncio.Event()
    upstream.plays([head + chunk(first), going, chunk(b"\n\n" + TELLING[2] + DONE), LAST])
    async with serving(settings(at(upstream.base_url), server=HASTY)) as house, wire(house.port) as line:
        line.send(request(STREAM))
        assert await line.head() == 200
        received = b""
        while len(received) < len(first):
            received += await line.chunk()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await line.reader.readexactly(1)
        going.set()
        assert received + await line.rest() == first + b"\n\n" + TELLING[2] + DONE


# ── readers that stop ──

IMPATIENT = Server(port=0, admin_port=0, write_stall_seconds=0.3)
FLOOD = [EVENT_STREAM, *[chunk(words("x" * 65_000))] * 400]


@pytest.mark.parametrize("kind", ["stream", "whole"])
async def test_a_reader_that_stops_is_cut_off_and_gives_its_place_back(upstream: Scripted, kind: str) -> None:
    upstream.plays(FLOOD if kind == "stream" else answer(ECHO | {"pad": "x" * (16 << 20)}))
    async with serving(settings(at(upstream.base_url), server=IMPATIENT)) as house:
        async with wire(house.port, receive_buffer=1 << 16) as line:
            line.send(request(STREAM if kind == "stream" else ASK))
            exchange = await upstream.exchange()
            await exchange.gone.wait()
            await house.until_idle()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await line.reader.readexactly(64 << 20)
        metrics = await house.metrics()
    assert metrics("client_disconnects_total", phase="stalled") == metrics("client_disconnects_total") == 1
    assert metrics("requests_total", outcome="cancelled", code="200") == 1
    assert metrics("stream_aborts_total", reason="client_stalled") == (kind == "stream")


async def test_a_slow_reader_is_not_one_that_has_stopped(upstream: Scripted) -> None:
    upstream.plays([EVENT_STREAM, *[chunk(words("x" * 65_000))] * 100, chunk(TELLING[2] + DONE), LAST])
    async with (
        serving(settings(at(upstream.base_url), server=IMPATIENT)) as house,
        wire(house.port, receive_buffer=1 << 16) as line,
    ):
        line.send(request(STREAM))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += await line.reader.read(1 << 18)
            await asyncio.sleep(0.02)  # slowness is what is tested; all of it takes longer than a stall may
        await house.until_idle()
        assert (await house.metrics())("requests_total", outcome="ok") == 1


@pytest.mark.timeout(60)  # seven times as many as there are places, each of which is waited for until it stalls
async def test_a_thousand_readers_that_stop_leave_room_for_the_others(upstream: Scripted) -> None:
    """They hold places and memory no longer than a stall lasts, and little of it."""
    upstream.improvises = lambda: FLOOD[:9] if b"stream" in upstream.exchanges[-1].body else answer(ECHO)
    allow_descriptors()
    dead, before = 1000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    places = settings(at(upstream.base_url, limits=FREE), server=IMPATIENT, gate=Gate(concurrency=150))
    async with serving(places) as house:
        with ExitStack() as stack:
            for _ in range(dead):
                line = stack.enter_context(socket.socket())
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
                line.setblocking(False)
                await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", house.port))
                line.send(request(STREAM))
            await until(lambda: len(upstream.exchanges) == dead, seconds=15.0)
            await house.until_idle()
            assert (await house.ask()).status == 200
            metrics = await house.metrics()
            await until(lambda: upstream.connections <= 1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert metrics("client_disconnects_total", phase="stalled") == dead
    assert grown < 400 * 1024, f"{grown} KiB"  # 2 MiB for each that is in flight, the test's own ends among them


# ── clients that leave ──


async def test_an_answer_is_read_on_for_its_usage_after_its_client_has_left(upstream: Scripted) -> None:
    going = asyncio.Event()
    usage = event({"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    upstream.plays([EVENT_STREAM + chunk(words("one")), going, chunk(words("", "stop") + usage + DONE), LAST])
    async with serving(settings(at(upstream.base_url, drain_seconds=5))) as house:
        async with wire(house.port) as line:
            line.send(request(STREAM))
            await line.head()
            await line.chunk()
            line.vanish()
        assert house.in_flight == 1  # its place is taken until the upstream is done
        going.set()
        await house.until_idle()
        metrics = await house.metrics()
        assert (await house.ask()).status == 200
    assert upstream.connections == 0 or len(upstream.exchanges) == 2
    assert metrics("requests_total", outcome="cancelled") == 1
    assert metrics("tokens_total", type="output") == 2
    assert metrics("usage_missing_total") == 0
    assert metrics("drained_answers_total", result="whole") == 1


async def test_an_answer_is_read_on_for_no_longer_than_it_may(upstream: Scripted) -> None:
    upstream.plays([EVENT_STREAM + chunk(words("one")), Act.SILENCE])
    async with serving(settings(at(upstream.base_url, drain_seconds=0.2))) as house:
        async with wire(house.port) as line:
            line.send(request(STREAM))
            await line.head()
            await line.chunk()
        await upstream.exchanges[0].gone.wait()
        await house.until_idle()
        metrics = await house.metrics()
    assert metrics("drained_answers_total", result="late") == 1
    assert metrics("usage_missing_total", reason="aborted") == 1
