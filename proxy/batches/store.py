"""What a store of batches can do: few verbs, each one commit. `sqlite` is the one that lasts, `memory` its twin.

Rules
-----
1. A verb that has returned is durable; one that has raised has changed nothing.
2. An item is queued, claimed, done or failed. A claim has a number, and lasts until a time; `finish` takes a result
   only under the number that is in force, so an item ends once, whoever runs it again.
3. Result, state and counts are one commit. With the last of them the batch is finalizing.
4. An open batch needs the bytes of its input, even when their file has been deleted.
5. What has an owner is found only by its owner.
6. That the end of a batch is to be told is in the commit of that end.
7. What a pipeline's steps gave is kept with their item until that has ended, so that nobody pays for them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.core.batch import Batch, File, Line, Result, Status


@dataclass(slots=True, frozen=True)
class Item:
    """A claim of one line.

    Attributes:
        attempt: its number, from 1; how often the line has been claimed.
        start, length: where the line stands in the input, in bytes.
    """

    batch: str
    line: int
    attempt: int
    start: int
    length: int
    custom_id: str


@dataclass(slots=True, frozen=True)
class Page:
    """A part of a list: at most `limit` of those behind `after`, an id; "" begins at the first."""

    after: str = ""
    limit: int = 100
    newest_first: bool = True


@dataclass(slots=True, frozen=True)
class Swept:
    """How many claims were given up, and how many files and batches are gone."""

    claims: int = 0
    files: int = 0
    batches: int = 0


class Store(Protocol):
    """
    Raises, all of it: StateUnavailable where nothing can be written now, for want of room or because another one holds
    the file; rule 1 holds.
    """

    async def add_file(self, file: File) -> None: ...

    async def file(self, owner: str, file_id: str) -> File | None: ...

    async def files(self, owner: str, page: Page, purpose: str = "") -> list[File]:
        """Those of a purpose, "" for any. Behind an `after` that is unknown there is nothing."""
        ...

    async def remove_file(self, owner: str, file_id: str) -> bool:
        """Whether there was one. With a file of results, the lines it holds are gone."""
        ...

    async def needed(self) -> set[str]:
        """Ids of the files whose bytes are needed (rule 4)."""
        ...

    async def create(self, batch: Batch) -> None: ...

    async def batch(self, owner: str, batch_id: str) -> Batch | None: ...

    async def batches(self, owner: str, page: Page) -> list[Batch]: ...

    async def open_batches(self) -> list[Batch]:
        """Of all owners, those that are not in a final state, the oldest first."""
        ...

    async def fill(self, batch_id: str, lines: Sequence[Line]) -> None:
        """Queue lines of a batch that is validating. The same line again changes nothing."""
        ...

    async def move(self, batch_id: str, status: Status, now: float, **changes: object) -> Batch:
        """Bring a batch into another state, with these fields of it changed.

        Raises:
            NotPossible: its state does not allow it.
        """
        ...

    async def note(self, batch_id: str, **changes: object) -> Batch:
        """Change these fields of a batch; its state stays what it is."""
        ...

    async def unended(self, batch_id: str) -> list[tuple[int, str]]:
        """Line and custom_id of each item that has not ended, in their order."""
        ...

    async def adopt(self, batch_id: str, results: Sequence[tuple[int, Result]], now: float) -> int:
        """Results that were made elsewhere, by line. An item that has ended stays as it is. How many have not."""
        ...

    async def claim(self, batch_id: str, most: int, until: float) -> list[Item]:
        """Take up to `most` of the queued items of a batch that is in progress, in the order of their lines."""
        ...

    async def renew(self, items: Sequence[Item], until: float) -> None:
        """Hold claims for longer; those not in force any more are left as they are."""
        ...

    async def release(self, items: Sequence[Item]) -> None:
        """Give claims back: their items are queued again."""
        ...

    async def keep_step(self, item: Item, step: str, gave: bytes) -> None:
        """A step of an item has ended; nothing is kept where the claim is not in force."""
        ...

    async def steps(self, item: Item) -> dict[str, bytes]:
        """What was kept of an item's steps, under any claim."""
        ...

    async def finish(self, item: Item, result: Result, now: float) -> int | None:
        """An item has ended. How many of its batch have not; None: the claim was not in force, nothing has changed."""
        ...

    async def close(self, batch_id: str, status: Status, now: float) -> Batch:
        """Bring a batch into a final state that keeps its results. Items that have not ended fail, with that reason.

        Raises:
            NotPossible: its state does not allow it.
        """
        ...

    async def remove(self, batch_id: str) -> None:
        """A batch that has ended, with its results; of one that is gone there is nothing to do."""
        ...

    async def untold(self) -> list[Batch]:
        """Batches that have ended, and whose end nobody was told of, in the order of their making."""
        ...

    async def mark_told(self, batch_id: str) -> None:
        """Whoever is to know of its end does."""
        ...

    async def lines(self, batch_id: str, *, done: bool, after: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """Results in the order of the input, from behind line `after`, as many as come to `most_bytes`, at least one;
        none: there are no more."""
        ...

    async def sweep(self, now: float, *, keep_seconds: float) -> Swept:
        """Give up claims whose time is over; remove files that have expired, and batches that ended so long ago."""
        ...

    async def aclose(self) -> None:
        """What was asked for before is done; nothing may be asked for after."""
        ...
