"""How many items of one caller and model stand before the gate: few, however many there are.

1. Between `AHEAD / 2` and `AHEAD` items wait to be let in, so the gate never starves and never holds a whole batch;
   what is in flight is bounded by the gate itself. Where there are many lanes each has fewer, and at least one.
2. Several batches of a lane take turns.
3. After a refusal that all others would meet as well (money, a credential, no connection) the lane is paused: one item
   at a time probes, and the first that is answered ends the pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

AHEAD = 32  # at 10 ms for a claim, 3,000 items a second
AHEAD_OF_ALL = 1024  # that all lanes together have before the gate, as long as there are fewer lanes
PAUSE_SECONDS = (5.0, 60.0)  # before the first probe, and at most before any
BREATH_SECONDS = 1.0  # after a refusal at the gate


@dataclass(slots=True, frozen=True)
class Pause:
    """
    Attributes:
        reason: money, auth, connect, failing, unnamed or model_not_found.
        since: seconds since the epoch.
    """

    reason: str
    message: str
    since: float


class Lane:
    """
    Args:
        now: the monotonic clock.
        ahead: most items that may wait now, >= 1.

    Attributes:
        pause: why nothing but a probe is sent; None: all goes on.
    """

    def __init__(self, now: Callable[[], float], ahead: Callable[[], int]) -> None:
        self._now, self._most = now, ahead
        self._ahead = 0
        self._probing = False
        self._until = 0.0  # nothing is taken before then
        self._next_seconds = PAUSE_SECONDS[0]
        self._turn = asyncio.Lock()
        self._moved = asyncio.Event()
        self.pause: Pause | None = None

    async def room(self) -> int:
        """Wait until there is room, and take it: places for so many items, each to be left by `leave`."""
        async with self._turn:
            while not (room := self._room()):
                self._moved.clear()
                if (seconds := self._until - self._now()) > 0.0:
                    await asyncio.sleep(seconds)
                else:
                    await self._moved.wait()
            self._ahead += room
            self._probing = self.pause is not None
            return room

    def _room(self) -> int:
        if self._now() < self._until:
            return 0
        if self.pause is not None:
            return 0 if self._probing else 1
        most = self._most()
        return 0 if self._ahead > most // 2 else most - self._ahead

    def leave(self) -> None:
        """An item waits no longer."""
        self._ahead -= 1
        self._moved.set()

    def give_back(self, places: int) -> None:
        """So many places were not used."""
        self._ahead -= places
        if places:
            self.given_up()

    def given_up(self) -> None:
        """An item was taken away before anything was known: if it was the probe, another one may go."""
        self._probing = False
        self._moved.set()

    def answered(self) -> None:
        """The upstream answers."""
        self.pause, self._probing = None, False
        self._next_seconds = PAUSE_SECONDS[0]
        self._moved.set()

    def breathe(self, seconds: float | None) -> None:
        """An item is to be run again; the next ones are asked so much later, 0.0: at once, None: nobody said."""
        wanted = BREATH_SECONDS if seconds is None else seconds
        self._until = max(self._until, self._now() + min(wanted, PAUSE_SECONDS[1]))
        self.given_up()

    def stop(self, pause: Pause, seconds: float | None) -> None:
        """Send a probe in so many seconds, and nothing else; by itself after 5, 10, 20, ... s."""
        if self.pause is None or self._probing:
            wanted = self._next_seconds if seconds is None else seconds
            self._until = max(self._until, self._now() + min(wanted, PAUSE_SECONDS[1]))
            self._next_seconds = min(2 * self._next_seconds, PAUSE_SECONDS[1])
        self.pause, self._probing = self.pause or pause, False
        self._moved.set()
