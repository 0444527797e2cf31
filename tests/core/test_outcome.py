"""The table of what a status, a code or a failure means; the relay, the limits and the metrics all follow it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import outcome
from proxy.core.outcome import Meaning, Outcome, Reason, Retry

RATE_LIMIT = {"code": "rate_limit_exceeded"}
MONEY = (Outcome.REJECTED, Reason.MONEY, Retry.ELSEWHERE)
FULL = (Outcome.OVERLOADED, Reason.FULL, Retry.BACKOFF)
SERVER = (Outcome.FAILED, Reason.SERVER, Retry.BACKOFF)
AUTH = (Outcome.REJECTED, Reason.AUTH, Retry.ELSEWHERE)
CALLER = (Outcome.REJECTED, Reason.CALLER, Retry.NEVER)
TOO_LARGE = (Outcome.REJECTED, Reason.TOO_LARGE, Retry.NEVER)


def throttled(reason):
    return Outcome.THROTTLED, reason, Retry.PACED


OPENAI_TPM = (
    "Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM): Limit 30000, Used 29000, Requested "
    "2000. Please try again in 2s."
)
OPENAI_RPM = (
    "Rate limit reached for gpt-4o in organization org-1 on requests per min (RPM): Limit 3, Used 3, Requested 1."
)
OPENAI_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 50000."
ADVICE = "Please reduce the prompt length or the maximum tokens requested, or try again later."
ANTHROPIC_TPM = f"This request would exceed your organization's rate limit of 40,000 input tokens per minute. {ADVICE}"
ANTHROPIC_RPM = f"This request would exceed your organization's rate limit of 50 requests per minute. {ADVICE}"
RATE_LIMIT_ERROR = {"kind": "rate_limit_error"}

TABLE = [
    # a limit that is used up
    (429, RATE_LIMIT | {"kind": "requests", "message": OPENAI_RPM}, throttled(Reason.REQUESTS)),
    (429, RATE_LIMIT | {"kind": "tokens", "message": OPENAI_TPM}, throttled(Reason.TOKENS)),
    (429, RATE_LIMIT | {"message": OPENAI_RPM}, throttled(Reason.REQUESTS)),
    (429, RATE_LIMIT | {"message": OPENAI_TPM}, throttled(Reason.TOKENS)),
    (429, RATE_LIMIT_ERROR | {"message": ANTHROPIC_TPM}, throttled(Reason.TOKENS)),
    (429, RATE_LIMIT_ERROR | {"message": ANTHROPIC_RPM}, throttled(Reason.REQUESTS)),
    (429, {"kind": "input_tokens"}, throttled(Reason.TOKENS)),
    (429, {"kind": "RESOURCE_EXHAUSTED", "message": "Resource has been exhausted"}, throttled(Reason.UNNAMED)),
    (429, {}, throttled(Reason.UNNAMED)),
    (429, {"message": "Too Many Requests"}, throttled(Reason.UNNAMED)),
    (429, {"code": "slow_down"}, throttled(Reason.SLOW_DOWN)),
    (503, {"kind": "slow_down"}, throttled(Reason.SLOW_DOWN)),
    # money
    *[
        (429, {where: word}, MONEY)
        for where in ("code", "kind")
        for word in (
            "credit_balance_exhausted",
            "insufficient_quota",
            "organization_spend_limit_exceeded",
            "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
            "enforced_spend_limit_reached",
        )
    ],
    (429, {"code": "insufficient_quota", "kind": "requests"}, MONEY),  # the code is trusted before the type
    (403, {"kind": "billing_error"}, MONEY),
    # one call that exceeds the whole limit
    (429, RATE_LIMIT | {"kind": "tokens", "message": OPENAI_LARGE}, TOO_LARGE),
    # capacity
    (503, {}, FULL),
    (529, {}, FULL),
    (529, {"kind": "overloaded_error"}, FULL),
    (503, {"code": "server_is_overloaded"}, FULL),
    (500, {"kind": "overloaded_error"}, FULL),
    # it could not
    *[(status, {}, SERVER) for status in (408, 409, 425, 500, 502, 504, 520, 521, 522, 523, 524)],
    (501, {}, (Outcome.FAILED, Reason.SERVER, Retry.NEVER)),
    (505, {}, (Outcome.FAILED, Reason.SERVER, Retry.NEVER)),
    # the credential, and the asker's own matter
    (401, {}, AUTH),
    (403, {"kind": "permission_error"}, AUTH),
    *[(status, {}, CALLER) for status in (400, 402, 404, 405, 413, 415, 418, 422, 451)],
    (400, {"message": "rate limit of requests"}, CALLER),  # a message decides nothing but which limit of a 429
    # well
    *[(status, {"code": "insufficient_quota"}, (Outcome.OK, Reason.NONE, Retry.NEVER)) for status in (200, 204, 304)],
]


@pytest.mark.parametrize(("status", "said", "meant"), TABLE)
def test_what_an_answer_means(status, said, meant):
    assert outcome.of_answer(status, **said) == Meaning(*meant)


FAILURES = (Reason.CONNECT, Reason.FIRST_BYTE, Reason.IDLE, Reason.RESET, Reason.GARBAGE, Reason.EOF)


@pytest.mark.parametrize("reason", FAILURES)
def test_before_the_first_byte_a_failure_may_be_tried_again_and_after_it_never(reason):
    assert outcome.of_failure(reason, begun=False) == Meaning(Outcome.FAILED, reason, Retry.BACKOFF)
    assert outcome.of_failure(reason, begun=True) == Meaning(Outcome.TRUNCATED, reason, Retry.NEVER)


def test_an_error_told_in_a_stream_is_a_failure_and_no_truncation():
    meaning = outcome.of_failure(Reason.ERROR_EVENT, begun=True)
    assert meaning == Meaning(Outcome.FAILED, Reason.ERROR_EVENT, Retry.NEVER)


@given(st.integers(100, 999), st.text(), st.text(), st.text(max_size=5000))
def test_every_answer_means_something(status, code, kind, message):
    meaning = outcome.of_answer(status, code=code, kind=kind, message=message)
    assert (meaning.outcome is Outcome.OK) == (status < 400)
    assert (meaning.retry is Retry.PACED) == (meaning.outcome is Outcome.THROTTLED)


WORDS = {
    *("", "rate_limited", "overloaded", "auth", "upstream_4xx", "upstream_5xx", "connect", "timeout", "stream_broken"),
}


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_counted_under_a_word_and_blames_somebody(reason):
    assert reason.word in WORDS
    assert reason.source in ("client", "gateway", "upstream") if reason.word else reason.source == ""
    assert (reason.word == "") == (reason is Reason.NONE)
