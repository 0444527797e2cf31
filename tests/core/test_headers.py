import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import headers
from proxy.core.headers import DAY, Kind, Reading

NOON = 1_750_000_000.0  # 2025-06-15T15:06:40Z
GIANT = "9" * 400


def openai(limit, remaining, reset, name="requests"):
    return {
        f"x-ratelimit-limit-{name}": limit,
        f"x-ratelimit-remaining-{name}": remaining,
        f"x-ratelimit-reset-{name}": reset,
    }


def read_one(said):
    (reading,) = headers.readings(said, NOON)
    return reading


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("6ms", 0.006),
        ("20ms", 0.02),
        ("1s", 1.0),
        ("8.64s", 8.64),
        ("6m0s", 360.0),
        ("7m12s", 432.0),
        ("2m59.56s", 179.56),
        ("24h0m0s", DAY),
        ("1d2h", 93600.0),
        ("500µs", 5e-4),
        ("0s", 0.0),
    ],
)
def test_durations_are_read_as_go_writes_them(said, seconds):
    assert read_one(openai("500", "0", said)).reset_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "said", ["", "soon", "1x", "-5s", "1e3s", "s", "..s", "1..2s", GIANT + "s", "NaN", "inf", "1s\n2"]
)
def test_what_is_no_duration_is_nothing(said):
    assert read_one(openai("500", "0", said)).reset_seconds is None


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "window"),
    [
        ("10000", "9999", "6ms", 60.0),
        ("30000", "29999", "2ms", 60.0),
        ("500", "499", "120ms", 60.0),
        ("50", "49", "120ms", 6.0),
        ("14400", "14399", "6s", DAY),
        ("200000", "198310", "507ms", 60.0),
        ("2000000", "1999990", "0s", None),  # rounding hides it
        ("500", "500", "0s", None),
        ("500", "0", "1m0s", 60.0),
        ("0", "0", "1m0s", None),
    ],
)
def test_one_answer_tells_the_window_by_the_law_of_the_header(limit, remaining, reset, window):
    told = read_one(openai(limit, remaining, reset)).window_seconds
    assert told == (None if window is None else pytest.approx(window, rel=0.01))


@given(
    st.integers(1, 10**7).flatmap(lambda limit: st.tuples(st.just(limit), st.integers(0, limit - 1))),
    st.sampled_from([1.0, 10.0, 60.0, 3600.0, DAY]),
)
def test_the_law_never_tells_a_wrong_window(levels, window):
    limit, remaining = levels
    reset = round((limit - remaining) / limit * window * 1000)
    told = read_one(openai(str(limit), str(remaining), f"{reset}ms")).window_seconds
    assert told is None or told == pytest.approx(window, rel=0.06)


@pytest.mark.parametrize("none", ["-1", "NaN", "inf", "1e400", "-inf", GIANT, "0x10", "1,000", "", "٣٣"])
def test_what_is_no_plain_number_is_nothing(none):
    assert headers.readings(openai(none, none, "1s"), NOON) == ()
    assert read_one(openai("500", none, "1s")).remaining is None
    assert read_one(openai(none, "7", "1s")).limit is None


def test_zero_is_a_value():
    assert read_one(openai("0", "0", "1m0s")) == Reading(Kind.REQUESTS, 0.0, 0.0, 60.0, None, "requests")


def test_azure_tells_bare_milliseconds_and_minus_one_for_none():
    said = openai("500", "498", "240") | openai("-1", "-1", "0", "tokens")
    assert read_one(said) == Reading(Kind.REQUESTS, 500.0, 498.0, 0.24, 60.0, "requests")


def test_groqs_requests_are_per_day_and_its_tokens_per_minute():
    said = openai("14400", "14370", "2m59.56s") | openai("18000", "17997", "10ms", "tokens")
    by_kind = {reading.kind: reading for reading in headers.readings(said, NOON)}
    assert by_kind[Kind.REQUESTS].window_seconds == pytest.approx(DAY, rel=0.01)
    assert by_kind[Kind.TOKENS].window_seconds == 60.0


def test_mistral_names_its_windows():
    said = {
        "x-ratelimit-limit-req-10-second": "60",
        "x-ratelimit-remaining-req-10-second": "59",
        "x-ratelimit-limit-tokens-minute": "500000",
        "x-ratelimit-remaining-tokens-minute": "499000",
        "x-ratelimit-limit-tokens-month": "1000000000",
        "x-ratelimit-remaining-tokens-month": "999999000",
    }
    found = {reading.name: reading for reading in headers.readings(said, NOON)}
    assert found["req-10-second"] == Reading(Kind.REQUESTS, 60.0, 59.0, None, 10.0, "req-10-second")
    assert found["tokens-minute"].window_seconds == 60.0
    assert found["tokens-month"].window_seconds == 30 * DAY


def anthropic(kind, limit, remaining, reset):
    return {
        f"anthropic-ratelimit-{kind}-limit": limit,
        f"anthropic-ratelimit-{kind}-remaining": remaining,
        f"anthropic-ratelimit-{kind}-reset": reset,
    }


@pytest.mark.parametrize(
    ("date", "reset"),
    [
        ("2025-06-15T15:06:50Z", 10.0),
        ("2025-06-15T17:06:50+02:00", 10.0),
        ("2025-06-15T15:06:50.500Z", 10.5),
        ("2025-06-15T15:06:00Z", 0.0),  # past: full again
        ("9999-01-01T00:00:00Z", None),
        ("2025-13-15T15:06:50Z", None),
        ("yesterday", None),
        (GIANT, None),
    ],
)
def test_anthropic_tells_dates(date, reset):
    reading = read_one(anthropic("requests", "50", "0", date))
    assert reading == Reading(Kind.REQUESTS, 50.0, 0.0, reset, 60.0, "requests")


def test_anthropics_summary_of_tokens_is_dropped_where_the_kinds_are_told():
    date = "2025-06-15T15:06:50Z"
    said = anthropic("tokens", "80000", "70000", date) | anthropic("input-tokens", "80000", "70000", date)
    assert read_one(said).kind is Kind.INPUT_TOKENS
    assert read_one(anthropic("tokens", "80000", "70000", date)).kind is Kind.TOKENS


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "7", "retry-after-ms": "soon"}, 7.0),
        ({"retry-after": "Sun, 15 Jun 2025 15:07:00 GMT"}, 20.0),
        ({"retry-after": "Sunday, 15-Jun-25 15:07:00 GMT"}, 20.0),
        ({"retry-after": "Sun Jun 15 15:07:00 2025"}, 20.0),
        ({"retry-after": "Sun, 15 Jun 2025 15:06:00 GMT"}, None),
        ({"retry-after": "Sun, 15 Jun 2925 15:06:00 GMT"}, DAY),
        ({"retry-after": "Sun, 99 Jun 2025 15:06:00 GMT"}, None),
        ({"retry-after": "Sun, 15 Foo 2025 15:06:00 GMT"}, None),
        ({"retry-after": "86401"}, DAY),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "NaN"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": GIANT}, None),
        ({"retry-after-ms": GIANT}, None),
    ],
)
def test_retry_after_is_read_in_seconds_milliseconds_and_dates(said, seconds):
    assert headers.retry_after(said, NOON) == (None if seconds is None else pytest.approx(seconds))


def test_retry_after_is_found_in_bodies():
    gemini = {
        "error": {"code": 429, "details": [{"@type": "…QuotaFailure"}, {"@type": "…RetryInfo", "retryDelay": "46s"}]}
    }
    assert headers.retry_after_of_body(json.dumps(gemini).encode()) == 46.0
    assert headers.retry_after_of_body(json.dumps([gemini]).encode()) == 46.0
    openai_body = {"error": {"message": "Rate limit reached … Please try again in 1m2.5s. Visit …", "type": "tokens"}}
    assert headers.retry_after_of_body(json.dumps(openai_body).encode()) == 62.5
    assert headers.retry_after_of_body(b"Please try again in 20ms.") == pytest.approx(0.02)
    for nothing in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"Please try again in a while",
        b'{"error":{"details":[7,{"retryDelay":7}]}}',
    ):
        assert headers.retry_after_of_body(nothing) is None


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (
            b'{"error":{"code":"rate_limit_exceeded","type":"tokens","message":"No."}}',
            ("rate_limit_exceeded", "tokens", "No."),
        ),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"Full"}}', ("", "overloaded_error", "Full")),
        (b'[{"error":{"code":429,"status":"RESOURCE_EXHAUSTED","message":"Q"}}]', ("429", "RESOURCE_EXHAUSTED", "Q")),
        (b'{"object":"error","message":"bad","type":"BadRequestError","code":400}', ("400", "BadRequestError", "bad")),
        (b'{"error":"Model not found"}', ("", "", "Model not found")),
        (b'{"detail":"Not Found"}', ("", "", "Not Found")),
        (b"upstream timed out\n", ("", "", "upstream timed out")),
        (b'{"error":{"code":null,"type":7,"message":["x"]}}', ("", "7", "")),
        (b"", ("", "", "")),
    ],
)
def test_errors_are_read_in_every_dialect(body, error):
    assert headers.error_of_body(body) == error


TEXT = st.text(max_size=60) | st.from_regex(r"[0-9.smhdµ:TZ+ -]{0,60}", fullmatch=True)
NAMES = st.sampled_from(
    [
        *sorted(headers.TO_CLIENT),
        "x-ratelimit-",
        "x-ratelimit-limit",
        "x-ratelimit-limit-",
        "anthropic-ratelimit--limit",
    ]
) | st.from_regex(r"(x|anthropic)-ratelimit-[a-z0-9-]{0,20}", fullmatch=True)


@given(st.dictionaries(NAMES, TEXT, max_size=12), st.floats(0, 2**40))
def test_no_header_crashes_or_stalls_or_yields_a_number_out_of_range(said, wall):
    began = time.perf_counter()
    for reading in headers.readings(said, wall):
        for number in (reading.limit, reading.remaining, reading.reset_seconds, reading.window_seconds):
            assert number is None or 0.0 <= number < 1e17
    seconds = headers.retry_after(said, wall)
    assert seconds is None or 0.0 <= seconds <= DAY
    assert time.perf_counter() - began < 0.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "code", "type", "message", "details", "retryDelay", "status"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(st.binary(max_size=200) | JSON.map(lambda said: json.dumps(said).encode("utf-8", "surrogatepass")))
def test_no_body_crashes(body):
    code, kind, message = headers.error_of_body(body)
    assert isinstance(code, str)
    assert isinstance(kind, str)
    assert len(message) <= headers.TEXT_LIMIT
    seconds = headers.retry_after_of_body(body)
    assert seconds is None or 0.0 <= seconds <= DAY


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"error":' * 20_000,
        b'{"error":{"code":' + b"9" * 5000 + b"}}",
        b"x" * 10**6,
        b'"\xff\xfe"',
        ("try again in " + "1" * 30 + "s ").encode() * 1000,
    ],
)
def test_hostile_bodies_are_read_in_no_time(body):
    began = time.perf_counter()
    headers.error_of_body(body)
    headers.retry_after_of_body(body)
    assert time.perf_counter() - began < 0.5


def test_credentials_and_cookies_pass_in_no_direction():
    secrets = {
        "authorization",
        "x-api-key",
        "api-key",
        "cookie",
        "set-cookie",
        "forwarded",
        "server",
        "host",
        "connection",
    }
    assert not secrets & (headers.TO_UPSTREAM | headers.TO_CLIENT)
    assert {"content-type", "x-ratelimit-remaining-tokens", "anthropic-ratelimit-requests-reset"} <= headers.TO_CLIENT
    assert all(name == name.lower() for name in headers.TO_UPSTREAM | headers.TO_CLIENT)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/api/v1/files/f-1?after=2#x", "/v1/files/f-1?after=2#x"),
        ("f-1", "/v1/files/f-1"),
        ("?page=2", "/v1/files/?page=2"),
        ("https://api.internal:8443/api/v1/files", "/v1/files"),
        ("http://API.internal/api/v1/files", "/v1/files"),
        ("//api.internal/api/v1/files", "/v1/files"),
        ("https://store.example/f-1?sig=%2B", "https://store.example/f-1?sig=%2B"),
        ("/", ""),
        ("/api/v1", ""),
        ("/api/v10/files", ""),
        ("../../../health", ""),
        ("https://api.internal/login", ""),
        ("http://node-7.internal/f-1", ""),
        ("https://user:key@store.example/f-1", ""),
        ("ftp://store.example/f-1", ""),
        ("https:///f-1", ""),
        ("https://[", ""),
        ("", "/v1/files/"),
    ],
)
def test_a_location_leads_a_client_to_the_gateway_or_away_but_names_no_server_of_ours(said, told):
    asked = "https://api.internal:8443/api/v1/files/"
    assert headers.location(said, asked, "https://api.internal:8443/api/v1") == told


@given(said=st.text(max_size=40) | st.from_regex(r"(https?:)?//[a-z.@:]{0,12}/[a-z/.?#]{0,12}", fullmatch=True))
def test_a_location_never_names_the_upstream(said):
    told = headers.location(said, "http://10.1.2.3:8000/v1/x", "http://10.1.2.3:8000/v1")
    assert "10.1.2.3" not in told or "10.1.2.3" in said.partition("?")[2]
    assert not told or told.startswith(("/v1/", "https://"))
