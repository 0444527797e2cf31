"""A batch of 50,000 lines: how much memory it takes, how much of the provider's limit it uses, and what live calls
beside it wait.

    provider (R requests a minute) <- gateway (a process of its own) <- one batch, and live calls at R / 2

Waits are the gateway's own account, in `Server-Timing`: a machine that is slow or busy lengthens all else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.batches.gateway import Nursery, Running
from benchmarks.batches.kill import submitted, told
from proxy.config import Limits
from proxy.simulator import Simulator, profiles
from proxy.simulator import serving as simulating

QUEUE = re.compile(r"queue;dur=([\d.]+)")
BURST_SECONDS = 1.0  # of the limit, that the provider allows at once
WARM_UP_SECONDS = 10.0
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


async def run(directory: Path, *, lines: int, per_minute: int, live_seconds: float) -> bool:
    """Print what was measured; whether every target was met."""
    profile = replace(
        profiles.INSTANT,
        first_token_seconds=0.2,
        requests_per_minute=per_minute,
        requests_burst=BURST_SECONDS * per_minute / 60,
        output_tokens=60,
    )
    async with simulating(profile, remember=0) as simulator, _gateway(directory, simulator) as (gateway, base, http):
        alone = await _live(http, base, per_minute / 120, live_seconds)
        idle = gateway.memory
        batch_id = await submitted(http, base, lines)
        watching = asyncio.create_task(_peak(gateway))
        beside = await _live(http, base, per_minute / 120, live_seconds, after=WARM_UP_SECONDS)
        used = await _use(http, base, batch_id, simulator, per_minute)
        batch = await _ended(http, base, batch_id)
        watching.cancel()
        peak = await watching
        cpu, refusals = gateway.cpu_seconds, simulator.provider.stats.refusals
    counts = batch["request_counts"]
    rise = (peak - idle) / 1e6
    print(f"lines                          {lines:>10,}   {counts['completed']:,} done, {counts['failed']:,} failed")
    print(f"memory above idle, at most     {rise:>10.0f} MB   target < 150")
    print(f"share of the provider's limit  {used:>10.1%}      target >= 99 %")
    print(f"live p99 wait without a batch  {alone:>10.1f} ms")
    print(f"live p99 wait beside it        {beside:>10.1f} ms   target <= 50 more")
    print(f"refused by the provider        {refusals:>10,}      each holds all calls for a moment")
    print(f"CPU of the gateway             {cpu:>10.0f} s    {1e3 * cpu / lines:.2f} ms an item, live calls included")
    return rise < 150 and used >= 0.99 and beside <= alone + 50 and counts["completed"] == lines


@asynccontextmanager
async def _gateway(directory: Path, simulator: Simulator) -> AsyncIterator[tuple[Running, str, aiohttp.ClientSession]]:
    gateway = await asyncio.to_thread(Nursery(directory, simulator.base_url, Limits()).begin)
    assert gateway is not None
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        try:
            yield gateway, f"http://127.0.0.1:{gateway.port}/v1", http
        finally:
            await asyncio.to_thread(gateway.kill)


async def _live(
    http: aiohttp.ClientSession, base: str, per_second: float, seconds: float, *, after: float = 0.0
) -> float:
    """Calls at an even pace; the wait at the gate that one in a hundred of them exceeds, in milliseconds."""
    await asyncio.sleep(after)
    waits: list[float] = []

    async def call() -> None:
        async with http.post(f"{base}/chat/completions", json=CHAT) as answer:
            await answer.read()
            wait = QUEUE.search(answer.headers.get("server-timing", ""))
            assert answer.status == 200
            assert wait is not None
            waits.append(float(wait[1]))

    began, count = time.monotonic(), int(per_second * seconds)
    async with asyncio.TaskGroup() as calls:
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            calls.create_task(call())
    return sorted(waits)[int(0.99 * len(waits))]


async def _use(http: aiohttp.ClientSession, base: str, batch_id: str, simulator: Simulator, per_minute: int) -> float:
    """The share of the limit that the batch used, by the provider's own count, while it had enough left to ask for."""
    stats = simulator.provider.stats
    began, admitted = time.monotonic(), stats.admitted
    enough = per_minute / 60
    async for batch in _watched(http, base, batch_id):
        if batch["request_counts"]["total"] - batch["request_counts"]["completed"] <= enough:
            break
    return (stats.admitted - admitted) / (per_minute / 60 * (time.monotonic() - began))


async def _ended(http: aiohttp.ClientSession, base: str, batch_id: str) -> dict[str, Any]:
    async for batch in _watched(http, base, batch_id):
        if batch["status"] == "completed":
            return batch
    raise AssertionError  # it is watched until then


async def _watched(http: aiohttp.ClientSession, base: str, batch_id: str) -> AsyncIterator[dict[str, Any]]:
    """The batch, twice a second."""
    while True:
        yield await told(http.get(f"{base}/batches/{batch_id}"))
        await asyncio.sleep(0.5)


async def _peak(gateway: Running) -> int:
    peak = gateway.memory
    try:
        while True:
            await asyncio.sleep(0.25)
            peak = max(peak, gateway.memory)
    except asyncio.CancelledError:
        return peak
