"""The same over HTTP, on the wall clock, with the official SDK: `python -m benchmarks.limits.wall_clock [--markdown]`.

Sockets, an event loop and calls that overtake each other, which virtual time cannot show. Callers who always have one
more call for a provider on loopback, for less than four minutes in all. What is used is told in all, and from when
the limit is known: until then little is sent to an upstream of which nothing is known.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass, replace

import uvloop
from openai import AsyncOpenAI, OpenAIError

from benchmarks.limits.table import show
from proxy import simulator
from proxy.app import Gateway
from proxy.config import Model, Secret, Server, Settings, Telemetry, Upstream
from proxy.simulator import Profile, Provider, Style

BASE = Profile(requests_per_minute=1_200, requests_burst=30, first_token_seconds=0.2, output_tokens=20)
CALLERS = 60  # several times as many as a call's half a second keeps in flight at the limit


@dataclass(frozen=True)
class Row:
    name: str
    profile: Profile
    cold: float  # seconds until the limit is known
    seconds: float  # in all
    refused_at_most: float  # share of the attempts
    used_at_least: float = 0.97  # of the limit, once it is known

    @property
    def per_second(self) -> float:
        return (self.profile.tokens_per_minute or self.profile.requests_per_minute or 0.0) / 60

    @property
    def burst(self) -> float:
        return self.profile.tokens_burst or self.profile.requests_burst or 0.0


TOKENS = replace(BASE, requests_per_minute=None, tokens_per_minute=40_000, tokens_burst=2_000)
ROWS = (
    Row("headers, requests", BASE, 5.0, 25.0, 0.001),
    Row("headers, tokens", TOKENS, 12.0, 40.0, 0.001),
    Row("no headers, requests", replace(BASE, style=Style.NONE), 105.0, 150.0, 0.03),
)


@dataclass(frozen=True)
class Count:
    """What the provider had let through, and what it had left."""

    at: float
    used: float
    left: float


def count(row: Row, provider: Provider, now: float) -> Count:
    by_tokens = row.profile.tokens_per_minute is not None
    used = provider.stats.tokens_charged if by_tokens else provider.stats.admitted
    return Count(now, used, provider.levels(now)["tokens" if by_tokens else "requests"])


async def measure(row: Row) -> tuple[str, ...]:
    await warm_up()
    async with simulator.serving(row.profile) as served:
        settings = Settings(
            server=Server(port=0, admin_port=0),
            upstreams={"simulated": Upstream(base_url=served.base_url, api_key=Secret("sk-simulated"))},
            models={"*": Model(upstreams=("simulated",))},
            telemetry=Telemetry(log=False),
        )
        async with Gateway(settings) as gateway:
            url = f"http://127.0.0.1:{gateway.port}/v1"
            async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=120.0) as client:
                await asyncio.gather(*(client.models.list() for _ in range(CALLERS)))  # opens the connections
                now = asyncio.get_running_loop().time
                began = now()
                until = began + row.seconds
                callers = asyncio.gather(*(keep_asking(client, number, until) for number in range(CALLERS)))
                await asyncio.sleep(row.cold)
                known = count(row, served.provider, now())
                await asyncio.sleep(until - now())
                ended = count(row, served.provider, now())
                asked, answered = (sum(each) for each in zip(*await callers, strict=True))
        stats = served.provider.stats
    in_all = ended.used / (row.burst + row.per_second * (ended.at - began))
    since = (ended.used - known.used) / (known.left + row.per_second * (ended.at - known.at))
    refused = stats.refusals / max(1, stats.arrived)
    met = answered == asked and refused <= row.refused_at_most and since >= row.used_at_least
    shares = (f"{in_all:.1%}", f"{since:.1%}", f"{stats.refusals} ({refused:.2%})")
    return row.name, f"{answered:,} of {asked:,}", f"{row.seconds:.0f} s", *shares, "met" if met else "MISSED"


async def warm_up() -> None:
    """Let the SDK load and build what it needs for its first call, which takes seconds: they are no provider's."""
    async with (
        simulator.serving(Profile()) as served,
        AsyncOpenAI(base_url=served.base_url, api_key="any", max_retries=0) as client,
    ):
        assert all(await asyncio.gather(*(ask(client, number) for number in range(CALLERS))))


async def keep_asking(client: AsyncOpenAI, caller: int, until: float) -> tuple[int, int]:
    """One call after the other until then; how many, and how many were answered."""
    asked = answered = 0
    while asyncio.get_running_loop().time() < until:
        answered += await ask(client, caller * 1000 + asked)
        asked += 1
    return asked, answered


async def ask(client: AsyncOpenAI, number: int) -> bool:
    prompt = f"{number} " + "word " * (number * 7 % 60)
    try:
        answer = await client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": prompt}], max_tokens=20
        )
    except OpenAIError:
        return False
    return f"echo: {number} " in (answer.choices[0].message.content or "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits.wall_clock", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/limits.md has it")
    chosen = parser.parse_args()
    lines = [uvloop.run(measure(row)) for row in ROWS]
    headings = ("provider", "answered", "for", "limit used", "once known", "refused", "")
    show(headings, lines, markdown=chosen.markdown)
    return int(any(line[-1] != "met" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
