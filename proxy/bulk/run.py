"""One run: from a file of prompts to a file of results, in the same order.

    read all -> hand in, 50,000 lines a batch -> watch -> collect -> results

What was handed in is noted beside the results, before and after each step, so the same command takes the run up again
wherever it was ended, be it by Ctrl-C, by `kill -9` or by the gateway's own end. A batch carries its run's id in its
metadata: one that was made, and not noted any more, is found again and not paid twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from proxy.bulk.prompts import BadInput, Row, encoded
from proxy.bulk.remote import Batch, Refused, Remote
from proxy.bulk.screen import Progress

LINES_MAX = 50_000  # of a batch; OpenAI's bound, and the gateway's
BYTES_MAX = 190 << 20  # of a batch's file; a little below OpenAI's bound of 200 MB
LOOK_SECONDS = 0.25  # between two looks at the batches, and doubling up to
LOOK_SECONDS_MAX = 2.0
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
NOTES = ".penstock"  # what is added to the name of the results


class Stopped(Exception):
    """The run cannot go on; the message says why, and what to do."""


@dataclass(slots=True)
class Part:
    """Rows that go into one batch.

    Attributes:
        rows: their numbers.
        batch: its id; "" before it is known to be there.
        begun: it may be there although its id is not known.
    """

    rows: list[int]
    batch: str = ""
    begun: bool = False


@dataclass(slots=True)
class Notes:
    """What is kept beside the results."""

    run: str
    digest: str  # of all lines: another input, model or template is another run
    rows: int
    gateway: str
    parts: list[Part] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Run:
    """What came of it."""

    answered: int
    failed: int
    reasons: Mapping[str, int]  # how often, by code, of those that failed

    @property
    def code(self) -> int:
        """Exit code: 0 if every prompt was answered."""
        return 1 if self.failed else 0


class _Spool:
    """All lines of the run on disk, and where each begins.

    Attributes:
        own_ids: by row, those that the input gave.
        models: by row; a batch asks one.
        url: of all.
        digest: of all lines.
    """

    def __init__(self, file: IO[bytes], rows: Iterable[Row]) -> None:
        self._file = file
        self._begins = array("Q", [0])
        self.own_ids: dict[int, str] = {}
        self.models: list[str] = []
        self.url = ""
        digest = hashlib.sha256()
        for row in rows:
            line = row.line
            digest.update(line)
            file.write(line)
            self._begins.append(self._begins[-1] + len(line))
            self.url = row.url
            self.models.append(row.model)
            if row.own_id:
                self.own_ids[row.number] = row.own_id
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._begins) - 1

    def length(self, row: int) -> int:
        return self._begins[row + 1] - self._begins[row]

    def copy(self, rows: Sequence[int], into: IO[bytes]) -> None:
        for row in rows:
            self._file.seek(self._begins[row])
            into.write(self._file.read(self.length(row)))


def run(
    remote: Remote,
    rows: Iterable[Row],
    out: Path | None,
    write: IO[bytes],
    progress: Progress,
    *,
    retry_failed: bool = False,
    fresh: bool = False,
    where: str = "",
) -> Run:
    """Answer all rows.

    Args:
        out: where the results will stand, once all are there; None: they go to `write`, and nothing is noted.
        write: where they go without `out`.
        retry_failed: ask those anew that failed when the run was ended before.
        fresh: forget what an earlier run has noted.
        where: the gateway, in words; "" for its URL.

    Raises:
        BadInput: nothing was sent.
        Stopped: what was answered is kept, and the same command goes on.
        Refused, Unreachable: as `Stopped`.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder, open(Path(folder, "lines"), "w+b") as file:
        spool = _Spool(file, rows)
        begun = _begin(spool, out, where or remote.url, fresh=fresh)
        results = _Results(Path(folder), spool)
        if retry_failed:
            begun.parts += _parts(spool, _failed(remote, begun, results))
        _note(begun, out)
        for part in begun.parts:
            if not part.batch:
                _hand_in(remote, spool, part, begun, out, Path(folder))
        ended = _watch(remote, begun, progress)
        results.collect(remote, ended)
        if all(batch["status"] == "failed" for batch in ended):
            raise Stopped(_why_invalid(ended))
        return results.give(out, write)


def _begin(spool: _Spool, out: Path | None, gateway: str, *, fresh: bool) -> Notes:
    """The notes of the same run as it was left, or of a new one."""
    new = Notes(secrets.token_hex(8), spool.digest, len(spool), gateway, _parts(spool, range(len(spool))))
    if out is None or fresh:
        return new
    try:
        said = json.loads(_notes_of(out).read_bytes())
        found = Notes(**said | {"parts": [Part(**part) for part in said["parts"]]})
    except FileNotFoundError:
        if out.exists():
            raise BadInput(f"{out} exists already; name another -o, or remove it") from None
        return new
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{_notes_of(out)} cannot be read; remove it, or begin anew with --fresh") from None
    if found.digest != spool.digest:
        raise BadInput(
            f"{out} belongs to a run with another input, model or template; name another -o, or begin anew with --fresh"
        )
    return found


def _parts(spool: _Spool, rows: Iterable[int]) -> list[Part]:
    """Rows of one model go together, as many as a batch may have."""
    parts: list[Part] = []
    filling: dict[str, tuple[Part, int]] = {}
    for row in rows:
        model, length = spool.models[row], spool.length(row)
        part, size = filling.get(model, (None, 0))
        if part is None or len(part.rows) >= LINES_MAX or size + length > BYTES_MAX:
            part, size = Part([]), 0
            parts.append(part)
        part.rows.append(row)
        filling[model] = part, size + length
    return parts


def _hand_in(remote: Remote, spool: _Spool, part: Part, notes: Notes, out: Path | None, folder: Path) -> None:
    number = str(notes.parts.index(part))
    if part.begun:
        ours = {"penstock_run": notes.run, "penstock_part": number}
        made = next(
            (batch for batch in remote.batches() if (batch.get("metadata") or {}) | ours == batch["metadata"]), None
        )
        if made is not None:
            part.batch = made["id"]
            _note(notes, out)
            return
    lines = folder / f"part-{number}.jsonl"
    with lines.open("wb") as into:
        spool.copy(part.rows, into)
    file = remote.upload(lines, lines.name)
    lines.unlink()
    part.begun = True
    _note(notes, out)
    part.batch = remote.create(file, spool.url, {"penstock_run": notes.run, "penstock_part": number})["id"]
    _note(notes, out)


def _batches(remote: Remote, notes: Notes) -> list[Batch]:
    """The batches of the run as they are now."""
    try:
        return [remote.batch(part.batch) for part in notes.parts if part.batch]
    except Refused as error:
        if error.status != 404:
            raise
        raise Stopped(
            f"{remote.url} does not know the batches of this run, which was begun at {notes.gateway}; go on there, or "
            "begin anew with --fresh"
        ) from None


def _watch(remote: Remote, notes: Notes, progress: Progress) -> list[Batch]:
    """Return the batches when all have ended."""
    pause = LOOK_SECONDS
    with progress:
        while True:
            batches = _batches(remote, notes)
            progress.show(batches)
            if all(batch["status"] in ENDED for batch in batches):
                return batches
            time.sleep(pause)
            pause = min(LOOK_SECONDS_MAX, 1.5 * pause)


def _failed(remote: Remote, notes: Notes, results: _Results) -> list[int]:
    """The rows whose every batch has ended without an answer for them."""
    batches = {batch["id"]: batch for batch in _batches(remote, notes)}
    ended = [batch for batch in batches.values() if batch["status"] in ENDED]
    results.collect(remote, ended)
    under_way = {
        row for part in notes.parts if not part.batch or batches[part.batch]["status"] not in ENDED for row in part.rows
    }
    return [row for row in range(notes.rows) if row not in under_way and not results.is_answered(row)]


def _why_invalid(batches: Iterable[Batch]) -> str:
    said = [
        f"line {error['line']}: {error['message']}" if error.get("line") else str(error.get("message"))
        for batch in batches
        for error in (batch.get("errors") or {}).get("data") or ()
    ]
    return "the gateway refused the batch: " + ("; ".join(said[:5]) or "it did not say why")


class _Results:
    """What was answered, by row, read where it lies on disk."""

    def __init__(self, folder: Path, spool: _Spool) -> None:
        self._folder, self._spool = folder, spool
        self._found: dict[int, tuple[Path, int, bool]] = {}  # file, offset, whether it is an answer

    def is_answered(self, row: int) -> bool:
        return row in self._found and self._found[row][2]

    def collect(self, remote: Remote, batches: Iterable[Batch]) -> None:
        """Fetch the files of batches that have ended, each once. An answer stays, whatever a later try brought."""
        for batch in batches:
            for name, is_answer in (("output_file_id", True), ("error_file_id", False)):
                if (file := batch.get(name)) is None:
                    continue
                kept = self._folder / f"{batch['id']}-{name}"
                if not kept.exists():
                    with kept.open("wb") as into:
                        remote.download(file, into)
                self._index(kept, is_answer)

    def _index(self, kept: Path, is_answer: bool) -> None:
        offset = 0
        with kept.open("rb") as lines:
            for line in lines:
                row = int(json.loads(line)["custom_id"].removeprefix("row-"))
                if not self.is_answered(row):
                    self._found[row] = (kept, offset, is_answer)
                offset += len(line)

    def give(self, out: Path | None, write: IO[bytes]) -> Run:
        """Write all results in the order of the rows; a file appears whole or not at all."""
        if out is None:
            return self._write(write)
        with _replacing(out) as file:
            return self._write(file)

    def _write(self, into: IO[bytes]) -> Run:
        answered, reasons = 0, dict[str, int]()
        opened: dict[Path, IO[bytes]] = {}
        try:
            for row in range(len(self._spool)):
                line: dict[str, Any] | None = None
                if (place := self._found.get(row)) is not None:
                    kept, offset, _ = place
                    file = opened.get(kept) or opened.setdefault(kept, kept.open("rb"))
                    file.seek(offset)
                    line = json.loads(file.readline())
                if self.is_answered(row):
                    answered += 1
                else:
                    code = str(_error(line)["code"])
                    reasons[code] = reasons.get(code, 0) + 1
                said = _result(row, line, self._spool.own_ids.get(row))
                into.write(encoded(said) + b"\n")
        finally:
            for file in opened.values():
                file.close()
        return Run(answered, len(self._spool) - answered, reasons)


def _result(row: int, line: Mapping[str, Any] | None, own_id: str | None) -> Mapping[str, Any]:
    """A row's line in the results: as OpenAI has it where the input was so, else what was answered and little more."""
    response = (line or {}).get("response") or {"status_code": 0}
    is_answer = 200 <= response["status_code"] < 300
    if own_id is not None:
        return {**(line or {"response": None}), "custom_id": own_id, "error": None if is_answer else _error(line)}
    if not is_answer:
        return {"index": row, "error": _error(line)}
    body = response["body"]
    choice = (body.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    said = {"index": row, "result": message.get("content")}
    if said["result"] is None:
        said["message"] = message
    return said | {"finish_reason": choice.get("finish_reason"), "usage": body.get("usage")}


def _error(line: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Why a row has no answer: code and message."""
    if line is None:
        return {"code": "not_run", "message": "the batch ended before it was its turn; --retry-failed asks it anew"}
    said = line.get("error")
    response = line.get("response") or {}
    body = response.get("body")
    if said is None and isinstance(body, dict):
        said = body.get("error")
    if not isinstance(said, dict):
        said = {"message": str(said or body)[:500]}
    return {"code": said.get("code") or f"http_{response.get('status_code', 0)}", "message": said.get("message")}


# ── notes ──


def _notes_of(out: Path) -> Path:
    return out.with_name(out.name + NOTES)


def _note(notes: Notes, out: Path | None) -> None:
    if out is not None:
        with _replacing(_notes_of(out)) as file:
            file.write(json.dumps(asdict(notes)).encode())


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path`, whole and on disk, when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
