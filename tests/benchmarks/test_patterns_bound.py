"""The bound that the fifty documents are measured against."""

import re

import pytest

from benchmarks.patterns.bound import least_seconds
from benchmarks.patterns.plot import bars


@pytest.mark.parametrize(
    ("documents", "stages", "latency", "per_second", "burst", "least"),
    [
        (1, 3, 4.0, 1000.0, 1000.0, 12.0),  # one after the other
        (50, 1, 4.0, 1000.0, 1000.0, 4.0),  # all at once
        (3, 1, 4.0, 0.5, 1.0, 8.0),  # the last is sent after 4 s
        (2, 2, 1.0, 1.0, 1.0, 4.0),  # four calls, one a second, and the last takes one
    ],
)
def test_it_is_what_latencies_and_limits_allow(documents, stages, latency, per_second, burst, least):
    assert least_seconds(documents, stages, latency, per_second=per_second, burst=burst) == pytest.approx(least)


def test_a_plot_has_a_bar_for_each_row_as_long_as_what_it_answered_and_says_what_failed():
    drawn = bars("a < b", [("one", 10, 0, 5.0), ("two", 5, 5, 2.5)])
    whole, half = (float(width) for width in re.findall(r'width="([\d.]+)" height="18"', drawn))
    assert whole == 2 * half
    assert "a &lt; b" in drawn
    assert drawn.count("failed") == 1
    assert "5 of 10 failed" in drawn
