"""Providers that lie, change their mind or say nothing: the real gate and learner against each, in virtual time.

Whatever happens, nobody waits longer than a minute or the provider's own word, and no storm of refusals follows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.limits.penstock import Penstock
from benchmarks.limits.rows import Load
from benchmarks.limits.world import World
from proxy.core.learner import SILENCE_MAX
from proxy.simulator.profile import Change, Profile, Style

TOLD = Profile(requests_per_minute=300, output_tokens=20)
SILENT = replace(TOLD, style=Style.NONE)
HOLD = 2.0  # seconds; more than this provider asks for while its limit is not lowered
LIMIT, REMAINING, RESET = (f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset"))


def live(profile, seconds=240.0):
    """A saturated source at this provider; what was sent, refused and admitted, by time."""
    load = Load(profile, seconds)
    world = World(profile, 0)
    load.saturate(world, Penstock(world))
    world.run(seconds)
    return world.tally


def longest_silence(tally):
    return max(later - earlier for earlier, later in pairwise([0.0, *tally.sent_at]))


def admitted(tally, since, until):
    return sum(since <= at < until for at, _ in tally.admitted)


@pytest.mark.parametrize(
    "lies",
    [
        {REMAINING: "300"},  # it never falls
        {REMAINING: "0"},
        {LIMIT: "0", REMAINING: "0"},
        {LIMIT: "-1", REMAINING: "-1", RESET: "-1"},
        {LIMIT: "NaN", REMAINING: "NaN", RESET: "NaN"},
        {LIMIT: "1" + "0" * 400, REMAINING: "9" * 400, RESET: "9" * 400 + "s"},
        {LIMIT: "3", REMAINING: "2"},
        {RESET: "99999999s"},
        {"retry-after": "86400"},
        {"retry-after": "0"},
        {"retry-after": "NaN", "retry-after-ms": "-1"},
    ],
    ids=lambda lies: ", ".join(f"{name} {text[:9]}" for name, text in lies.items()),
)
def test_lies_neither_stall_nor_storm(lies):
    tally = live(replace(TOLD, lies=tuple(lies.items())))
    assert longest_silence(tally) <= SILENCE_MAX + HOLD
    assert tally.refused_share <= 0.05


@pytest.mark.parametrize("first", list(Style))
def test_headers_that_flip_their_format_mid_run_are_followed(first):
    flips = [style for style in Style if style is not first]
    changes = tuple(Change(60.0 + 30.0 * number, style=style) for number, style in enumerate(flips))
    tally = live(replace(TOLD, style=first, changes=changes))
    assert longest_silence(tally) <= HOLD
    assert tally.refused_share <= 0.02
    assert admitted(tally, 60.0, 240.0) >= 0.9 * 3 * 300


@pytest.mark.parametrize("profile", [TOLD, SILENT], ids=["headers", "no headers"])
def test_a_limit_that_falls_tenfold_and_rises_again_is_followed(profile):
    tally = live(replace(profile, changes=(Change(90.0, 0.1), Change(150.0, 1.0))), 270.0)
    assert longest_silence(tally) <= SILENCE_MAX
    assert sum(at >= 90.0 for at in tally.refused_at) <= 15
    assert admitted(tally, 210.0, 270.0) >= 0.9 * 300


@pytest.mark.parametrize("profile", [TOLD, SILENT], ids=["headers", "no headers"])
def test_a_limit_of_nothing_is_not_unlimited_and_nobody_is_silent_for_good(profile):
    tally = live(replace(profile, changes=(Change(90.0, 0.0), Change(180.0, 1.0))), 330.0)
    assert sum(at >= 90.0 for at in tally.refused_at) <= 15
    assert longest_silence(tally) <= SILENCE_MAX + HOLD
    assert admitted(tally, 270.0, 330.0) >= 270
