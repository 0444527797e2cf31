"""Batches where something is wrong: with the input, the disk, the upstream, the time or the process."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from proxy.api import files
from proxy.batches import runner, sqlite
from proxy.config import Gate, State
from proxy.core import batch as rules
from proxy.core import breaker
from proxy.simulator import ALWAYS
from proxy.simulator import serving as simulating
from tests.e2e.running import CHAT, at, serving, settings, until
from tests.e2e.test_batches import FOUR_TOKENS, ended, jsonl, lines, request, submit, through, upload

A_CALL_AT_A_TIME = replace(FOUR_TOKENS, requests_per_minute=1, requests_burst=5)


async def _until(client: AsyncOpenAI, batch: Batch, completed: int) -> Batch:
    async with asyncio.timeout(10):
        while batch.request_counts is None or batch.request_counts.completed < completed:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    return batch


# ── the input ──


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["nothing", "blank lines"])
async def test_an_empty_input_is_told(tmp_path: Path, content: bytes) -> None:
    async with through(tmp_path) as (_, client, _):
        batch = await ended(client, await submit(client, content))
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [each.code for each in batch.errors.data or ()] == ["empty_file"]


async def test_a_file_that_is_too_large_is_refused_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "INPUT_BYTES_MAX", 3 << 20)
    async with through(tmp_path) as (_, client, _):
        assert (await upload(client, b"x" * (3 << 20))).startswith("file-")
        with pytest.raises(openai.APIStatusError, match="larger than 3 MB") as refused:
            await upload(client, b"x" * ((3 << 20) + 1))
        assert refused.value.status_code == 413
        assert [entry.stat().st_size for entry in (tmp_path / "files").iterdir()] == [3 << 20]


async def test_a_file_of_200_mb_and_a_byte_is_refused(tmp_path: Path) -> None:
    head = A_PURPOSE + b"batch\r\n" + A_FILE.removesuffix(b"x")
    size = rules.INPUT_BYTES_MAX + 1

    async def parts() -> AsyncIterator[bytes]:
        yield head
        for _ in range(200):
            yield b"x" * (1 << 20)
        yield b"x" + END

    told = {"content-type": FORM, "content-length": str(len(head) + size + len(END))}
    async with through(tmp_path) as (house, _, _):
        async with house.http.post(f"{house.base_url}/files", data=parts(), headers=told) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (413, "request_too_large")
        assert spooled(tmp_path) == []


def spooled(state: Path) -> list[Path]:
    return list(state.glob("files/*"))


FORM = "multipart/form-data; boundary=b"
A_FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx'
A_PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
A_FORM = b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n"
END = b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("body", "content_type", "code"),
    [
        pytest.param(b"{}", "application/json", "invalid_form", id="json"),
        pytest.param(b"x", "multipart/form-data", "invalid_form", id="no boundary"),
        pytest.param(b"x", FORM, "invalid_form", id="no part"),
        pytest.param(A_FILE, FORM, "invalid_form", id="cut off"),
        pytest.param(A_PURPOSE + b"batch" + END, FORM, "invalid_request", id="no file"),
        pytest.param(A_FILE + END, FORM, "invalid_request", id="no purpose"),
        pytest.param(A_FORM, FORM, "invalid_form", id="a form in a form"),
        pytest.param(A_PURPOSE + b"x" * 20_000 + END, FORM, "invalid_form", id="a long field"),
    ],
)
async def test_an_upload_that_is_no_form_is_told_so(tmp_path: Path, body: bytes, content_type: str, code: str) -> None:
    async with through(tmp_path) as (house, _, _):
        answer = await house.ask(body, "/v1/files", headers={"content-type": content_type})
        assert (answer.status, answer.error["code"]) == (400, code)
    assert spooled(tmp_path) == []


async def test_the_fields_of_a_form_come_in_any_order(tmp_path: Path) -> None:
    body = A_FILE + b"\r\n" + A_PURPOSE + b"batch" + END
    async with through(tmp_path) as (house, client, _):
        answer = await house.ask(body, "/v1/files", headers={"content-type": FORM})
        assert answer.status == 200
        assert (await client.files.content(answer.json["id"])).content == b"x"


async def test_an_input_deleted_while_it_is_run_is_run_to_its_end(tmp_path: Path) -> None:
    async with through(tmp_path, A_CALL_AT_A_TIME) as (_, client, _):
        file_id = await upload(client, jsonl(map(request, range(8))))
        batch = await client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
        await _until(client, batch, 5)
        await client.files.delete(file_id)
        assert (tmp_path / "files" / file_id).exists()
        await client.batches.cancel(batch.id)
        await ended(client, batch)
        await until(lambda: not (tmp_path / "files" / file_id).exists(), "removed")


async def test_an_input_that_somebody_took_away_fails_its_items_and_no_more(tmp_path: Path) -> None:
    async with through(tmp_path, A_CALL_AT_A_TIME) as (_, client, _):
        batch = await _until(client, await submit(client, jsonl(map(request, range(200)))), 5)
        (tmp_path / "files" / batch.input_file_id).unlink()
    async with through(tmp_path) as (_, client, _):
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (5, 195)
        errors = await lines(client, batch.error_file_id)
        assert {each["error"]["code"] for each in errors} == {"input_file_unreadable"}


async def test_an_input_that_is_no_file_of_the_callers_is_not_found(tmp_path: Path) -> None:
    async with through(tmp_path) as (_, client, _):
        with pytest.raises(openai.NotFoundError, match="no file `file-none`"):
            await client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["nowhere", "claude"])
async def test_a_model_that_cannot_be_batched_is_told(tmp_path: Path, model: str) -> None:
    async with simulating(FOUR_TOKENS) as simulator:
        upstreams = {"up": at(simulator.base_url), "other": at(simulator.base_url, dialect="anthropic")}
        models = {"m": {"upstreams": ("up",)}, "claude": {"upstreams": ("other",)}}
        said = settings(upstreams, models=models, state=State(path=str(tmp_path)))
        async with serving(said) as house, house.sdk() as client:
            batch = await ended(client, await submit(client, jsonl([request(1, model=model)])))
            assert batch.errors is not None
            assert [(each.code, each.param) for each in batch.errors.data or ()] == [("model_not_found", "body.model")]


# ── the disk ──


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 16 MB; not below pytest's own directory, which it clears."""
    disk = Path(tempfile.mkdtemp(prefix="penstock-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
    disk.rmdir()


async def test_a_full_disk_pauses_the_batch_and_loses_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "INSIST_SECONDS", 0.05)
    async with through(small_disk, A_CALL_AT_A_TIME) as (_, client, _):
        batch = await _until(client, await submit(client, jsonl(map(request, range(100)))), 5)
    ballast = small_disk / "ballast"
    async with through(small_disk) as (_, client, simulator):
        ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
        await until(lambda: "batches wait: there is no room" in caplog.text, "full", seconds=10.0)
        with pytest.raises(openai.InternalServerError, match="no room") as refused:
            await upload(client, b"x" * 100_000)
        assert refused.value.status_code == 503
        before = await client.batches.retrieve(batch.id)
        assert before.status == "in_progress"
        ballast.unlink()
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (100, 0)
        sent = [seen.headers["idempotency-key"] for seen in simulator.seen]
        assert len(set(sent)) == len(sent) == 95
        assert len(await lines(client, batch.output_file_id)) == 100


async def test_a_database_that_another_program_holds_is_waited_for(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, client, _):
        file_id = await upload(client, jsonl(map(request, range(20))))
        holder = await asyncio.to_thread(_held, tmp_path / sqlite.FILE)
        creating = asyncio.create_task(
            client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
        )
        assert (await client.files.retrieve(file_id)).id == file_id
        assert (await house.ask()).status == 200
        assert not creating.done()
        await asyncio.to_thread(holder.rollback)
        await asyncio.to_thread(holder.close)
        batch = await ended(client, await creating)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 20


def _held(path: Path) -> sqlite3.Connection:
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    return holder


async def test_a_database_held_for_too_long_is_told_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(runner, "INSIST_SECONDS", 0.05)
    async with through(tmp_path, A_CALL_AT_A_TIME) as (_, client, _):
        batch = await _until(client, await submit(client, jsonl(map(request, range(30)))), 5)
    async with through(tmp_path) as (_, client, _):
        holder = await asyncio.to_thread(_held, tmp_path / sqlite.FILE)
        with pytest.raises(openai.InternalServerError, match="another program has held"):
            await upload(client, b"x")
        await asyncio.to_thread(holder.close)
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 30


# ── the upstream ──


async def test_an_upstream_that_is_not_there_pauses_the_batch_until_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.batches.lane.PAUSE_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(breaker, "FEW", 10_000)  # else these hurried probes would themselves keep it limited
    async with simulating(FOUR_TOKENS) as simulator:
        port = simulator.port
    said = settings(at(f"http://127.0.0.1:{port}/v1"), state=State(path=str(tmp_path)))
    async with serving(said) as house, house.sdk() as client:
        batch = await submit(client, jsonl(map(request, range(30))))
        async with asyncio.timeout(10):
            while "penstock" not in (batch.model_extra or {}):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert (batch.model_extra or {})["penstock"]["paused"]["reason"] == "connect"
        async with simulating(FOUR_TOKENS, port=port):
            batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (30, 0)
        assert "penstock" not in (batch.model_extra or {})


async def test_an_upstream_that_fails_now_and_then_fails_no_item(tmp_path: Path) -> None:
    flaky = replace(FOUR_TOKENS, error_rate=0.2, reset_rate=0.1)
    async with through(tmp_path, flaky) as (_, client, simulator):
        batch = await ended(client, await submit(client, jsonl(map(request, range(60)))), seconds=18)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (60, 0)
        assert len(simulator.seen) > 60


async def test_an_item_that_always_fails_is_run_three_times_and_told(tmp_path: Path) -> None:
    async with through(tmp_path, replace(FOUR_TOKENS, outage=ALWAYS)) as (_, client, simulator):
        batch = await ended(client, await submit(client, jsonl([request(1)])))
        (failure,) = await lines(client, batch.error_file_id)
        assert failure["response"]["status_code"] == 500
        assert len(simulator.seen) == 9


async def test_a_queue_without_room_gives_items_back(tmp_path: Path) -> None:
    """Nobody may wait, and one call may be in flight: all others are refused at the gate, and come again."""
    slow = replace(FOUR_TOKENS, first_token_seconds=0.02)
    async with through(tmp_path, slow, gate=Gate(concurrency=4, queue_limit=0)) as (house, client, _):
        batch = await ended(client, await submit(client, jsonl(map(request, range(12)))), seconds=18)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (12, 0)
        assert (await house.metrics())("batch_items_total", outcome="again") > 0


# ── time ──


async def test_a_batch_that_is_not_done_in_time_expires_with_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.WINDOWS, "24h", 2)  # type: ignore[arg-type]
    async with through(tmp_path, A_CALL_AT_A_TIME) as (house, client, _):
        batch = await ended(client, await submit(client, jsonl(map(request, range(20)))))
        assert batch.status == "expired"
        assert batch.expired_at
        assert batch.request_counts is not None
        done = batch.request_counts.completed
        assert 1 <= done <= 5
        assert len(await lines(client, batch.output_file_id)) == done
        errors = await lines(client, batch.error_file_id)
        assert [each["error"]["code"] for each in errors] == ["batch_expired"] * (20 - done)
        assert (await house.metrics())("batch_jobs_finished_total", outcome="expired") == 1
        await house.until_idle()


@pytest.mark.parametrize("state", ["validating", "in_progress", "cancelling", "completed", "failed", "cancelled"])
async def test_a_cancel_in_every_state(tmp_path: Path, state: str) -> None:
    profile = FOUR_TOKENS if state == "completed" else A_CALL_AT_A_TIME
    content = b"{" if state == "failed" else jsonl(map(request, range(8)))
    async with through(tmp_path, profile) as (house, client, _):
        batch = await submit(client, content)
        if state in ("completed", "failed"):
            batch = await ended(client, batch)
        elif state != "validating":
            batch = await _until(client, batch, 5)
        if state in ("cancelling", "cancelled"):
            batch = await client.batches.cancel(batch.id)
        if state == "cancelled":
            batch = await ended(client, batch)
        if batch.status in ("completed", "failed", "cancelled"):
            with pytest.raises(openai.ConflictError, match=f"the batch is {batch.status}"):
                await client.batches.cancel(batch.id)
            assert (await client.batches.retrieve(batch.id)).status == batch.status
            return
        assert (await client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        batch = await ended(client, batch)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert counts.completed + counts.failed == counts.total
        await house.until_idle()


# ── the process ──


async def test_a_gateway_that_stops_lets_what_was_sent_end_and_gives_the_rest_back(tmp_path: Path) -> None:
    slow = replace(FOUR_TOKENS, first_token_seconds=0.3)
    async with through(tmp_path, slow, gate=Gate(concurrency=4)) as (house, client, before):
        batch = await submit(client, jsonl(map(request, range(20))))
        await until(lambda: len(before.seen) >= 4, "sent")
        assert await house.gateway.drain(10.0)
        sent = {seen.headers["idempotency-key"] for seen in before.seen}
    async with through(tmp_path) as (_, client, after):
        batch = await ended(client, batch)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 0)
        again = {seen.headers["idempotency-key"] for seen in after.seen}
        assert not sent & again
        assert len(sent | again) == 20


async def test_a_reload_that_takes_the_model_away_pauses_its_batch_and_one_that_gives_it_back_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.batches.lane.PAUSE_SECONDS", (0.05, 0.1))
    async with simulating(A_CALL_AT_A_TIME) as narrow, simulating(FOUR_TOKENS) as wide:
        state = State(path=str(tmp_path))
        now = settings(at(narrow.base_url), models={"m": {"upstreams": ("up",)}}, state=state)
        loaded = [now]
        async with serving(now, load=lambda: loaded[0]) as house, house.sdk() as client:
            batch = await _until(client, await submit(client, jsonl(map(request, range(200)))), 5)
            loaded[0] = settings(at(wide.base_url), models={"other": {"upstreams": ("up",)}}, state=state)
            await house.gateway.reload()
            loaded[0] = settings({"new": at(wide.base_url)}, models={"m": {"upstreams": ("new",)}}, state=state)
            await house.gateway.reload()
            batch = await client.batches.retrieve(batch.id)
            assert batch.status == "in_progress"
            await client.batches.cancel(batch.id)
            assert (await ended(client, batch)).status == "cancelled"
