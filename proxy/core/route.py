"""Which upstream next, and how often."""

from __future__ import annotations

from typing import Generic, TypeVar

Target = TypeVar("Target")

PACED_LIMIT = 20  # refusals by a limit that one call lives through; with a provider that keeps its word, one is rare


class Tries(Generic[Target]):
    """The tries of one call.

    A target that failed is left alone while there is one that was not tried; after all have failed, all are asked again
    in their order. A refusal by a limit is no failure: the limit says when to come back, and the call keeps its turn.

    Args:
        targets: best first, at least one.
        attempts: how many may fail, >= 1.

    Attributes:
        targets: those to ask next.
        failures: attempts that failed so far.
    """

    __slots__ = ("_all", "_attempts", "_refusals", "failures", "targets")

    def __init__(self, targets: tuple[Target, ...], attempts: int) -> None:
        self._all = self.targets = targets
        self._attempts = attempts
        self._refusals = 0
        self.failures = 0

    def refused(self) -> bool:
        """A limit refused. Returns whether the call may ask again."""
        self._refusals += 1
        return self._refusals <= PACED_LIMIT

    def failed(self, target: Target) -> bool:
        """`target` failed. Returns whether the call may ask again."""
        self.failures += 1
        self.targets = tuple(other for other in self.targets if other is not target) or self._all
        return self.failures < self._attempts

    @property
    def is_fresh(self) -> bool:
        """Whether the next target has not failed this call yet: there is no reason to pause."""
        return self.failures < len(self._all) and self.targets is not self._all
