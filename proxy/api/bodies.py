"""The bodies that are held in memory, all calls' together: a large one is read when there is room for it.

1. All are counted, from before they are read until their call has ended.
2. A small one is never refused, and never waits.
3. A large one waits its turn, unread, so that its client waits with it; at the call's deadline it is refused.
4. One whose length is not told is counted as it comes, and refused where it would not fit: half of it is held already,
   and of those that wait holding some, none might ever end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from proxy.errors import BodiesFull

SMALL = 64 << 10  # bytes; of ten thousand such bodies, all waiting, 640 MiB


_Waiter = tuple[int, int, "asyncio.Future[None]"]  # its size, the budget, its turn


class Bodies:
    """
    Attributes:
        held: bytes, of all bodies together.
    """

    def __init__(self) -> None:
        self.held = 0
        self._waiting: deque[_Waiter] = deque()

    async def take(self, size: int, budget: int, seconds: float) -> None:
        """Count a body that is about to be read, once there is room for it.

        Args:
            budget: for all bodies, in bytes.
            seconds: the longest that it may wait.

        Raises:
            BodiesFull: there was none in time; nothing was counted.
        """
        if size <= SMALL or (not self._waiting and self.held + size <= budget):
            self.held += size
            return
        waiter = (size, budget, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter[2]
        except TimeoutError:
            self._leave_queue(waiter)
            raise _full() from None
        except asyncio.CancelledError:
            self._leave_queue(waiter)
            raise

    def grow(self, size: int, grown: int, budget: int) -> None:
        """Count `size` more bytes of a body that has `grown` so far.

        Raises:
            BodiesFull: there is no room for them; they were not counted.
        """
        if grown + size > SMALL and self.held + size > budget:
            raise _full()
        self.held += size

    def leave(self, size: int) -> None:
        """So many bytes are held no more."""
        self.held -= size
        if self._waiting:
            self._let_in()

    def _leave_queue(self, waiter: _Waiter) -> None:
        """It waits no more; if its turn had come all the same, that is another's now."""
        size, _, turn = waiter
        if not turn.cancelled():
            self.held -= size
        with suppress(ValueError):
            self._waiting.remove(waiter)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            size, budget, turn = self._waiting[0]
            if self.held + size > budget:
                break
            self._waiting.popleft()
            if not turn.done():
                self.held += size
                turn.set_result(None)


def _full() -> BodiesFull:
    return BodiesFull(
        "the bodies of other calls leave no room for this one; ask again soon, or send less", retry_after=1.0
    )
