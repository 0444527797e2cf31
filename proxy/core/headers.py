"""What the headers and error bodies of providers say about limits, as numbers; and which headers may pass, each way.

The law of the header: for a continuous bucket, `reset = (limit - remaining) / limit * window`, so that one answer gives
limit, level and window. It held in 1,278 of 1,278 recorded answers of OpenAI and Groq within 1 ms, with `remaining`
rounded down. 0 is a value; a missing header, -1 (Azure's word for none) and what is not a plain number are None.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

import msgspec

DAY = 86_400.0  # seconds
MONTH = 30 * DAY
BODY_LIMIT = 1 << 16  # bytes of an error body that are looked at; the longest real one seen was 6 KiB
TEXT_LIMIT = 2_000  # characters of a message that are kept

# What a client may say to an upstream. Credentials are the gateway's, and so are user-agent and accept-encoding.
TO_UPSTREAM = frozenset(
    {
        "accept",
        "anthropic-beta",
        "anthropic-user-profile-id",
        "anthropic-version",
        "anthropic-workspace-id",
        "content-type",
        "idempotency-key",
        "openai-beta",
        "openai-organization",
        "openai-project",
    }
)
# ... and of what is passed through as it is: how the body is packed, and which part of a file is wanted.
PASSED_UPSTREAM = TO_UPSTREAM | {"content-encoding", "if-match", "if-none-match", "if-range", "range"}

_PARTS = ("limit", "remaining", "reset")
_SPANS = ("second", "10-second", "minute", "hour", "day", "month")
# What an upstream may say to a client: nothing that names its servers, its account or its cookies.
TO_CLIENT = (
    frozenset(
        {
            "accept-ranges",
            "cache-control",
            "content-disposition",
            "content-encoding",
            "content-range",
            "content-type",
            "etag",
            "last-modified",
            "location",
            "openai-model",
            "openai-poll-after-ms",
            "openai-processing-ms",
            "openai-version",
            "request-id",
            "retry-after",
            "retry-after-ms",
        }
    )
    | {f"x-ratelimit-{part}-{kind}" for part in _PARTS for kind in ("requests", "tokens")}
    | {
        f"x-ratelimit-{part}-{kind}-{span}"
        for part in _PARTS
        for kind in ("req", "requests", "tokens")
        for span in _SPANS
    }
    | {
        f"anthropic-ratelimit-{kind}-{part}"
        for kind in ("requests", "tokens", "input-tokens", "output-tokens")
        for part in _PARTS
    }
)


def without_hops(headers: dict[str, str], connection: str) -> dict[str, str]:
    """`headers` without those that the other side's header `connection` names, which are for it and us alone."""
    if "," in connection or connection.lower() not in ("", "keep-alive", "close"):
        for name in connection.lower().split(","):
            headers.pop(name.strip(), None)
    return headers


ANTHROPIC_VERSION = {"anthropic-version": "2023-06-01"}  # the first that knows messages; a call needs one


def for_client(said: Mapping[str, str]) -> dict[str, str]:
    """Those of an upstream's headers that a client may see; none holds a control character or what is no character.

    Args:
        said: names in lower case.
    """
    told = {name: value for name, value in said.items() if name in TO_CLIENT and value.isprintable()}
    return without_hops(told, said.get("connection", ""))


def location(said: str, asked: str, base_url: str) -> str:
    """Where an upstream sends the client, as the client can go there; "" where it must not be told.

    What is below the upstream's `base_url` is below the gateway's `/v1`, to which it comes back with its key. Another
    host, over https, is meant for the client (a store of files, with its signature) and stays as it is. All else names
    a server that only the gateway knows: the upstream's own outside of its `base_url`, or one without TLS.

    Args:
        said: an answer's `location`.
        asked: the URL that was asked for.
    """
    try:
        target, base = urlsplit(urljoin(asked, said)), urlsplit(base_url)
        own = target.hostname == base.hostname  # whatever scheme and port: behind a proxy a server knows neither
    except ValueError:
        return ""
    if not own:
        return target.geturl() if target.scheme == "https" and target.hostname and "@" not in target.netloc else ""
    below = target.path.removeprefix(base.path)
    if not target.path.startswith(base.path) or not below.startswith("/"):
        return ""
    return urlunsplit(("", "", f"/v1{below}", target.query, target.fragment))


_KEY = "openai-insecure-api-key."


def subprotocols(said: str) -> tuple[tuple[str, ...], str]:
    """A WebSocket's subprotocols, and the key among them, "" if there is none: browsers can send no other header.

    Args:
        said: the value of `sec-websocket-protocol`.
    """
    names = [name for part in said.split(",") if (name := part.strip())]
    key = next((name.removeprefix(_KEY) for name in names if name.startswith(_KEY)), "")
    return tuple(name for name in names if not name.startswith(_KEY)), key


class Kind(Enum):
    """What a limit counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"


class Reading(NamedTuple):
    """What one answer says of one limit. (A tuple, because each answer makes one or more: a third of the cost.)

    `name` tells the provider's limits of one kind apart ("tokens-minute", "tokens-month"). `window_seconds` is the time
    in which the whole limit flows back, known by the provider's convention or by the law of the header.
    """

    kind: Kind
    limit: float | None
    remaining: float | None
    reset_seconds: float | None
    window_seconds: float | None
    name: str


# ── limits ──


def readings(headers: Mapping[str, str], wall: float) -> tuple[Reading, ...]:
    """All limits that an answer tells, in no order; () when it tells none. Never raises.

    Args:
        headers: of the answer, names in lower case.
        wall: seconds since the epoch; Anthropic tells dates.
    """
    found: dict[str, Reading] = {}
    get = headers.get
    for family in _families(tuple(headers)):
        limit, remaining = _number(get(family.limit)), _number(get(family.remaining))
        if (limit is None and remaining is None) or family.name in found:
            continue
        window, reset = family.window, _reset(get(family.reset, ""), family, wall)
        if window is None:
            window = _window(limit, remaining, reset)
        found[family.name] = Reading(family.kind, limit, remaining, reset, window, family.name)
    if "input_tokens" in found or "output_tokens" in found:
        found.pop("tokens", None)  # Anthropic's summary: whichever of the two is scarcer
    return tuple(found.values())


_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
_HEADER = re.compile(
    r"x-ratelimit-(?:limit|remaining)-((req|requests|tokens)(?:-(?:(\d{1,4})-)?(second|minute|hour|day|month)s?)?)"
    r"|anthropic-ratelimit-(requests|tokens|input-tokens|output-tokens)-(?:limit|remaining)",
    re.ASCII,
)
_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": DAY, "month": MONTH}


@dataclass(slots=True, frozen=True)
class _Family:
    """The three headers that tell of one limit."""

    kind: Kind
    name: str
    limit: str
    remaining: str
    reset: str
    window: float | None  # by convention
    dated: bool  # its reset is a date


@lru_cache(maxsize=64)  # a server sends the same names each time, or one of a few sets of them
def _families(names: tuple[str, ...]) -> tuple[_Family, ...]:
    """The limits that headers of these names tell of."""
    families = (_family(name) for name in names if name.startswith(_PREFIXES))
    return tuple(dict.fromkeys(family for family in families if family is not None))


@lru_cache(maxsize=256)
def _family(header: str) -> _Family | None:
    """To which limit a header belongs that tells what it is or what is left of it."""
    match = _HEADER.fullmatch(header)
    if match is None:
        return None
    name, counts, number, span, anthropic = match.groups()
    if anthropic:
        kind = Kind(anthropic.replace("-", "_"))
        limit, remaining, reset = (f"anthropic-ratelimit-{anthropic}-{part}" for part in _PARTS)
        return _Family(kind, kind.value, limit, remaining, reset, 60.0, True)  # whole seconds: too coarse for the law
    kind = Kind.TOKENS if counts == "tokens" else Kind.REQUESTS
    window = (int(number or 1) or 1) * _SECONDS[span] if span else None
    limit, remaining, reset = (f"x-ratelimit-{part}-{name}" for part in _PARTS)
    return _Family(kind, "requests" if name == "req" else name, limit, remaining, reset, window, False)


def _reset(said: str, family: _Family, wall: float) -> float | None:
    """Seconds until all of a limit is there again."""
    if family.dated:
        date = _rfc3339(said)
        return None if date is None or date - wall > MONTH else max(0.0, date - wall)  # often already past
    seconds = _duration(said)
    if seconds is None and (bare := _number(said)) is not None:
        # A bare number is milliseconds (Azure), but seconds beside a named window (Mistral, Cerebras).
        seconds = bare if family.window else bare / 1000
    return seconds


CONVENTIONAL = (1.0, 10.0, 60.0, 3600.0, DAY)  # windows that providers really use, in seconds


def _window(limit: float | None, remaining: float | None, reset: float | None) -> float | None:
    """The window by the law of the header, or None where rounding hides it.

    `reset` is given to the millisecond: a conventional window within that is taken, else what the law says, where
    rounding leaves it sure to 30 %.
    """
    if limit is None or remaining is None or reset is None or not 0.0 <= remaining < limit:
        return None
    per_second = limit / (limit - remaining)
    least, most = max(0.0, reset - 0.001) * per_second, (reset + 0.001) * per_second
    first, after = bisect_left(CONVENTIONAL, least), bisect_right(CONVENTIONAL, most)
    if first < after:
        return CONVENTIONAL[first] if after - first == 1 else None
    return reset * per_second if 0.0 < most <= least * 1.3 else None


# ── when to come back ──


def retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds after which an upstream wants to be asked again, in [0, one day], or None. Never raises.

    `retry-after-ms` is finer than `retry-after` and wins. NaN, infinity, negatives, dates that are past and numbers of
    absurd length are as good as nothing said.

    Args:
        headers: names in lower case.
        wall: seconds since the epoch, for dates.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, DAY)
    said = headers.get("retry-after", "")
    seconds = _number(said)
    if seconds is None and (date := _http_date(said)) is not None and date > wall:
        seconds = date - wall
    return None if seconds is None else min(seconds, DAY)


_AGAIN = re.compile(r"(?:try again|retry) in (\d[\d.a-zµ]{0,30})", re.IGNORECASE)


def retry_after_of_body(body: bytes) -> float | None:
    """Seconds after which an error body asks to come back: Gemini's RetryInfo, OpenAI's "Please try again in 1m2.5s".
    In [0, one day], or None. Never raises."""
    error = _error(body)
    if isinstance(error, dict):
        details = error.get("details")
        for detail in details if isinstance(details, list) else ():
            said = detail.get("retryDelay") if isinstance(detail, dict) else None
            if isinstance(said, str) and (delay := _duration(said)) is not None:
                return min(delay, DAY)
    match = _AGAIN.search(error_of_body(body)[2])
    delay = _duration(match[1].rstrip(".")) if match else None
    return None if delay is None else min(delay, DAY)


def error_of_body(body: bytes) -> tuple[str, str, str]:
    """`(code, type, message)` of an error body, each "" where absent. Never raises.

    Knows OpenAI's, Anthropic's and Gemini's shapes (Gemini's may be an array and calls its type `status`), FastAPI's
    `detail`, and plain text, which is all message. Codes that are integers become text.
    """
    error = _error(body)
    if not isinstance(error, dict):
        text = error if isinstance(error, str) else body[:BODY_LIMIT].decode(errors="replace")
        return "", "", text.strip()[:TEXT_LIMIT]
    message = _text(error.get("message")) or _text(error.get("detail"))
    return _text(error.get("code")), _text(error.get("type")) or _text(error.get("status")), message


def _error(body: bytes) -> Any:
    """The part of an error body that tells the error, or None where it is not JSON."""
    if len(body) > BODY_LIMIT:
        return None
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    if isinstance(said, list):
        said = said[0] if said else None
    if isinstance(said, dict):
        inner = said.get("error")
        return inner if isinstance(inner, dict | str) else said
    return None


def _text(value: object) -> str:
    if isinstance(value, str):
        return value[:TEXT_LIMIT]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


# ── numbers, durations, dates: bounded in length before they are looked at, so that no text stalls ──

_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,18})?")
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,18})?(?:ms|us|µs|ns|d|h|m|s))+", re.ASCII)
_PART = re.compile(r"([\d.]+)([^\d.]+)", re.ASCII)
_UNITS = {"d": DAY, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(\.\d{1,9})?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_IMF = re.compile(r"[A-Za-z]{3,9}, (\d\d)[ -]([A-Za-z]{3})[ -](\d{4}|\d\d) (\d\d):(\d\d):(\d\d) GMT", re.ASCII)
_ASCTIME = re.compile(r"[A-Za-z]{3} ([A-Za-z]{3}) ([ \d]\d) (\d\d):(\d\d):(\d\d) (\d{4})", re.ASCII)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


@lru_cache(maxsize=4096)  # limits stay the same, and what is left of them repeats
def _number(said: str | None) -> float | None:
    if said is None or len(said) > 40:
        return None
    if len(said) <= 15 and said.isascii() and said.isdigit():  # nearly all of them
        return float(said)
    said = said.strip()
    return float(said) if said.isascii() and _NUMBER.fullmatch(said) else None


@lru_cache(maxsize=1024)  # milliseconds repeat
def _short_duration(said: str) -> float | None:
    said = said.strip()
    if not _DURATION.fullmatch(said):
        return None
    return sum(float(count) * _UNITS[unit] for count, unit in _PART.findall(said))


def _duration(said: str) -> float | None:
    """Go's way of writing durations: 6ms, 8.64s, 6m0s, 1h2m3.5s. None for a bare number."""
    return _short_duration(said) if len(said) <= 64 else None


def _rfc3339(said: str) -> float | None:
    match = _RFC3339.fullmatch(said.strip()) if len(said) <= 64 else None
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(match[index]) for index in range(1, 7))
    offset = (int(match[9]) * 3600 + int(match[10]) * 60) * (-1 if match[8] == "-" else 1) if match[8] else 0
    instant = _epoch(year, month, day, hour, minute, second)
    return None if instant is None else instant + float(match[7] or 0) - offset


def _http_date(said: str) -> float | None:
    """The three forms of RFC 9110, 5.6.7."""
    if len(said) > 64:
        return None
    said = said.strip()
    if match := _IMF.fullmatch(said):
        day, name, year, hour, minute, second = match.groups()
    elif match := _ASCTIME.fullmatch(said):
        name, day, hour, minute, second, year = match.groups()
    else:
        return None
    if name.lower() not in _MONTHS:
        return None
    full_year = int(year) + (0 if len(year) == 4 else 2000 if int(year) < 70 else 1900)
    return _epoch(full_year, _MONTHS.index(name.lower()) + 1, int(day), int(hour), int(minute), int(second))


def _epoch(year: int, month: int, day: int, hour: int, minute: int, second: int) -> float | None:
    """Seconds since 1970-01-01 UTC, or None for a date that is none.

    Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", days_from_civil.
    """
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour <= 24 and minute <= 59 and second <= 60 and year >= 1):
        return None
    shifted = year - (month <= 2)
    era, of_era = divmod(shifted, 400)
    of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    days = era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468
    return days * DAY + hour * 3600.0 + minute * 60.0 + second
