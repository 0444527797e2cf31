"""One side of the comparison: the burst on its way to a provider of its own, and what is known of it meanwhile.

Who measures what:
    the client      answered, failed, tokens, first tokens, wall time; with one clock for both sides
    the provider    what it refused, and what arrived
    the gateway     in flight, queued, its own retries; read from its /metrics
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from proxy.demo import client
from proxy.demo.client import Tally
from proxy.demo.scrape import Scrape, scrape
from proxy.simulator import Simulator

_RATE_SECONDS = 5.0  # a rate is that of the last so many seconds
_SETTLE_SECONDS = 2.0  # a call is counted after its last byte, so a moment after its client has read it
_SETTLE_STEP_SECONDS = 0.05


@dataclass(slots=True, frozen=True)
class Figures:
    """One side at one moment. None: there is no such thing on this side, or not yet."""

    seconds: float
    calls: int
    answered: int
    failed: int
    in_order: bool
    in_flight: int  # at the provider
    queued: int | None
    answered_per_second: float
    tokens_per_second: float
    first_token_p95: float | None  # seconds
    refused: int  # by the provider
    sdk_retries: int
    gateway_retries: int | None


class Side:
    """
    Args:
        provider: asked by nobody else.
        base_url: where the client sends its calls.
        admin_port: of the gateway on the way; None where there is none.

    Attributes:
        scrape: the last reading of the gateway's metrics.
    """

    def __init__(self, provider: Simulator, calls: int, *, base_url: str, admin_port: int | None = None) -> None:
        self.provider = provider
        self.tally = Tally(calls)
        self.scrape: Scrape | None = None
        self._base_url, self._admin_port = base_url, admin_port
        self._past: deque[tuple[float, int, int]] = deque()  # seconds, answered, tokens

    async def burst(self, until: float) -> None:
        """Send the burst and wait for its end, or until the loop's clock shows `until`; who waits then has failed."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await client.burst(self._base_url, client.prompts(self.tally.calls), self.tally)

    async def look(self) -> Figures:
        """The figures now; rates are those of the last few seconds."""
        if self._admin_port is not None:
            self.scrape = await scrape(self._admin_port)
        tally = self.tally
        now = tally.seconds
        self._past.append((now, tally.answered, tally.tokens))
        while now - self._past[0][0] > _RATE_SECONDS:
            self._past.popleft()
        before, answered, tokens = self._past[0]
        return self._figures(tally.answered - answered, tally.tokens - tokens, now - before)

    async def result(self) -> Figures:
        """The figures of the whole burst, once it is over; rates are those of all of it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                while self._admin_port is not None:
                    self.scrape = await scrape(self._admin_port)
                    if not self.scrape.total("requests_in_flight"):
                        break
                    await asyncio.sleep(_SETTLE_STEP_SECONDS)
        return self._figures(self.tally.answered, self.tally.tokens, self.tally.seconds)

    def _figures(self, answered: int, tokens: int, seconds: float) -> Figures:
        tally, stats, own = self.tally, self.provider.provider.stats, self.scrape
        received = stats.arrived
        in_flight, queued, retries = stats.in_flight, None, None
        if own is not None:
            received = int(own.total("requests_total") + own.total("requests_in_flight"))
            in_flight = int(own.total("gate_in_use") - own.total("gate_in_use", gate="process"))
            queued = int(own.total("gate_queue_depth"))
            retries = int(own.total("upstream_retries_total"))
        return Figures(
            seconds=tally.seconds,
            calls=tally.calls,
            answered=tally.answered,
            failed=tally.failed,
            in_order=tally.in_order,
            in_flight=in_flight,
            queued=queued,
            answered_per_second=answered / seconds if seconds > 0 else 0.0,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            first_token_p95=tally.first_token_p95,
            refused=stats.refusals,
            sdk_retries=max(0, received - tally.calls),  # below 0 while the calls are still arriving
            gateway_retries=retries,
        )
