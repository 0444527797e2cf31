"""Panels that stand on more than one page. Each call makes a new one: a panel has one place."""

from __future__ import annotations

from grafana.panels import Panel, Query, graph, percentiles
from grafana.promql import gauge, least, rate

FRESH_SECONDS = 300  # a provider that has not answered for longer is not known to have room; HeadroomLow says the same


def duration() -> Panel:
    return graph(
        "Duration",
        "From a request's arrival to the last byte of its answer, waits in the gateway included. A dot is one call "
        "whose trace is kept.",
        "s",
        *percentiles("request_duration_seconds", exemplars=True),
    )


def first_token() -> Panel:
    return graph(
        "Time to first token",
        "Streams: from the request's arrival to the first content written to the client, waits in the gateway "
        "included. A dot is one call whose trace is kept.",
        "s",
        *percentiles("time_to_first_token_seconds", exemplars=True),
    )


def refusals() -> Panel:
    return graph(
        "429, theirs and ours",
        "Refusals for a limit: a provider's of an attempt (upstream), or the gateway's own of a request (gateway), and "
        "which limit it was. Theirs are waited out by the gateway, ours reach the client.",
        "reqps",
        Query(rate("rate_limited", "source, provider, scope"), "{{source}} {{provider}} {{scope}}"),
    )


def backoff() -> Panel:
    return graph(
        "Calls in backoff",
        "Calls that pause after a failed attempt: how many at this moment, and how many in the mean, which misses no "
        "short pause.",
        "short",
        Query(f"sum by (provider) ({gauge('backoff_sleepers')})", "now {{provider}}"),
        Query(rate("backoff_seconds", "provider, source", part="sum"), "mean {{provider}} {{source}}"),
    )


def headroom() -> Panel:
    of_all = f"{gauge('ratelimit_remaining')} / {gauge('ratelimit_limit')}"
    age = f"time() - {gauge('ratelimit_observed_timestamp_seconds')}"
    fresh = f"{of_all} and on (job, instance, provider, credential, model) ({age} < {FRESH_SECONDS})"
    return graph(
        "Headroom",
        "The share of a provider's limit that is left, the scarcest of its models. Shown only while the provider "
        "answers: what it said long ago says nothing.",
        "percentunit",
        Query(least("provider, kind", fresh), "{{provider}} {{kind}}"),
        most=1,
        lines=((0.1, "orange"),),
    )


def attempts() -> Panel:
    return graph(
        "Attempts at providers",
        "A request may need several. A status, or how the attempt broke; 499 and cancelled: the client left.",
        "reqps",
        Query(rate("upstream_attempts", "provider, result"), "{{provider}} {{result}}"),
        stacked=True,
    )


def retries() -> Panel:
    return graph(
        "Retries",
        "Attempts that were followed by another one, by the provider that failed and why; and requests that ended in "
        "such a failure, because no attempt was left or no time.",
        "reqps",
        Query(rate("upstream_retries", "provider, reason"), "{{provider}} {{reason}}"),
        Query(rate("upstream_retries_exhausted", "provider, reason"), "given up: {{provider}} {{reason}}"),
    )


def overhead() -> Panel:
    return graph(
        "Overhead of the gateway",
        "What the gateway itself spent on a request: all of its time less the waits for places, backoff, provider and "
        "client.",
        "s",
        *percentiles("overhead_seconds"),
    )


def ages() -> Panel:
    return graph(
        "Calls in flight by age",
        "Requests that have not ended, by how long ago they arrived. One that hangs shows here, and in no duration.",
        "short",
        Query(f"sum by (age) ({gauge('requests_in_flight_age')})", "{{age}}"),
        stacked=True,
    )


def usage_missing() -> Panel:
    return graph(
        "Answers whose tokens are not known",
        "How blind the figures of tokens and cost are: no_usage, the provider told none; aborted, the stream ended "
        "before it could.",
        "reqps",
        Query(rate("usage_missing", "provider, model, reason"), "{{provider}} {{model}} {{reason}}"),
    )


def error_share() -> str:
    """Of all requests, those that ended in an error out of the gateway's or a provider's budget."""
    ours = rate("request_errors", source="gateway|upstream")
    return f"({ours} or vector(0)) / {rate('requests')}"
