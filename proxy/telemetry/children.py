"""Plain numbers by label values: what a family's series are made of.

1. A family's children stand in a dict keyed by their label values. A hit costs a lookup and an addition; children that
   are always written together are found by one lookup (`Bundles`).
2. Only a miss looks at the bounds: a value outside them is replaced by `other`, and the child of *that* tuple is
   counted. What is not within the bounds is never stored, so no request can make a series.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

from proxy.telemetry.catalogue import NONE, OTHER, Configured, Family

Key = tuple[str, ...]

_FALLBACKS = frozenset({OTHER, NONE})


class Count:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


@dataclass(frozen=True, slots=True)
class Exemplar:
    trace_id: str
    value: float
    time: float  # seconds since the epoch


class Histogram:
    """Observations by bucket; `counts` has one more than `bounds`, for what exceeds them all.

    An observation is only noted, by one call into C; `fold` sorts what was noted into the buckets, all at once.
    """

    __slots__ = ("_noted", "bounds", "counts", "exemplars", "observe", "observe_all", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.exemplars: dict[int, Exemplar] = {}  # by bucket, the last one each
        self._noted: list[float] = []
        self.observe = self._noted.append
        self.observe_all = self._noted.extend

    def fold(self) -> None:
        noted, counts = self._noted, self.counts
        if not noted:
            return
        noted.sort()
        below = 0
        for bucket, bound in enumerate(self.bounds):
            if below == len(noted):
                break
            within = bisect_right(noted, bound, below)
            counts[bucket] += within - below
            below = within
        counts[-1] += len(noted) - below
        self.sum += sum(noted)
        noted.clear()

    def exemplify(self, exemplar: Exemplar) -> None:
        self.exemplars[bisect_left(self.bounds, exemplar.value)] = exemplar


Child = TypeVar("Child", Count, Histogram)


class Children(dict[Key, Child], Generic[Child]):
    """The children of one family: `children[key]` is the child of these label values, or of the allowed ones nearest.

    A plain dict to whoever knows the key. `bound` comes before anything else.
    """

    def __init__(self, family: Family, born: Callable[[], Child], overflow: Callable[[str], None]) -> None:
        super().__init__()
        self._family = family
        self._born: Callable[[], Child] = born
        self._overflow = overflow
        self._allowed: tuple[frozenset[str], ...] = ()

    def bound(self, names: Mapping[str, tuple[str, ...]]) -> None:
        """Take these configured names as the bounds; drop the children of names that are gone."""
        values = [names[said.field] if isinstance(said, Configured) else said for said in self._family.labels.values()]
        self._allowed = tuple(frozenset(known) | _FALLBACKS for known in values)
        for key in [key for key in self if key != self._clamped(key)]:
            del self[key]
        if self._family.zeroed:
            for key in product(*values):
                self.setdefault(key, self._born())

    def is_within(self, key: Key) -> bool:
        """Whether these label values stand for themselves."""
        return key == self._clamped(key)

    def _clamped(self, key: Key) -> Key:
        return tuple(value if value in allowed else OTHER for value, allowed in zip(key, self._allowed, strict=True))

    def __missing__(self, key: Key) -> Child:
        clamped = self._clamped(key)
        for label, value, taken in zip(self._family.labels, key, clamped, strict=True):
            if value != taken:
                self._overflow(label)
        return self.setdefault(clamped, self._born())

    def snapshot(self) -> Iterator[tuple[Key, Child]]:
        return iter(self.copy().items())


Bundle = TypeVar("Bundle")


class Bundles(dict[Key, Bundle], Generic[Bundle]):
    """Children that are always written together, by the label values that they have in common.

    What is outside the bounds is gathered anew each time, and so counted as overflow each time.

    Args:
        gather: finds the children for a key's values.
        is_within: whether a key may be kept.
    """

    def __init__(self, gather: Callable[..., Bundle], is_within: Callable[[Key], bool]) -> None:
        super().__init__()
        self._gather: Callable[..., Bundle] = gather
        self._is_within = is_within

    def __missing__(self, key: Key) -> Bundle:
        bundle = self._gather(*key)
        if self._is_within(key):
            self[key] = bundle
        return bundle
