"""`python -m benchmarks.limits [--seeds N] [--row T3 ...] [--no-baselines]`: the table; 1 where a target is missed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.limits.rows import BASELINES, Load, Row, saturation
from benchmarks.limits.stories import (
    cold_burst,
    fairness,
    lowered,
    money,
    not_built,
    open_loop,
    outage,
    raised,
    release,
)
from proxy.simulator.profile import Profile, Style

SEEDS = 5
SILENT = Style.NONE

# Answers take 1 to 10 seconds, in rows of high rates (output 100) about 1.5.
ROWS: list[Row[Any]] = [
    cold_burst("cold burst of 300, bucket 50, 500/min, headers", Style.OPENAI, 2),
    cold_burst("the same, no headers", SILENT, 10),
    *(
        saturation("T1", f"headers, {rate:,}/min", Load(profile, seconds), used=0.993, refused=0.0002)
        for rate, profile, seconds in (
            (60, Profile(requests_per_minute=60, output_tokens=300), 3_000),
            (500, Profile(requests_per_minute=500, output_tokens=300), 300),
            (3_000, Profile(requests_per_minute=3_000, output_tokens=100), 45),
            (30_000, Profile(requests_per_minute=30_000, output_tokens=100), 10),
        )
    ),
    *(
        saturation("T2", f"headers, 300 k tokens/min, {charge}", load, used=0.993, refused=0.0002)
        for charge, load in (
            ("charge = characters / 4", Load(Profile(tokens_per_minute=300_000, output_tokens=100), 300)),
            (
                "charge + max_tokens",
                Load(Profile(tokens_per_minute=300_000, output_tokens=100, max_tokens_weight=1.0), 400, max_tokens=500),
            ),
            (
                "charge 30 % off, and noisy",
                Load(Profile(tokens_per_minute=300_000, output_tokens=100, charge_factor=1.3, charge_noise=0.3), 400),
            ),
        )
    ),
    *(
        saturation("T3", f"no headers, {what}", Load(profile, seconds), used=0.99, refused=0.003)
        for what, profile, seconds in (
            ("60/min", Profile(requests_per_minute=60, style=SILENT, output_tokens=300), 4_500),
            ("500/min", Profile(requests_per_minute=500, style=SILENT, output_tokens=100), 840),
            ("3,000/min", Profile(requests_per_minute=3_000, style=SILENT, output_tokens=100), 300),
            (
                "300 k tokens/min, charge 30 % off, and noisy",
                Profile(
                    tokens_per_minute=300_000, style=SILENT, output_tokens=100, charge_factor=1.3, charge_noise=0.3
                ),
                700,
            ),
            (
                "500/min, refused calls are charged",
                Profile(requests_per_minute=500, style=SILENT, output_tokens=100, charge_refused=True),
                700,
            ),
            (
                "500/min, others take 100",
                Profile(requests_per_minute=500, style=SILENT, output_tokens=100, cross_requests_per_minute=100),
                700,
            ),
        )
    ),
    *(
        saturation(
            "T4",
            f"no headers, windows of {window} s, {rate}/min",
            Load(
                Profile(requests_per_minute=rate, window_seconds=window, style=SILENT, output_tokens=100),
                seconds - phase,
                phase=phase,
            ),
            used=0.97,
            refused=0.003,
        )
        for window, rate, seconds, phase in (
            (10, 60, 3_600, 3.3),
            (10, 600, 600, 3.3),
            (60, 60, 4_200, 23.3),
            (60, 600, 600, 23.3),
        )
    ),
    *(
        lowered(f"limit / 2.5, {what}", profile, after, 0.4)
        for what, profile, after in (
            ("500/min, headers", Profile(requests_per_minute=500, output_tokens=100), 120),
            ("3,000/min, headers", Profile(requests_per_minute=3_000, output_tokens=100), 45),
            ("60/min, no headers", Profile(requests_per_minute=60, style=SILENT, output_tokens=100), 900),
            ("500/min, no headers", Profile(requests_per_minute=500, style=SILENT, output_tokens=100), 300),
        )
    ),
    *(
        raised(f"limit x 2, {what}", profile, after, 2.0, within)
        for what, profile, after, within in (
            ("500/min, headers", Profile(requests_per_minute=500, output_tokens=100), 120, 60),
            ("500/min, no headers", Profile(requests_per_minute=500, style=SILENT, output_tokens=100), 400, 200),
            ("3,000/min, no headers", Profile(requests_per_minute=3_000, style=SILENT, output_tokens=100), 90, 60),
        )
    ),
    open_loop("90 % of 500/min", Load(Profile(requests_per_minute=500, output_tokens=300), 360), 7.5),
    open_loop("90 % of 300 k tokens/min", Load(Profile(tokens_per_minute=300_000, output_tokens=300), 360), 8.1),
    fairness(),
    not_built("T9", "8 replicas with a store"),
    not_built("T10", "the store is gone for 60 s"),
    outage(),
    release(
        "1,000 calls held, then released, headers, 3,000/min", Profile(requests_per_minute=3_000, output_tokens=100)
    ),
    release("the same, no headers, 6,000/min", Profile(requests_per_minute=6_000, style=SILENT, output_tokens=100)),
    money(),
]


def measure(number: int, seed: int) -> tuple[Any, float]:
    """One run of row `number` of ROWS, by its place, so that another process can be asked for it; and its seconds of
    one core."""
    began = time.process_time()
    return ROWS[number].run(seed), time.process_time() - began


def compare(number: int, name: str) -> tuple[str, float]:
    """The same for one of BASELINES."""
    began, baseline = time.process_time(), ROWS[number].baseline
    assert baseline is not None
    return baseline(0, name), time.process_time() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each row (default {SEEDS})")
    parser.add_argument("--row", action="append", help="only rows of this number, such as T3; may be repeated")
    parser.add_argument("--no-baselines", action="store_true", help="only Penstock")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    chosen = parser.parse_args()

    numbers = [number for number, row in enumerate(ROWS) if not chosen.row or row.number in chosen.row]
    began, spent, missed = time.monotonic(), 0.0, False
    table = Table(title=f"Limits unknown beforehand, in virtual time, {chosen.seeds} seeds: share used, share refused")
    for name in ("", "what", "target", "Penstock", "", *BASELINES, "s"):
        table.add_column(name, no_wrap=name not in ("what", "target"))
    with ProcessPoolExecutor(chosen.jobs) as pool:
        seeds = range(chosen.seeds)
        runs = {number: [pool.submit(measure, number, seed) for seed in seeds] for number in numbers}
        others = {
            number: [pool.submit(compare, number, name) for name in BASELINES]
            for number in numbers
            if ROWS[number].baseline and not chosen.no_baselines
        }
        for number in numbers:
            row, told = ROWS[number], [run.result() for run in runs[number]]
            compared = [other.result() for other in others.get(number, ())]
            seconds = sum(took for _, took in (*told, *compared))
            result = row.judge([run for run, _ in told])
            spent, missed = spent + seconds, missed or result.met is False
            met = {True: "met", False: "MISSED", None: "-"}[result.met]
            texts = [text for text, _ in compared] or [""] * len(BASELINES)
            table.add_row(row.number, row.what, row.target, result.text, met, *texts, f"{seconds:.0f}")
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(table)
    console.print(f"{spent:.0f} s of one core, {time.monotonic() - began:.0f} s by the clock")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
