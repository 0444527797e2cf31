"""Streams to the console, word by word; several at once, each written whole in the order of the questions."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from openai import AsyncOpenAI

from examples.asking import MODEL, Answers, client, prompts

COUNT = 8


async def words(openai: AsyncOpenAI, prompt: str) -> AsyncIterator[str]:
    said = [{"role": "user", "content": prompt}]
    async for chunk in await openai.chat.completions.create(model=MODEL, messages=said, stream=True):  # type: ignore[call-overload]
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


async def copied(base_url: str) -> Answers:
    """One queue for each stream, so that the second is under way while the first is written."""

    async def fill(prompt: str, queue: asyncio.Queue[str | None]) -> None:
        try:
            async for word in words(openai, prompt):
                queue.put_nowait(word)
        finally:
            queue.put_nowait(None)

    async with client(base_url) as openai, asyncio.TaskGroup() as group:
        queues: list[asyncio.Queue[str | None]] = [asyncio.Queue() for _ in range(COUNT)]
        for prompt, queue in zip(prompts(COUNT), queues, strict=True):
            group.create_task(fill(prompt, queue))
        answers = []
        for queue in queues:
            answers.append("")
            while (word := await queue.get()) is not None:
                sys.stdout.write(word)
                answers[-1] += word
            sys.stdout.write("\n")
        return answers


async def through(base_url: str) -> Answers:
    """The same: a stream passes through the gateway as it comes. What it adds is that a broken one says that it is."""
    return await copied(base_url)
