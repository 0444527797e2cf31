"""What is read at a scrape from the things themselves, as they stand at that moment, so that it cannot drift."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from proxy.core.learner import Limit, Snapshot, Source


@dataclass(frozen=True, slots=True)
class GateLevel:
    """A gate.

    Attributes:
        name: process, pool/<name>, upstream/<name>, model/<name>, or <upstream>/<model>.
        limit: places; may be infinite.
        waiting: calls, by priority.
        queue_limit: None: it has no queue of its own.
        bounds: least and most places its limit may come to; None: the limit is fixed.
        held_seconds, queued_seconds, full_seconds: for how long, ever, each of its places was held, each call waited
            for it, and none of its places was left.
    """

    name: str
    limit: float
    in_use: int
    waiting: Mapping[str, int]
    queue_limit: int | None = None
    bounds: tuple[float, float] | None = None
    held_seconds: float = 0.0
    queued_seconds: float = 0.0
    full_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ConnectionLevel:
    """The connections to one upstream; `limit` is 0 where there is no bound.

    Attributes:
        opened, acquired: how many were ever made, and how often an attempt was given one.
    """

    upstream: str
    active: int
    idle: int
    limit: int
    opened: int
    acquired: int


@dataclass(frozen=True, slots=True)
class AccountLevel:
    """What is known of an upstream's limits for one configured model."""

    upstream: str
    model: str
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class BatchLevel:
    """The batches that have not ended.

    Attributes:
        jobs: how many, by state.
        pending: items that have not ended.
        oldest: when the oldest batch with such an item was made, seconds since the epoch; None: there is none.
    """

    jobs: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0
    oldest: float | None = None


@dataclass(frozen=True, slots=True)
class Levels:
    gates: Iterable[GateLevel] = ()
    connections: Iterable[ConnectionLevel] = ()
    accounts: Iterable[AccountLevel] = ()
    batches: BatchLevel = field(default_factory=BatchLevel)


@dataclass(frozen=True, slots=True)
class Headroom:
    """What an upstream still lets through, of one kind.

    Attributes:
        limit: the whole of it; of a minute, unless more can be left.
        remaining: now, >= 0.
        full_seconds: until all of it is there again; None: not known.
    """

    upstream: str
    model: str
    kind: str
    limit: float
    remaining: float
    full_seconds: float | None


def headroom(accounts: Iterable[AccountLevel]) -> Iterator[Headroom]:
    """What is left of the limits that the providers' headers or refusals taught.

    Of several limits of one kind, and of several accounts of one model (those behind a wildcard), the scarcest is told.
    """
    scarcest: dict[tuple[str, str, str], Limit] = {}
    for account in accounts:
        for limit in account.snapshot.limits:
            if limit.source is Source.CONFIGURED:
                continue
            key = (account.upstream, account.model, limit.kind.value)
            if key not in scarcest or _share(limit) < _share(scarcest[key]):
                scarcest[key] = limit
    for (upstream, model, kind), limit in scarcest.items():
        per_second = limit.per_minute / 60.0
        full = None
        if limit.burst is not None and per_second > 0.0:
            full = max(0.0, limit.burst - limit.level) / per_second
        yield Headroom(upstream, model, kind, _whole(limit), max(0.0, limit.level), full)


def holds(accounts: Iterable[AccountLevel]) -> dict[str, float]:
    """Seconds for which each upstream is left alone, the longest of its models; those that are not are left out."""
    longest: dict[str, float] = {}
    for account in accounts:
        if (seconds := account.snapshot.hold_seconds) > longest.get(account.upstream, 0.0):
            longest[account.upstream] = seconds
    return longest


def _whole(limit: Limit) -> float:
    return max(limit.per_minute, limit.burst or 0.0)


def _share(limit: Limit) -> float:
    whole = _whole(limit)
    return limit.level / whole if whole > 0.0 else 0.0
