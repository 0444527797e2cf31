"""Inputs on the disk: how they arrive, how they are read, and which of them go."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from proxy.batches.inputs import WRITE_BYTES, Inputs, Reading
from proxy.core.batch import LINES_MAX, Input, Line
from proxy.errors import StateUnavailable

CHAT = "/v1/chat/completions"
GOOD = b'{"custom_id":"c-%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}\n'


def read(path: Path, *, line_bytes_max: int = 10_000) -> tuple[Input, list[Line]]:
    found = Input(CHAT, line_bytes_max)
    reading, lines = Reading(path, found, line_bytes_max), []
    while not reading.is_over:
        lines += reading.some()
    reading.close()
    return found, lines


def written(path: Path, count: int, wrong: frozenset[int] = frozenset()) -> Path:
    path.write_bytes(b"".join(b"{\n" if number in wrong else GOOD % number for number in range(1, count + 1)))
    return path


async def arrived(inputs: Inputs, content: bytes, name: str = "file-1") -> None:
    async with inputs.arriving() as arrival:
        await arrival.write(content)
        await arrival.keep(name)


async def test_what_arrives_is_kept_whole_whatever_its_pieces(tmp_path: Path) -> None:
    inputs, pieces = Inputs(tmp_path / "files"), [b"a" * 10, b"b" * (WRITE_BYTES + 1), b"", b"c"]
    async with inputs.arriving() as arrival:
        for piece in pieces:
            await arrival.write(piece)
        assert arrival.size == sum(map(len, pieces))
        await arrival.keep("file-1")
    assert inputs.path("file-1").read_bytes() == b"".join(pieces)
    assert stat.S_IMODE(inputs.path("file-1").stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "files") == ["file-1"]


async def test_what_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "files")
    async with inputs.arriving() as arrival:
        await arrival.write(b"x" * (2 * WRITE_BYTES))
        assert len(os.listdir(tmp_path / "files")) == 1
    assert os.listdir(tmp_path / "files") == []


async def test_what_nobody_needs_goes_and_what_arrives_or_is_needed_stays(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "files")
    assert inputs.collect(set()) == 0
    await arrived(inputs, b"old", "file-old")
    await arrived(inputs, b"needed", "file-needed")
    async with inputs.arriving() as arrival:
        await arrival.write(b"x")
        await arrival.keep("file-new")  # its row is not there yet
        assert inputs.collect({"file-needed"}) == 1
        assert set(os.listdir(tmp_path / "files")) == {"file-needed", "file-new"}
    async with inputs.arriving():
        assert inputs.collect({"file-needed", "file-new"}) == 0
        inputs.forget_arrivals()
        assert set(os.listdir(tmp_path / "files")) == {"file-needed", "file-new"}


async def test_no_room_for_an_upload_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(tmp_path / "files")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("proxy.batches.inputs.os.write", lambda *_: (_ for _ in ()).throw(full))
    async with inputs.arriving() as arrival:
        with pytest.raises(StateUnavailable, match="no room"):
            await arrival.write(b"x" * WRITE_BYTES)


def test_lines_are_found_again_by_their_place(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + GOOD % 1 + b"\r\n" + GOOD[:-1] % 2 + b"\r\n" + GOOD[:-1] % 3)
    found, lines = read(tmp_path / "in")
    assert [line.number for line in lines] == [1, 3, 4]
    assert found.count == 3
    assert inputs.lines("in", [(line.start, line.length) for line in lines]) == [GOOD[:-1] % n for n in (1, 2, 3)]


def test_lines_that_are_no_json_are_told_at_the_beginning_the_middle_and_the_end(tmp_path: Path) -> None:
    found, lines = read(written(tmp_path / "in", LINES_MAX, frozenset({1, 25_000, LINES_MAX})))
    assert [(each.code, each.line) for each in found.mistakes] == [
        ("invalid_json_line", 1),
        ("invalid_json_line", 25_000),
        ("invalid_json_line", LINES_MAX),
    ]
    assert len(lines) == LINES_MAX - 3


def test_fifty_thousand_requests_are_taken_and_one_more_is_not(tmp_path: Path) -> None:
    found, lines = read(written(tmp_path / "in", LINES_MAX + 1))
    assert [each.code for each in found.mistakes] == ["too_many_tasks"]
    assert [lines[0].number, lines[-1].number] == [1, LINES_MAX]


def test_of_a_line_that_is_too_long_no_more_is_read_than_that(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD % 1 + b"x" * 5_000_000 + b"\n" + GOOD % 3)
    found, lines = read(tmp_path / "in")
    assert [(each.code, each.line) for each in found.mistakes] == [("request_too_large", 2)]
    assert [line.number for line in lines] == [1, 3]


def test_an_empty_input_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"")
    assert [each.code for each in read(tmp_path / "in")[0].mistakes] == ["empty_file"]
