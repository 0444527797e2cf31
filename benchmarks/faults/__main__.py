"""`python -m benchmarks.faults`: every fault of a peer, many times over, and what is left of the gateway after it.

Prints the table of docs/faults.md and exits with 1 if a call was lost or an invariant did not hold. A call is lost that
hangs, that ends in order when it is not whole, or that gets something else than what the upstream sent or an error that
says what became of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Iterable

import uvloop

from benchmarks.faults.cases import CASES, Case
from benchmarks.faults.world import World, chance, world
from proxy.app import allow_descriptors

BOUND_SECONDS = 600.0


async def tried(seed: int, share: float, cases: Iterable[Case] = CASES) -> tuple[World, bool]:
    """Run this share of the cases; returns what was found, and whether there was time for all."""
    until_then = time.monotonic() + BOUND_SECONDS
    async with world() as here:
        await here.house.metrics()  # its connection is kept
        tasks, opened = await here.at_rest()
        for case in cases:
            if time.monotonic() > until_then:
                return here, False
            number = max(24, round(share * case.number))
            began = time.process_time()
            await here.run(case.name, itertools.islice(case.trials(chance(seed, case.name)), number))
            spent = time.process_time() - began
            print(
                f"{case.name:32}{here.tried[case.name]:7}{here.lost[case.name]:6} lost   {spent:5.1f} s of CPU",
                file=sys.stderr,
            )
        for _ in range(50):
            now = await here.at_rest()
            if now == (tasks, opened):
                break
            await asyncio.sleep(0.1)
        else:
            here.problems.append(f"tasks and descriptors: {tasks}, {opened} at the start, {now} at the end")
        if here.leaks():
            here.problems.append("the upstream's key stands in the log")
        return here, True


def table(found: World) -> str:
    rows = [
        f"| {case.name} | {case.meaning} | {found.tried[case.name]:,} | "
        f"{found.tried[case.name] - found.lost[case.name]:,} | {found.lost[case.name]:,} |"
        for case in CASES
    ]
    total, lost = sum(found.tried.values()), sum(found.lost.values())
    rows.append(f"| all | | {total:,} | {total - lost:,} | {lost:,} |")
    return "\n".join(("| case | what happens | tried | survived | lost |", "|---|---|---:|---:|---:|", *rows))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of a full run, which takes every place")
    said = parser.parse_args()
    allow_descriptors()
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # of the peers' faults, which are the matter here
    found, complete = uvloop.run(tried(said.seed, said.share))
    print(table(found))
    print(f"\nseed {said.seed}; " + ("all invariants held" if not found.problems else "invariants that did not hold:"))
    for problem in found.problems:
        print(f"- {problem}")
    if not complete:
        print(f"stopped after {BOUND_SECONDS:.0f} s")
    return int(bool(found.problems or sum(found.lost.values()) or not complete))


if __name__ == "__main__":
    sys.exit(main())
