"""The store in one SQLite file: written by one thread in groups, read by another.

    await verb -> queue -> writer thread: gather 5 ms -> BEGIN IMMEDIATE, all verbs, COMMIT (fsync) -> all answered

1. A group is one commit, so its disk write is shared. Nobody is answered before it; if it fails, each verb of it is
   tried by itself, so that only the one that cannot be done fails.
2. One process owns the directory, by a lock that ends with the process. So whatever is claimed when the file is opened
   was claimed by one that died, and is queued again.
3. What can be read in a `Batch` or a `File` is one JSON document in its row; the columns beside it are what is searched
   by.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import msgspec

from proxy.batches.store import Item, Page, Swept
from proxy.core import batch as rules
from proxy.core.batch import Batch, File, Line, Result, Status
from proxy.errors import StateOff, StateUnavailable

FILE = "penstock.db"
GATHER_SECONDS = 0.005  # what comes within it shares a commit
GROUP_MAX = 1000
BUSY_SECONDS = 30.0  # for which another program may hold the file, as a backup does
_QUEUED, _CLAIMED, _DONE, _FAILED = range(4)
_SCHEMA = (  # what each version added to the one before
    """
CREATE TABLE files (n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, purpose TEXT NOT NULL,
                    batch TEXT NOT NULL, expires_at INTEGER, doc BLOB NOT NULL);
CREATE INDEX files_of_owner ON files (owner, n);
CREATE INDEX files_of_batch ON files (batch) WHERE batch != '';
CREATE TABLE batches (n INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, open INTEGER NOT NULL,
                      ended_at INTEGER, doc BLOB NOT NULL);
CREATE INDEX batches_of_owner ON batches (owner, n);
CREATE INDEX batches_open ON batches (n) WHERE open;
CREATE TABLE items (batch INTEGER NOT NULL, line INTEGER NOT NULL, start INTEGER NOT NULL, length INTEGER NOT NULL,
                    custom_id TEXT NOT NULL, state INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,
                    until REAL, output BLOB, PRIMARY KEY (batch, line));
CREATE INDEX items_queued ON items (batch, line) WHERE state = 0;
CREATE INDEX items_claimed ON items (until) WHERE state = 1;
""",
    """
CREATE TABLE steps (batch INTEGER NOT NULL, line INTEGER NOT NULL, step TEXT NOT NULL, gave BLOB NOT NULL,
                    PRIMARY KEY (batch, line, step)) WITHOUT ROWID;
""",
    """
ALTER TABLE batches ADD COLUMN untold INTEGER NOT NULL DEFAULT 0;
CREATE INDEX batches_untold ON batches (n) WHERE untold;
""",
)
VERSION = len(_SCHEMA)
_ENCODE = msgspec.json.encode
_BATCH = msgspec.json.Decoder(Batch)
_FILE = msgspec.json.Decoder(File)

Answer = TypeVar("Answer")
Row = TypeVar("Row", File, Batch)
Work = Callable[[sqlite3.Connection], Any]


class SqliteStore:
    """See `proxy.batches.store.Store`. Made by `opened`, outside of the event loop."""

    def __init__(self, directory: Path, lock: int) -> None:
        self._lock = lock
        path = directory / FILE
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # its journal takes over who may read it
        self._writer = _Writer(_connected(path))
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="state-reader")
        self._reader = _connected(path)
        self._reader.execute("PRAGMA query_only = ON")

    @classmethod
    def opened(cls, directory: Path) -> SqliteStore:
        """The store in this directory, which is made where there is none.

        Raises:
            StateOff: another process owns it, it cannot be written, or it was made by a later version.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise StateOff(f"state cannot be kept: {error.strerror}; the operator can set state.path") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(directory, lock)
        except BlockingIOError as error:
            os.close(lock)
            message = "another gateway keeps its state there; the operator can give each its own state.path"
            raise StateOff(message) from error
        except (sqlite3.Error, OSError) as error:
            os.close(lock)
            raise StateOff(f"state cannot be kept: {error}; the operator can set state.path") from error
        except StateOff:
            os.close(lock)
            raise

    # ── files ──

    async def add_file(self, file: File) -> None:
        await self._write(lambda db: _add_file(db, file))

    async def file(self, owner: str, file_id: str) -> File | None:
        return await self._read(lambda db: _one_file(db, owner, file_id))

    async def files(self, owner: str, page: Page, purpose: str = "") -> list[File]:
        def read(db: sqlite3.Connection) -> list[File]:
            return list(map(_FILE.decode, _paged(db, "files", owner, page, purpose)))

        return await self._read(read)

    async def remove_file(self, owner: str, file_id: str) -> bool:
        def remove(db: sqlite3.Connection) -> bool:
            if (file := _one_file(db, owner, file_id)) is None:
                return False
            _remove_file(db, file)
            return True

        return await self._write(remove)

    async def needed(self) -> set[str]:
        def read(db: sqlite3.Connection) -> set[str]:
            inputs = {batch.input_file_id for _, batch in _open(db)}
            return inputs | {file_id for (file_id,) in db.execute("SELECT id FROM files WHERE batch = ''")}

        return await self._read(read)

    # ── batches ──

    async def create(self, batch: Batch) -> None:
        def create(db: sqlite3.Connection) -> None:
            row = (batch.id, batch.owner, _ENCODE(batch))
            db.execute("INSERT INTO batches (id, owner, open, doc) VALUES (?, ?, 1, ?)", row)

        await self._write(create)

    async def batch(self, owner: str, batch_id: str) -> Batch | None:
        def read(db: sqlite3.Connection) -> Batch | None:
            found = db.execute("SELECT doc FROM batches WHERE id = ? AND owner = ?", (batch_id, owner)).fetchone()
            return None if found is None else _BATCH.decode(found[0])

        return await self._read(read)

    async def batches(self, owner: str, page: Page) -> list[Batch]:
        return await self._read(lambda db: list(map(_BATCH.decode, _paged(db, "batches", owner, page))))

    async def open_batches(self) -> list[Batch]:
        return await self._read(lambda db: [batch for _, batch in _open(db)])

    async def fill(self, batch_id: str, lines: Sequence[Line]) -> None:
        def fill(db: sqlite3.Connection) -> None:
            n, _ = _one(db, batch_id)
            db.executemany(
                "INSERT INTO items (batch, line, start, length, custom_id) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                ((n, line.number, line.start, line.length, line.custom_id) for line in lines),
            )

        await self._write(fill)

    async def move(self, batch_id: str, status: Status, now: float, **changes: object) -> Batch:
        def move(db: sqlite3.Connection) -> Batch:
            n, batch = _one(db, batch_id)
            batch = msgspec.structs.replace(rules.moved(batch, status, now), **changes)
            _keep(db, n, batch)
            return batch

        return await self._write(move)

    async def note(self, batch_id: str, **changes: object) -> Batch:
        def note(db: sqlite3.Connection) -> Batch:
            n, batch = _one(db, batch_id)
            batch = msgspec.structs.replace(batch, **changes)
            _keep(db, n, batch)
            return batch

        return await self._write(note)

    async def remove(self, batch_id: str) -> None:
        def remove(db: sqlite3.Connection) -> None:
            for (n,) in db.execute("SELECT n FROM batches WHERE id = ?", (batch_id,)).fetchall():
                _forget(db, n, batch_id)

        await self._write(remove)

    async def untold(self) -> list[Batch]:
        def read(db: sqlite3.Connection) -> list[Batch]:
            return [_BATCH.decode(doc) for (doc,) in db.execute("SELECT doc FROM batches WHERE untold ORDER BY n")]

        return await self._read(read)

    async def mark_told(self, batch_id: str) -> None:
        await self._write(lambda db: db.execute("UPDATE batches SET untold = 0 WHERE id = ?", (batch_id,)) and None)

    # ── items ──

    async def claim(self, batch_id: str, most: int, until: float) -> list[Item]:
        def claim(db: sqlite3.Connection) -> list[Item]:
            n, batch = _one(db, batch_id)
            if batch.status is not Status.IN_PROGRESS:
                return []
            rows = db.execute(
                "UPDATE items SET state = 1, attempt = attempt + 1, until = ? WHERE rowid IN"
                " (SELECT rowid FROM items WHERE batch = ? AND state = 0 ORDER BY line LIMIT ?)"
                " RETURNING line, attempt, start, length, custom_id",
                (until, n, most),
            )
            return sorted((Item(batch_id, *row) for row in rows), key=lambda item: item.line)

        return await self._write(claim)

    async def renew(self, items: Sequence[Item], until: float) -> None:
        await self._write(lambda db: _mark(db, items, "until = ?", until))

    async def release(self, items: Sequence[Item]) -> None:
        await self._write(lambda db: _mark(db, items, "state = ?", _QUEUED))

    async def keep_step(self, item: Item, step: str, gave: bytes) -> None:
        def keep(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR REPLACE INTO steps SELECT batch, line, ?, ? FROM items"
                " WHERE batch = (SELECT n FROM batches WHERE id = ?) AND line = ? AND state = 1 AND attempt = ?",
                (step, gave, item.batch, item.line, item.attempt),
            )

        await self._write(keep)

    async def steps(self, item: Item) -> dict[str, bytes]:
        def read(db: sqlite3.Connection) -> dict[str, bytes]:
            found = "SELECT step, gave FROM steps WHERE batch = (SELECT n FROM batches WHERE id = ?) AND line = ?"
            return dict(db.execute(found, (item.batch, item.line)).fetchall())

        return await self._read(read)

    async def unended(self, batch_id: str) -> list[tuple[int, str]]:
        def read(db: sqlite3.Connection) -> list[tuple[int, str]]:
            left = "SELECT line, custom_id FROM items WHERE batch = ? AND state < 2 ORDER BY line"
            return db.execute(left, (_one(db, batch_id)[0],)).fetchall()

        return await self._read(read)

    async def adopt(self, batch_id: str, results: Sequence[tuple[int, Result]], now: float) -> int:
        def adopt(db: sqlite3.Connection) -> int:
            n, batch = _one(db, batch_id)
            size = {True: 0, False: 0}
            for line, result in results:
                state = _DONE if result.is_done else _FAILED
                end = "UPDATE items SET state = ?, until = NULL, output = ? WHERE batch = ? AND line = ? AND state < 2"
                if db.execute(end, (state, result.line, n, line)).rowcount:
                    batch = rules.counted(batch, result)
                    size[result.is_done] += len(result.line)
            for done in filter(size.get, size):
                _grow(db, batch, done=done, size=size[done], now=now)
            _keep(db, n, batch := rules.finalized(batch, now))
            return batch.pending

        return await self._write(adopt)

    async def finish(self, item: Item, result: Result, now: float) -> int | None:
        def finish(db: sqlite3.Connection) -> int | None:
            n, batch = _one(db, item.batch)
            changed = db.execute(
                "UPDATE items SET state = ?, until = NULL, output = ?"
                " WHERE batch = ? AND line = ? AND state = 1 AND attempt = ?",
                (_DONE if result.is_done else _FAILED, result.line, n, item.line, item.attempt),
            )
            if not changed.rowcount:
                return None
            db.execute("DELETE FROM steps WHERE batch = ? AND line = ?", (n, item.line))
            batch = rules.counted(batch, result)
            _grow(db, batch, done=result.is_done, size=len(result.line), now=now)
            _keep(db, n, batch := rules.finalized(batch, now))
            return batch.pending

        return await self._write(finish)

    async def close(self, batch_id: str, status: Status, now: float) -> Batch:
        def close(db: sqlite3.Connection) -> Batch:
            n, batch = _one(db, batch_id)
            batch = rules.moved(batch, status, now)
            left = "SELECT line, custom_id FROM items WHERE batch = ? AND state < 2 ORDER BY line"
            end = "UPDATE items SET state = 3, until = NULL, output = ? WHERE batch = ? AND line = ?"
            size = 0
            unrun = db.execute(left, (n,)).fetchall()
            for line, custom_id in unrun:
                result = rules.unrun(batch, line, custom_id)
                batch = rules.counted(batch, result)
                db.execute(end, (result.line, n, line))
                size += len(result.line)
            db.execute("DELETE FROM steps WHERE batch = ?", (n,))
            if size:
                _grow(db, batch, done=False, size=size, now=now)
            if batch.output_seconds is not None:
                _let_expire(db, batch, int(now) + batch.output_seconds)
            batch = msgspec.structs.replace(batch, total=batch.completed + batch.failed, unrun=len(unrun))
            _keep(db, n, batch)
            return batch

        return await self._write(close)

    async def lines(self, batch_id: str, *, done: bool, after: int, most_bytes: int) -> list[tuple[int, bytes]]:
        def read(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            left = most_bytes
            found: list[tuple[int, bytes]] = []
            rows = db.execute(
                "SELECT line, output FROM items WHERE batch = (SELECT n FROM batches WHERE id = ?)"
                " AND line > ? AND state = ? AND output IS NOT NULL ORDER BY line",
                (batch_id, after, _DONE if done else _FAILED),
            )
            for line, output in rows:
                found.append((line, output))
                if (left := left - len(output)) <= 0:
                    break
            rows.close()
            return found

        return await self._read(read)

    # ── time ──

    async def sweep(self, now: float, *, keep_seconds: float) -> Swept:
        def sweep(db: sqlite3.Connection) -> Swept:
            given_up = db.execute("UPDATE items SET state = 0, until = NULL WHERE state = 1 AND until <= ?", (now,))
            files = db.execute("SELECT doc FROM files WHERE expires_at <= ?", (now,)).fetchall()
            for (doc,) in files:
                _remove_file(db, _FILE.decode(doc))
            ended = "SELECT n, id FROM batches WHERE NOT open AND ended_at <= ?"
            batches = db.execute(ended, (now - keep_seconds,)).fetchall()
            for n, batch_id in batches:
                _forget(db, n, batch_id)
            return Swept(given_up.rowcount, len(files), len(batches))

        return await self._write(sweep)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._reading.shutdown()
        self._reader.close()
        os.close(self._lock)

    async def _write(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        return await self._writer.do(work)

    async def _read(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reading, work, self._reader)
        except sqlite3.Error as error:
            raise _unavailable(error) from error


class _Writer:
    """The one thread that writes (rule 1)."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._queue: SimpleQueue[tuple[Work, asyncio.Future[Any], asyncio.AbstractEventLoop] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)
        self._thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """What `work` returns, once it is on disk. It looks before it writes: if it raises, it has written nothing."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._queue.put((work, answer, loop))
        return await answer

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._db.close()

    def _run(self) -> None:
        is_open = True
        while is_open:
            group = [self._queue.get()]
            time.sleep(GATHER_SECONDS)
            while len(group) < GROUP_MAX:
                try:
                    group.append(self._queue.get_nowait())
                except Empty:
                    break
            is_open = None not in group
            asked = [one for one in group if one is not None]
            answers = self._committed([work for work, _, _ in asked])
            for loop in {loop for _, _, loop in asked}:
                told = [
                    (future, answer)
                    for (_, future, its), answer in zip(asked, answers, strict=True)
                    if its is loop and not loop.is_closed()
                ]
                loop.call_soon_threadsafe(_tell, told)

    def _committed(self, works: list[Work]) -> list[Any]:
        """What each of them returned or raised, all in one commit where that is possible."""
        if not works:
            return []
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            return [_unavailable(error)] * len(works)
        try:
            answers = [_answer(work, db) for work in works]
            db.execute("COMMIT")
            return answers
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if len(works) == 1:
                return [_unavailable(error)]
        return [self._committed([work])[0] for work in works]


def _answer(work: Work, db: sqlite3.Connection) -> Any:
    try:
        return work(db)
    except sqlite3.Error:
        raise
    except Exception as error:  # noqa: BLE001  # handed to whoever asked, on the thread of theirs
        return _Raised(error)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _tell(told: Iterable[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in told:
        if future.done():
            continue  # whoever asked has left; it is done all the same
        if isinstance(answer, _Raised):
            future.set_exception(answer.error)
        elif isinstance(answer, StateUnavailable):
            future.set_exception(answer)
        else:
            future.set_result(answer)


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk, not on its way there
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise StateOff("state was written by a later version of the gateway; run that one, or set another state.path")
    for number, added in enumerate(_SCHEMA[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {number}; COMMIT;")
    db.execute("UPDATE items SET state = 0, until = NULL WHERE state = 1")  # rule 2
    return db


def _unavailable(error: sqlite3.Error) -> StateUnavailable:
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        message = "there is no room where state is kept; nothing was lost, come back when there is some"
    elif kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        message = f"another program has held the file of the state for {BUSY_SECONDS:.0f} s; come back later"
    else:
        message = f"state cannot be read or written now ({error}); come back later"
    return StateUnavailable(message, retry_after=5.0)


# ── rows ──


def _one(db: sqlite3.Connection, batch_id: str) -> tuple[int, Batch]:
    n, doc = db.execute("SELECT n, doc FROM batches WHERE id = ?", (batch_id,)).fetchone()
    return n, _BATCH.decode(doc)


def _open(db: sqlite3.Connection) -> list[tuple[int, Batch]]:
    rows = db.execute("SELECT n, doc FROM batches WHERE open ORDER BY n").fetchall()
    return [(n, _BATCH.decode(doc)) for n, doc in rows]


def _forget(db: sqlite3.Connection, n: int, batch_id: str) -> None:
    db.execute("DELETE FROM items WHERE batch = ?", (n,))
    db.execute("DELETE FROM files WHERE batch = ?", (batch_id,))
    db.execute("DELETE FROM batches WHERE n = ?", (n,))


def _keep(db: sqlite3.Connection, n: int, batch: Batch) -> None:
    ended = batch.ended_at if batch.status.is_final else None
    row = (ended is None, ended, ended is not None, _ENCODE(batch), n)
    db.execute("UPDATE batches SET open = ?, ended_at = ?, untold = ?, doc = ? WHERE n = ?", row)


def _mark(db: sqlite3.Connection, items: Sequence[Item], change: str, value: float) -> None:
    """Change claims that are in force."""
    rows = [(value, item.batch, item.line, item.attempt) for item in items]
    where = "batch = (SELECT n FROM batches WHERE id = ?) AND line = ? AND state = 1 AND attempt = ?"
    db.executemany(f"UPDATE items SET {change} WHERE {where}", rows)  # noqa: S608  # `change` is one of two above


def _one_file(db: sqlite3.Connection, owner: str, file_id: str) -> File | None:
    found = db.execute("SELECT doc FROM files WHERE id = ? AND owner = ?", (file_id, owner)).fetchone()
    return None if found is None else _FILE.decode(found[0])


def _add_file(db: sqlite3.Connection, file: File) -> None:
    row = (file.id, file.owner, file.purpose, file.batch, file.expires_at, _ENCODE(file))
    db.execute("INSERT INTO files (id, owner, purpose, batch, expires_at, doc) VALUES (?, ?, ?, ?, ?, ?)", row)


def _remove_file(db: sqlite3.Connection, file: File) -> None:
    db.execute("DELETE FROM files WHERE id = ?", (file.id,))
    if file.batch:
        n, batch = _one(db, file.batch)
        state = _DONE if file.id == batch.output_file_id else _FAILED
        db.execute("UPDATE items SET output = NULL WHERE batch = ? AND state = ?", (n, state))


def _grow(db: sqlite3.Connection, batch: Batch, *, done: bool, size: int, now: float) -> None:
    """The file of results is longer by so many bytes."""
    file_id = batch.output_file_id if done else batch.error_file_id
    if (file := _one_file(db, batch.owner, file_id)) is None:
        _add_file(db, rules.results_file(batch, done=done, size=size, now=now))
        return
    file = msgspec.structs.replace(file, bytes=file.bytes + size)
    db.execute("UPDATE files SET doc = ? WHERE id = ?", (_ENCODE(file), file_id))


def _let_expire(db: sqlite3.Connection, batch: Batch, expires_at: int) -> None:
    for (doc,) in db.execute("SELECT doc FROM files WHERE batch = ?", (batch.id,)).fetchall():
        file = msgspec.structs.replace(_FILE.decode(doc), expires_at=expires_at)
        db.execute("UPDATE files SET expires_at = ?, doc = ? WHERE id = ?", (expires_at, _ENCODE(file), file.id))


def _paged(db: sqlite3.Connection, table: str, owner: str, page: Page, purpose: str = "") -> Iterable[bytes]:
    """The documents of a part of a list."""
    sign, order = ("<", "DESC") if page.newest_first else (">", "ASC")
    wanted, values = "owner = ?", [owner]
    if purpose:
        wanted, values = f"{wanted} AND purpose = ?", [*values, purpose]
    if page.after:
        wanted = f"{wanted} AND n {sign} (SELECT n FROM {table} WHERE id = ? AND owner = ?)"  # noqa: S608  # our names
        values += [page.after, owner]
    found = f"SELECT doc FROM {table} WHERE {wanted} ORDER BY n {order} LIMIT ?"  # noqa: S608  # our names
    return (doc for (doc,) in db.execute(found, (*values, page.limit)).fetchall())
