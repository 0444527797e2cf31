"""What one call costs the gate and the learner, in microseconds of CPU: `python -m benchmarks.limits.cpu`.

The ordinary call: it comes at 80 % of a limit that is known, fits at once, is answered and ends. The limit is learned
beforehand, in virtual time; what the provider says is prepared, so that only the gateway's own decisions are counted:
the call's size, the gate, the learner, and the reading of the headers.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.limits.penstock import Penstock
from benchmarks.limits.rows import Load
from benchmarks.limits.world import World
from proxy.core import headers
from proxy.core.gate import Gate, Priority, State, Target, Ticket
from proxy.core.learner import Learner, Reservation, Size
from proxy.core.pool import Pool
from proxy.core.usage import Usage
from proxy.simulator.profile import Profile, Style
from proxy.simulator.provider import EPOCH, Admitted

CALLS = 5_000
REPEATS = 7  # the least of them counts: what the machine does beside is no cost of ours
LOAD = 0.8  # of the limit
FIRST_TOKEN, LAST_TOKEN = 0.6, 1.4  # seconds after a call was sent
LEARNING_SECONDS = 150.0
REQUESTS, TOKENS = 3_000.0, 1_500_000.0  # a minute


@dataclass(slots=True, frozen=True)
class House:
    """Where the calls are sent: the gate, the account's learner, and what the provider says to each call."""

    gate: Gate
    targets: tuple[Target, ...]
    learner: Learner | None
    began: float
    answers: list[Admitted]


def learned(profile: Profile) -> House:
    """An account whose limits were found out: a burst beyond them, and then what is asked for at `LOAD`."""
    world = World(profile, 0)
    client, load = Penstock(world), Load(profile, LEARNING_SECONDS)
    for _ in range(int(1.5 * REQUESTS)):
        client.ask(load.job(world))
    world.run(LEARNING_SECONDS)
    assert client.waiting == 0, "the burst was not served; give it more time"
    gap = 60.0 / REQUESTS / LOAD
    answers = []
    leaving: list[tuple[float, int, Admitted]] = []
    for number in range(CALLS):
        now = world.now + number * gap
        while leaving and leaving[0][0] <= now:
            world.provider.leave(heapq.heappop(leaving)[2], now)
        answer = world.provider.arrive(now, load.job(world).size)
        assert isinstance(answer, Admitted), "the load is beyond the limit"
        heapq.heappush(leaving, (now + LAST_TOKEN, number, answer))
        answers.append(answer)
    return House(client.gate, client.targets, client.learner, world.now, answers)


def of_one_pool(pool: Pool) -> House:
    """An account whose provider says nothing and refuses nothing."""
    house = learned(Profile(style=Style.NONE))
    gate = Gate(Pool("process", "process", concurrency=10_000), 10_000)
    return House(gate, (_To(pool),), pool.rates, 0.0, house.answers)


class _To:
    def __init__(self, pool: Pool) -> None:
        self.pools, self.account = (pool,), pool


def spend(house: House, began: float) -> float:
    """Seconds of CPU for all the calls, the first of them sent at `began`."""
    gate, learner, targets = house.gate, house.learner, house.targets
    gap = 60.0 / REQUESTS / LOAD
    tickets: list[Ticket] = []
    taken: list[Reservation] = []

    def ask(number: int, answer: Admitted, now: float) -> None:
        size = Size(input_tokens=float(answer.input_tokens), model="gpt-4o-mini")
        ticket = gate.ask(now, targets, size, priority=Priority.DEFAULT, caller="somebody")
        assert ticket.state is State.HELD, f"call {number} did not fit at once"
        tickets.append(ticket)
        taken.extend(reservation for _, reservation in ticket.reservations)

    def hear(number: int, answer: Admitted, now: float) -> None:
        if learner is not None:
            learner.answered(taken[number], headers.readings(answer.headers, EPOCH + now), now)

    def end(number: int, answer: Admitted, now: float) -> None:
        ticket = tickets[number]
        if learner is not None:
            learner.settle(taken[number], Usage(answer.input_tokens, answer.output_tokens), now)
        gate.served(ticket, answer.input_tokens, answer.output_tokens)
        gate.end(ticket, now)

    script: list[tuple[float, int, Callable[[int, Admitted, float], None]]] = []
    for number in range(CALLS):
        sent = began + number * gap
        script += [(sent, number, ask), (sent + FIRST_TOKEN, number, hear), (sent + LAST_TOKEN, number, end)]
    script.sort(key=lambda event: event[:2])
    gc.collect()
    gc.disable()
    before = time.process_time()
    for now, number, do in script:
        do(number, house.answers[number], now)
    seconds = time.process_time() - before
    gc.enable()
    return seconds


ROWS: dict[str, Callable[[], House]] = {
    "places only": lambda: of_one_pool(Pool("account", "account", concurrency=1_000)),
    "configured ceilings": lambda: of_one_pool(
        Pool("account", "account", rates=Learner(requests_per_minute=REQUESTS, tokens_per_minute=TOKENS, learn=False))
    ),
    "headers: requests": lambda: learned(Profile(requests_per_minute=REQUESTS)),
    "headers: requests and tokens": lambda: learned(Profile(requests_per_minute=REQUESTS, tokens_per_minute=TOKENS)),
    "refusals: requests": lambda: learned(Profile(requests_per_minute=REQUESTS, style=Style.NONE)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits.cpu", description=__doc__)
    parser.add_argument("--row", help="only the rows whose name begins so")
    chosen = parser.parse_args()
    table = Table(title=f"A call that fits at once: the least of {REPEATS} times {CALLS:,} calls")
    table.add_column("limits known from")
    table.add_column("us of CPU a call", justify="right")
    for name, make in ROWS.items():
        if name.startswith(chosen.row or ""):
            house = make()
            span = CALLS * 60.0 / REQUESTS / LOAD + LAST_TOKEN
            seconds = min(spend(house, house.began + number * span) for number in range(REPEATS))
            table.add_row(name, f"{1e6 * seconds / CALLS:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
