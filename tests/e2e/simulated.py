"""The gateway in front of a simulated provider, and the official client of each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from openai import AsyncOpenAI

from proxy.config import Model
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
SAID = "echo: hello runs down the"


@asynccontextmanager
async def through(
    profile: Profile = FOUR_TOKENS, *, names: tuple[str, ...] = (), **sections: Any
) -> AsyncIterator[tuple[House, AsyncOpenAI, Simulator]]:
    """The gateway in front of a simulated provider, and a client of it; `names` are configured models."""
    async with simulating(profile, remember=100) as simulator:
        if names:
            sections["models"] = {name: Model(upstreams=("up",)) for name in names}
        async with serving(settings(at(simulator.base_url), **sections)) as house, house.sdk() as client:
            yield house, client, simulator


def straight(simulator: Simulator) -> AsyncOpenAI:
    """A client of the provider itself; close it with `async with`."""
    return AsyncOpenAI(base_url=simulator.base_url, api_key="sk-client", max_retries=0)
