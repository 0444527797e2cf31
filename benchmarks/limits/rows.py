"""What a row of the table is, and the rows of a source that always has more.

"used" is strict: what was admitted, over all that could have been had since the very first second, a full bucket among
it. "refused" is refusals over attempts. Penstock knows nothing of the provider beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Generic, TypeVar

from benchmarks.limits.baselines import Aimd, FixedConcurrency, UserCode
from benchmarks.limits.penstock import Penstock
from benchmarks.limits.world import Client, Job, World
from proxy.simulator.profile import Profile
from proxy.simulator.provider import Size

BASELINES: dict[str, Callable[[World], Client]] = {
    "fixed 64": lambda world: FixedConcurrency(world, 64),
    "fixed 256": lambda world: FixedConcurrency(world, 256),
    "AIMD": Aimd,
    "user code": UserCode,
}
BASELINE_ATTEMPTS = 4_000  # a storm is cut short here; what it used until then is what it used
Run = TypeVar("Run")  # what one run of a row tells
BACKLOG = 50  # calls that wait, whenever somebody looks: the source is saturated


@dataclass(slots=True, frozen=True)
class Result:
    """Of a row, over all its seeds."""

    text: str
    met: bool | None  # None: it has no target here


@dataclass(slots=True, frozen=True)
class Use:
    """How a saturated run went."""

    used: float  # share of what could be had
    sent: int
    refused: int

    def __str__(self) -> str:
        return f"{self.used:.2%} used, {self.refused / max(1, self.sent):.3%} refused"


@dataclass(slots=True, frozen=True)
class Row(Generic[Run]):
    """One line of the table.

    Attributes:
        run: once, with a seed.
        judge: what came of all the runs.
        calls: about how many one run makes; those that take longest begin first.
        baseline: the same once, with a seed, by what is named in BASELINES.
    """

    number: str
    what: str
    target: str
    run: Callable[[int], Run]
    judge: Callable[[Sequence[Run]], Result]
    calls: float = 0.0
    baseline: Callable[[int, str], str] | None = None

    def measure(self, seeds: Iterable[int]) -> Result:
        return self.judge([self.run(seed) for seed in seeds])


# ── the source of calls ──


@dataclass(slots=True, frozen=True)
class Load:
    """What is asked for: prompts of so many characters, uniformly, and how long it goes on."""

    profile: Profile
    seconds: float
    characters: tuple[int, int] = (400, 4000)
    max_tokens: int | None = None
    phase: float = 0.0

    @property
    def calls(self) -> float:
        """About how many are made where the limit is used."""
        profile = self.profile
        tokens = profile.tokens_per_minute or 0.0
        charged = sum(self.characters) / 8 + profile.max_tokens_weight * (self.max_tokens or 0)
        per_minute = max(profile.requests_per_minute or 0.0, tokens / charged)
        return per_minute * (1.0 + self.seconds / 60)

    def job(self, world: World, caller: str = "") -> Job:
        random = world.random
        size = Size(int(random.uniform(*self.characters)), self.max_tokens)
        return Job(size, world.now, caller=caller, stream=random.random() < 0.5)

    def saturate(self, world: World, client: Client, backlog: int = BACKLOG) -> None:
        """Keep so many calls waiting."""
        profile = self.profile
        per_second = max((profile.requests_per_minute or 0) / 60, (profile.tokens_per_minute or 0) / 60 / 550, 0.1)
        gap = min(1.0, backlog / 20 / per_second)

        def refill() -> None:
            while client.waiting < backlog:
                client.ask(self.job(world))
            world.at(world.now + gap, refill)

        world.at(0.0, refill)


def saturated(load: Load, seed: int, make: Callable[[World], Client], most: int = 1 << 60) -> Use:
    world = World(load.profile, seed, phase=load.phase)
    load.saturate(world, make(world))
    world.run(load.seconds, sent_at_most=most)
    profile, stats = load.profile, world.provider.stats
    had = [
        taken / _available(load, rate, burst or rate, world.now)
        for rate, burst, taken in (
            (profile.requests_per_minute, profile.requests_burst, stats.admitted + stats.cross_admitted),
            (profile.tokens_per_minute, profile.tokens_burst, stats.tokens_charged + stats.cross_tokens),
        )
        if rate
    ]
    return Use(max(had), len(world.tally.sent_at), len(world.tally.refused_at))


def _available(load: Load, per_minute: float, burst: float, seconds: float) -> float:
    """What could have been had of a limit until then: a full bucket and the refill, or each window's quota."""
    window = load.profile.window_seconds
    if window is None:
        return burst + per_minute / 60 * seconds
    return per_minute / 60 * window * ceil((load.phase + seconds) / window - 1e-9)


def saturation(number: str, what: str, load: Load, *, used: float, refused: float) -> Row[Use]:
    """A source that always has more; the worst seed counts for the use, all together for the refusals."""

    def run(seed: int) -> Use:
        return saturated(load, seed, Penstock)

    def judge(uses: Sequence[Use]) -> Result:
        total = Use(min(use.used for use in uses), sum(use.sent for use in uses), sum(use.refused for use in uses))
        return Result(str(total), total.used >= used and total.refused <= refused * total.sent)

    def baseline(seed: int, name: str) -> str:
        return str(saturated(load, seed, BASELINES[name], BASELINE_ATTEMPTS))

    return Row(number, what, f">= {used:.1%} used, <= {refused:.2%} refused", run, judge, load.calls, baseline)
