"""`python -m benchmarks.patterns`: what copied patterns of client code come to, and plain code through the gateway.

Every pattern meets the same simulated provider over HTTP, once with tight limits (500 requests and 200,000 tokens a
minute) and once with roomy ones; an answer takes 1 to 10 s. Nothing is sped up. The patterns that have few calls on
their way run beside each other, those that send all at once one after the other, so that none waits for the machine:
it takes less than six minutes in all.

    --write     write docs/patterns.md and its plots anew
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.patterns.bound import least_seconds
from benchmarks.patterns.plot import bars
from examples import asking, three_stages
from examples.__main__ import failed, gateway
from examples.asking import Answers, ask, client
from examples.retry import ask_again
from proxy import simulator
from proxy.simulator import Profile, profiles

CALLS = 300
SEQUENTIAL = 20  # of them; the rest would only take longer
AT_ONCE = 20
REVIEW = " It came on time, it does what it says, and I would buy it again." * 18  # 300 tokens
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "patterns.md"
TABLE = "<!-- table -->"


def _paced(profile: Profile) -> Profile:
    """With the latencies of this benchmark."""
    return replace(profile, first_token_seconds=1.0, tokens_per_second=20.0, output_tokens=60.0, output_sigma=0.5)


PROVIDERS = {"tight": _paced(profiles.TIGHT), "roomy": _paced(profiles.ROOMY)}
STEADY = replace(PROVIDERS["tight"], first_token_sigma=0.0, output_sigma=0.0)
LATENCY = 1.0 + 60.0 / 20.0  # seconds of its every call


def prompts(count: int) -> list[str]:
    return [f"{prompt}{REVIEW}" for prompt in asking.prompts(count)]


async def sequential(base_url: str) -> Answers:
    answers: list[str | BaseException] = []
    async with client(base_url) as openai:
        for prompt in prompts(SEQUENTIAL):
            answers += await asyncio.gather(ask(openai, prompt), return_exceptions=True)
    return answers


async def gather(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask(openai, prompt) for prompt in prompts(CALLS)), return_exceptions=True)


async def semaphore_and_retry(base_url: str) -> Answers:
    semaphore = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: str) -> str:
        async with semaphore:
            return await ask_again(openai, prompt)

    async with client(base_url) as openai:
        return await asyncio.gather(*map(one, prompts(CALLS)), return_exceptions=True)


async def gather_and_retry(base_url: str) -> Answers:
    async with client(base_url) as openai:
        return await asyncio.gather(*(ask_again(openai, prompt) for prompt in prompts(CALLS)), return_exceptions=True)


async def through(base_url: str) -> Answers:
    async with gateway(base_url) as address:
        return await gather(address)


Pattern = Callable[[str], Awaitable[Answers]]
FEW: dict[str, Pattern] = {"sequential": sequential, f"semaphore of {AT_ONCE}, retry decorator": semaphore_and_retry}
MANY: dict[str, Pattern] = {
    "gather": gather,
    "gather, retry decorator": gather_and_retry,
    "gather through Penstock": through,
}


@dataclass(frozen=True)
class Row:
    """One pattern against one provider."""

    provider: str
    pattern: str
    answered: int
    failed: int
    seconds: float
    refusals: int

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds

    @property
    def wasted(self) -> int:
        """Tokens of prompts that were sent and refused."""
        return self.refusals * (len(prompts(1)[0]) // 4)


async def measured(name: str, pattern: str) -> Row:
    async with simulator.serving(PROVIDERS[name]) as provider:
        began = time.monotonic()
        answers = await (FEW | MANY)[pattern](provider.base_url)
        seconds = time.monotonic() - began
        refusals = provider.provider.stats.refusals
    lost = failed(answers)
    return Row(name, pattern, len(answers) - lost, lost, seconds, refusals)


async def all_measured() -> list[Row]:
    rows = await asyncio.gather(*(measured(provider, pattern) for provider in PROVIDERS for pattern in FEW))
    rows += [await measured(provider, pattern) for provider in PROVIDERS for pattern in MANY]
    order = [(provider, pattern) for provider in PROVIDERS for pattern in (*FEW, *MANY)]
    return sorted(rows, key=lambda row: order.index((row.provider, row.pattern)))


async def staged() -> list[float]:
    """Seconds that fifty documents take through the gateway: when it has never asked this provider, and once it has."""

    async def once() -> float:
        began = time.monotonic()
        assert not failed(await three_stages.through(address))
        return time.monotonic() - began

    assert STEADY.requests_burst is not None
    assert STEADY.requests_per_minute is not None
    async with simulator.serving(STEADY) as provider, gateway(provider.base_url, bounded=False) as address:
        first = await once()
        await asyncio.sleep(60.0 * STEADY.requests_burst / STEADY.requests_per_minute)  # its bucket is full again
        return [first, await once()]


def least() -> float:
    """Seconds that they take at least."""
    assert STEADY.requests_burst is not None
    assert STEADY.requests_per_minute is not None
    stages = len(three_stages.PIPELINE)
    pace = STEADY.requests_per_minute / 60.0
    return least_seconds(three_stages.COUNT, stages, LATENCY, per_second=pace, burst=STEADY.requests_burst)


def told(rows: Iterable[Row], bound: float, first: float, second: float) -> str:
    """The table of the page."""
    lines = ["| provider | pattern | answered | failed | wall time | answered a second | refusals | tokens wasted |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    lines += [
        f"| {row.provider} | {row.pattern} | {row.answered} | {row.failed} | {row.seconds:.0f} s | "
        f"{row.per_second:.2f} | {row.refusals} | {row.wasted:,} |"
        for row in rows
    ]
    by = {(row.provider, row.pattern): row for row in rows}
    gains = {
        name: by[name, "gather through Penstock"].per_second / by[name, "sequential"].per_second for name in PROVIDERS
    }
    lines += [
        "",
        f"Through the gateway {gains['roomy']:.0f} times as many calls a second are answered as by sequential code on "
        f"the roomy provider, and {gains['tight']:.0f} times as many on the tight one.",
        "",
        f"Fifty documents through three stages take {bound:.1f} s at least, as the tight provider's limits and the "
        f"latencies allow. Through the gateway they took {second:.1f} s ({second / bound:.2f} x), and {first:.1f} s "
        f"({first / bound:.2f} x) when it asked this provider for the first time.",
    ]
    return "\n".join(lines)


async def main(*, write: bool) -> None:
    rows = await all_measured()
    table = told(rows, least(), *await staged())
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
