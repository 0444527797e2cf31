"""Fifty documents through three stages, a semaphore for each: extract, analyse, summarise."""

from __future__ import annotations

import asyncio

from examples.asking import Answers, ask, client

COUNT = 50
PIPELINE = {  # what the gateway's configuration says in place of `copied`; see config/pipelines.yaml
    "extract": {"model": "gpt-4o-mini", "prompt": "Facts in: {input}", "concurrency": 10},
    "analyse": {"model": "gpt-4o-mini", "prompt": "What follows from: {steps.extract}", "concurrency": 5},
    "summarise": {"model": "gpt-4o-mini", "prompt": "Sum up: {steps.analyse}", "concurrency": 10},
}


def documents() -> list[str]:
    return [f"document {number:03d}" for number in range(COUNT)]


async def copied(base_url: str) -> Answers:
    extracting, analysing, summarising = asyncio.Semaphore(10), asyncio.Semaphore(5), asyncio.Semaphore(10)

    async def digest(document: str) -> str:
        async with extracting:
            facts = await ask(openai, f"Facts in: {document}")
        async with analysing:
            analysis = await ask(openai, f"What follows from: {facts}")
        async with summarising:
            return await ask(openai, f"Sum up: {analysis}")

    async with client(base_url) as openai:
        return await asyncio.gather(*map(digest, documents()), return_exceptions=True)


async def through(base_url: str) -> Answers:
    """The stages are a model."""
    async with client(base_url) as openai:
        asked = (ask(openai, document, "pipeline/digest") for document in documents())
        return await asyncio.gather(*asked)
