"""What it costs, by model and by key, and how much of it is not known."""

from __future__ import annotations

from grafana.pages import shared
from grafana.panels import Page, Query, bars, figure, figures, graph, row
from grafana.promql import increase, or_zero, rate

HOURLY = "* 3600"

PAGE = Page(
    "cost",
    "Penstock: cost and keys",
    "What the tokens cost, by the prices in the configuration. Keys are counted where telemetry.per_caller is true.",
    (
        figures(
            figure(
                "Cost an hour",
                "What the tokens of an hour cost at the present rate.",
                "currencyUSD",
                f"{rate('cost_usd')} {HOURLY}",
                decimals=2,
            ),
            figure(
                "Cost in this time",
                "What the tokens of the time that this page shows cost.",
                "currencyUSD",
                increase("cost_usd"),
                decimals=2,
            ),
            figure(
                "Cost of 1,000 requests",
                "Over all requests, those of models without a price among them.",
                "currencyUSD",
                f"1000 * {rate('cost_usd')} / {rate('requests')}",
                decimals=3,
            ),
            figure(
                "Cost of a million tokens",
                "Input and output together, over all models that have a price or not.",
                "currencyUSD",
                f"1e6 * {rate('cost_usd')} / {rate('tokens')}",
                decimals=2,
            ),
            figure(
                "Requests without a price",
                "Share of requests that used tokens of a model without a price; what they cost is not told here.",
                "percentunit",
                f"{or_zero(rate('unpriced_requests'))} / {rate('requests')}",
                decimals=1,
                steps=((0.01, "orange"),),
            ),
            figure(
                "Answers without usage",
                "Share of requests whose tokens are not known, and so neither is their cost.",
                "percentunit",
                f"{or_zero(rate('usage_missing'))} / {rate('requests')}",
                decimals=1,
                steps=((0.05, "orange"),),
            ),
        ),
        row(
            graph(
                "Cost an hour by model",
                "At the present rate.",
                "currencyUSD",
                Query(f"{rate('cost_usd', 'model')} {HOURLY}", "{{model}}"),
                stacked=True,
            ),
            graph(
                "Cost an hour by provider",
                "At the present rate.",
                "currencyUSD",
                Query(f"{rate('cost_usd', 'provider')} {HOURLY}", "{{provider}}"),
                stacked=True,
            ),
            bars(
                "Cost in this time by model",
                "Over the time that this page shows.",
                "currencyUSD",
                Query(increase("cost_usd", "model"), "{{model}}"),
            ),
        ),
        row(
            graph(
                "Cost of a million tokens by model",
                "Input and output together, as they come: it rises with the share of output and falls with what the "
                "provider's cache serves.",
                "currencyUSD",
                Query(f"1e6 * {rate('cost_usd', 'model')} / {rate('tokens', 'model')}", "{{model}}"),
            ),
            graph(
                "Requests without a price by model",
                "Requests that used tokens of a model without a price. Name its price in the configuration.",
                "reqps",
                Query(rate("unpriced_requests", "provider, model"), "{{provider}} {{model}}"),
            ),
            shared.usage_missing(),
        ),
        row(
            graph(
                "Cost an hour by key",
                "At the present rate.",
                "currencyUSD",
                Query(f"{rate('key_cost_usd', 'key')} {HOURLY}", "{{key}}"),
                stacked=True,
            ),
            bars(
                "Cost in this time by key",
                "Over the time that this page shows.",
                "currencyUSD",
                Query(increase("key_cost_usd", "key"), "{{key}}"),
            ),
            graph(
                "Tokens by key",
                "Tokens a second.",
                "short",
                Query(rate("key_tokens", "key, type"), "{{key}} {{type}}"),
                stacked=True,
            ),
        ),
        row(
            graph(
                "Requests by key",
                "Client requests, by the alias of their key and what became of them.",
                "reqps",
                Query(rate("key_requests", "key, outcome"), "{{key}} {{outcome}}"),
                stacked=True,
            ),
            graph(
                "429 by key",
                "Requests of a key that were answered 429, by the gateway or by the provider after all attempts.",
                "reqps",
                Query(rate("key_rate_limited", "key"), "{{key}}"),
            ),
        ),
    ),
)
