"""What is known of every limit, for people: what was learned, from what, since when, the level now, who waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proxy.core.breaker import Breaker
from proxy.core.gate import Level, Priority
from proxy.core.learner import Limit
from proxy.core.pool import Pool


def report(
    pools: Iterable[Pool], levels: Iterable[Level], breakers: Mapping[str, Breaker], now: float
) -> dict[str, list[dict[str, Any]]]:
    """One entry in `limits` for each pool, one in `upstreams` for each upstream that was ever asked.

    Args:
        levels: of the same pools, by label; those who wait are counted there.
        breakers: by upstream.

    Returns:
        JSON values. Rates are per minute, `level` is what may be sent at once, `hold_seconds` is what is left of a
        refusal's word, `known_seconds` is how long the limit has been what it is.
    """
    return {
        "limits": _pools(pools, {level.label: level.waiting for level in levels}, now),
        "upstreams": [
            {
                "upstream": name,
                "state": breaker.state(now).value,
                "reason": breaker.reason.value,
                "shut_seconds": round(breaker.shut_for(now), 3),
            }
            for name, breaker in breakers.items()
        ],
    }


def _pools(pools: Iterable[Pool], waiting: Mapping[str, Mapping[Priority, int]], now: float) -> list[dict[str, Any]]:
    return [
        {
            "pool": pool.name,
            "in_use": pool.in_use,
            "concurrency": pool.concurrency,
            "waiting": {priority.name.lower(): count for priority, count in waiting.get(pool.label, {}).items()},
            **_rates(pool, now),
        }
        for pool in pools
    ]


def _rates(pool: Pool, now: float) -> dict[str, Any]:
    if pool.rates is None:
        return {"limits": [], "hold_seconds": 0.0, "cold_calls": None}
    known = pool.rates.snapshot(now)
    return {
        "limits": [_limit(limit, now) for limit in known.limits],
        "hold_seconds": round(known.hold_seconds, 3),
        "cold_calls": known.cold_calls,
        "unanswered": known.unanswered,
        "tokens_per_second_max": known.tokens_per_second_max,
    }


def _limit(limit: Limit, now: float) -> dict[str, Any]:
    return {
        "limit": limit.name,
        "counts": limit.kind.value,
        "per_minute": round(limit.per_minute, 3),
        "burst": None if limit.burst is None else round(limit.burst, 3),
        "level": round(limit.level, 3),
        "source": limit.source.value,
        "known_seconds": None if limit.since is None else round(max(0.0, now - limit.since), 3),
        "hold_seconds": round(limit.hold_seconds, 3),
        "changes": limit.changes,
    }
