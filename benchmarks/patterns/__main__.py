"""`python -m benchmarks.patterns`: what copied patterns of client code come to, and plain code through the gateway.

Every pattern meets the same simulated provider over HTTP, one with tight limits (500 requests and 200,000 tokens a
minute) and a roomy one; an answer takes 1 to 10 s. All times and limits run `SPEED` times faster than that, pauses of
the patterns' own among them; what is told is what it would be at the real speed. So what the machine itself spends
weighs `SPEED` times as much as it would: with a fast machine the gateway's rows get better, not worse.

    --write     write docs/patterns.md and its plots anew
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.patterns.bound import least_seconds
from benchmarks.patterns.plot import bars
from examples import asking, retry, three_stages
from examples.__main__ import failed, gateway
from examples.asking import Answers, ask, client
from examples.retry import ask_again
from proxy import simulator
from proxy.simulator import Profile, profiles

SPEED = 10.0
CALLS = 300
SEQUENTIAL = 60  # of them; the rest would only take longer
AT_ONCE = 20
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "patterns.md"
TABLE = "<!-- table -->"


def _fast(profile: Profile, **pace: float) -> Profile:
    """The profile with the benchmark's latencies, at its speed."""
    requests, tokens = profile.requests_per_minute, profile.tokens_per_minute
    assert requests is not None
    assert tokens is not None
    return replace(
        profile,
        requests_per_minute=requests * SPEED,
        tokens_per_minute=tokens * SPEED,
        requests_burst=profile.requests_burst,
        tokens_burst=profile.tokens_burst or tokens,
        first_token_seconds=1.0,
        tokens_per_second=20.0,
        output_tokens=60.0,
        output_sigma=0.5,
        speed=SPEED,
        **pace,
    )


PROVIDERS = {"tight": _fast(profiles.TIGHT), "roomy": _fast(profiles.ROOMY)}
STEADY = replace(PROVIDERS["tight"], first_token_sigma=0.0, output_sigma=0.0)
LATENCY = 1.0 + 60.0 / 20.0  # seconds of a call, at the real speed


async def sequential(base_url: str) -> Answers:
    answers: list[str | BaseException] = []
    async with client(base_url) as openai:
        for prompt in asking.prompts(SEQUENTIAL):
            answers += await asyncio.gather(ask(openai, prompt), return_exceptions=True)
    return answers


async def gather(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in asking.prompts(CALLS)), return_exceptions=True)


async def semaphore_and_retry(base_url: str) -> Answers:
    semaphore = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: str) -> str:
        async with semaphore:
            return await ask_again(openai, prompt)

    async with client(base_url) as openai:
        return await asyncio.gather(*map(one, asking.prompts(CALLS)), return_exceptions=True)


async def through(base_url: str) -> Answers:
    async with gateway(base_url) as address:
        return await gather(address)


PATTERNS: dict[str, Callable[[str], Awaitable[Answers]]] = {
    "sequential": sequential,
    "gather": gather,
    f"semaphore of {AT_ONCE}, retry decorator": semaphore_and_retry,
    "gather through Penstock": through,
}


@dataclass(frozen=True)
class Row:
    """One pattern against one provider; times at the real speed."""

    provider: str
    pattern: str
    answered: int
    failed: int
    seconds: float
    refusals: int
    wasted: int  # tokens of prompts that were refused

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds


async def measured(name: str, pattern: str) -> Row:
    async with simulator.serving(PROVIDERS[name]) as provider:
        began = time.monotonic()
        answers = await PATTERNS[pattern](provider.base_url)
        seconds = (time.monotonic() - began) * SPEED
        refusals = provider.provider.stats.refusals
    lost = failed(answers)
    prompt_tokens = len(asking.prompts(1)[0]) // 4
    return Row(name, pattern, len(answers) - lost, lost, seconds, refusals, refusals * prompt_tokens)


async def staged(*, warm: bool) -> float:
    """Seconds that the fifty documents take through the gateway, at the real speed; `warm`: it knows the limits."""
    async with simulator.serving(STEADY) as provider, gateway(provider.base_url) as address:
        if warm:
            async with client(address) as openai:
                await ask(openai, "hello")
        began = time.monotonic()
        answers = await three_stages.through(address)
        assert not failed(answers)
        return (time.monotonic() - began) * SPEED


def told(rows: list[Row], bound: float, cold: float, warm: float) -> str:
    """The table of the page."""
    lines = ["| provider | pattern | answered | failed | wall time | answered a second | refusals | tokens wasted |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row.provider} | {row.pattern} | {row.answered} | {row.failed} | {row.seconds:.0f} s | "
        f"{row.per_second:.1f} | {row.refusals} | {row.wasted:,} |"
        for row in rows
    ]
    by = {(row.provider, row.pattern): row for row in rows}
    gain = by["roomy", "gather through Penstock"].per_second / by["roomy", "sequential"].per_second
    lines += [
        "",
        f"On the roomy provider the gateway answers {gain:.0f} times as many calls a second as sequential code.",
        "",
        f"Fifty documents through three stages: the limits and latencies allow {bound:.1f} s; through the gateway it "
        f"took {warm:.1f} s ({warm / bound:.2f} x), and {cold:.1f} s ({cold / bound:.2f} x) where it had never asked "
        "this provider before.",
    ]
    return "\n".join(lines)


async def main(*, write: bool) -> None:
    retry.UNIT_SECONDS /= SPEED
    three_stages.PIPELINE = {  # no bound of its own, so that only the provider's are measured
        name: {key: said for key, said in step.items() if key != "concurrency"}
        for name, step in three_stages.PIPELINE.items()
    }
    rows = [await measured(provider, pattern) for provider in PROVIDERS for pattern in PATTERNS]
    burst, per_minute = profiles.TIGHT.requests_burst, profiles.TIGHT.requests_per_minute
    assert burst is not None
    assert per_minute is not None
    bound = least_seconds(three_stages.COUNT, 3, LATENCY, per_second=per_minute / 60.0, burst=burst)
    table = told(rows, bound, await staged(warm=False), await staged(warm=True))
    print(table)
    if write:
        head, _, rest = PAGE.read_text().partition(TABLE)
        PAGE.write_text(f"{head}{TABLE}\n\n{table}\n\n{TABLE}{rest.partition(TABLE)[2]}")
        for provider in PROVIDERS:
            shown = [
                (row.pattern, row.answered, row.failed, row.per_second) for row in rows if row.provider == provider
            ]
            (DOCS / f"patterns-{provider}.svg").write_text(bars(f"Calls answered a second, {provider} provider", shown))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/patterns.md and its plots anew")
    asyncio.run(main(write=parser.parse_args().write))
