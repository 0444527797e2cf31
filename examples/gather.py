"""All calls at once: fast, until the provider refuses what exceeds its limits."""

from __future__ import annotations

import asyncio

from examples.asking import Answers, ask, client, prompts

COUNT = 60


async def copied(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(COUNT)), return_exceptions=True)


async def through(base_url: str) -> Answers:
    """The same lines: the gateway lets through what the provider takes, and the rest waits its turn."""
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(COUNT)))
