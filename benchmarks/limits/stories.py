"""The rows that tell a story: a burst, a changed limit, a hold, an outage, a caller who floods."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from benchmarks.limits.penstock import Penstock
from benchmarks.limits.rows import BASELINE_ATTEMPTS, BASELINES, Load, Result, Row
from benchmarks.limits.world import Client, Job, Tally, World
from proxy.core import backoff, outcome
from proxy.core.breaker import Breaker
from proxy.core.outcome import OK, Retry
from proxy.core.retry_budget import RetryBudget
from proxy.core.route import Tries
from proxy.simulator.profile import Change, Profile, Style

Make = Callable[[World], Client]


def _live(load: Load, seed: int, make: Make) -> Tally:
    world = World(load.profile, seed)
    load.saturate(world, make(world))
    world.run(load.seconds, sent_at_most=1 << 60 if make is Penstock else 3 * BASELINE_ATTEMPTS)
    return world.tally


def cold_burst(what: str, style: Style, most: int) -> Row[tuple[int, int]]:
    """300 calls at once, to a provider of which nothing is known."""
    load = Load(Profile(requests_per_minute=500, requests_burst=50, style=style, output_tokens=100), 120.0)

    def run(seed: int, make: Make = Penstock) -> tuple[int, int]:
        world = World(load.profile, seed)
        client, jobs = make(world), [load.job(world) for _ in range(300)]
        for job in jobs:
            client.ask(job)
        world.run(load.seconds, sent_at_most=BASELINE_ATTEMPTS)
        return sum(job.ended is not None for job in jobs), len(world.tally.refused_at)

    def judge(runs: Sequence[tuple[int, int]]) -> Result:
        served, refused = min(run[0] for run in runs), max(run[1] for run in runs)
        return Result(f"{served} served, {refused} refused", served == 300 and refused <= most)

    def baseline(seed: int, name: str) -> str:
        served, refused = run(seed, BASELINES[name])
        return f"{served}, {refused} refused"

    return Row("T0", what, f"300 served, <= {most} refused", run, judge, 300, baseline)


def lowered(what: str, profile: Profile, after: float, factor: float) -> Row[int]:
    """After so many seconds the limit falls to `factor` of itself."""
    load = Load(replace(profile, changes=(Change(after, factor),)), after + 60)

    def run(seed: int, make: Make = Penstock) -> int:
        return sum(at >= after for at in _live(load, seed, make).refused_at)

    def judge(runs: Sequence[int]) -> Result:
        return Result(f"{max(runs)} refused", max(runs) <= 10)

    def baseline(seed: int, name: str) -> str:
        refused = run(seed, BASELINES[name])
        return f"{refused} refused" if refused else "never got there"

    return Row("T5", what, "<= 10 refused in the next 60 s", run, judge, load.calls, baseline)


def raised(what: str, profile: Profile, after: float, factor: float, within: float) -> Row[float]:
    """After so many seconds the limit rises to `factor` of itself; it is looked at for `within` seconds."""
    load = Load(replace(profile, changes=(Change(after, factor),)), after + within)
    assert profile.requests_per_minute is not None
    goal = 0.95 * factor * profile.requests_per_minute / 60
    span = max(1.0, 20 * 60 / profile.requests_per_minute)  # seconds over which a rate is measured

    def run(seed: int) -> float:
        times = [at for at, _ in _live(load, seed, Penstock).admitted]
        at = after
        while at + span <= load.seconds and bisect_left(times, at + span) - bisect_left(times, at) < goal * span:
            at += span / 4
        return at - after

    def judge(runs: Sequence[float]) -> Result:
        return Result(f"{max(runs):.0f} s", max(runs) <= 30.0)

    return Row("T6", what, "<= 30 s to 95 %", run, judge, load.calls)


def open_loop(what: str, load: Load, per_second: float) -> Row[float]:
    """Poisson arrivals at 90 % of the limit; those of the first minute, while the limit is learned, do not count."""

    def run(seed: int) -> float:
        world, waits = World(load.profile, seed), list[float]()

        def done(job: Job) -> None:
            if job.asked > 60.0:
                waits.append(job.waited)

        client = Penstock(world, done)

        def arrive() -> None:
            client.ask(load.job(world))
            world.at(world.now + world.random.expovariate(per_second), arrive)

        world.at(0.0, arrive)
        world.run(load.seconds)
        return sorted(waits)[int(0.99 * len(waits))]

    def judge(runs: Sequence[float]) -> Result:
        return Result(f"{1000 * max(runs):.1f} ms", max(runs) <= 0.005)

    return Row("T7", what, "p99 of the gate's wait <= 5 ms", run, judge, load.calls)


CALLERS = 8
SIZES = [int(200 * 50 ** (number / (CALLERS - 1))) for number in range(CALLERS)]  # characters, 1 : 50


def fairness() -> Row[tuple[float, float]]:
    """Eight callers who always have calls waiting, of sizes 1 : 50; then the first has a hundred times as many.

    Service is input + 2 x output tokens. What the others wait is compared with what they wait without the flood.
    """
    load = Load(Profile(tokens_per_minute=300_000, output_tokens=100), 70.0)
    counts_from = 30.0  # when the limit is learned, and its full bucket is used up

    def serve(seed: int, *, flood: bool) -> tuple[float, float]:
        world, service, waits = World(load.profile, seed), [0.0] * CALLERS, list[float]()

        def ask(number: int) -> None:
            client.ask(replace(load, characters=(SIZES[number], SIZES[number])).job(world, str(number)))

        def done(job: Job) -> None:
            number = int(job.caller)
            if world.now >= counts_from:
                service[number] += job.size.input_tokens + 2 * 100
                if number:
                    waits.append(job.waited)
            ask(number)

        client = Penstock(world, done)
        for number in range(CALLERS):
            for _ in range(4_000 if flood and number == 0 else 40):
                ask(number)
        world.run(load.seconds)
        jain = sum(service) ** 2 / (CALLERS * sum(each**2 for each in service))
        return jain, sorted(waits)[int(0.99 * len(waits))]

    def run(seed: int) -> tuple[float, float]:
        alone, flooded = serve(seed, flood=False), serve(seed, flood=True)
        return min(alone[0], flooded[0]), flooded[1] / alone[1]

    def judge(runs: Sequence[tuple[float, float]]) -> Result:
        jain, ratio = min(run[0] for run in runs), max(run[1] for run in runs)
        return Result(f"Jain {jain:.4f}, p99 wait x {ratio:.2f}", jain >= 0.99 and ratio <= 1.2)

    return Row("T8", "8 callers, sizes 1:50, one floods x100", "Jain >= 0.99, p99 wait <= 1.2 x", run, judge, 2 * 4_000)


def _relay(seed: int, per_second: float, *, outage: tuple[float, float], reason: str) -> tuple[int, list[float]]:
    """Clients of an OpenAI SDK (3 attempts, unless told not to) and the gateway's own retries, in front of one upstream
    that answers 200 but in its outage. Returns the clients' requests in that time, and when the upstream was asked."""
    random, budget, breaker = Random(seed), RetryBudget(), Breaker()
    refusal = outcome.of_answer(500) if reason == "500" else outcome.of_answer(429, code=reason)
    began, ended = outage
    world = World(Profile(), seed)
    asked: list[float] = []
    requests = 0

    def client(attempt: int) -> None:
        tries: Tries[str] = Tries(("upstream",), 3)

        def gateway() -> None:
            now = world.now
            if not breaker.admits(now, random.random()):
                return answer(said_no=True)
            if began <= now < ended:
                asked.append(now)
            meaning = refusal if began <= now < ended else OK
            world.at(now + random.uniform(0.05, 0.2), lambda: told(meaning))

        def told(meaning: outcome.Meaning) -> None:
            now = world.now
            breaker.ended(meaning, None, now)
            if meaning is OK:
                return budget.succeeded(now)
            if meaning.retry is Retry.BACKOFF and tries.failed("upstream") and budget.spend(now):
                pause = backoff.delay(tries.failures - 1, random.random(), base=0.5, cap=20.0, retry_after=None)
                return world.at(now + pause, gateway)
            return answer(said_no=True)

        def answer(*, said_no: bool) -> None:
            if not said_no and attempt < 2:  # the gateway always says `x-should-retry: false` on these
                world.at(world.now + 0.5 * 2**attempt, lambda: client(attempt + 1))

        gateway()

    def arrive() -> None:
        nonlocal requests
        requests += began <= world.now < ended
        client(0)
        world.at(world.now + random.expovariate(per_second), arrive)

    world.at(0.0, arrive)
    world.run(ended + 10.0)
    return requests, asked


def outage() -> Row[float]:
    def run(seed: int) -> float:
        requests, asked = _relay(seed, 50.0, outage=(30.0, 90.0), reason="500")
        return len(asked) / requests

    def judge(runs: Sequence[float]) -> Result:
        return Result(f"{max(runs):.2f} x", max(runs) <= 1.1)

    return Row("T11", "all answers 500 for 60 s, SDK clients", "upstream calls <= 1.1 x requests", run, judge)


def money() -> Row[int]:
    def run(seed: int) -> int:
        _, asked = _relay(seed, 10.0, outage=(30.0, 630.0), reason="insufficient_quota")
        known = [at for at in asked if at > asked[0] + 0.2]  # those on their way when it said so do not count
        return max((bisect_left(known, at + 60.0) - index for index, at in enumerate(known)), default=0)

    def judge(runs: Sequence[int]) -> Result:
        return Result(f"{max(runs)} in a minute", max(runs) <= 1)

    return Row("T13", "credit is used up", "<= 1 upstream call a minute", run, judge)


def release(what: str, profile: Profile) -> Row[int]:
    """The limit falls to 0 for 30 s; a refusal holds 1,000 calls for a minute."""
    after = 40.0
    load = Load(replace(profile, changes=(Change(after, 0.0), Change(after + 30, 1.0))), after + 85)
    assert profile.requests_per_minute is not None
    each = profile.requests_per_minute / 600

    def run(seed: int) -> int:
        world = World(load.profile, seed)
        load.saturate(world, Penstock(world), backlog=1_000)
        world.run(load.seconds)
        times = world.tally.sent_at
        released = times[bisect_left(times, after + 30) :][:1_000]
        assert len(released) == 1_000
        return max(bisect_left(released, at + 0.1 - 1e-6) - index for index, at in enumerate(released))

    def judge(runs: Sequence[int]) -> Result:
        return Result(f"{max(runs)} in 100 ms", max(runs) <= max(1.0, 1.1 * each))

    return Row("T12", what, f"<= {max(1.0, 1.1 * each):.1f} in any 100 ms", run, judge, load.calls)


def not_built(number: str, what: str) -> Row[None]:
    return Row(number, what, "-", lambda seed: None, lambda runs: Result("several processes: not built", met=None))
