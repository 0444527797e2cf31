"""What a call cost, to the micro-dollar."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import cost
from proxy.core.cost import MICRO, Price
from proxy.core.usage import Usage

LISTED = {  # dollars for a million tokens, as providers list them
    "gpt-4o-mini": cost.price(input=0.15, output=0.60, cached_input=0.075),
    "claude-sonnet": cost.price(input=3, output=15, cached_input=0.30, cache_write=3.75),
}


@pytest.mark.parametrize(
    ("model", "usage", "micro_dollars"),
    [
        ("gpt-4o-mini", Usage(), 0),
        ("gpt-4o-mini", Usage(input=1_000_000), 150_000),
        ("gpt-4o-mini", Usage(output=1_000_000), 600_000),
        ("gpt-4o-mini", Usage(input=1000, output=500), 450),
        ("gpt-4o-mini", Usage(input=1000, output=500, cached=1000), 375),
        ("gpt-4o-mini", Usage(input=1000, output=500, cached=400, reasoning=300), 420),  # reasoning as output
        ("claude-sonnet", Usage(input=3000, output=100, cached=1000, cache_write=1000), 3000 + 300 + 3750 + 1500),
        ("gpt-4o-mini", Usage(input=3), 0),  # 0.45
        ("gpt-4o-mini", Usage(input=10), 2),  # 1.5
    ],
)
def test_the_bill_is_that_of_the_price_list(model: str, usage: Usage, micro_dollars: int) -> None:
    assert cost.of(usage, LISTED[model]) == micro_dollars


def test_what_has_no_price_of_its_own_is_billed_as_what_it_is_a_part_of() -> None:
    price = cost.price(input=2, output=8)
    assert cost.of(Usage(100, 50, cached=60, cache_write=20, reasoning=30), price) == cost.of(Usage(100, 50), price)


def test_a_price_of_nothing_is_a_price() -> None:
    free = cost.price(input=2, output=8, cached_input=0, reasoning=0)
    assert cost.of(Usage(100, 50, cached=100, reasoning=50), free) == 0


def test_dollars_become_whole_micro_dollars() -> None:
    assert cost.price(input=0.1, output=0.29, cached_input=0.0000005, cache_write=1e6) == Price(
        100_000, 290_000, 0, 10**12
    )


TOKENS = st.integers(0, 10**9)
PRICES = st.integers(0, 10**9)


@given(
    parts=st.tuples(TOKENS, TOKENS, TOKENS, TOKENS, TOKENS), prices=st.tuples(PRICES, PRICES, PRICES, PRICES, PRICES)
)
def test_each_token_is_billed_once_at_its_own_price(parts: tuple[int, ...], prices: tuple[int, ...]) -> None:
    plain, cached, written, answer, reasoning = parts
    usage = Usage(plain + cached + written, answer + reasoning, cached, written, reasoning)
    exact = Fraction(sum(count * price for count, price in zip(parts, prices, strict=True)), MICRO)
    billed = cost.of(usage, Price(prices[0], prices[3], prices[1], prices[2], prices[4]))
    assert Fraction(-1, 2) <= exact - billed < Fraction(1, 2)


@given(st.builds(Usage, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS), st.builds(Price, PRICES, PRICES, PRICES))
def test_no_bill_is_negative_whatever_a_provider_tells(usage: Usage, price: Price) -> None:
    assert cost.of(usage, price) >= 0
