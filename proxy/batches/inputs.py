"""The bytes of uploaded files on the disk: spooled as they arrive, read by the line, removed when nobody needs them.

arriving -> written in pieces to NAME.part -> fsync -> renamed to the file's id -> its row is added -> acknowledged
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from proxy.core.batch import Input, Line
from proxy.errors import StateUnavailable

WRITE_BYTES = 1 << 20  # gathered before each trip to the disk
READ_LINES = 2_000  # checked in one go and queued in one commit; 40 ms
READ_BYTES = 1 << 20


class Inputs:
    """The directory that they are in; its functions block, but those that are coroutines."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: set[str] = set()  # renamed, and their rows not added yet

    def path(self, file_id: str) -> Path:
        return self._directory / file_id

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[Arrival]:
        """A file that arrives; unless it is kept, nothing of it stays."""
        arrival = await asyncio.to_thread(self._begin)
        try:
            yield arrival
        finally:
            self._kept.discard(arrival.kept_as)
            await asyncio.to_thread(arrival.close)

    def _begin(self) -> Arrival:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        return Arrival(self._directory, self._directory / f"{secrets.token_hex(16)}.part", self._kept)

    def lines(self, file_id: str, wanted: Sequence[tuple[int, int]]) -> list[bytes]:
        """Stretches of a file, each as start and length in bytes.

        Raises:
            OSError: it cannot be read.
        """
        with self.path(file_id).open("rb") as file:
            return [os.pread(file.fileno(), length, start) for start, length in wanted]

    def collect(self, needed: set[str]) -> int:
        """Remove what nobody needs, and what never arrived; how many that were."""
        removed = 0
        with suppress(FileNotFoundError):
            for entry in list(os.scandir(self._directory)):
                if entry.name not in needed and entry.name not in self._kept and not entry.name.endswith(".part"):
                    os.unlink(entry.path)
                    removed += 1
        return removed

    def forget_arrivals(self) -> None:
        """Remove what was arriving when the process before this one ended."""
        for part in self._directory.glob("*.part"):
            part.unlink()


class Arrival:
    """
    Attributes:
        path: where its bytes are, as long as it is not kept.
        size: bytes so far.
    """

    def __init__(self, directory: Path, path: Path, kept: set[str]) -> None:
        self._directory, self.path, self._kept = directory, path, kept
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self.size = 0
        self.kept_as = ""

    async def write(self, data: bytes) -> None:
        """Raises: StateUnavailable: there is no room."""
        self.size += len(data)
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= WRITE_BYTES:
            await asyncio.to_thread(self._flush)

    async def flush(self) -> None:
        """All of it can be read from `path`. Raises as `write` does."""
        await asyncio.to_thread(self._flush)

    async def keep(self, file_id: str) -> None:
        """On the disk for good, under this name. Raises as `write` does."""
        self._kept.add(file_id)
        self.kept_as = file_id
        await asyncio.to_thread(self._keep, file_id)

    def _flush(self) -> None:
        with _room():
            left = memoryview(b"".join(self._gathered))
            while left:
                left = left[os.write(self._file, left) :]
        self._gathered.clear()
        self._gathered_bytes = 0

    def _keep(self, file_id: str) -> None:
        self._flush()
        with _room():
            os.fsync(self._file)
            self.path.rename(self._directory / file_id)
            directory = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(directory)  # the name as well as the bytes
            finally:
                os.close(directory)

    def close(self) -> None:
        os.close(self._file)
        self.path.unlink(missing_ok=True)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        message = "there is no room where state is kept; come back when there is some"
        raise StateUnavailable(message, retry_after=5.0) from error


class Reading:
    """An uploaded file, read for the first time; all of it blocks.

    Args:
        found: takes the lines in, and notes what is wrong with them.
        line_bytes_max: of a longer line no more is read into memory.
    """

    def __init__(self, path: Path, found: Input, line_bytes_max: int) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._busy = Lock()  # who is cancelled while a thread reads closes only after it
        self._found, self._line_bytes_max = found, line_bytes_max
        self._number = self._start = 0
        self.is_over = False

    def some(self) -> list[Line]:
        """The next requests; none, where those lines are blank or wrong, or the reading was closed."""
        with self._busy:
            return [] if self.is_over else self._some()

    def _some(self) -> list[Line]:
        self._file = file = self._file or self._path.open("rb")
        lines: list[Line] = []
        until = self._start + READ_BYTES
        for _ in range(READ_LINES):
            if self._found.is_hopeless or not (text := self._line(file)):
                self.is_over = True
                self._found.close()
                break
            if (line := self._found.take(text.rstrip(b"\r\n"), self._number, self._start)) is not None:
                lines.append(line)
            self._start = file.tell()
            if self._start >= until:
                break
        return lines

    def _line(self, file: BinaryIO) -> bytes:
        self._number += 1
        text = file.readline(self._line_bytes_max + 1)
        more = text
        while more and not more.endswith(b"\n"):
            more = file.readline(READ_BYTES)
        return text

    def close(self) -> None:
        with self._busy:
            self.is_over = True
            if self._file is not None:
                self._file.close()
