"""Every metric family there is: its name, type, labels, buckets and meaning. The one source of all of them.

The exposition, the recorder's bounds and docs/metrics.md are made from this table.

1. A label's value comes from a constant enumeration here, or from the configuration (`Configured`); never from a
   request. What is in neither becomes `other`, and `label_overflow` counts it.
2. A configured label holds at most `cap` values; those beyond become `other`.
3. A family has at most two configured labels, and a histogram at most one enumeration beside them. The wait at the
   gates has two, because one without its result and its class says nothing; headroom names the credential as well.
4. Keys are labels of counters only, and only where the configuration asks for them.
5. A bound that an objective may name is a bucket's bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

from proxy.core import batch
from proxy.core.outcome import Outcome, Reason

PREFIX = "penstock_"
OTHER = "other"  # a value outside the label's bounds
NONE = "none"  # there is no such thing: a call refused before any upstream was chosen


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Configured:
    """The label's values are names in the configuration."""

    field: str  # of `Labels`
    cap: int  # most values; a series costs memory here and at whoever scrapes


Values = tuple[str, ...] | Configured


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the catalogue."""

    name: str  # without the prefix, and without the `_total` of a counter
    kind: Kind
    help: str
    labels: Mapping[str, Values] = field(default_factory=dict)  # (): what the process says of itself
    buckets: tuple[float, ...] = ()  # upper bounds, rising, without infinity; of histograms only
    zeroed: bool = False  # every child exists from the start, so that the first increment is seen by `rate`
    live: bool = False  # read at the scrape from what it tells of; gauges all are
    per: int = 1  # so many of the recorder's counts make one of the unit in the name

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


@dataclass(frozen=True, slots=True)
class Section:
    """Families that belong together."""

    title: str
    families: tuple[Family, ...]


MODELS = Configured("models", cap=200)
UPSTREAMS = Configured("upstreams", cap=50)
CREDENTIALS = Configured("upstreams", cap=50)  # each upstream has one
GATES = Configured("gates", cap=300)  # the process, and one for each pool, upstream and model
KEYS = Configured("callers", cap=200)
STEPS = Configured("steps", cap=200)  # pipeline/step

# operations whose answers count tokens
_WITH_TOKENS = ("chat", "completions", "embeddings", "responses", "messages", "complete")
_WITHOUT = (  # those whose answers may count none
    "count_tokens",
    "message_batches",
    "models",
    "audio",
    "images",
    "moderations",
    "assistants",
    "batches",
    "chatkit",
    "containers",
    "content_provenance_checks",
    "conversations",
    "evals",
    "files",
    "fine_tuning",
    "jobs",
    "organization",
    "projects",
    "realtime",
    "skills",
    "stream",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
    "passthrough",
    OTHER,
)
OPERATIONS = (*_WITH_TOKENS, *_WITHOUT)
TOKENLESS = frozenset(_WITHOUT)
PRIORITIES = ("interactive", "default", "batch")
STREAM = ("false", "true")
OUTCOMES = tuple(outcome.value for outcome in Outcome)
_STATUSES = (101, 200, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 499, 500, 502, 503, 504, 529)
CODES = (*map(str, _STATUSES), "2xx_other", "3xx_other", "4xx_other", "5xx_other")
ERROR_SOURCES = ("client", "gateway", "upstream")
ERROR_TYPES = (
    "invalid_request",
    "auth",
    "not_found",
    "rate_limited",
    "queue_full",
    "queue_timeout",
    "overloaded",
    "timeout",
    "connect",
    "upstream_4xx",
    "upstream_5xx",
    "stream_broken",
    "unfit",
    "internal",
)
ABORTS = (
    "upstream_eof",
    "upstream_reset",
    "idle_timeout",
    "total_timeout",
    "client_disconnect",
    "client_stalled",
    "malformed_sse",
    "error_event",
    "shutdown",
)
PHASES = ("queued", "waiting", "streaming")
DEPARTURES = (*PHASES, "stalled")
ADMISSIONS = ("immediate", "queued", "rejected_full", "rejected_timeout", "cancelled", "shutdown")
ATTEMPT_RESULTS = ("ok", "timeout", "connect", "reset", "eof", "garbage", "error_event", "cancelled", *CODES)
REASONS = tuple(reason.value for reason in Reason)
SCOPES = ("requests", "tokens", "concurrency", "quota", "budget", "unknown")
AGES = ("0-10s", "10-60s", "60-300s", "300s+")
LIMIT_CAUSES = ("upstream_429", "upstream_5xx", "latency", "success", "header", "manual")
COOLDOWNS = (Reason.REQUESTS.value, Reason.TOKENS.value, Reason.UNNAMED.value, Reason.SLOW_DOWN.value)
CIRCUITS = ("closed", "limited", "shut")
CONNECT_ERRORS = ("dns", "tcp", "tls", "timeout")
KINDS = ("requests", "tokens", "input_tokens", "output_tokens")
JOBS = tuple(status.value for status in batch.OPEN)
JOB_ENDS = tuple(status.value for status in batch.Status if status.is_final)
ITEM_ENDS = tuple(end.value for end in batch.End)
TOLD = ("delivered", "failed", "dropped")
STAGES = ("auth", "parse", "route", "send", "relay", "usage", "log")
STEP_RESULTS = ("ok", "fallback", "skipped", "omitted", "failed", "cancelled")
SIGNALS = ("span", "log", "audit")
DROPS = ("queue_full", "export_failed", "write_failed", "shutdown")

LATENCY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 900)
FIRST_TOKEN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5, 10, 15, 20, 30, 60, 120, 300)
TOKEN_PACE = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
GAP = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
WAIT = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
BACKOFF = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)
ATTEMPTS = (1, 2, 3, 4, 5, 8)
TOKENS = (16, 64, 256, 1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)
JOB = (10, 60, 300, 900, 3600, 10_800, 21_600, 43_200, 86_400)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)

_PAIR: Mapping[str, Values] = {"provider": UPSTREAMS, "model": MODELS}
_HEADROOM: Mapping[str, Values] = {"provider": UPSTREAMS, "credential": CREDENTIALS, "model": MODELS}
_PROVIDER: Mapping[str, Values] = {"provider": UPSTREAMS}
_GATE: Mapping[str, Values] = {"gate": GATES}
_KEY: Mapping[str, Values] = {"key": KEYS}
_MICRO = 1_000_000
_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

_INBOUND = (
    Family(
        "requests",
        _C,
        "Client requests, each counted once, after its last byte; code as the client saw it (499: it left).",
        {"operation": OPERATIONS, "model": MODELS, "stream": STREAM, "code": CODES, "outcome": OUTCOMES},
    ),
    Family(
        "request_errors",
        _C,
        "Client requests that ended in an error, by whose budget it counts against.",
        {"operation": OPERATIONS, "model": MODELS, "source": ERROR_SOURCES, "error_type": ERROR_TYPES},
    ),
    Family(
        "request_duration_seconds",
        _H,
        "From a request's arrival to the last byte of its answer.",
        {"model": MODELS, "stream": STREAM, "outcome": OUTCOMES},
        LATENCY,
    ),
    Family("requests_in_flight", _G, "Requests that have arrived and not ended.", {"operation": OPERATIONS}),
    Family(
        "requests_in_flight_age",
        _G,
        "Requests that have arrived and not ended, by how long ago: one that hangs shows here, and in no duration.",
        {"age": AGES},
    ),
    Family("streams_in_flight", _G, "Streamed answers that have begun and not ended."),
    Family(
        "client_disconnects",
        _C,
        "Clients that left before their answer was whole, by what the call was doing (stalled: took nothing more).",
        {"operation": OPERATIONS, "phase": DEPARTURES},
        zeroed=True,
    ),
    Family(
        "stream_aborts",
        _C,
        "Streamed answers that began and did not end well: a status of 200 can still fail.",
        {**_PAIR, "reason": ABORTS},
    ),
    Family(
        "stream_pings",
        _C,
        "Comments sent to clients whose stream was silent, or had not begun yet.",
        {"operation": OPERATIONS},
        zeroed=True,
    ),
    Family(
        "request_bytes",
        _C,
        "Bytes of request bodies (in) and of answers (out).",
        {"operation": OPERATIONS, "direction": ("in", "out")},
        zeroed=True,
    ),
)

_GATES = (
    Family("gate_limit", _G, "Places there are: the limit in force.", _GATE),
    Family(
        "gate_limit_bound",
        _G,
        "Between what the limit in force may move; both are the limit where it is fixed.",
        {**_GATE, "bound": ("min", "max")},
    ),
    Family("gate_in_use", _G, "Places taken.", _GATE),
    Family("gate_queue_depth", _G, "Calls that wait for a place.", {**_GATE, "priority": PRIORITIES}),
    Family("gate_queue_limit", _G, "Calls that may wait for a place.", _GATE),
    Family(
        "gate_queue_wait_seconds",
        _H,
        "How long a call waited for its places; one admitted at once counts as 0, at the process's gate.",
        {**_GATE, "priority": PRIORITIES, "result": ("admitted", "timeout", "cancelled")},
        WAIT,
    ),
    Family(
        "gate_admissions",
        _C,
        "What became of each call that asked for its places, by the gate it waited for or was refused by.",
        {**_GATE, "priority": PRIORITIES, "result": ADMISSIONS},
        zeroed=True,
    ),
    Family(
        "gate_limit_changes",
        _C,
        "Moves of the limit in force, and what moved it.",
        {**_GATE, "direction": ("up", "down"), "cause": LIMIT_CAUSES},
    ),
    Family(
        "gate_permit_seconds",
        _C,
        "Seconds for which places were held, all together: the rate is the exact mean in use.",
        _GATE,
        live=True,
    ),
    Family(
        "gate_queue_seconds",
        _C,
        "Seconds for which calls waited, all together: the rate is the exact mean queued.",
        _GATE,
        live=True,
    ),
    Family(
        "gate_saturated_seconds",
        _C,
        "Seconds for which no place was left: the rate is the share of the time.",
        _GATE,
        live=True,
    ),
)

_ATTEMPTS = (
    Family(
        "upstream_attempts",
        _C,
        "Attempts at an upstream, of which a request may need several; a status, or how it broke.",
        {**_PAIR, "result": ATTEMPT_RESULTS},
    ),
    Family(
        "upstream_attempt_duration_seconds",
        _H,
        "From the start of an attempt to its last byte or its failure.",
        {**_PAIR, "outcome": OUTCOMES},
        LATENCY,
    ),
    Family("upstream_in_flight", _G, "Attempts that have begun and not ended.", _PROVIDER),
    Family(
        "upstream_retries",
        _C,
        "Attempts that were followed by another one, by the provider that failed and why.",
        {**_PAIR, "reason": REASONS},
    ),
    Family(
        "upstream_retries_exhausted",
        _C,
        "Requests that ended in a failure worth another attempt: none was left, or no time.",
        {**_PAIR, "reason": REASONS},
    ),
    Family("request_attempts", _H, "Attempts a request needed, where it got to any.", {"model": MODELS}, ATTEMPTS),
    Family(
        "rate_limited",
        _C,
        "Refusals for a limit: an upstream's of an attempt, or the gateway's own of a request (provider none).",
        {"source": ("upstream", "gateway"), **_PAIR, "scope": SCOPES},
    ),
    Family(
        "backoff_seconds",
        _H,
        "How long a call paused before another attempt, and what set the pause: limit is the pool's hold.",
        {**_PROVIDER, "source": ("retry_after", "reset_header", "computed", "limit")},
        BACKOFF,
    ),
    Family("backoff_sleepers", _G, "Calls that pause now before another attempt.", _PROVIDER),
    Family(
        "cooldowns",
        _C,
        "Refusals after which a provider was left alone by everybody; those of calls already under way not counted.",
        {**_PROVIDER, "cause": COOLDOWNS},
        zeroed=True,
    ),
    Family(
        "cooldown_until_timestamp_seconds",
        _G,
        "Until when a provider is left alone, the longest of its models; 0 where it is not.",
        _PROVIDER,
    ),
    Family(
        "circuit_state",
        _G,
        "1 for the state that a provider's circuit is in, else 0.",
        {**_PROVIDER, "state": CIRCUITS},
    ),
    Family(
        "circuit_transitions",
        _C,
        "Changes of a provider's circuit, by the state that began.",
        {**_PROVIDER, "to": CIRCUITS},
        zeroed=True,
    ),
    Family(
        "drained_answers",
        _C,
        "Answers read on after their client had left (drain_seconds): to their end, or as long as was allowed.",
        {**_PROVIDER, "result": ("whole", "late")},
        zeroed=True,
    ),
    Family(
        "fallbacks",
        _C,
        "Attempts at another provider than the one before, and why that one was left.",
        {"from_provider": UPSTREAMS, "to_provider": UPSTREAMS, "reason": REASONS},
    ),
)

_CONNECTIONS = (
    Family(
        "upstream_connections",
        _G,
        "Connections that stand: with an attempt on them, or kept for the next.",
        {**_PROVIDER, "state": ("active", "idle")},
    ),
    Family("upstream_connections_limit", _G, "Connections there may be; infinite where there is no bound.", _PROVIDER),
    Family(
        "upstream_connection_acquires",
        _C,
        "Connections that attempts were given.",
        {**_PROVIDER, "how": ("new", "reused")},
        live=True,
    ),
    Family(
        "upstream_connection_wait_seconds",
        _H,
        "How long an attempt that found all connections in use waited for one.",
        _PROVIDER,
        WAIT,
    ),
    Family("upstream_connect_seconds", _H, "How long connecting took: name, TCP and TLS.", _PROVIDER, WAIT),
    Family(
        "upstream_connect_errors",
        _C,
        "Connections that did not come to stand.",
        {**_PROVIDER, "reason": CONNECT_ERRORS},
        zeroed=True,
    ),
    Family(
        "upstream_connections_stale",
        _C,
        "Kept connections that a provider had closed by the time they were used; the call went on a new one.",
        _PROVIDER,
        zeroed=True,
    ),
)

_TOKENS = (
    Family(
        "time_to_first_token_seconds",
        _H,
        "Streams: from the request's arrival to the first content written to the client.",
        _PAIR,
        FIRST_TOKEN,
    ),
    Family(
        "upstream_time_to_first_token_seconds",
        _H,
        "Streams: from the start of the attempt that answered to the first content.",
        _PAIR,
        FIRST_TOKEN,
    ),
    Family(
        "time_per_output_token_seconds",
        _H,
        "Streams: (last byte - first token) / (output tokens - 1), once per request.",
        _PAIR,
        TOKEN_PACE,
    ),
    Family("stream_max_gap_seconds", _H, "The longest silence between two chunks of a stream.", _PAIR, GAP),
    Family(
        "tokens",
        _C,
        "Tokens as the upstream counted them; input and output together are all of them.",
        {**_PAIR, "type": ("input", "output")},
    ),
    Family("input_tokens_cached", _C, "Input tokens read from the provider's cache; part of tokens.", _PAIR),
    Family("input_tokens_cache_write", _C, "Input tokens written to the provider's cache; part of tokens.", _PAIR),
    Family("output_tokens_reasoning", _C, "Output tokens spent on reasoning; part of tokens.", _PAIR),
    Family(
        "tokens_per_request",
        _H,
        "Tokens of one request.",
        {"model": MODELS, "type": ("input", "output")},
        TOKENS,
    ),
    Family(
        "usage_missing",
        _C,
        "Answers whose tokens are not known: how blind the token figures are.",
        {**_PAIR, "reason": ("no_usage", "aborted", "parse_error")},
    ),
    Family("cost_usd", _C, "What the tokens cost, by the prices in the configuration.", _PAIR, per=_MICRO),
    Family("unpriced_requests", _C, "Requests that used tokens of a model without a price.", _PAIR),
    Family("key_requests", _C, "Client requests by the alias of their key.", {**_KEY, "outcome": OUTCOMES}),
    Family("key_tokens", _C, "Tokens by the alias of the key.", {**_KEY, "type": ("input", "output")}),
    Family("key_cost_usd", _C, "What the tokens of a key cost.", _KEY, per=_MICRO),
    Family("key_rate_limited", _C, "Client requests of a key that were answered 429.", _KEY),
)

_LIMITS = (
    Family(
        "ratelimit_limit",
        _G,
        "The whole of a provider's limit, as its headers or its refusals taught.",
        {**_HEADROOM, "kind": KINDS},
    ),
    Family(
        "ratelimit_remaining",
        _G,
        "What is left of it now, by the gateway's own account; of several limits of one kind the scarcest.",
        {**_HEADROOM, "kind": KINDS},
    ),
    Family(
        "ratelimit_reset_timestamp_seconds",
        _G,
        "When all of it will be there again, if nothing more is sent.",
        {**_HEADROOM, "kind": KINDS},
    ),
    Family(
        "ratelimit_observed_timestamp_seconds",
        _G,
        "When the provider last answered; what is told of its limits is no fresher.",
        _HEADROOM,
    ),
)

_BATCHES = (
    Family("batch_jobs", _G, "Batches that have not ended.", {"state": JOBS}),
    Family("batch_jobs_finished", _C, "Batches that have ended, by how.", {"outcome": JOB_ENDS}, zeroed=True),
    Family(
        "batch_items",
        _C,
        "Runs of items: done, failed, given back to be run again, or given back because all would be refused (pause).",
        {"outcome": ITEM_ENDS},
        zeroed=True,
    ),
    Family("batch_items_pending", _G, "Items of all batches that have not ended."),
    Family(
        "batch_oldest_item_timestamp_seconds",
        _G,
        "When the oldest batch with an item that has not ended was made; no value where there is none.",
    ),
    Family(
        "batch_webhooks",
        _C,
        "Tries to tell the webhook of a batch's end: delivered, failed and to be tried again, or given up (dropped).",
        {"result": TOLD},
        zeroed=True,
    ),
    Family("batch_job_duration_seconds", _H, "From a batch's making to its end.", {}, JOB, zeroed=True),
)

_PIPELINES = (
    Family(
        "pipeline_steps",
        _C,
        "Steps of pipelines that ended: ok, or answered by the fallback; skipped for its error, or omitted because its "
        "condition did not hold; failed, or cancelled with its pipeline.",
        {"step": STEPS, "result": STEP_RESULTS},
        zeroed=True,
    ),
    Family(
        "pipeline_step_duration_seconds",
        _H,
        "From the start of a step to its end, the waits of its calls and all items of a map among it.",
        {"step": STEPS},
        LATENCY,
    ),
)

_PROCESS = (
    Family(
        "stage_duration_seconds",
        _H,
        "Where the gateway's own time goes, waits taken out: auth (the key), parse (the body and its route), route "
        "(the gates), send (the request made), relay (the answer passed on), usage (settled), log (this accounting).",
        {"stage": STAGES},
        OVERHEAD,
        zeroed=True,
    ),
    Family(
        "overhead_seconds",
        _H,
        "What the gateway itself spent on a request: all of it less the waits for places, backoff, upstream, client.",
        {"stream": STREAM},
        OVERHEAD,
        zeroed=True,
    ),
    Family(
        "event_loop_lag_seconds",
        _H,
        "How much later than asked for the event loop woke a sleeper, ten times a second.",
        {},
        LAG,
        zeroed=True,
    ),
    Family(
        "build_info",
        _G,
        "1, labelled with what is running.",
        {"version": (), "revision": (), "python": ()},
    ),
    Family("config_reloads", _C, "Reloads of the configuration.", {"result": ("success", "failure")}, zeroed=True),
    Family("config_last_reload_successful", _G, "1 if the configuration on file is the one in force."),
    Family("config_last_reload_success_timestamp_seconds", _G, "When the configuration in force was loaded."),
    Family(
        "telemetry_dropped",
        _C,
        "Spans and lines of the logs that were not written.",
        {"signal": SIGNALS, "reason": DROPS},
        zeroed=True,
    ),
    Family("draining", _G, "1 while the gateway finishes its calls and takes no new ones."),
)


def _overflow(families: tuple[Family, ...]) -> Family:
    labels = chain.from_iterable(family.labels.items() for family in families)
    return Family(
        "label_overflow",
        _C,
        "Label values that were replaced by other: not in the configuration, or beyond the label's cap.",
        {"label": tuple(dict.fromkeys(label for label, values in labels if values))},
        zeroed=True,
    )


_COUNTED = (*_INBOUND, *_GATES, *_ATTEMPTS, *_CONNECTIONS, *_TOKENS, *_LIMITS, *_BATCHES, *_PIPELINES)
SECTIONS: tuple[Section, ...] = (
    Section("Inbound", _INBOUND),
    Section("Gates", _GATES),
    Section("Attempts, refusals, backoff", _ATTEMPTS),
    Section("Connections", _CONNECTIONS),
    Section("Tokens, speed, cost", _TOKENS),
    Section("Headroom", _LIMITS),
    Section("Batches", _BATCHES),
    Section("Pipelines", _PIPELINES),
    Section("Stages and process", (*_PROCESS, _overflow((*_COUNTED, *_PROCESS)))),
)
FAMILIES: tuple[Family, ...] = tuple(chain.from_iterable(section.families for section in SECTIONS))
BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}


def _code_of(status: int) -> str:
    return str(status) if status in _STATUSES else f"{status // 100}xx_other"


CODE_OF: Mapping[int, str] = {status: _code_of(status) for status in (101, *range(200, 600))}
