"""The same over HTTP, on the wall clock, with the official SDK: `python -m benchmarks.limits.wall_clock`.

Limits are ten times a small account's, so that a minute's worth takes seconds; bounded to about a minute and to
loopback. What virtual time cannot show is here: real sockets, a real event loop, calls that overtake each other.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, replace

import uvloop
from openai import AsyncOpenAI, OpenAIError
from rich.console import Console
from rich.table import Table

from proxy import simulator
from proxy.app import Gateway
from proxy.config import Model, Secret, Server, Settings, Telemetry, Upstream
from proxy.simulator import Profile, Style

BASE = Profile(requests_per_minute=5000, requests_burst=100, first_token_seconds=0.2, output_tokens=20)
CALLS = 1100  # the burst, and 12 s at the limit


@dataclass(frozen=True)
class Row:
    name: str
    profile: Profile
    refused_at_most: float  # share of the attempts


ROWS = (
    Row("headers, requests", BASE, 0.01),
    Row("no headers, requests", replace(BASE, style=Style.NONE), 0.05),
    Row("headers, tokens", replace(BASE, requests_per_minute=None, tokens_per_minute=200_000, tokens_burst=4000), 0.01),
)


async def measure(row: Row) -> tuple[str, ...]:
    async with simulator.serving(row.profile) as provider:
        settings = Settings(
            server=Server(port=0, admin_port=0),
            upstreams={"simulated": Upstream(base_url=provider.base_url, api_key=Secret("sk-simulated"))},
            models={"*": Model(upstreams=("simulated",))},
            telemetry=Telemetry(log=False),
        )
        async with Gateway(settings) as gateway:
            url = f"http://127.0.0.1:{gateway.port}/v1"
            async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=120.0) as client:
                began = time.monotonic()
                answers = await asyncio.gather(*(ask(client, number) for number in range(CALLS)))
                seconds = time.monotonic() - began
        stats = provider.provider.stats
    answered = sum(answers)
    per_minute = row.profile.requests_per_minute
    burst = row.profile.requests_burst or 0.0
    used = stats.admitted
    if row.profile.tokens_per_minute is not None:
        per_minute, burst, used = row.profile.tokens_per_minute, row.profile.tokens_burst or 0.0, stats.tokens_charged
    assert per_minute is not None
    share = used / (burst + per_minute / 60 * seconds)
    refused = stats.refusals / max(1, stats.arrived)
    ok = answered == CALLS and refused <= row.refused_at_most
    figures = (f"{answered} of {CALLS}", f"{seconds:.1f} s", f"{share:.1%}", f"{stats.refusals} ({refused:.2%})")
    return row.name, *figures, "met" if ok else "MISSED"


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
    table = Table(title="Over HTTP, on the wall clock, by the OpenAI SDK")
    for heading in ("provider", "answered", "took", "limit used", "refused", ""):
        table.add_column(heading)
    missed = 0
    for row in ROWS:
        figures = uvloop.run(measure(row))
        missed += figures[-1] != "met"
        table.add_row(*figures)
    Console().print(table)
    return min(1, missed)


if __name__ == "__main__":
    sys.exit(main())
