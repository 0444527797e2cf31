"""What did this usage cost? Whole micro-dollars, so that sums are exact.

Prices are micro-dollars for a million tokens: $0.15 for a million tokens is 150,000. Tokens times price is then
millionths of a micro-dollar, a whole number; it is rounded once, at the call's end.

Source: the price lists of OpenAI and Anthropic. Both bill tokens read from a cache and tokens written to one at rates
of their own, in place of the rate for input; reasoning tokens at the rate for output, of which they are a part.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.core.usage import Usage

MICRO = 1_000_000  # micro-dollars in a dollar; tokens in the unit that prices are for


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-dollars for a million tokens, >= 0. None: as the input, or the output, that the tokens are a part of."""

    input: int
    output: int
    cached_input: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None


def price(
    *,
    input: float,
    output: float,
    cached_input: float | None = None,
    cache_write: float | None = None,
    reasoning: float | None = None,
) -> Price:
    """A price as providers tell it: dollars for a million tokens, each to the nearest micro-dollar."""
    return Price(
        _micro(input),
        _micro(output),
        None if cached_input is None else _micro(cached_input),
        None if cache_write is None else _micro(cache_write),
        None if reasoning is None else _micro(reasoning),
    )


def of(usage: Usage, price: Price) -> int:
    """Micro-dollars, a half rounded up.

        (input - cached - cache_write) * input price + cached * cached price + cache_write * cache-write price
        + (output - reasoning) * output price + reasoning * reasoning price

    Parts that exceed their whole, as a provider may tell them by mistake, are billed as told; the rest is then nothing.
    """
    if not (usage.cached or usage.cache_write or usage.reasoning):  # as most are
        return (usage.input * price.input + usage.output * price.output + MICRO // 2) // MICRO
    total = max(0, usage.input - usage.cached - usage.cache_write) * price.input
    total += max(0, usage.output - usage.reasoning) * price.output
    total += usage.cached * (price.input if price.cached_input is None else price.cached_input)
    total += usage.cache_write * (price.input if price.cache_write is None else price.cache_write)
    total += usage.reasoning * (price.output if price.reasoning is None else price.reasoning)
    return (total + MICRO // 2) // MICRO


def _micro(dollars: float) -> int:
    return round(dollars * MICRO)
