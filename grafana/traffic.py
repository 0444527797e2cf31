"""Calls for the gateway of docker-compose.yml, so that its pages have something to show.

A steady trickle, and every half minute a burst that the provider's limits cannot take at once: what waits then, waits
in the gateway. Every minute a batch, which takes what the others leave. A call that fails is counted by the gateway;
here it is nobody's business.

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
BATCH_SECONDS = 60.0
BATCH_PROMPTS = 40
MODELS = (*("gpt-4o-mini",) * 7, *("gpt-4o",) * 2, "pipeline/digest")
PRIORITIES = ("interactive", "default", "default", "batch")


async def call(session: aiohttp.ClientSession, base_url: str) -> None:
    body = {
        "model": random.choice(MODELS),
        "messages": [{"role": "user", "content": "What is a penstock? " * random.randint(1, 50)}],
        "max_tokens": random.randint(16, 256),
        "stream": random.random() < 0.5,
    }
    await post(session, f"{base_url}/chat/completions", body, {"x-penstock-priority": random.choice(PRIORITIES)})


async def post(session: aiohttp.ClientSession, url: str, body: object, headers: dict[str, str] | None = None) -> None:
    try:
        async with session.post(url, json=body, headers=headers) as response:
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


async def batches(session: aiohttp.ClientSession, base_url: str) -> None:
    while True:
        prompts = [f"Which river turns the mill of number {number}?" for number in range(BATCH_PROMPTS)]
        await post(session, f"{base_url.removesuffix('/v1')}/batch", {"model": "gpt-4o-mini", "prompts": prompts})
        await asyncio.sleep(BATCH_SECONDS)


async def main(base_url: str) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(trickle(session, base_url), bursts(session, base_url), batches(session, base_url))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1].rstrip("/")))
