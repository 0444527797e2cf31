"""What providers write: the headers that tell of limits, and the bodies that refuse.

Sources: the published header and error references of OpenAI, Azure OpenAI, Anthropic and Groq, and answers recorded
from them. A refusal's message and its `retry-after` carry the same wait, rounded up: who waits it out is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from math import ceil

from proxy.simulator.meter import Meter, Window
from proxy.simulator.profile import Style

ORGANIZATION = "org-sim"
_MILLISECONDS = 1000
_ADVICE = "Visit https://platform.openai.com/account/rate-limits to learn more."

Shown = tuple[tuple[str, Meter], ...]  # the dimensions that headers tell of, in order


def duration(seconds: float) -> str:
    """As Go writes a duration rounded to milliseconds: `0s` `6ms` `20ms` `1s` `8.64s` `6m0s` `24h0m0s`."""
    return _duration(round(seconds * _MILLISECONDS))


def _duration(milliseconds: int) -> str:
    if 0 < milliseconds < _MILLISECONDS:
        return f"{milliseconds}ms"
    whole, rest = divmod(milliseconds, _MILLISECONDS)
    minutes, left = divmod(whole, 60)
    last = f"{left}.{rest:03}".rstrip("0") + "s" if rest else f"{left}s"
    if not minutes:
        return last
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{last}" if hours else f"{minutes}m{last}"


def _wait_milliseconds(seconds: float) -> int:
    """Rounded up; the ten-thousandth taken off is what floating point may have put on."""
    return ceil(seconds * _MILLISECONDS - 1e-4)


def limit_headers(style: Style, shown: Shown, *, wall: float, stuck: bool) -> dict[str, str]:
    """The headers on every answer, refusals among them.

    Args:
        shown: meters brought up to date by `advance`.
        wall: seconds since the Unix epoch.
        stuck: lie: nothing was ever used.
    """
    if style is Style.NONE:
        return {}
    if style is Style.ANTHROPIC:
        return _anthropic_headers(shown, wall=wall, stuck=stuck)
    headers: dict[str, str] = {}
    for dimension, meter in shown:
        reset = 0 if stuck else round(meter.reset * _MILLISECONDS)
        headers["x-ratelimit-limit-" + dimension] = meter.limit_text
        headers["x-ratelimit-remaining-" + dimension] = meter.limit_text if stuck else str(meter.remaining)
        headers["x-ratelimit-reset-" + dimension] = str(reset) if style is Style.AZURE else _duration(reset)
    if style is Style.AZURE:
        for dimension in ("requests", "tokens"):
            if "x-ratelimit-limit-" + dimension not in headers:
                headers["x-ratelimit-limit-" + dimension] = "-1"
                headers["x-ratelimit-remaining-" + dimension] = "-1"
                headers["x-ratelimit-reset-" + dimension] = "0"
    return headers


def _anthropic_headers(shown: Shown, *, wall: float, stuck: bool) -> dict[str, str]:
    """Tokens are rounded to thousands; resets are cut to whole seconds, so often already past."""
    headers: dict[str, str] = {}
    longest = 0.0
    for dimension, meter in shown:
        remaining = int(meter.limit) if stuck else meter.remaining
        reset = 0.0 if stuck else meter.reset
        longest = max(longest, reset)
        told = str(remaining if dimension == "requests" else round(remaining, -3))
        date = datetime.fromtimestamp(int(wall + reset), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for name in (dimension,) if dimension == "requests" else ("tokens", "input-tokens"):
            headers[f"anthropic-ratelimit-{name}-limit"] = meter.limit_text
            headers[f"anthropic-ratelimit-{name}-remaining"] = told
            headers[f"anthropic-ratelimit-{name}-reset"] = date
    if headers:
        headers["retry-after"] = str(ceil(longest))  # on success too, where it means nothing
    return headers


def retry_headers(style: Style, wait: float) -> dict[str, str]:
    """When to come back; `retry-after` in whole seconds, in milliseconds too where the provider does so."""
    milliseconds = _wait_milliseconds(wait)
    headers = {"retry-after": str(-(-milliseconds // _MILLISECONDS))}
    if style in (Style.OPENAI, Style.AZURE):
        headers["retry-after-ms"] = str(milliseconds)
    return headers


def error(
    message: str, kind: str | None, *, code: str | int | None = None, param: str | None = None
) -> dict[str, object]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error(message: str, kind: str) -> dict[str, object]:
    """An error in Anthropic's shape."""
    return {"type": "error", "error": {"type": kind, "message": message}}


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def for_anthropics_clients(status: int, said: dict[str, object]) -> dict[str, object]:
    """Any error in Anthropic's shape; what is in it already stays as it is."""
    told = said["error"]
    if said.get("type") == "error" or not isinstance(told, dict):
        return said
    return anthropic_error(str(told["message"]), _KINDS.get(status, "api_error"))


def limit_reached(style: Style, meter: Meter, *, model: str, cost: float, wait: float) -> dict[str, object]:
    """The body of a 429 for a limit that is used up."""
    limit = meter.spoken
    used = max(0, limit - meter.remaining)
    seconds = ceil(wait - 1e-6)
    if style is Style.AZURE:
        rate = "call" if meter.dimension == "requests" else "token"
        return error(
            "Requests to the ChatCompletions_Create Operation under Azure OpenAI API version 2024-10-21 have exceeded "
            f"{rate} rate limit of your current OpenAI S0 pricing tier. Please retry after {seconds} "
            f"second{'' if seconds == 1 else 's'}. Please go here: https://aka.ms/oai/quotaincrease if you would "
            "like to further increase the default rate limit.",
            None,
            code="429",
        )
    if style is Style.ANTHROPIC:
        few = meter.dimension == "requests"
        advice = "" if few else "Please reduce the prompt length or the maximum tokens requested, or try again later. "
        return anthropic_error(
            f"This request would exceed your organization's rate limit of {limit:,} "
            f"{'requests' if few else 'input tokens'} per minute (org: {ORGANIZATION}, model: {model}). For details, "
            "refer to: https://docs.claude.com/en/api/rate-limits. You can see the response headers for current usage. "
            f"{advice}You may also contact sales to discuss your options for a rate limit increase.",
            "rate_limit_error",
        )
    tier = " service tier `on_demand`" if style is Style.GROQ else ""
    organization = f"`{ORGANIZATION}`" if style is Style.GROQ else ORGANIZATION
    name = f"`{model}`" if style is Style.GROQ else model
    return error(
        f"Rate limit reached for {name} in organization {organization}{tier} on {_phrase(meter)}: Limit {limit}, "
        f"Used {used}, Requested {ceil(cost)}. Please try again in {_duration(_wait_milliseconds(wait))}. {_ADVICE}",
        meter.dimension,
        code="rate_limit_exceeded",
    )


def _phrase(meter: Meter) -> str:
    short = meter.dimension[0].upper()
    return f"{meter.dimension} per day ({short}PD)" if meter.period > 60 else f"{meter.dimension} per min ({short}PM)"


def too_large(style: Style, meter: Meter, *, model: str, cost: float) -> dict[str, object]:
    """The body of a 429 for a call that exceeds the whole limit by itself."""
    if style is Style.ANTHROPIC:
        return anthropic_error(
            f"Request too large: this request would exceed the rate limit of {meter.spoken} input tokens per minute.",
            "rate_limit_error",
        )
    return error(
        f"Request too large for {model} in organization {ORGANIZATION} on {_phrase(meter)}: "
        f"Limit {meter.spoken if isinstance(meter, Window) else meter.limit_text}, Requested {ceil(cost)}. "
        f"The input or output tokens must be reduced in order to run successfully. {_ADVICE}",
        "tokens",
        code="rate_limit_exceeded",
    )


def overloaded(style: Style) -> tuple[int, dict[str, object]]:
    """Status and body when too many calls are in flight."""
    if style is Style.ANTHROPIC:
        return 529, anthropic_error("Overloaded", "overloaded_error")
    if style is Style.NONE:
        return 503, error("The engine's waiting queue is full. Please try again later.", "ServiceUnavailable", code=503)
    return 503, error(
        "The server is currently overloaded with other requests. Sorry about that! You can retry your request.",
        "service_unavailable_error",
        code="server_is_overloaded",
    )


def no_money(style: Style) -> dict[str, object]:
    if style is Style.ANTHROPIC:
        return anthropic_error("You have reached your specified API usage limits.", "enforced_spend_limit_reached")
    return error(
        "You exceeded your current quota, please check your plan and billing details. For more information on this "
        "error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
        "insufficient_quota",
        code="insufficient_quota",
    )


def too_steep(style: Style) -> dict[str, object]:
    if style is Style.ANTHROPIC:
        return anthropic_error("Number of requests has risen too fast. Please ramp up slowly.", "rate_limit_error")
    return error(
        "Your request rate rose too fast. Please reduce it to its original level, hold it there for at least 15 "
        "minutes, and then increase it gradually.",
        "requests",
        code="slow_down",
    )


def broken(style: Style) -> dict[str, object]:
    """The body of a 5xx, and the error told in a stream."""
    if style is Style.ANTHROPIC:
        return anthropic_error("Internal server error", "api_error")
    return error("The server had an error while processing your request. Sorry about that!", "server_error")


def with_lies(headers: dict[str, str], lies: Mapping[str, str]) -> dict[str, str]:
    """The same headers, with the text of `lies` wherever one of them is sent."""
    for name, text in lies.items():
        if name in headers:
            headers[name] = text
    return headers
