"""What the simulated provider writes, beside what real ones wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.core.outcome import Outcome, Reason, of_answer
from proxy.simulator import ALWAYS, Profile, Provider, Refused, Size, Style
from proxy.simulator.wording import duration

DRY = Profile(requests_per_minute=500, tokens_per_minute=200_000, tokens_burst=100_000)
HUNDRED_TOKENS = Size(400)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0003, "0s"),
        (0.006, "6ms"),
        (0.02, "20ms"),
        (0.9996, "1s"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (179.56, "2m59.56s"),
        (360, "6m0s"),
        (432, "7m12s"),
        (3600, "1h0m0s"),
        (86400, "24h0m0s"),
        (60.007, "1m0.007s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def empty(profile: Profile, size: Size = HUNDRED_TOKENS) -> Refused:
    provider = Provider(profile)
    while True:
        decision = provider.arrive(0.0, size)
        if isinstance(decision, Refused):
            return decision


def test_openai_refuses_for_requests_in_these_words() -> None:
    refusal = empty(DRY)
    assert refusal.status == 429
    assert refusal.headers == {
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "100000",
        "x-ratelimit-remaining-tokens": "50000",
        "x-ratelimit-reset-tokens": "15s",
        "retry-after": "1",
        "retry-after-ms": "120",
    }
    assert refusal.body == {
        "error": {
            "message": "Rate limit reached for gpt-4o-mini in organization org-sim on requests per min (RPM): Limit "
            "500, Used 500, Requested 1. Please try again in 120ms. "
            "Visit https://platform.openai.com/account/rate-limits to learn more.",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    }


def test_openai_refuses_for_tokens_in_these_words() -> None:
    refusal = empty(DRY, Size(200_000))
    assert refusal.scope == "tokens"
    assert "on tokens per min (TPM): Limit 200000, Used 200000, Requested 50000. Please try again in 15s." in str(
        refusal.body
    )


def test_a_small_bucket_is_the_limit_of_the_headers_and_the_minute_that_of_the_message() -> None:
    refusal = empty(replace(DRY, requests_burst=50))
    assert refusal.headers["x-ratelimit-limit-requests"] == "50"
    assert refusal.headers["x-ratelimit-reset-requests"] == "6s"
    assert "Limit 500, Used 500, Requested 1. Please try again in 120ms." in str(refusal.body)


def test_a_window_says_when_it_ends() -> None:
    refusal = empty(Profile(requests_per_minute=60, window_seconds=10))
    assert refusal.headers["retry-after"] == "10"
    assert refusal.headers["x-ratelimit-limit-requests"] == "10"
    assert refusal.headers["x-ratelimit-reset-requests"] == "10s"


def test_azure_writes_bare_milliseconds_and_minus_one_for_no_limit() -> None:
    refusal = empty(Profile(requests_per_minute=60, style=Style.AZURE))
    assert refusal.headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60000",
        "x-ratelimit-limit-tokens": "-1",
        "x-ratelimit-remaining-tokens": "-1",
        "x-ratelimit-reset-tokens": "0",
        "retry-after": "1",
        "retry-after-ms": "1000",
    }


def test_groq_tells_the_requests_of_the_day_and_refuses_for_those_of_the_minute() -> None:
    refusal = empty(Profile(requests_per_minute=30, requests_per_day=14_400, tokens_per_minute=6_000, style=Style.GROQ))
    assert refusal.headers == {
        "x-ratelimit-limit-requests": "14400",
        "x-ratelimit-remaining-requests": "14370",
        "x-ratelimit-reset-requests": "3m0s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "30s",
        "retry-after": "2",
    }


def test_anthropic_rounds_tokens_to_thousands() -> None:
    refusal = empty(Profile(requests_per_minute=3, tokens_per_minute=50_000, style=Style.ANTHROPIC), Size(2_000))
    assert refusal.headers["anthropic-ratelimit-tokens-remaining"] == "48000"  # 48,500
    assert refusal.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert refusal.headers["retry-after"] == "20"
    assert refusal.body["type"] == "error"


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize(
    ("profile", "size", "outcome", "reason"),
    [
        (Profile(requests_per_minute=1), Size(4), Outcome.THROTTLED, Reason.REQUESTS),
        (Profile(tokens_per_minute=10), Size(24), Outcome.THROTTLED, Reason.TOKENS),
        (Profile(tokens_per_minute=10), Size(400), Outcome.REJECTED, Reason.TOO_LARGE),
        (Profile(concurrency=1), Size(4), Outcome.OVERLOADED, Reason.FULL),
        (Profile(out_of_money=ALWAYS), Size(4), Outcome.REJECTED, Reason.MONEY),
        (Profile(outage=ALWAYS), Size(4), Outcome.FAILED, Reason.SERVER),
    ],
    ids=["requests", "tokens", "too large", "overload", "money", "outage"],
)
def test_every_refusal_means_what_it_simulates(
    style: Style, profile: Profile, size: Size, outcome: Outcome, reason: Reason
) -> None:
    refusal = empty(replace(profile, style=style), size)
    error = refusal.body["error"]
    assert isinstance(error, dict)
    said = of_answer(
        refusal.status, code=str(error.get("code") or ""), kind=error.get("type") or "", message=error["message"]
    )
    assert (said.outcome, said.reason) == (outcome, reason)
