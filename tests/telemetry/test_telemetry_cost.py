"""Cost and the callers' keys in the numbers."""

from __future__ import annotations

import pytest

from proxy.core.cost import price
from proxy.telemetry import Labels
from tests.telemetry.conftest import LABELS

PAIR = {"provider": "openai", "model": "gpt-4o-mini"}
PRICES = {"gpt-4o-mini": price(input=0.15, output=0.6, cached_input=0.075)}  # a plain call costs 19 micro-dollars
CALLERS = Labels(LABELS.models, LABELS.upstreams, ("team-a", "team-b"), LABELS.gates)


def test_a_call_with_a_price_costs_and_one_without_is_counted(make, gateway_of, scrape):
    telemetry = make(prices=PRICES)
    gateway = gateway_of(telemetry)
    record = gateway.plain()
    gateway.streamed()
    gateway.plain(model="fast")
    told = scrape(telemetry)
    assert record.cost == 19
    assert told("cost_usd_total", **PAIR) == told.total("cost_usd_total") == pytest.approx(38e-6)
    assert told("unpriced_requests_total", provider="openai", model="fast") == 1
    assert told.total("unpriced_requests_total") == 1


def test_a_call_whose_tokens_are_not_known_is_neither_priced_nor_unpriced(make, gateway_of, scrape):
    telemetry = make(prices=PRICES)
    record = gateway_of(telemetry).left()
    told = scrape(telemetry)
    assert record.cost is None
    assert told.total("cost_usd_total") == told.total("unpriced_requests_total") == 0
    assert told.total("usage_missing_total") == 1


def test_a_million_calls_cost_exactly_a_million_times_as_much(make, gateway_of, scrape):
    telemetry = make(prices=PRICES)
    gateway_of(telemetry).plain()
    telemetry.settle()
    telemetry._recorder.counters["cost_usd"]["openai", "gpt-4o-mini"].value *= 1_000_000
    assert scrape(telemetry)("cost_usd_total", **PAIR) == 19.0


def test_a_reload_brings_other_prices(make, gateway_of, scrape):
    telemetry = make(prices=PRICES)
    gateway = gateway_of(telemetry)
    gateway.plain(model="fast")
    telemetry.settle()
    telemetry.relabel(LABELS, {"fast": price(input=1, output=1)})
    gateway.plain()
    gateway.plain(model="fast")
    told = scrape(telemetry)
    assert told("unpriced_requests_total", **PAIR) == 1
    assert told("unpriced_requests_total", provider="openai", model="fast") == 1
    assert told("cost_usd_total", provider="openai", model="fast") == pytest.approx(111e-6)


def test_tokens_are_told_by_request_too(gateway, telemetry, scrape):
    gateway.plain()
    told = scrape(telemetry)
    assert told("tokens_per_request_bucket", model="gpt-4o-mini", type="input", le="64.0") == 0
    assert told("tokens_per_request_bucket", model="gpt-4o-mini", type="input", le="256.0") == 1
    assert told("tokens_per_request_sum", model="gpt-4o-mini", type="output") == 11


def test_keys_are_counted_by_their_alias_where_that_is_asked_for(make, gateway_of, scrape):
    telemetry = make(CALLERS, prices=PRICES)
    gateway = gateway_of(telemetry)
    gateway.plain()
    gateway.refused()
    told = scrape(telemetry)
    assert told("key_requests_total", key="team-a", outcome="ok") == 1
    assert told("key_requests_total", key="team-a", outcome="rejected") == 1
    assert told("key_tokens_total", key="team-a", type="input") == 100
    assert told("key_tokens_total", key="team-a", type="output") == 11
    assert told("key_cost_usd_total", key="team-a") == pytest.approx(19e-6)
    assert told("key_rate_limited_total", key="team-a") == told.total("key_rate_limited_total") == 1


def test_whoever_brought_no_key_is_counted_as_none(make, gateway_of, scrape):
    telemetry = make(CALLERS)
    gateway = gateway_of(telemetry)
    for caller in ("", "made-up"):
        record = gateway.begin()
        record.caller = caller
        with telemetry.request(record):
            pass
    told = scrape(telemetry)
    assert told("key_requests_total", key="none", outcome="cancelled") == 1
    assert told("key_requests_total", key="other", outcome="cancelled") == 1


def test_without_asking_no_key_makes_a_series(make, gateway_of, scrape):
    telemetry = make(Labels(LABELS.models, LABELS.upstreams, (), LABELS.gates), prices=PRICES)
    gateway_of(telemetry).plain()
    assert not [labels for name, labels in scrape(telemetry) if name.startswith("penstock_key_")]
