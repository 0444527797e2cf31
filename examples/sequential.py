"""One call after the other: nothing can go wrong, and nothing goes fast."""

from __future__ import annotations

import asyncio

from examples.asking import Answers, ask, client, prompts

COUNT = 12


async def copied(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return [await ask(openai, prompt) for prompt in prompts(COUNT)]


async def through(base_url: str) -> Answers:
    """The gateway knows how many may be on their way; the program need not."""
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(COUNT)))
