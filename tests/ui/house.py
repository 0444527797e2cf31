"""A gateway before a simulated provider, load for it, and its feed as a tab reads it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from random import Random
from typing import Any

import aiohttp
from aiohttp import web

from proxy.api import ui
from proxy.config import Gate, Limits, Model, Secret, Upstream
from proxy.simulator import Profile, profiles
from proxy.simulator import serving as simulating
from proxy.tasks import Tasks
from tests.e2e.running import House, at, serving, settings

QUICK = replace(profiles.INSTANT, output_tokens=8)
LIVELY = replace(
    profiles.TIGHT, requests_per_minute=1200, requests_burst=20, speed=8.0, output_tokens=30, error_rate=0.05
)
DIGEST: Mapping[str, Any] = {
    "steps": {
        "pros": {"model": "gpt-4o-mini", "prompt": "For {input}", "parallel": True},
        "a-step-with-a-name-that-goes-on-and-on-and-on": {
            "model": "gpt-4o-mini-with-a-long-name-and-a-date-2026-11-28",
            "prompt": "Against {input}",
            "parallel": True,
        },
        **{f"weigh-{turn}": {"model": "gpt-4o-mini", "prompt": "{steps.pros}"} for turn in range(6)},
        "each": {"model": "gpt-4o-mini", "prompt": "{item}", "map": "{input}"},
    }
}
MODELS = {"gpt-4o-mini": Model(upstreams=("up",)), "*": Model(upstreams=("up",))}


@asynccontextmanager
async def gateway(profile: Profile = QUICK, **sections: Any) -> AsyncIterator[House]:
    async with simulating(profile, seed=3) as provider:
        limits = sections.pop("limits", Limits(learn=False))
        upstreams: Mapping[str, Upstream] = {"up": at(provider.base_url, limits=limits)}
        async with serving(settings(upstreams, **({"models": MODELS} | sections))) as house:
            yield house


async def load(house: House, calls: int, *, model: str = "gpt-4o-mini") -> None:
    """So many calls at once, every other one a stream, and all answered."""
    asked = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    await asyncio.gather(*(house.ask(asked | {"stream": number % 2 == 1}) for number in range(calls)))
    await house.until_idle()


@asynccontextmanager
async def serving_feed(feed: ui.Feed) -> AsyncIterator[int]:
    """The page and its feed on a port of their own; stopped as the gateway's admin port is."""
    app = web.Application()
    ui.add_routes(app, feed)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


class Tab:
    """One reader of a feed."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer

    async def event(self) -> tuple[str, Any]:
        """The next event's name and data; ("", None) at the end."""
        name, data = "snapshot", None
        async with asyncio.timeout(5):
            while line := (await self.answer.content.readline()).decode():
                if line.startswith("event:"):
                    name = line[6:].strip()
                elif line.startswith("data:"):
                    data = json.loads(line[5:])
                elif data is not None:
                    return name, data
        return "", None

    async def snapshot(self) -> Any:
        name, data = await self.event()
        assert name == "snapshot"
        return data


@asynccontextmanager
async def tab(port: int, *, key: str = "") -> AsyncIterator[Tab]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession(read_bufsize=1 << 20) as http,
        http.get(f"http://127.0.0.1:{port}/ui/live", headers=headers) as answer,
    ):
        assert answer.status == 200
        yield Tab(answer)


async def snapshot_of(house: House) -> Any:
    """One that is made now: the first that a tab is given may be what the last one saw."""
    async with tab(house.gateway.admin_port) as reader:
        await reader.snapshot()
        return await reader.snapshot()


MIXED_KEYS = {
    "team-search": "key-of-team-search-1",
    "batch-jobs": "key-of-batch-jobs-12",
    "notebook": "key-of-notebook-123",
}


@asynccontextmanager
async def mixed() -> AsyncIterator[House]:
    """Three providers, three callers and a load that swells and ebbs, for as long as the block lasts."""
    tight = replace(profiles.TIGHT, requests_per_minute=400, error_rate=0.03, cut_rate=0.02)
    own = replace(profiles.SELF_HOSTED, concurrency=64)
    silent = replace(profiles.SILENT, requests_per_minute=120, requests_burst=10)
    async with simulating(tight, seed=1) as one, simulating(own, seed=2) as two, simulating(silent, seed=3) as three:
        said = settings(
            {
                "openai": at(one.base_url),
                "vllm-a100": at(two.base_url, limits=Limits(concurrency=24)),
                "mistral": at(three.base_url),
            },
            models={
                "gpt-4o-mini": Model(upstreams=("openai", "mistral")),
                "gpt-4o": Model(upstreams=("openai",)),
                "qwen3-32b": Model(upstreams=("vllm-a100",), pool="gpu0"),
                "mistral-small": Model(upstreams=("mistral",)),
            },
            pools={"gpu0": Limits(concurrency=16)},
            gate=Gate(concurrency=200),
            callers={name: Secret(key) for name, key in MIXED_KEYS.items()},
        )
        async with serving(said) as house:
            tasks = Tasks()
            tasks.spawn("load", _swelling(house, tasks))
            yield house
            await tasks.stop()


async def _swelling(house: House, tasks: Tasks) -> None:
    random, loop = Random(5), asyncio.get_running_loop()
    while True:
        tasks.spawn("call", _one(house, random))
        await asyncio.sleep(random.expovariate(14 + 8 * math.sin(loop.time() / 20)))


async def _one(house: House, random: Random) -> None:
    models = ("gpt-4o-mini", "qwen3-32b", "mistral-small", "gpt-4o")
    caller = random.choice(list(MIXED_KEYS))
    priority = {"team-search": "interactive", "batch-jobs": "batch", "notebook": "default"}[caller]
    key = MIXED_KEYS[caller] if random.random() > 0.01 else "another-key"
    asked = {
        "model": random.choices(models, (5, 6, 2, 2))[0],
        "messages": [{"role": "user", "content": "tell me " * random.randint(1, 300)}],
        "stream": random.random() < 0.7,
        "max_tokens": random.randint(20, 400),
    }
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(random.choice((60, 60, 60, 60, 60, 3))):
            await house.ask(asked, headers={"Authorization": f"Bearer {key}", "x-penstock-priority": priority})
