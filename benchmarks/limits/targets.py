"""The rows T0 to T13: what is asked for, what shall come of it, and one run of any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.limits.rows import BASELINE_ATTEMPTS, Load, Row, saturation
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


@dataclass(slots=True, frozen=True)
class Work:
    """One run: of row `number` of ROWS with a seed, or of one of BASELINES there. Told by these words alone, so that
    another process can be asked for it."""

    number: int
    seed: int
    baseline: str = ""

    @property
    def length(self) -> float:
        """The longest begin first, so that all processes are busy to the end; a baseline's attempts are few."""
        return min(ROWS[self.number].calls, BASELINE_ATTEMPTS) / 4 if self.baseline else ROWS[self.number].calls


def done(work: Work) -> Any:
    """What came of it."""
    row = ROWS[work.number]
    if not work.baseline:
        return row.run(work.seed)
    assert row.baseline is not None
    return row.baseline(work.seed, work.baseline)
