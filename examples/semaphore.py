"""Three hundred classifications with a semaphore of 20: a number that was right for somebody else's account."""

from __future__ import annotations

import asyncio

from examples.asking import Answers, ask, client, prompts

COUNT = 300
AT_ONCE = 20


async def copied(base_url: str) -> Answers:
    semaphore = asyncio.Semaphore(AT_ONCE)

    async def classify(prompt: str) -> str:
        async with semaphore:
            return await ask(openai, prompt)

    async with client(base_url) as openai:
        return await asyncio.gather(*(classify(prompt) for prompt in prompts(COUNT)), return_exceptions=True)


async def through(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(COUNT)))
