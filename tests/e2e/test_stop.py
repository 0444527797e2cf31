"""The whole process stops with two hundred streams open: what ends is whole, and what does not end is told so."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.e2e.running import until
from tests.e2e.scripted import EVENT_STREAM, LAST, TELLING, Act, Scripted, chunk
from tests.e2e.test_life import STREAM, configuration, penstock
from tests.e2e.wire import Wire, request, wire

STREAMS = 200
ENDING = 50  # of them end while the gateway drains


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[str, list[int]]]:
    """A collector of spans: where it is, and the size of each post."""
    posts: list[int] = []

    async def take(asked: web.BaseRequest) -> web.Response:
        posts.append(len(await asked.read()))
        return web.Response()

    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", posts
    finally:
        await runner.cleanup()


async def begin(line: Wire) -> None:
    line.send(request(STREAM))
    assert await line.head() == 200
    assert await line.chunk() == TELLING[0]


@pytest.mark.parametrize("signals", [1, 2], ids=["at the deadline", "hurried"])
async def test_two_hundred_streams_end_or_are_told_that_they_will_not(
    upstream: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    done = asyncio.Event()
    whole = [EVENT_STREAM, chunk(TELLING[0]), done, *map(chunk, TELLING[1:]), LAST]
    upstream.plays(*[whole] * ENDING)
    upstream.otherwise = [EVENT_STREAM, chunk(TELLING[0]), Act.SILENCE]
    server = {"port": 0, "admin_port": 0, "drain_seconds": 2.0 if signals == 1 else 60.0}
    said = configuration(upstream, server=server, models={"m": {"upstreams": ["up"]}})
    async with collecting() as (collector, posts), AsyncExitStack() as stack:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        running = await stack.enter_async_context(penstock(said, tmp_path))
        lines = [await stack.enter_async_context(wire(running.port)) for _ in range(STREAMS + 1)]
        idle = lines.pop()
        for line in lines:
            await begin(line)
        running.process.send_signal(signal.SIGTERM)
        await running.reaches("draining", 1)

        assert (await running.get("/readyz")).status == 503
        idle.send(request(STREAM))
        refused = await idle.answer()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        assert refused.headers["x-should-retry"] == "true"
        assert int(refused.headers["retry-after-ms"]) > 0
        assert await idle.until_closed() == b"", "a kept connection does not keep its client here"

        done.set()
        rests = [asyncio.create_task(line.rest()) for line in lines]
        await until(lambda: sum(rest.done() for rest in rests) == ENDING, "those that end")
        if signals == 2:
            running.process.send_signal(signal.SIGTERM)
        told = await asyncio.gather(*rests)
        assert await running.process.wait() == 0
        log = [json.loads(line) for line in running.log.read_text().splitlines()]
    ended = [rest for rest in told if rest.endswith(TELLING[-1])]
    assert ended == [b"".join(TELLING[1:])] * ENDING
    for rest in told:
        if rest not in ended:
            name, _, data = rest.partition(b"\ndata: ")
            assert name == b"event: error"
            assert json.loads(data)["error"]["code"] == "draining"
            assert b"[DONE]" not in rest
    calls = [line for line in log if line["route"].endswith("completions")]
    assert sum(line["outcome"] == "ok" for line in calls) == ENDING
    assert sum(line["outcome"] == "truncated" for line in calls) == STREAMS - ENDING
    assert sum(line["outcome"] == "rejected" for line in calls) == 1
    assert sum(posts) > 100 * (STREAMS - ENDING), "the spans of those that broke were sent"
    assert "cut off" in running.said
