"""The store's twin in memory: what `Store` means, without a disk. For tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from proxy.batches.store import Item, Page, Swept
from proxy.core import batch as rules
from proxy.core.batch import Batch, File, Line, Result, Status

Row = TypeVar("Row", File, Batch)


@dataclass(slots=True)
class _Line:
    said: Line
    state: str = "queued"
    attempt: int = 0
    until: float = 0.0
    output: bytes | None = None
    steps: dict[str, bytes] = field(default_factory=dict)


class MemoryStore:
    """See `proxy.batches.store.Store`."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._batches: dict[str, Batch] = {}
        self._lines: dict[str, dict[int, _Line]] = {}
        self._told: set[str] = set()  # batches

    async def add_file(self, file: File) -> None:
        self._files[file.id] = file

    async def file(self, owner: str, file_id: str) -> File | None:
        return _owned(self._files.get(file_id), owner)

    async def files(self, owner: str, page: Page, purpose: str = "") -> list[File]:
        return _page(self._files, page, lambda file: file.owner == owner and purpose in ("", file.purpose))

    async def remove_file(self, owner: str, file_id: str) -> bool:
        if (file := await self.file(owner, file_id)) is None:
            return False
        self._remove(file)
        return True

    def _remove(self, file: File) -> None:
        del self._files[file.id]
        if (batch := self._batches.get(file.batch)) is not None:
            state = "done" if file.id == batch.output_file_id else "failed"
            for line in self._lines[batch.id].values():
                if line.state == state:
                    line.output = None

    async def needed(self) -> set[str]:
        inputs = {batch.input_file_id for batch in self._batches.values() if not batch.status.is_final}
        return inputs | {file.id for file in self._files.values() if not file.batch}

    async def create(self, batch: Batch) -> None:
        self._batches[batch.id], self._lines[batch.id] = batch, {}

    async def batch(self, owner: str, batch_id: str) -> Batch | None:
        return _owned(self._batches.get(batch_id), owner)

    async def batches(self, owner: str, page: Page) -> list[Batch]:
        return _page(self._batches, page, lambda batch: batch.owner == owner)

    async def open_batches(self) -> list[Batch]:
        return [batch for batch in self._batches.values() if not batch.status.is_final]

    async def fill(self, batch_id: str, lines: Sequence[Line]) -> None:
        for line in lines:
            self._lines[batch_id].setdefault(line.number, _Line(line))

    async def move(self, batch_id: str, status: Status, now: float, **changes: object) -> Batch:
        batch = msgspec.structs.replace(rules.moved(self._batches[batch_id], status, now), **changes)
        self._batches[batch_id] = batch
        return batch

    async def note(self, batch_id: str, **changes: object) -> Batch:
        batch = self._batches[batch_id] = msgspec.structs.replace(self._batches[batch_id], **changes)
        return batch

    async def unended(self, batch_id: str) -> list[tuple[int, str]]:
        lines = sorted(self._lines[batch_id].items())
        return [(number, line.said.custom_id) for number, line in lines if line.state in ("queued", "claimed")]

    async def adopt(self, batch_id: str, results: Sequence[tuple[int, Result]], now: float) -> int:
        open_lines = dict(await self.unended(batch_id))
        for number, result in results:
            if open_lines.pop(number, None) is not None:
                self._ended(batch_id, self._lines[batch_id][number], result, now)
        batch = self._batches[batch_id] = rules.finalized(self._batches[batch_id], now)
        return batch.pending

    async def remove(self, batch_id: str) -> None:
        if (batch := self._batches.get(batch_id)) is not None:
            self._forget(batch)

    async def untold(self) -> list[Batch]:
        return [batch for batch in self._batches.values() if batch.status.is_final and batch.id not in self._told]

    async def mark_told(self, batch_id: str) -> None:
        self._told.add(batch_id)

    async def claim(self, batch_id: str, most: int, until: float) -> list[Item]:
        if self._batches[batch_id].status is not Status.IN_PROGRESS:
            return []
        queued = [line for _, line in sorted(self._lines[batch_id].items()) if line.state == "queued"]
        for line in queued[:most]:
            line.state, line.attempt, line.until = "claimed", line.attempt + 1, until
        return [
            Item(batch_id, said.number, line.attempt, said.start, said.length, said.custom_id)
            for line in queued[:most]
            for said in (line.said,)
        ]

    async def renew(self, items: Sequence[Item], until: float) -> None:
        for line in filter(None, map(self._claimed, items)):
            line.until = until

    async def release(self, items: Sequence[Item]) -> None:
        for line in filter(None, map(self._claimed, items)):
            line.state = "queued"

    async def keep_step(self, item: Item, step: str, gave: bytes) -> None:
        if (line := self._claimed(item)) is not None:
            line.steps[step] = gave

    async def steps(self, item: Item) -> dict[str, bytes]:
        return dict(self._lines[item.batch][item.line].steps)

    async def finish(self, item: Item, result: Result, now: float) -> int | None:
        if (line := self._claimed(item)) is None:
            return None
        batch = self._batches[item.batch] = rules.finalized(self._ended(item.batch, line, result, now), now)
        return batch.pending

    def _ended(self, batch_id: str, line: _Line, result: Result, now: float) -> Batch:
        line.state, line.output = "done" if result.is_done else "failed", result.line
        line.steps.clear()
        batch = self._batches[batch_id] = rules.counted(self._batches[batch_id], result)
        file_id = batch.output_file_id if result.is_done else batch.error_file_id
        if (file := self._files.get(file_id)) is None:
            self._files[file_id] = rules.results_file(batch, done=result.is_done, size=len(result.line), now=now)
        else:
            self._files[file_id] = msgspec.structs.replace(file, bytes=file.bytes + len(result.line))
        return batch

    async def close(self, batch_id: str, status: Status, now: float) -> Batch:
        batch = rules.moved(self._batches[batch_id], status, now)
        self._batches[batch_id] = batch
        left = await self.unended(batch_id)
        for number, custom_id in left:
            self._ended(batch_id, self._lines[batch_id][number], rules.unrun(batch, number, custom_id), now)
        for file in list(self._files.values()):
            if file.batch == batch_id and batch.output_seconds is not None:
                self._files[file.id] = msgspec.structs.replace(file, expires_at=int(now) + batch.output_seconds)
        batch = self._batches[batch_id]
        total = batch.completed + batch.failed
        batch = self._batches[batch_id] = msgspec.structs.replace(batch, total=total, unrun=len(left))
        return batch

    async def lines(self, batch_id: str, *, done: bool, after: int, most_bytes: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for number, line in sorted(self._lines[batch_id].items()):
            if number > after and line.state == ("done" if done else "failed") and line.output is not None:
                found.append((number, line.output))
                if (most_bytes := most_bytes - len(line.output)) <= 0:
                    break
        return found

    async def sweep(self, now: float, *, keep_seconds: float) -> Swept:
        claims = [
            line
            for lines in self._lines.values()
            for line in lines.values()
            if line.state == "claimed" and line.until <= now
        ]
        files = [file for file in self._files.values() if file.expires_at is not None and file.expires_at <= now]
        old = now - keep_seconds
        batches = [batch for batch in self._batches.values() if batch.status.is_final and batch.ended_at <= old]
        for line in claims:
            line.state = "queued"
        for file in files:
            self._remove(file)
        for batch in batches:
            self._forget(batch)
        return Swept(len(claims), len(files), len(batches))

    def _forget(self, batch: Batch) -> None:
        del self._batches[batch.id], self._lines[batch.id]
        self._told.discard(batch.id)
        for file_id in (batch.output_file_id, batch.error_file_id):
            self._files.pop(file_id, None)

    async def aclose(self) -> None:
        """There is nothing to close."""

    def _claimed(self, item: Item) -> _Line | None:
        line = self._lines.get(item.batch, {}).get(item.line)
        return line if line is not None and line.state == "claimed" and line.attempt == item.attempt else None


def _owned(row: Row | None, owner: str) -> Row | None:
    return row if row is not None and row.owner == owner else None


def _page(rows: dict[str, Row], page: Page, wanted: Callable[[Row], bool]) -> list[Row]:
    found = [row for row in rows.values() if wanted(row)]
    if page.newest_first:
        found.reverse()
    if page.after:
        place = next((at for at, row in enumerate(found) if row.id == page.after), len(found))
        found = found[place + 1 :]
    return found[: page.limit]
