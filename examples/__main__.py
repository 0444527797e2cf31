"""Runs the examples, each without and with the gateway, and says how many calls were answered and how long it took.

The provider's times and limits run so much faster than real ones that all of it takes a minute; see `SPEED`.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module
from types import ModuleType

from examples import retry, three_stages
from examples.asking import Answers
from proxy import simulator
from proxy.app import Gateway
from proxy.config import Model, Secret, Server, Settings, State, Upstream
from proxy.simulator import Profile, profiles

SPEED = 10.0
TIGHT = replace(
    profiles.TIGHT,
    speed=SPEED,
    requests_per_minute=500 * SPEED,
    requests_burst=20,
    tokens_per_minute=200_000 * SPEED,
    first_token_seconds=1.0,
)
NAMES = (
    "sequential",
    "gather",
    "semaphore",
    "streaming",
    "parallel_streams",
    "retry",
    "three_stages",
    "batch_service",
    "websocket",
    "anthropic_client",
)


@asynccontextmanager
async def gateway(base_url: str, *, bounded: bool = True) -> AsyncIterator[str]:
    """A gateway in front of this provider; its address for clients.

    Args:
        bounded: whether the pipeline's steps have bounds of their own, beside the provider's limits.
    """
    key = Secret("any")
    steps = {
        name: {word: said for word, said in step.items() if bounded or word != "concurrency"}
        for name, step in three_stages.PIPELINE.items()
    }
    with tempfile.TemporaryDirectory() as state:
        said = Settings(
            server=Server(port=0, admin_port=0),
            upstreams={
                "openai": Upstream(base_url=base_url, api_key=key),
                "anthropic": Upstream(base_url=base_url, api_key=key, dialect="anthropic"),
            },
            models={"*": Model(upstreams=("openai",)), "claude-*": Model(upstreams=("anthropic",))},
            pipelines={"digest": {"steps": steps}},  # type: ignore[dict-item]
            state=State(path=state),
        )
        async with Gateway(said) as running:
            yield f"http://127.0.0.1:{running.port}/v1"


async def run(example: ModuleType, profile: Profile = TIGHT) -> tuple[Answers, Answers]:
    """What was answered without the gateway, and with it; each against a provider of its own."""
    async with simulator.serving(profile) as provider:
        without = await example.copied(provider.base_url)
    async with simulator.serving(profile) as provider, gateway(provider.base_url) as address:
        return without, await example.through(address)


def failed(answers: Answers) -> int:
    return sum(isinstance(answer, BaseException) for answer in answers)


async def main(names: list[str]) -> None:
    retry.UNIT_SECONDS /= SPEED
    for name in names or NAMES:
        example = import_module(f"examples.{name}")
        began = time.monotonic()
        without, through = await run(example)
        seconds = time.monotonic() - began
        print(  # noqa: T201
            f"{name:17} without: {len(without) - failed(without)} of {len(without)}   "
            f"with: {len(through) - failed(through)} of {len(through)}   {seconds:.1f} s"
        )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
