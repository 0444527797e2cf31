"""Several streams at once, each written whole to the console, in the order of the questions."""

from __future__ import annotations

import asyncio
import sys

from examples.asking import Answers, client, prompts, words

COUNT = 8


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
