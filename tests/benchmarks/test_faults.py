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
        found, complete = uvloop.run(tried(seed=7, trials=0))
    assert (found.problems, +found.lost, complete) == ([], {}, True)
    assert set(found.tried) == {case.name for case in CASES}


def test_the_page_tells_of_every_case() -> None:
    page = PAGE.read_text()
    for case in CASES:
        assert f"| {case.name} | {case.meaning} |" in page
