"""Clients that leave, in every state of a call: what was theirs is free at once, and nothing of them is left."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import aiohttp
import pytest

from proxy.config import Gate, Limits, Model
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import ASK, CHAT, House, at, descriptors, serving, settings, until
from tests.e2e.scripted import ECHO, EVENT_STREAM, Act, Play, Scripted, answer, chunk, refusal, words
from tests.e2e.wire import Wire, request, wire

AT_ONCE = 0.1  # seconds
STREAM = ASK | {"stream": True}
STALLED: Play = (EVENT_STREAM, chunk(words("one")), Act.SILENCE)
ONE_PLACE = {"models": {"*": Model(upstreams=("up",), limits=Limits(concurrency=1, learn=False))}}


async def free_at_once(house: House, *also: asyncio.Event) -> None:
    """Everything of the one call is given back within AT_ONCE from now."""
    loop = asyncio.get_running_loop()
    left = loop.time()
    async with asyncio.timeout(5.0):
        for event in also:
            await event.wait()
    await house.until_idle()
    assert loop.time() - left < AT_ONCE


@pytest.mark.parametrize("leave", [Wire.leave, Wire.vanish], ids=["FIN", "RST"])
async def test_a_client_that_leaves_a_stream_frees_its_place_and_the_upstream(
    upstream: Scripted, house: House, leave: Callable[[Wire], None]
) -> None:
    upstream.plays(STALLED)
    async with wire(house.port) as line:
        line.send(request(STREAM))
        await line.head()
        assert await line.chunk() == words("one")
        assert house.in_flight == 1
        leave(line)
        await free_at_once(house, upstream.exchanges[0].gone)
    metrics = await house.metrics()
    assert metrics("client_disconnects_total", phase="streaming") == 1
    assert metrics("requests_total", outcome="cancelled", code="200") == 1
    assert metrics("stream_aborts_total", reason="client_disconnect") == 1
    assert metrics("requests_in_flight") == 0
    assert metrics("upstream_attempts_total", result="cancelled") == 1


async def test_a_client_that_is_killed_frees_its_place_and_the_upstream(upstream: Scripted, house: House) -> None:
    upstream.plays(STALLED)
    program = (
        "import socket, sys\n"
        f"line = socket.create_connection(('127.0.0.1', {house.port}))\n"
        f"line.sendall({request(STREAM)!r})\n"
        "while b'one' not in line.recv(65536): pass\n"
        "print('streaming', flush=True)\n"
        "line.recv(65536)\n"
    )
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert await client.stdout.readline() == b"streaming\n"
    assert house.in_flight == 1
    client.kill()
    await free_at_once(house, upstream.exchanges[0].gone)
    await client.wait()


@pytest.mark.parametrize("said", [ASK, STREAM], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_its_answer_begins_frees_the_upstream(
    upstream: Scripted, house: House, said: object
) -> None:
    upstream.plays([Act.SILENCE])
    async with wire(house.port) as line:
        line.send(request(said))
        exchange = await upstream.exchange()
        line.leave()
        await free_at_once(house, exchange.gone)
    metrics = await house.metrics()
    assert metrics("client_disconnects_total", phase="waiting") == 1
    assert metrics("requests_total", outcome="cancelled", code="499") == 1


async def test_a_client_that_leaves_during_a_backoff_is_not_tried_for_again(upstream: Scripted) -> None:
    upstream.otherwise = refusal(500, retry_after="30")
    async with serving(settings(at(upstream.base_url))) as house, wire(house.port) as line:
        line.send(request())
        exchange = await upstream.exchange()
        await until(lambda: not upstream.in_flight)
        line.leave()
        await free_at_once(house)
        assert (await house.metrics())("requests_total", outcome="cancelled", code="499") == 1
        assert len(upstream.exchanges) == 1
        assert not exchange.gone.is_set()  # that answer was read to its end: the connection is of further use


async def test_a_client_that_leaves_the_queue_is_gone_at_once_and_never_reaches_the_upstream(
    upstream: Scripted,
) -> None:
    done = asyncio.Event()
    upstream.plays([done, *answer(ECHO)])
    async with (
        serving(settings(at(upstream.base_url), **ONE_PLACE)) as house,
        wire(house.port) as first,
        wire(house.port) as second,
        wire(house.port) as third,
    ):
        first.send(request())
        await upstream.exchange()
        second.send(request())
        await until(lambda: house.waiting == 1)
        third.send(request(STREAM))
        await until(lambda: house.waiting == 2)
        second.vanish()
        began = asyncio.get_running_loop().time()
        await until(lambda: house.waiting == 1)
        assert asyncio.get_running_loop().time() - began < AT_ONCE
        third.leave()
        await until(lambda: house.waiting == 0)
        done.set()
        assert await first.head() == 200
        metrics = await house.metrics()
    assert len(upstream.exchanges) == 1
    assert metrics("client_disconnects_total", phase="queued") == 2
    assert metrics("gate_admissions_total", result="cancelled") == 2
    assert metrics("gate_queue_wait_seconds_count", result="cancelled") == 2
    assert metrics("gate_queue_depth") == 0


async def test_the_place_of_one_who_left_goes_to_the_next_in_the_queue(upstream: Scripted) -> None:
    upstream.plays(STALLED, answer(ECHO))
    async with (
        serving(settings(at(upstream.base_url), **ONE_PLACE)) as house,
        wire(house.port) as first,
        wire(house.port) as second,
    ):
        first.send(request(STREAM))
        await first.head()
        await first.chunk()
        second.send(request())
        await until(lambda: house.waiting == 1)
        first.vanish()
        async with asyncio.timeout(AT_ONCE):
            assert await second.head() == 200


async def test_a_client_that_leaves_while_it_does_not_read_frees_the_upstream(upstream: Scripted, house: House) -> None:
    flood = chunk(words("x" * 65_000))
    upstream.plays([EVENT_STREAM, *[flood] * 400])
    async with wire(house.port, receive_buffer=1 << 16) as line:
        line.send(request(STREAM))
        exchange = await upstream.exchange()
        await until(lambda: exchange.sent > 1 << 20)
        line.vanish()
        await exchange.gone.wait()
        await house.until_idle()
    assert (await house.metrics())("client_disconnects_total", phase="streaming") == 1


async def test_a_client_that_leaves_while_it_sends_its_body_is_counted_and_forgotten(
    upstream: Scripted, house: House
) -> None:
    async with wire(house.port) as line:
        line.send(request(b"x" * 100_000)[:50_000])
        await until(lambda: len(house.gateway.telemetry._open) == 1)
        line.vanish()
        await until(lambda: len(house.gateway.telemetry._open) == 0)
    metrics = await house.metrics()
    assert metrics("requests_total") == metrics("requests_total", outcome="cancelled", code="499") == 1
    assert upstream.exchanges == []


# ── the storm ──

CALLS = 2_000
AT_A_TIME = 200
TROUBLED = replace(
    profiles.INSTANT,
    first_token_seconds=0.01,
    first_token_sigma=1.0,
    tokens_per_second=3_000.0,
    output_tokens=100,
    chunk_tokens=10,
    concurrency=18,
    error_rate=0.01,
    reset_rate=0.01,
    abort_rate=0.02,
)


def of_the_simulator(record: logging.LogRecord) -> bool:
    """Whether the simulated provider logged it: a client that leaves in its last write is an error to aiohttp."""
    return "/simulator/" in logging.Formatter().format(record)


async def test_after_a_storm_of_cancelled_calls_nothing_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """Streams and whole answers, cancelled at random moments of their lives or not at all, at a provider in trouble."""
    chance = random.Random(2026)
    ended: Counter[str] = Counter()
    at_a_time = asyncio.Semaphore(AT_A_TIME)

    async def call(http: aiohttp.ClientSession, url: str, patience: float | None, stream: bool) -> None:
        async with at_a_time:
            try:
                async with asyncio.timeout(patience), http.post(url, json=ASK | {"stream": stream}) as answered:
                    await answered.read()
                    ended[str(answered.status)] += 1
            except TimeoutError:
                ended["cancelled"] += 1
            except aiohttp.ClientPayloadError:  # the provider broke off an answer that is not a stream
                ended["cut"] += 1

    async with (
        simulating(TROUBLED, seed=7) as simulator,
        serving(settings(at(simulator.base_url, limits=Limits(learn=False)), gate=Gate(concurrency=20))) as house,
    ):
        await house.metrics()
        tasks, opened = asyncio.all_tasks(), descriptors()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            calls = []
            for _ in range(CALLS):
                patience = None if chance.random() < 0.3 else chance.expovariate(1 / 0.1)
                calls.append(call(http, house.origin + CHAT, patience, chance.random() < 0.6))
            await asyncio.gather(*calls)
        await house.until_idle()
        await until(lambda: simulator.provider.stats.in_flight == 0)
        metrics = await house.metrics()
        await house.gateway._transport.close()  # idle connections to upstreams are kept on purpose
        await until(lambda: asyncio.all_tasks() <= tasks, "tasks")
        await until(lambda: descriptors() == opened, "descriptors")
    for family in ("requests_in_flight", "streams_in_flight", "gate_in_use", "gate_queue_depth"):
        assert metrics(family) == 0, family
    assert sum(ended.values()) == CALLS
    assert ended["cancelled"] > CALLS / 4
    assert ended["200"] > CALLS / 4
    for phase in ("queued", "waiting", "streaming"):
        assert metrics("client_disconnects_total", phase=phase) > 0, phase
    assert metrics("requests_total", code="200") >= ended["200"]
    assert metrics("requests_total") >= CALLS - ended["cancelled"]
    assert all(map(of_the_simulator, caplog.records))
    caplog.clear()
