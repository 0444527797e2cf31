"""Whether all is well, and if not, whose matter it is: the first page."""

from __future__ import annotations

from grafana.pages import shared
from grafana.panels import Page, Query, figure, figures, graph, row
from grafana.promql import BURN_WINDOWS, burn, gauge, level, most, quantile, rate

PROCESS_GATE = "process"
FAST_BURN, SLOW_BURN = 14.4, 6.0  # the thresholds of the two alerts on the error budget
USE = f"{gauge('gate_in_use')} / ({gauge('gate_limit')} < +Inf)"

PAGE = Page(
    "overview",
    "Penstock: overview",
    "How the gateway and the providers behind it are doing, at a glance.",
    (
        figures(
            figure(
                "Requests",
                "Client requests that ended, each counted once, after its last byte.",
                "reqps",
                rate("requests"),
                decimals=1,
            ),
            figure(
                "Errors that are not the client's",
                "Share of requests that ended in an error out of the gateway's or a provider's budget. A client's own "
                "mistakes and clients that left are not among them.",
                "percentunit",
                shared.error_share(),
                decimals=2,
                steps=((0.001, "orange"), (0.0144, "red")),
            ),
            figure(
                "First token, p95",
                "Streams: from a request's arrival to the first content written to the client, waits in the gateway "
                "included.",
                "s",
                quantile(0.95, "time_to_first_token_seconds"),
                decimals=2,
            ),
            figure(
                "Fullest gate",
                "Share of the places taken, at the gate where it is highest. At 100 % the next call waits.",
                "percentunit",
                f"max({USE})",
                decimals=0,
                steps=((0.8, "orange"), (1.0, "red")),
            ),
            figure(
                "Tokens",
                "Input and output tokens a second, as the providers counted them.",
                "short",
                rate("tokens"),
                decimals=0,
            ),
            figure(
                "Cost an hour",
                "What the tokens of an hour cost at the present rate, by the prices in the configuration. Calls of "
                "models without a price are not in it.",
                "currencyUSD",
                f"{rate('cost_usd')} * 3600",
                decimals=2,
            ),
        ),
        row(
            graph(
                "Requests by outcome",
                "What became of client requests. `rejected` is the asker's matter, or a refusal of the gateway; "
                "`cancelled`: the client left.",
                "reqps",
                Query(rate("requests", "outcome"), "{{outcome}}"),
                stacked=True,
            ),
            shared.duration(),
            shared.first_token(),
        ),
        row(
            graph(
                "The process's gate",
                "Places there are in the whole process, places taken, and calls that wait for any gate. What waits "
                "while places are free waits for a provider's limit.",
                "short",
                Query(level("gate_limit", gate=PROCESS_GATE), "limit"),
                Query(level("gate_in_use", gate=PROCESS_GATE), "in use"),
                Query(level("gate_queue_depth"), "waiting"),
            ),
            graph(
                "Use of the gates",
                "Share of the places taken, for gates that have a limit. At 100 % the next call waits.",
                "percentunit",
                Query(most("gate", USE), "{{gate}}"),
                most=1,
            ),
            graph(
                "Waiting at the gates",
                "Calls that wait for a place or for their turn at a limit, by their class.",
                "short",
                Query(level("gate_queue_depth", "priority"), "{{priority}}"),
                stacked=True,
            ),
        ),
        row(shared.refusals(), shared.backoff(), shared.headroom()),
        row(
            shared.overhead(),
            graph(
                "Burn of the error budget",
                "How many times as fast as it may the budget for errors that are not the client's is used, over four "
                "windows. At 1 it lasts just as long as it has to; the lines are where the alerts are. Idle times have "
                "no burn.",
                "none",
                *(Query(burn(window), window) for window in BURN_WINDOWS),
                lines=((SLOW_BURN, "orange"), (FAST_BURN, "red")),
            ),
            graph(
                "Errors",
                "Requests that ended in an error, by whose budget it counts against (client, gateway, upstream) and "
                "what it was.",
                "reqps",
                Query(rate("request_errors", "source, error_type"), "{{source}} {{error_type}}"),
            ),
        ),
        row(
            shared.attempts(),
            shared.retries(),
            graph(
                "In flight",
                "Requests that have arrived and not ended, and the streams among them that have begun.",
                "short",
                Query(level("requests_in_flight", "operation"), "{{operation}}"),
                Query(level("streams_in_flight"), "streams"),
            ),
        ),
    ),
)
