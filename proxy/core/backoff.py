"""How long to leave an upstream alone after it failed."""

from __future__ import annotations


def delay(attempt: int, draw: float, *, base: float, cap: float, retry_after: float | None) -> float:
    """Seconds to wait before the next attempt.

    Full jitter: uniform in [0, min(cap, base * 2**attempt)), never less than what the upstream asked for.

    Args:
        attempt: failures so far less one, >= 0.
        draw: the random draw, in [0, 1).
        base, cap: seconds, 0 < base <= cap.
        retry_after: seconds from the upstream's header, or None; may exceed `cap`.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    ceiling = min(cap, base * 2.0 ** min(attempt, 60))
    return max(draw * ceiling, retry_after or 0.0)


def spread(seconds: float, draw: float) -> float:
    """`seconds` moved by up to 20 % either way, so that clients told to come back do not come together."""
    return seconds * (0.8 + 0.4 * draw)
