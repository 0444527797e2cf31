"""A decorator that retries with exponential backoff: every call learns by itself what all the others know already."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from examples.asking import Answers, ask, client, prompts

COUNT = 60
UNIT_SECONDS = 1.0  # of the first pause


def retried(tries: int = 5) -> Callable[[Callable[..., Awaitable[str]]], Callable[..., Awaitable[str]]]:
    def decorate(call: Callable[..., Awaitable[str]]) -> Callable[..., Awaitable[str]]:
        async def again(*said: object) -> str:
            for attempt in range(tries):
                try:
                    return await call(*said)
                except (APIStatusError, APIConnectionError):
                    if attempt == tries - 1:
                        raise
                    await asyncio.sleep(UNIT_SECONDS * (2**attempt + random.random()))
            raise AssertionError

        return again

    return decorate


@retried()
async def ask_again(openai: AsyncOpenAI, prompt: str) -> str:
    return await ask(openai, prompt)


async def copied(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask_again(openai, prompt) for prompt in prompts(COUNT)), return_exceptions=True)


async def through(base_url: str) -> Answers:
    """No decorator: what can be tried again is tried again once, for everybody, by the gateway."""
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(COUNT)))
