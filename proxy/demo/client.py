"""The client as everybody writes it first: all calls at once, no semaphore, no retry but those of the SDK."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openai import AsyncOpenAI  # an extra; `run` says so where it is missing

MODEL = "gpt-4o-mini"


@dataclass(slots=True)
class Tally:
    """What the client has seen of its burst so far. Times are seconds on the monotonic clock."""

    calls: int
    began: float | None = None
    ended: float | None = None
    answered: int = 0
    failed: int = 0
    tokens: int = 0  # of output
    first_tokens: list[float] = field(default_factory=list)  # seconds from the call to its first token, streams only
    errors: Counter[str] = field(default_factory=Counter)  # known once all calls have ended
    in_order: bool = False  # each answer stands at its prompt's place; known once all calls have ended

    @property
    def seconds(self) -> float:
        if self.began is None:
            return 0.0
        return (time.monotonic() if self.ended is None else self.ended) - self.began

    @property
    def first_token_p95(self) -> float | None:
        """Seconds within which 19 of 20 answered streams had begun (nearest rank); None before the first."""
        if not self.first_tokens:
            return None
        return sorted(self.first_tokens)[ceil(0.95 * len(self.first_tokens)) - 1]


def prompts(calls: int) -> list[str]:
    """All distinct, and none the beginning of another."""
    return [f"How does a penstock work? (question {number:05d})" for number in range(1, calls + 1)]


async def burst(base_url: str, asked: Sequence[str], tally: Tally) -> None:
    """Send all prompts at the same moment, every other one as a stream, and wait for all answers.

    `tally` is kept while it goes on. Cancelled, it has counted whoever was not answered as failed.
    """
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    tally.began = time.monotonic()
    direct = DefaultAsyncHttpxClient(trust_env=False)  # a proxy in the environment does not lead to loopback
    try:
        async with AsyncOpenAI(base_url=base_url, api_key="demo", http_client=direct) as client:
            answers = await asyncio.gather(
                *(_counted(client, prompt, number % 2 == 1, tally) for number, prompt in enumerate(asked)),
                return_exceptions=True,
            )
    finally:
        tally.ended, tally.failed = time.monotonic(), tally.calls - tally.answered
    tally.errors.update(type(answer).__name__ for answer in answers if isinstance(answer, BaseException))
    tally.in_order = are_in_order(asked, answers)


def are_in_order(asked: Sequence[str], answers: Sequence[str | BaseException]) -> bool:
    """Whether each answer there is echoes the prompt at its place; the simulated provider's answers begin with it."""
    return all(
        isinstance(answer, BaseException) or answer.startswith(f"echo: {prompt}")
        for prompt, answer in zip(asked, answers, strict=True)
    )


async def _counted(client: AsyncOpenAI, prompt: str, stream: bool, tally: Tally) -> str:
    answered = False
    try:
        answer = await (_streamed if stream else _whole)(client, prompt, tally)
        answered = True
        return answer
    finally:
        tally.answered += answered
        tally.failed += not answered


async def _whole(client: AsyncOpenAI, prompt: str, tally: Tally) -> str:
    answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}])
    if answer.usage is not None:
        tally.tokens += answer.usage.completion_tokens
    return answer.choices[0].message.content or ""


async def _streamed(client: AsyncOpenAI, prompt: str, tally: Tally) -> str:
    asked = time.monotonic()
    pieces: list[str] = []
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": prompt}], stream=True
    )
    async for chunk in stream:
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            if not pieces:
                tally.first_tokens.append(time.monotonic() - asked)
            pieces.append(piece)
            tally.tokens += 1  # the simulated provider sends each token in a chunk of its own
    return "".join(pieces)
