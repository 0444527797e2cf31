"""What all examples have in common: a client, prompts, and one question."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

MODEL = "gpt-4o-mini"
Answers = Sequence[str | BaseException]


def client(base_url: str, *, max_retries: int = 0) -> AsyncOpenAI:
    """As articles make it, but that it retries only where it is told to, so that what is copied is what is seen."""
    direct = DefaultAsyncHttpxClient(trust_env=False)  # a proxy in the environment does not lead to this machine
    return AsyncOpenAI(base_url=base_url, api_key="any", max_retries=max_retries, timeout=60.0, http_client=direct)


def prompts(count: int) -> list[str]:
    """All distinct, and none the beginning of another."""
    return [f"Is review {number:04d} positive? One word." for number in range(count)]


async def ask(openai: AsyncOpenAI, prompt: str, model: str = MODEL) -> str:
    answer = await openai.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    return answer.choices[0].message.content or ""


async def words(openai: AsyncOpenAI, prompt: str) -> AsyncIterator[str]:
    """The answer as it comes."""
    asked = openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}], stream=True)
    async for chunk in await asked:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content
