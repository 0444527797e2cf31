"""Connections to upstreams: kept while they are of use, never trusted, never many."""

from __future__ import annotations

import asyncio

import pytest

from proxy.config import Limits, Retry
from tests.e2e.running import ASK, House, at, serving, settings, until
from tests.e2e.scripted import ECHO, EVENT_STREAM, TELLING, Act, Play, Scripted, answer, chunk, stream
from tests.e2e.wire import request, wire

ONCE = Retry(attempts=1)
STREAM = ASK | {"stream": True}
FREE = Limits(learn=False)


def closing(upstream: Scripted, end: Act) -> None:
    """Each connection serves one request, and is closed when the next has come: what an idle timeout looks like to
    whoever sends at that moment."""
    served: set[object] = set()

    def play() -> Play:
        if upstream.serving in served:
            return [end]
        served.add(upstream.serving)
        return answer(ECHO)

    upstream.improvises = play


@pytest.mark.parametrize("end", [Act.FIN, Act.RST])
async def test_a_call_on_a_connection_that_went_stale_goes_once_more_on_a_new_one(upstream: Scripted, end: Act) -> None:
    closing(upstream, end)
    async with serving(settings(at(upstream.base_url), retry=ONCE)) as house:
        for _ in range(3):
            assert (await house.ask()).status == 200
        metrics = await house.metrics()
    assert len(upstream.exchanges) == 5  # two found theirs closed
    assert metrics("upstream_connections_stale_total") == 2
    assert metrics("upstream_attempts_total", result="ok") == metrics("upstream_attempts_total") == 3
    assert metrics("upstream_retries_total") == 0


@pytest.mark.parametrize("end", [Act.FIN, Act.RST])
async def test_a_new_connection_that_is_closed_is_a_failed_attempt(upstream: Scripted, end: Act) -> None:
    upstream.plays([end], answer(ECHO))
    async with serving(settings(at(upstream.base_url), retry=ONCE)) as house:
        assert (await house.ask()).status == 502
        metrics = await house.metrics()
    assert len(upstream.exchanges) == 1
    assert metrics("upstream_connections_stale_total") == 0
    assert metrics("upstream_attempts_total", result="reset") == 1


async def test_a_call_is_sent_once_more_only(upstream: Scripted) -> None:
    upstream.plays(answer(ECHO), [Act.FIN], [Act.FIN], answer(ECHO))
    async with serving(settings(at(upstream.base_url), retry=ONCE)) as house:
        assert (await house.ask()).status == 200
        assert (await house.ask()).status == 502
    assert len(upstream.exchanges) == 3


async def test_half_an_answer_is_not_a_stale_connection(upstream: Scripted) -> None:
    upstream.plays(answer(ECHO), [b"HTTP/1.1 200 O", Act.FIN], answer(ECHO))
    async with serving(settings(at(upstream.base_url), retry=ONCE)) as house:
        assert (await house.ask()).status == 200
        assert (await house.ask()).status == 502
        assert (await house.metrics())("upstream_connections_stale_total") == 0


async def test_few_connections_are_kept_that_nobody_uses(upstream: Scripted) -> None:
    together = asyncio.Event()
    upstream.otherwise = [together, *answer(ECHO)]
    async with serving(settings(at(upstream.base_url, limits=FREE, idle_connections=3))) as house:
        calls = [asyncio.ensure_future(house.ask()) for _ in range(12)]
        await until(lambda: upstream.in_flight == 12)
        together.set()
        assert {(await call).status for call in calls} == {200}
        await until(lambda: upstream.connections == 3)
        await asyncio.gather(*(house.ask() for _ in range(3)))
        assert (await house.metrics())("upstream_connection_acquires_total", how="reused") == 3


async def test_a_connection_is_kept_for_a_short_while_only(upstream: Scripted) -> None:
    async with serving(settings(at(upstream.base_url, keep_alive_seconds=0.1))) as house:
        assert (await house.ask()).status == 200
        await until(lambda: upstream.connections == 0)
        assert (await house.ask()).status == 200
        assert (await house.metrics())("upstream_connection_acquires_total", how="new") == 2


@pytest.mark.timeout(60)  # 1,700 calls
async def test_a_server_that_closes_after_each_stream_though_it_promised_otherwise_fails_no_call(
    upstream: Scripted,
) -> None:
    """As llama.cpp's does: 1,700 calls, twelve at a time, some streamed; no attempt of theirs fails either."""
    streamed: set[object] = set()  # the connections that are to be closed, some of them when the next request has come

    def play() -> Play:
        if upstream.serving in streamed:
            return [Act.FIN]
        if b"stream" not in upstream.exchanges[-1].body:
            return answer(ECHO)
        streamed.add(upstream.serving)
        return [*stream(*TELLING), Act.FIN] if len(upstream.exchanges) % 2 else stream(*TELLING)

    upstream.improvises = play
    calls = iter(range(1700))

    async def client(house: House) -> None:
        async with wire(house.port) as line:
            for number in calls:
                line.send(request(STREAM if number % 3 else ASK))
                assert await line.head() == 200
                if number % 3:
                    assert await line.rest() == b"".join(TELLING)
                else:
                    await line.reader.readexactly(int(line.headers["content-length"]))

    async with serving(settings(at(upstream.base_url, limits=FREE), retry=ONCE)) as house:
        await asyncio.gather(*(client(house) for _ in range(12)))
        metrics = await house.metrics()
    assert metrics("requests_total", outcome="ok") == metrics("requests_total") == 1700
    assert metrics("upstream_attempts_total", result="ok") == 1700
    assert metrics("upstream_connections_stale_total") > 0


async def test_an_http_1_0_stream_passes_and_its_connection_is_not_used_again(upstream: Scripted, house: House) -> None:
    body = b"".join(TELLING)
    head = EVENT_STREAM.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"transfer-encoding: chunked\r\n", b"")
    upstream.plays([head + body, Act.FIN], [EVENT_STREAM + chunk(body), b"0\r\n\r\n"])
    assert (await house.ask(STREAM)).body == body
    assert (await house.ask(STREAM)).body == body
    assert (await house.metrics())("upstream_connection_acquires_total", how="new") == 2
