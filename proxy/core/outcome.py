"""What one attempt meant: the single place where a status, an error code or a failure gets its meaning.

The retry loop, the limits, the metrics and the spans all read the same `Meaning`; none of them looks at a status again.
What a provider says is trusted in this order: error code, error type, message, status.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How an attempt, or a whole call, ended. The value is the `outcome` label of every metric and span."""

    OK = "ok"
    THROTTLED = "throttled"  # the upstream said that a limit of ours is used up
    OVERLOADED = "overloaded"  # the upstream said that it is full, whoever asks
    FAILED = "failed"  # the upstream could not: 5xx, broken connection, late before the first byte
    TRUNCATED = "truncated"  # the upstream broke off after the first byte had left for the client
    REJECTED = "rejected"  # the asker's matter: other 4xx, and what the gateway itself refuses
    CANCELLED = "cancelled"  # the client went away; says nothing about the upstream


class Reason(Enum):
    """Why it ended so. The value is the `reason` label of metrics and the `error.type` of spans."""

    NONE = "none"
    REQUESTS = "requests"  # the limit of requests is used up
    TOKENS = "tokens"  # the limit of tokens is used up
    UNNAMED = "unnamed"  # some limit is used up; the upstream does not say which
    SLOW_DOWN = "slow_down"  # the rate rose too fast
    MONEY = "money"  # credit, quota or a spend limit is used up: waiting does not help
    TOO_LARGE = "too_large"  # this one call exceeds the whole limit
    FULL = "full"  # 503, 529: capacity
    AUTH = "auth"  # 401, 403: the credential
    CALLER = "caller"  # any other 4xx
    SERVER = "server"  # any other 5xx
    CONNECT = "connect"  # no connection in time, or refused
    FIRST_BYTE = "first_byte"  # connected, but no answer in time
    IDLE = "idle"  # the answer began and fell silent
    RESET = "reset"  # the connection broke
    GARBAGE = "garbage"  # not HTTP, or not what the endpoint speaks
    EOF = "eof"  # a stream ended cleanly without its closing mark
    ERROR_EVENT = "error_event"  # an error told in the stream, under status 200
    SHUT = "shut"  # not sent: the breaker keeps this upstream from being asked

    @property
    def word(self) -> str:
        """The `error_type` it is counted under in metrics and logs; "" when all went well."""
        return _WORDS[self][0]

    @property
    def source(self) -> str:
        """Whose budget it comes out of: client, gateway, upstream; "" when all went well."""
        return _WORDS[self][1]


_WORDS = {
    Reason.NONE: ("", ""),
    Reason.REQUESTS: ("rate_limited", "upstream"),
    Reason.TOKENS: ("rate_limited", "upstream"),
    Reason.UNNAMED: ("rate_limited", "upstream"),
    Reason.SLOW_DOWN: ("rate_limited", "upstream"),
    Reason.MONEY: ("rate_limited", "upstream"),
    Reason.TOO_LARGE: ("rate_limited", "client"),
    Reason.FULL: ("overloaded", "upstream"),
    Reason.AUTH: ("auth", "upstream"),
    Reason.CALLER: ("upstream_4xx", "client"),
    Reason.SERVER: ("upstream_5xx", "upstream"),
    Reason.CONNECT: ("connect", "upstream"),
    Reason.FIRST_BYTE: ("timeout", "upstream"),
    Reason.IDLE: ("stream_broken", "upstream"),
    Reason.RESET: ("stream_broken", "upstream"),
    Reason.GARBAGE: ("upstream_5xx", "upstream"),
    Reason.EOF: ("stream_broken", "upstream"),
    Reason.ERROR_EVENT: ("stream_broken", "upstream"),
    Reason.SHUT: ("overloaded", "upstream"),
}


class Retry(Enum):
    NEVER = "never"
    ELSEWHERE = "elsewhere"  # not at this upstream again, but the route's next one may be asked
    PACED = "paced"  # when the limit allows it again; the wait is the limit's, not a backoff of this call
    BACKOFF = "backoff"  # after a jittered pause, on the route's next upstream first


@dataclass(slots=True, frozen=True)
class Meaning:
    outcome: Outcome
    reason: Reason
    retry: Retry


OK = Meaning(Outcome.OK, Reason.NONE, Retry.NEVER)
SHUT = Meaning(Outcome.REJECTED, Reason.SHUT, Retry.ELSEWHERE)
ABSENT = Meaning(Outcome.REJECTED, Reason.CALLER, Retry.ELSEWHERE)  # a 404, where the thing may be elsewhere
CANCELLED = Meaning(Outcome.CANCELLED, Reason.NONE, Retry.NEVER)
_MONEY = Meaning(Outcome.REJECTED, Reason.MONEY, Retry.ELSEWHERE)
_TOO_LARGE = Meaning(Outcome.REJECTED, Reason.TOO_LARGE, Retry.NEVER)
_SLOW_DOWN = Meaning(Outcome.THROTTLED, Reason.SLOW_DOWN, Retry.PACED)
_REQUESTS = Meaning(Outcome.THROTTLED, Reason.REQUESTS, Retry.PACED)
_TOKENS = Meaning(Outcome.THROTTLED, Reason.TOKENS, Retry.PACED)
_UNNAMED = Meaning(Outcome.THROTTLED, Reason.UNNAMED, Retry.PACED)
_FULL = Meaning(Outcome.OVERLOADED, Reason.FULL, Retry.BACKOFF)
_AUTH = Meaning(Outcome.REJECTED, Reason.AUTH, Retry.ELSEWHERE)
_CALLER = Meaning(Outcome.REJECTED, Reason.CALLER, Retry.NEVER)
_SERVER = Meaning(Outcome.FAILED, Reason.SERVER, Retry.BACKOFF)
_SERVER_FINAL = Meaning(Outcome.FAILED, Reason.SERVER, Retry.NEVER)

# Error codes and types that decide by themselves, whatever the status.
# Sources: OpenAI's and Anthropic's error guides; the table in docs/operating.md, "Retries and failover".
_BY_WORD = {
    "credit_balance_exhausted": _MONEY,
    "insufficient_quota": _MONEY,
    "organization_spend_limit_exceeded": _MONEY,
    "project_spend_limit_exceeded": _MONEY,
    "organization_usage_limit_exceeded": _MONEY,
    "billing_hard_limit_reached": _MONEY,
    "billing_not_active": _MONEY,
    "enforced_spend_limit_reached": _MONEY,
    "billing_error": _MONEY,
    "slow_down": _SLOW_DOWN,
    "server_is_overloaded": _FULL,
    "overloaded_error": _FULL,
}
_TRANSIENT = frozenset({408, 409, 425, 500, 502, 504, 520, 521, 522, 523, 524})


def of_answer(status: int, *, code: str = "", kind: str = "", message: str = "") -> Meaning:
    """Meaning of an upstream's answer.

    Args:
        status: the HTTP status.
        code, kind, message: `error.code`, `error.type` and `error.message` of the body, or "" where it has none.
    """
    if status < 400:
        return OK
    for word in (code, kind):
        if (known := _BY_WORD.get(word)) is not None:
            return known
    if status == 429:
        return _of_refusal(kind, message)
    if status in (503, 529):
        return _FULL
    if status in _TRANSIENT:
        return _SERVER
    if status >= 500:
        return _SERVER_FINAL
    return _AUTH if status in (401, 403) else _CALLER


def says_absent(status: int, code: str) -> bool:
    """Whether an answer says that what was asked for is not there; `status` and `code` as for `of_answer`."""
    return (status == 404 and code != "model_not_found") or code == "previous_response_not_found"


def _of_refusal(kind: str, message: str) -> Meaning:
    said = message[:2000].lower()
    if "request too large" in said:
        return _TOO_LARGE
    if kind in ("tokens", "input_tokens", "output_tokens"):
        return _TOKENS
    if kind == "requests" or "requests per" in said:  # Anthropic's advice at the end speaks of tokens either way
        return _REQUESTS
    if "token" in said:
        return _TOKENS
    if "request" in said and "limit" in said:
        return _REQUESTS
    return _UNNAMED


def of_failure(reason: Reason, *, begun: bool) -> Meaning:
    """Meaning of an attempt that broke instead of ending.

    Args:
        reason: CONNECT, FIRST_BYTE, IDLE, RESET, GARBAGE, EOF or ERROR_EVENT.
        begun: whether a byte of this answer has left for the client; after that nothing is retried.
    """
    if begun:
        outcome = Outcome.FAILED if reason is Reason.ERROR_EVENT else Outcome.TRUNCATED
        return Meaning(outcome, reason, Retry.NEVER)
    return Meaning(Outcome.FAILED, reason, Retry.BACKOFF)
