"""Calls for the gateway of docker-compose.yml, so that its pages have something to show.

A steady trickle, and every half minute a burst that the provider's limits cannot take at once: what waits then, waits
in the gateway. A call that fails is counted by the gateway; here it is nobody's business.

    python grafana/traffic.py http://127.0.0.1:8080/v1
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys

import aiohttp

STEADY_SECONDS = 0.25  # between two calls, in the mean
BURST_SECONDS = 30.0
BURST_CALLS = 120
MODELS = ("gpt-4o-mini", "gpt-4o-mini", "gpt-4o-mini", "gpt-4o")
PRIORITIES = ("interactive", "default", "default", "batch")


async def call(session: aiohttp.ClientSession, base_url: str) -> None:
    body = {
        "model": random.choice(MODELS),
        "messages": [{"role": "user", "content": "What is a penstock? " * random.randint(1, 50)}],
        "max_tokens": random.randint(16, 256),
        "stream": random.random() < 0.5,
    }
    headers = {"x-penstock-priority": random.choice(PRIORITIES)}
    try:
        async with session.post(f"{base_url}/chat/completions", json=body, headers=headers) as response:
            await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        logging.warning("%s: %s", type(error).__name__, error)


async def trickle(session: aiohttp.ClientSession, base_url: str) -> None:
    async with asyncio.TaskGroup() as calls:
        while True:
            calls.create_task(call(session, base_url))
            await asyncio.sleep(random.expovariate(1 / STEADY_SECONDS))


async def bursts(session: aiohttp.ClientSession, base_url: str) -> None:
    while True:
        await asyncio.sleep(BURST_SECONDS)
        await asyncio.gather(*(call(session, base_url) for _ in range(BURST_CALLS)))


async def main(base_url: str) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(trickle(session, base_url), bursts(session, base_url))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1].rstrip("/")))
