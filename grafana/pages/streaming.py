"""How fast answers come, how streams end, and how many tokens they are."""

from __future__ import annotations

from grafana.pages import shared
from grafana.panels import Page, Query, figure, figures, graph, percentiles, row
from grafana.promql import level, or_zero, quantile, rate

PAGE = Page(
    "streaming",
    "Penstock: streaming and tokens",
    "How soon and how fast answers come, how streams end, and how many tokens pass.",
    (
        figures(
            figure(
                "Streams in flight",
                "Streamed answers that have begun and not ended.",
                "short",
                level("streams_in_flight"),
                decimals=0,
            ),
            figure(
                "Speed of a stream, median",
                "Output tokens a second within one stream, from its first token to its last.",
                "short",
                f"1 / {quantile(0.5, 'time_per_output_token_seconds')}",
                decimals=0,
            ),
            figure(
                "Output tokens",
                "Output tokens a second of all calls together.",
                "short",
                rate("tokens", type="output"),
                decimals=0,
            ),
            figure(
                "Streams that broke",
                "Share of streams that began and did not end well, clients that left among them: their status was 200 "
                "all the same.",
                "percentunit",
                f"{or_zero(rate('stream_aborts'))} / {rate('requests', stream='true', code='200')}",
                decimals=1,
            ),
        ),
        row(
            shared.first_token(),
            graph(
                "Time to first token, of the provider alone",
                "Streams: from the start of the attempt that answered to the first content. What the other panel has "
                "more was spent waiting here.",
                "s",
                *percentiles("upstream_time_to_first_token_seconds"),
            ),
            graph(
                "Time to first token by model, p95",
                "As the client sees it, by the provider that answered.",
                "s",
                Query(quantile(0.95, "time_to_first_token_seconds", "provider, model"), "{{provider}} {{model}}"),
            ),
        ),
        row(
            graph(
                "Time for each token",
                "Streams: (last byte - first token) / (output tokens - 1), once for each request.",
                "s",
                *percentiles("time_per_output_token_seconds"),
            ),
            graph(
                "Speed of a stream by model, median",
                "Output tokens a second within one stream.",
                "short",
                Query(
                    f"1 / {quantile(0.5, 'time_per_output_token_seconds', 'provider, model')}",
                    "{{provider}} {{model}}",
                ),
            ),
            graph(
                "Longest silence within a stream",
                "The longest wait between two chunks of each stream: what a reader feels as a stall.",
                "s",
                *percentiles("stream_max_gap_seconds"),
            ),
        ),
        row(
            graph(
                "Streams that broke, and why",
                "Streamed answers that began and did not end well. The client is told in band, and nothing is retried.",
                "reqps",
                Query(rate("stream_aborts", "provider, reason"), "{{provider}} {{reason}}"),
            ),
            graph(
                "Clients that left",
                "Before their answer was whole, by what the call was doing: queued, waiting for the provider, or "
                "streaming.",
                "reqps",
                Query(rate("client_disconnects", "phase"), "{{phase}}"),
                stacked=True,
            ),
            shared.ages(),
        ),
        row(
            graph(
                "Kept alive, and read on",
                "Comments sent to clients whose stream was silent, and answers read on for a client that had left.",
                "cps",
                Query(rate("stream_pings", "operation"), "comments: {{operation}}"),
                Query(rate("drained_answers", "provider, result"), "{{provider}} read on: {{result}}"),
            ),
            graph(
                "Tokens by model",
                "Tokens a second as the providers counted them; input and output together are all of them.",
                "short",
                Query(rate("tokens", "model, type"), "{{model}} {{type}}"),
                stacked=True,
            ),
            graph(
                "Tokens of a request, p95",
                "One request in 20 has more.",
                "short",
                Query(quantile(0.95, "tokens_per_request", "model, type"), "{{model}} {{type}}"),
            ),
            graph(
                "Bytes",
                "Request bodies in, answers out.",
                "Bps",
                Query(rate("request_bytes", "direction"), "{{direction}}"),
            ),
        ),
        row(
            graph(
                "Input from and to the cache",
                "Share of the input tokens that a provider read from its cache, and wrote to it.",
                "percentunit",
                Query(
                    f"{rate('input_tokens_cached', 'provider')} / {rate('tokens', 'provider', type='input')}",
                    "{{provider}} read",
                ),
                Query(
                    f"{rate('input_tokens_cache_write', 'provider')} / {rate('tokens', 'provider', type='input')}",
                    "{{provider}} written",
                ),
                most=1,
            ),
            graph(
                "Output spent on reasoning",
                "Share of the output tokens that nobody reads but everybody pays.",
                "percentunit",
                Query(
                    f"{rate('output_tokens_reasoning', 'provider, model')} "
                    f"/ {rate('tokens', 'provider, model', type='output')}",
                    "{{provider}} {{model}}",
                ),
                most=1,
            ),
            shared.usage_missing(),
        ),
    ),
)
