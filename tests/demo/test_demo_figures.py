"""The demo's instruments: what they read, and how they count."""

from __future__ import annotations

import pytest

from proxy.demo.client import Tally, are_in_order, prompts
from proxy.demo.scrape import Scrape

TEXT = r"""# HELP penstock_requests_total Client requests.
# TYPE penstock_requests_total counter
penstock_requests_total{code="200",model="a \"quoted\" one",outcome="ok"} 3.0
penstock_requests_total{code="429",model="b",outcome="rejected"} 2.0
penstock_overhead_seconds_bucket{le="+Inf",stream="true"} 9.0
penstock_overhead_seconds_sum{stream="true"} 1.5e-03
penstock_streams_in_flight 4.0
process_open_fds 12.0
"""


def test_a_family_is_summed_over_the_labels_that_are_not_asked_for() -> None:
    scrape = Scrape(TEXT)
    assert scrape.total("requests_total") == 5
    assert scrape.total("requests_total", outcome="ok") == 3
    assert scrape.total("requests_total", outcome="ok", code="429") == 0
    assert scrape.total("requests_total", model=r"a \"quoted\" one") == 3
    assert scrape.total("overhead_seconds_sum") == 0.0015
    assert scrape.total("streams_in_flight") == 4


def test_what_is_not_there_counts_as_nothing() -> None:
    assert Scrape(TEXT).total("retries_total") == 0
    assert Scrape("").total("requests_total") == 0


@pytest.mark.parametrize(("count", "p95"), [(0, None), (1, 1.0), (19, 19.0), (20, 19.0), (100, 95.0), (150, 143.0)])
def test_the_p95_is_a_value_that_was_seen(count: int, p95: float | None) -> None:
    tally = Tally(count, first_tokens=[float(number) for number in range(count, 0, -1)])
    assert tally.first_token_p95 == p95


def test_a_burst_that_has_not_begun_has_lasted_no_time() -> None:
    assert Tally(1).seconds == 0.0
    assert Tally(1, began=10.0, ended=12.5).seconds == 2.5


def test_answers_in_each_others_place_are_noticed() -> None:
    asked = prompts(3)
    answers: list[str | BaseException] = [f"echo: {prompt} and more" for prompt in asked]
    assert are_in_order(asked, answers)
    answers[0], answers[2] = answers[2], answers[0]
    assert not are_in_order(asked, answers)


def test_a_failed_call_leaves_the_others_in_order() -> None:
    asked = prompts(2)
    assert are_in_order(asked, [OSError(), f"echo: {asked[1]}"])
    assert not are_in_order(asked, [OSError(), ""])


def test_no_prompt_is_the_beginning_of_another() -> None:
    asked = prompts(1200)
    assert len(set(asked)) == 1200
    assert len({len(prompt) for prompt in asked}) == 1
