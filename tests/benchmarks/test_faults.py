"""The benchmark of faults, a few trials of each case: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import uvloop

from benchmarks.faults.__main__ import tried
from benchmarks.faults.cases import CASES

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@pytest.mark.timeout(120)  # five hundred calls, some of which wait for a deadline
def test_a_few_trials_of_each_case_lose_nothing_and_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL, logger="aiohttp"):  # peers that break off are errors to its server
        found, complete = uvloop.run(tried(seed=7, share=0.0))
    assert (found.problems, +found.lost, complete) == ([], {}, True)
    assert set(found.tried) == {case.name for case in CASES}


@pytest.mark.timeout(180)  # 2,600 calls, spread over all places of which the benchmark takes every one
def test_streams_of_either_dialect_that_are_cut_or_split_anywhere_are_never_taken_for_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cases = [case for case in CASES if "tream cut" in case.name or "tream split" in case.name]
    with caplog.at_level(logging.CRITICAL, logger="aiohttp"):
        found, complete = uvloop.run(tried(seed=8, share=0.1, cases=cases))
    assert (found.problems, +found.lost, complete) == ([], {}, True)
    assert sum(found.tried.values()) > 2_000


def test_the_page_tells_of_every_case() -> None:
    page = PAGE.read_text()
    for case in CASES:
        assert f"| {case.name} | {case.meaning} |" in page
