"""What holds calls back: our own gates, the providers' limits, and what is done about refusals."""

from __future__ import annotations

from grafana.pages import shared
from grafana.panels import Page, Query, graph, percentiles, row, states
from grafana.promql import gauge, level, mean, most, quantile, rate

CIRCUITS = {0: ("closed", "green"), 1: ("limited", "orange"), 2: ("shut", "red")}

PAGE = Page(
    "gate",
    "Penstock: gate and upstreams",
    "Which limit holds calls back, how long they wait for it, and what the providers say to it.",
    (
        row(
            graph(
                "Limit in force",
                "Places at each gate that has a limit, and between what the gateway may move it.",
                "short",
                Query(f"{level('gate_limit', 'gate')} < +Inf", "{{gate}}"),
                Query(f"{level('gate_limit_bound', 'gate, bound')} < +Inf", "{{gate}} {{bound}}"),
            ),
            graph(
                "Places taken",
                "Calls that have a place, by gate, those without a limit too; and the exact mean between the scrapes.",
                "short",
                Query(level("gate_in_use", "gate"), "{{gate}}"),
                Query(rate("gate_permit_seconds", "gate"), "{{gate}} mean"),
            ),
            graph(
                "Full",
                "The share of the time in which a gate had no place left. One that is full while nobody waits is well "
                "used; one before which calls wait holds them back.",
                "percentunit",
                Query(rate("gate_saturated_seconds", "gate"), "{{gate}}"),
                lines=((0.9, "orange"),),
            ),
            graph(
                "Why the limit moved",
                "Moves of the limit in force, up and down, and what moved it.",
                "cps",
                Query(rate("gate_limit_changes", "gate, direction, cause"), "{{gate}} {{direction}}: {{cause}}"),
            ),
        ),
        row(
            graph(
                "Waiting",
                "Calls that wait, by the gate that keeps them and their class; the exact mean between the scrapes; and "
                "how many may wait in all.",
                "short",
                Query(level("gate_queue_depth", "gate, priority"), "{{gate}} {{priority}}"),
                Query(rate("gate_queue_seconds", "gate"), "{{gate}} mean"),
                Query(level("gate_queue_limit"), "most"),
            ),
            graph(
                "Wait for a place",
                "How long admitted calls had waited; one admitted at once counts as 0.",
                "s",
                *percentiles("gate_queue_wait_seconds", result="admitted"),
            ),
            graph(
                "What became of those who asked",
                "Calls that asked for their places: let in at once, after a wait, or refused and why.",
                "reqps",
                Query(rate("gate_admissions", "result"), "{{result}}"),
                stacked=True,
            ),
        ),
        row(shared.refusals(), shared.retries(), shared.backoff()),
        row(
            shared.attempts(),
            graph(
                "Duration of attempts, p95",
                "From the start of an attempt to its last byte or its failure, by provider and outcome.",
                "s",
                Query(
                    quantile(0.95, "upstream_attempt_duration_seconds", "provider, outcome"), "{{provider}} {{outcome}}"
                ),
            ),
            graph(
                "Attempts a request needs",
                "The mean over requests that got to any attempt. 1 is a world without failures.",
                "none",
                Query(mean("request_attempts", "model"), "{{model}}"),
            ),
        ),
        row(
            graph(
                "Attempts in flight",
                "Attempts that have begun and not ended.",
                "short",
                Query(level("upstream_in_flight", "provider"), "{{provider}}"),
                stacked=True,
            ),
            graph(
                "Pauses before another attempt, p95",
                "How long calls paused, and what set the pause: the provider's retry-after, our own backoff "
                "(computed), or the limit that holds everybody.",
                "s",
                Query(quantile(0.95, "backoff_seconds", "provider, source"), "{{provider}} {{source}}"),
            ),
            graph(
                "Failovers",
                "Attempts at another provider than the one before, and why that one was left.",
                "reqps",
                Query(
                    rate("fallbacks", "from_provider, to_provider, reason"),
                    "{{from_provider}} to {{to_provider}}: {{reason}}",
                ),
            ),
        ),
        row(
            states(
                "Circuits",
                "Whether a provider is asked at all: closed, all calls; limited, a share of them, for it fails too "
                "often; shut, none but a probe, for it refused the credential or is out of money.",
                CIRCUITS,
                Query(
                    f"{level('circuit_state', 'provider', how='max', state='limited')} "
                    f"+ 2 * {level('circuit_state', 'provider', how='max', state='shut')}",
                    "{{provider}}",
                ),
            ),
            graph(
                "Cool-downs and changes of circuits",
                "Refusals after which a provider was left alone by everybody, by what was refused; and changes of its "
                "circuit, by the state that began.",
                "cps",
                Query(rate("cooldowns", "provider, cause"), "{{provider}} cools down: {{cause}}"),
                Query(rate("circuit_transitions", "provider, to"), "{{provider}} is {{to}}"),
            ),
            graph(
                "Left alone for",
                "How long providers will still be left alone after a refusal, the longest of their models.",
                "s",
                Query(
                    most("provider", f"clamp_min({gauge('cooldown_until_timestamp_seconds')} - time(), 0)"),
                    "{{provider}}",
                ),
            ),
        ),
        row(
            shared.headroom(),
            graph(
                "Until all of it is there again",
                "How long until a provider's limit is whole, if nothing more is sent.",
                "s",
                Query(
                    most("provider, kind", f"clamp_min({gauge('ratelimit_reset_timestamp_seconds')} - time(), 0)"),
                    "{{provider}} {{kind}}",
                ),
            ),
            graph(
                "Age of what is known",
                "How long ago a provider last answered. Its headroom is no fresher.",
                "s",
                Query(
                    most("provider, model", f"time() - {gauge('ratelimit_observed_timestamp_seconds')}"),
                    "{{provider}} {{model}}",
                ),
            ),
        ),
        row(
            graph(
                "Connections",
                "Connections that stand: with an attempt on them, or kept for the next; and how many there may be, "
                "where there is a bound.",
                "short",
                Query(level("upstream_connections", "provider, state"), "{{provider}} {{state}}"),
                Query(f"{level('upstream_connections_limit', 'provider')} < +Inf", "{{provider}} most"),
            ),
            graph(
                "Connections given to attempts",
                "New ones cost a handshake; those that did not come to stand are told by what failed.",
                "cps",
                Query(rate("upstream_connection_acquires", "provider, how"), "{{provider}} {{how}}"),
                Query(rate("upstream_connect_errors", "provider, reason"), "{{provider}} failed: {{reason}}"),
                Query(rate("upstream_connections_stale", "provider"), "{{provider}} kept, and dead"),
            ),
            graph(
                "Connecting and waiting for a connection, p95",
                "How long connecting took (name, TCP and TLS), and how long attempts waited that found all connections "
                "in use.",
                "s",
                Query(quantile(0.95, "upstream_connect_seconds", "provider"), "{{provider}} connecting"),
                Query(quantile(0.95, "upstream_connection_wait_seconds", "provider"), "{{provider}} waiting"),
            ),
        ),
    ),
)
