"""Lines to a file descriptor, from a thread of their own.

The event loop never waits for the descriptor: what the queue cannot hold, or the descriptor does not take, is dropped
and counted.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from threading import Condition, Thread

LINES_MAX = 10_000  # waiting; some 6 MB, and seconds of a busy gateway
_GATHER_SECONDS = 0.05  # lines are written together; waking the thread for each would cost more than the line


class Writer:
    """Writes lines to a descriptor from a thread of its own.

    Args:
        fd: where to; it stays open.
        dropped: called as dropped(reason, count), from either thread.
        lines_max: how many may wait.
    """

    def __init__(self, fd: int, dropped: Callable[[str, int], None], *, lines_max: int = LINES_MAX) -> None:
        self._fd = fd
        self._dropped = dropped
        self._lines_max = lines_max
        self._changed = Condition()  # guards all below
        self._lines: list[bytes] = []
        self._writing = False
        self._hurried = False
        self._closed = False
        Thread(target=self._run, name="log-writer", daemon=True).start()

    def take(self, *lines: bytes) -> None:
        """Write `lines`, each of which ends in its line feed, some time soon; or drop what there is no room for."""
        with self._changed:
            room = 0 if self._closed else self._lines_max - len(self._lines)
            if len(lines) > room:
                self._dropped("shutdown" if self._closed else "queue_full", len(lines) - room)
            if room > 0 and lines:
                if not self._lines:
                    self._changed.notify_all()
                self._lines += lines[:room]

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until all lines are written; False if the deadline came first."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._lines and not self._writing, deadline_seconds)
            self._hurried = False
            return done

    def close(self) -> None:
        """Take no more; what waits is still written. Returns at once: what blocks, blocks only the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while lines := self._gather():
            self._write(b"".join(lines))
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _gather(self) -> list[bytes]:
        """The lines to write next; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            self._changed.wait_for(lambda: self._hurried or self._closed, _GATHER_SECONDS)
            lines, self._lines = self._lines, []
            self._writing = bool(lines)
            return lines

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # nobody reads any longer, or the disk is full
                self._dropped("write_failed", bytes(rest).count(b"\n"))
                return
