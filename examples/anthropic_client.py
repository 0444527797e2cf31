"""Anthropic's client: only its address changes."""

from __future__ import annotations

import asyncio

from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

from examples.asking import Answers, prompts

COUNT = 40
MODEL = "claude-sonnet-5"


async def _ask(anthropic: AsyncAnthropic, prompt: str) -> str:
    said = await anthropic.messages.create(model=MODEL, max_tokens=20, messages=[{"role": "user", "content": prompt}])
    return "".join(block.text for block in said.content if block.type == "text")


async def _all(base_url: str) -> Answers:
    direct = DefaultAsyncHttpxClient(trust_env=False)
    address = base_url.removesuffix("/v1")  # this client writes /v1 itself
    async with AsyncAnthropic(base_url=address, api_key="any", max_retries=0, http_client=direct) as anthropic:
        return await asyncio.gather(*(_ask(anthropic, prompt) for prompt in prompts(COUNT)), return_exceptions=True)


async def copied(base_url: str) -> Answers:
    return await _all(base_url)


async def through(base_url: str) -> Answers:
    return await _all(base_url)
