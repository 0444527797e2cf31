"""The bodies of all calls share a budget: a large one that finds no room waits unread, and its client with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.config import Limits, Server
from tests.e2e.running import ASK, House, at, serving, settings, until
from tests.e2e.scripted import ECHO, Scripted, answer, scripted
from tests.e2e.wire import request, wire

MIB = 1 << 20
LARGE = ASK | {"pad": "x" * (700 << 10)}
TIGHT = Server(port=0, admin_port=0, max_body_bytes=MIB, bodies_bytes=1)  # room for the largest there is all the same


@asynccontextmanager
async def tight() -> AsyncIterator[tuple[House, Scripted, asyncio.Event]]:
    """A gateway with room for one large body, and an upstream that answers when told to."""
    going = asyncio.Event()
    async with scripted() as upstream:
        upstream.otherwise = [going, *answer(ECHO)]
        async with serving(settings(at(upstream.base_url, limits=Limits(learn=False)), server=TIGHT)) as house:
            yield house, upstream, going
            going.set()
            await until(lambda: house.gateway._edge._bodies.held == 0, "nothing is held")


async def test_a_large_body_waits_for_room_and_a_small_one_does_not() -> None:
    async with tight() as (house, upstream, going):
        calls = [asyncio.ensure_future(house.ask(LARGE)) for _ in range(3)]
        await upstream.exchange()
        small = asyncio.ensure_future(house.ask())
        await upstream.exchange(1)
        assert house.in_flight == 2
        going.set()
        assert {(await call).status for call in (*calls, small)} == {200}
        metrics = await house.metrics()
    assert metrics("requests_total", outcome="ok") == 4
    assert [len(exchange.body) > MIB // 2 for exchange in upstream.exchanges] == [True, False, True, True]


async def test_one_that_finds_no_room_in_time_is_told_when_to_come_back() -> None:
    async with tight() as (house, upstream, going):
        first = asyncio.ensure_future(house.ask(LARGE))
        await upstream.exchange()
        late = await house.ask(LARGE, headers={"x-request-timeout": "0.2"})
        going.set()
        assert (await first).status == 200
        metrics = await house.metrics()
    assert (late.status, late.error["code"]) == (503, "bodies_full")
    assert (late.headers["x-should-retry"], late.headers["retry-after"]) == ("true", "1")
    assert len(upstream.exchanges) == 1
    assert metrics("request_errors_total", error_type="overloaded") == 1


async def test_one_that_does_not_tell_its_length_is_refused_where_it_grows_too_large() -> None:
    async with tight() as (house, upstream, _), wire(house.port) as line:
        first = asyncio.ensure_future(house.ask(LARGE))
        await upstream.exchange()
        line.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: penstock\r\ntransfer-encoding: chunked\r\n\r\n")
        line.send(b"80000\r\n" + b"x" * (512 << 10))
        told = await line.answer()
        assert (told.status, told.error["code"]) == (503, "bodies_full")
        first.cancel()


@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/audio/transcriptions"])
async def test_of_what_streams_through_its_beginning_counts(path: str) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
    head = part % b"model" + b"m\r\n" + part % b"file"
    form = {"content-type": "multipart/form-data; boundary=b", "content-length": str(9 * MIB)}
    async with tight() as (house, _, _), wire(house.port) as line:
        line.send(request(head, path, headers=form))
        await until(lambda: house.gateway._edge._bodies.held == MIB, "its beginning is counted")
        line.vanish()


async def test_a_client_that_leaves_leaves_its_room() -> None:
    async with tight() as (house, upstream, _), wire(house.port) as line, wire(house.port) as other:
        line.send(request(LARGE))
        await upstream.exchange()
        other.send(request(LARGE)[: 1 << 10])
        await until(lambda: len(house.gateway._edge._in_flight) == 2, "both are there")
        line.vanish()
        await until(lambda: not house.in_flight, "it left")
        other.send(request(LARGE)[1 << 10 :])
        await upstream.exchange(1)
