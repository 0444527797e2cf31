"""What a simulated provider is like: its limits, what it says of them, its pace and its troubles.

Every time in a profile is in seconds since the provider started; every rate of trouble is a probability per call.
A profile is a value: it holds no state and no chance, so one profile and one seed always make the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

Period = tuple[float, float]  # from, until (not included)
ALWAYS: Period = (0.0, inf)


class Style(Enum):
    """How a provider speaks of its limits: headers on every answer, and the body of a refusal."""

    OPENAI = "openai"  # x-ratelimit-*, resets as Go durations
    AZURE = "azure"  # the same names, resets in bare milliseconds, -1 where there is no limit
    ANTHROPIC = "anthropic"  # anthropic-ratelimit-*, resets as dates, retry-after even on success
    GROQ = "groq"  # as OpenAI, but requests are those of the day
    NONE = "none"  # no header at all; overload is told as vLLM does


@dataclass(frozen=True, slots=True)
class Change:
    """From `at` on the limits are `factor` times the configured ones (not of the ones before) and told in `style`."""

    at: float
    factor: float = 1.0
    style: Style | None = None  # None: as before


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A provider to simulate. The default is one without limits, at the pace of a small hosted model."""

    # Limits. None: no such limit; 0: nothing is ever admitted.
    requests_per_minute: float | None = None
    requests_burst: float | None = None  # capacity of the bucket; None: the whole minute's limit
    tokens_per_minute: float | None = None
    tokens_burst: float | None = None
    requests_per_day: float | None = None  # always a bucket of the whole day's limit
    window_seconds: float | None = None  # fixed windows with a quota each, in place of the minute's buckets
    concurrency: int | None = None  # calls in flight; one more is refused as overload
    changes: tuple[Change, ...] = ()  # in order of time
    charge_refused: bool = False  # a call refused for a limit draws from all of them too, down to nothing

    # The tokens charged at admission: (characters / 4 + weight * max_tokens) * factor * uniform(1 - noise, 1 + noise).
    max_tokens_weight: float = 0.0
    charge_factor: float = 1.0
    charge_noise: float = 0.0

    # Other clients of the same account: a Poisson stream, each call with exponentially many tokens. They take their
    # share first, so it should be less than the limits.
    cross_requests_per_minute: float = 0.0
    cross_tokens: float = 0.0  # mean of one call

    # What it says.
    style: Style = Style.OPENAI
    retry_after: bool = True  # whether a refusal says when to come back
    remaining_stuck: bool = False  # `remaining` is always the limit, as if nothing had been used
    lies: tuple[tuple[str, str], ...] = ()  # header -> text, in place of the true value wherever that header is sent

    # Pace. Lognormal by median and sigma; sigma 0 is a constant.
    first_token_seconds: float = 0.4
    first_token_sigma: float = 0.3
    prompt_tokens_per_second: float = inf  # reading the prompt adds to the time to the first token
    tokens_per_second: float = 80.0  # of one stream
    output_tokens: float = 60.0  # mean; a call's max_tokens caps it
    output_sigma: float = 0.3
    knee: int | None = None  # past so many in flight all times grow in proportion to those in flight (one GPU, shared)
    speed: float = 1.0  # all these times are divided by it; limits keep real time
    chunk_tokens: int = 1  # tokens in one streamed chunk

    # Trouble. Periods are switches as well: `provider.outage = ALWAYS`.
    outage: Period | None = None  # everything is answered `error_status`
    out_of_money: Period | None = None  # everything is refused as insufficient_quota
    slow_down: Period | None = None  # everything is refused as slow_down
    error_rate: float = 0.0  # `error_status` before the first byte
    error_status: int = 500
    reset_rate: float = 0.0  # the connection is reset before the first byte
    stall_rate: float = 0.0  # silence for `stall_seconds` in the middle, then the rest
    stall_seconds: float = 3600.0
    cut_rate: float = 0.0  # ends cleanly in the middle, without its closing mark
    abort_rate: float = 0.0  # the connection breaks in the middle
    error_event_rate: float = 0.0  # an error told in the middle of the stream

    # Only for the HTTP server.
    models: tuple[str, ...] = ()  # empty: whatever is asked for
    keys: tuple[str, ...] | None = ()  # empty: any key, but not none; None: nobody is asked for one
    embedding_dimensions: int = 256  # where the call does not say

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "requests_per_day", "concurrency"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < inf:
                raise ValueError(f"{name} must be >= 0 and finite, or None for no limit, is {value:g}")
        if any(burst is not None and not 0 < burst < inf for burst in (self.requests_burst, self.tokens_burst)):
            raise ValueError("requests_burst and tokens_burst must be > 0 and finite")
        if self.trouble_rate > 1:
            raise ValueError(f"the rates of trouble must sum to at most 1, they sum to {self.trouble_rate:g}")
        if any(later.at < earlier.at for earlier, later in zip(self.changes, self.changes[1:], strict=False)):
            raise ValueError("changes must be in order of time")
        if any(change.factor < 0 for change in self.changes):
            raise ValueError("the factor of a change must be >= 0")
        if self.window_seconds is not None and self.window_seconds <= 0:
            raise ValueError(f"window_seconds must be > 0, is {self.window_seconds:g}")
        if self.speed <= 0 or self.tokens_per_second <= 0 or self.prompt_tokens_per_second <= 0:
            raise ValueError("speed, tokens_per_second and prompt_tokens_per_second must be > 0 (infinity is allowed)")
        if self.chunk_tokens < 1 or (self.knee is not None and self.knee < 1):
            raise ValueError("chunk_tokens and knee must be >= 1")

    @property
    def trouble_rate(self) -> float:
        return (
            self.error_rate
            + self.reset_rate
            + self.stall_rate
            + self.cut_rate
            + self.abort_rate
            + self.error_event_rate
        )
