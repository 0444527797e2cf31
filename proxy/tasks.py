"""The one way to start a background task: named, supervised, ended by who started it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

log = logging.getLogger("penstock.tasks")


class Tasks:
    """The background tasks of one owner.

    A task that dies of an exception is logged with its name, never lost silently.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, name: str, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s died", task.get_name(), exc_info=error)

    async def stop(self) -> None:
        """Cancel all that still run and wait until they have ended."""
        while running := list(self._running):  # what they start at their end is stopped as well
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def __len__(self) -> int:
        return len(self._running)
