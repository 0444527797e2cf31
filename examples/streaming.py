"""Answers to the console, word by word as they come."""

from __future__ import annotations

import sys

from examples.asking import Answers, client, prompts, words

COUNT = 3


async def copied(base_url: str) -> Answers:
    answers = []
    async with client(base_url) as openai:
        for prompt in prompts(COUNT):
            answers.append("")
            async for word in words(openai, prompt):
                sys.stdout.write(word)
                sys.stdout.flush()
                answers[-1] += word
            sys.stdout.write("\n")
    return answers


async def through(base_url: str) -> Answers:
    """The same: a stream passes through the gateway as it comes. What it adds is that a broken one says that it is."""
    return await copied(base_url)
