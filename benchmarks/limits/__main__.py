"""`python -m benchmarks.limits [--seeds N] [--row T3 ...] [--no-baselines]`: the table; 1 where a target is missed.

Limits are unknown beforehand, time is virtual, and each row and seed is a run of its own, on all cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from signal import SIG_DFL, SIGINT, signal
from typing import Any

from benchmarks.limits.rows import BASELINES
from benchmarks.limits.table import show
from benchmarks.limits.targets import ROWS, Work, done

SEEDS = 5


def all_done(works: Sequence[Work], jobs: int) -> dict[Work, Any]:
    """What came of each. They are done in so many processes. Whatever their order, what comes of them is the same.

    Raises:
        KeyboardInterrupt: what ran has ended by then.
    """
    found: dict[Work, Any] = {}
    # An interrupt ends the workers at once; this process hears of it, too, and tells it.
    with ProcessPoolExecutor(jobs, get_context("spawn"), signal, (SIGINT, SIG_DFL)) as pool:
        try:
            running = {pool.submit(done, work): work for work in sorted(works, key=lambda work: -work.length)}
            for run in as_completed(running):
                found[running[run]] = run.result()
                end = "\r" if sys.stderr.isatty() and len(found) < len(works) else "\n"
                print(f"{len(found)} of {len(works)} runs", end=end, file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each row (default {SEEDS})")
    parser.add_argument("--row", action="append", help="only rows of this number, such as T3; may be repeated")
    parser.add_argument("--no-baselines", action="store_true", help="only Penstock")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/limits.md has it")
    chosen = parser.parse_args()

    numbers = [number for number, row in enumerate(ROWS) if not chosen.row or row.number in chosen.row]
    baselines = () if chosen.no_baselines else tuple(BASELINES)
    runs = {number: [Work(number, seed) for seed in range(chosen.seeds)] for number in numbers}
    others = {number: [Work(number, 0, name) for name in baselines if ROWS[number].baseline] for number in numbers}
    began = time.monotonic()
    try:
        found = all_done([work for each in (runs, others) for works in each.values() for work in works], chosen.jobs)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    lines, missed = [], False
    for number in numbers:
        row = ROWS[number]
        result = row.judge([found[work] for work in runs[number]])
        met, missed = {True: "met", False: "MISSED", None: "-"}[result.met], missed or result.met is False
        texts = [found[work] for work in others[number]] or [""] * len(baselines)
        lines.append((row.number, row.what, row.target, result.text, met, *texts))
    show(("", "what", "target", "Penstock", "", *baselines), lines, markdown=chosen.markdown)
    spent = sum(used.ru_utime + used.ru_stime for used in (getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)))
    print(f"{chosen.seeds} seeds, {spent:.0f} s of CPU, {time.monotonic() - began:.0f} s by the clock")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
