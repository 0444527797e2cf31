"""Files and batches through the assembled gateway, by the official SDK and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch

from proxy.config import Secret, State
from proxy.simulator import ALWAYS, Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import HELLO, House, at, serving, settings

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def through(
    state: Path, profile: Profile = FOUR_TOKENS, **sections: Any
) -> AsyncIterator[tuple[House, AsyncOpenAI, Simulator]]:
    """The gateway in front of a simulated provider, with state in this directory."""
    async with simulating(profile, remember=100_000) as simulator:
        said = settings(at(simulator.base_url), state=State(path=str(state)), **sections)
        async with serving(said) as house, house.sdk() as client:
            yield house, client, simulator


def request(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    told = {"model": "m", "messages": HELLO} | body
    return {"custom_id": f"c-{number}", "method": "POST", "url": url, "body": told}


def jsonl(requests: Iterable[object]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in requests)


async def upload(client: AsyncOpenAI, content: bytes) -> str:
    return (await client.files.create(file=("in.jsonl", content), purpose="batch")).id


async def submit(client: AsyncOpenAI, content: bytes, endpoint: Any = CHAT, **more: Any) -> Batch:
    file_id = await upload(client, content)
    return await client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **more)


async def ended(client: AsyncOpenAI, batch: Batch, *, seconds: float = 15.0) -> Batch:
    async with asyncio.timeout(seconds):
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def lines(client: AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


async def test_the_whole_life_of_a_batch(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, client, simulator):
        file = await client.files.create(file=("in.jsonl", jsonl(map(request, range(20)))), purpose="batch")
        assert (file.purpose, file.filename, file.object) == ("batch", "in.jsonl", "file")
        assert file.expires_at == file.created_at + 30 * 86_400
        assert (await client.files.retrieve(file.id)).bytes == file.bytes
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"for": "the test"}
        )
        assert (batch.status, batch.object, batch.metadata) == ("validating", "batch", {"for": "the test"})
        assert batch.expires_at == batch.created_at + 86_400
        batch = await ended(client, batch)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
        assert (batch.error_file_id, batch.errors, batch.model) == (None, None, "m")
        assert None not in (batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert batch.usage is not None
        assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (20, 80, 100)
        results = await lines(client, batch.output_file_id)
        assert [result["custom_id"] for result in results] == [f"c-{number}" for number in range(20)]
        assert all(result["id"].startswith("batch_req_") and result["error"] is None for result in results)
        assert all(result["response"]["status_code"] == 200 for result in results)
        assert results[0]["response"]["body"]["choices"][0]["message"]["content"].startswith("echo: hello")
        assert [each.id async for each in client.batches.list()] == [batch.id]
        assert {each.id async for each in client.files.list()} == {file.id, batch.output_file_id}
        assert [each.id async for each in client.files.list(purpose="batch_output")] == [batch.output_file_id]
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        sent = [seen.headers["idempotency-key"] for seen in simulator.seen if "idempotency-key" in seen.headers]
        assert len(set(sent)) == 20
        assert set(sent) == {result["id"] for result in results}
        told = await house.metrics()
        assert told("batch_items_total", outcome="done") == 20
        assert told("batch_jobs_finished_total", outcome="completed") == 1
        assert told("requests_total", operation="chat", outcome="ok") == 20
        assert told("gate_admissions_total", priority="batch") == 20


async def test_failures_go_into_the_error_file_with_what_the_upstream_said(tmp_path: Path) -> None:
    async with through(tmp_path, replace(FOUR_TOKENS, models=("known",))) as (_, client, _):
        batch = await ended(client, await submit(client, jsonl([request(1, model="unknown")])))
        assert (batch.status, batch.output_file_id) == ("completed", None)
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (1, 0, 1)
        (failure,) = await lines(client, batch.error_file_id)
        assert failure["custom_id"] == "c-1"
        assert failure["response"]["status_code"] == 404
        assert failure["response"]["body"]["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
async def test_every_endpoint_runs_in_a_batch(tmp_path: Path, endpoint: str, body: dict[str, str]) -> None:
    line = {"custom_id": "c", "method": "POST", "url": endpoint, "body": {"model": "m"} | body}
    async with through(tmp_path) as (_, client, _):
        batch = await ended(client, await submit(client, jsonl([line]), endpoint))
        (result,) = await lines(client, batch.output_file_id)
        assert result["response"]["status_code"] == 200


async def test_a_batch_with_a_mistake_runs_nothing_and_tells_all_of_them(tmp_path: Path) -> None:
    bad = jsonl([request(1), request(1)]) + b"{\n" + jsonl([request(2, url="/v1/embeddings")])
    async with through(tmp_path) as (_, client, simulator):
        batch = await ended(client, await submit(client, bad))
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.failed_at
        assert batch.errors is not None
        assert [(each.code, each.line, each.param) for each in batch.errors.data or ()] == [
            ("duplicate_custom_id", 2, "custom_id"),
            ("invalid_json_line", 3, None),
            ("invalid_url", 4, "url"),
        ]
        assert not simulator.seen


async def test_what_is_done_can_be_read_while_the_batch_runs_and_is_kept_when_it_is_cancelled(tmp_path: Path) -> None:
    """A provider that takes five calls, and then one a minute."""
    profile = replace(FOUR_TOKENS, requests_per_minute=1, requests_burst=5)
    async with through(tmp_path, profile) as (house, client, _):
        batch = await submit(client, jsonl(map(request, range(40))))
        async with asyncio.timeout(10):
            while batch.request_counts is None or batch.request_counts.completed < 5:
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        assert len(await lines(client, batch.output_file_id)) == 5
        with pytest.raises(openai.ConflictError, match="still writes this file"):
            await client.files.delete(batch.output_file_id or "")
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("cancelled", 5)
        assert None not in (batch.cancelling_at, batch.cancelled_at)
        assert len(await lines(client, batch.output_file_id)) == 5
        errors = await lines(client, batch.error_file_id)
        assert [(each["response"], each["error"]["code"]) for each in errors] == [(None, "batch_cancelled")] * 35
        with pytest.raises(openai.ConflictError, match="is cancelled; it can no longer be cancelled"):
            await client.batches.cancel(batch.id)
        await house.until_idle()


async def test_a_batch_goes_on_where_the_process_before_left_it(tmp_path: Path) -> None:
    profile = replace(FOUR_TOKENS, requests_per_minute=1, requests_burst=5)
    async with through(tmp_path, profile) as (_, client, before):
        batch = await submit(client, jsonl(map(request, range(12))))
        async with asyncio.timeout(10):
            while batch.request_counts is None or batch.request_counts.completed < 5:
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        first = {seen.headers["idempotency-key"] for seen in before.seen}
    async with through(tmp_path) as (_, client, after):
        batch = await ended(client, batch)
        assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("completed", 12)
        results = await lines(client, batch.output_file_id)
        assert [result["custom_id"] for result in results] == [f"c-{number}" for number in range(12)]
        second = {seen.headers["idempotency-key"] for seen in after.seen}
        assert len(second) == 7
        assert first | second == {result["id"] for result in results}


async def test_no_money_pauses_the_batch_says_so_and_fails_nothing(tmp_path: Path) -> None:
    async with through(tmp_path, replace(FOUR_TOKENS, out_of_money=ALWAYS)) as (house, client, _):
        batch = await submit(client, jsonl(map(request, range(50))))
        async with asyncio.timeout(10):
            while "penstock" not in (batch.model_extra or {}):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (0, 0)
        told = (batch.model_extra or {})["penstock"]["paused"]
        assert told["reason"] == "money"
        assert (await house.metrics())("batch_items_total", outcome="failed") == 0
        await client.batches.cancel(batch.id)
        assert (await ended(client, batch)).status == "cancelled"


async def test_a_callers_files_and_batches_are_nobody_elses(tmp_path: Path) -> None:
    keys = {"one": Secret("sk-caller-one-0001"), "two": Secret("sk-caller-two-0002")}
    async with (
        through(tmp_path, callers=keys) as (house, _, _),
        house.sdk(api_key="sk-caller-one-0001") as one,
        house.sdk(api_key="sk-caller-two-0002") as two,
    ):
        file_id = await upload(one, jsonl([request(1)]))
        batch = await ended(one, await submit(one, jsonl([request(1)])))
        assert batch.output_file_id
        for known, unknown in ((file_id, "file-0"), (batch.output_file_id, "file-0")):
            for verb in (two.files.retrieve, two.files.content, two.files.delete):
                said = []
                for each in (known, unknown):
                    with pytest.raises(openai.NotFoundError) as caught:
                        await verb(each)
                    said.append(str(caught.value).replace(each, "ID"))
                assert said[0] == said[1]
        for ask in (two.batches.retrieve, two.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            await two.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        assert [each async for each in two.files.list()] == []
        assert [each async for each in two.batches.list()] == []
        assert len([each async for each in one.files.list(limit=1)]) == 3


async def test_a_gateway_without_state_says_so_and_serves_all_else() -> None:
    async with simulating(FOUR_TOKENS) as simulator, serving(settings(at(simulator.base_url))) as house:
        own = "/v1/files?purpose=batch"
        for method, path in (("GET", own), ("GET", "/v1/batches/batch_1"), ("POST", "/v1/batches/b/cancel")):
            answer = await house.ask(b"", path, method=method)
            assert (answer.status, answer.error["code"]) == (503, "state_off")
            assert "state.path" in answer.error["message"]
        assert (await house.ask()).status == 200


async def test_a_client_that_leaves_while_the_state_is_opened_takes_nothing_with_it(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, _, _):
        port = house.gateway.port
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /v1/batches HTTP/1.1\r\nhost: x\r\n\r\n")
            await writer.drain()
            writer.transport.abort()
        deadline = time.monotonic() + 10.0
        while (metrics := await house.metrics())("requests_total", operation="batches") < 3:
            assert time.monotonic() < deadline, metrics.text
            await asyncio.sleep(0.005)
        assert metrics("requests_total", operation="batches", code="499") > 0, "none of them left in time"
        answer = await house.ask(b"", "/v1/batches", method="GET")
        assert (answer.status, answer.json["data"]) == (200, [])


async def test_a_second_gateway_on_the_same_state_has_no_batches_and_serves_all_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with through(tmp_path) as (_, client, _):
        await upload(client, b"x")
        async with through(tmp_path) as (second, _, _):
            assert "batches are off: another gateway keeps its state there" in caplog.text
            answer = await second.ask(b"", "/v1/files?purpose=batch", method="GET")
            assert (answer.status, answer.error["code"]) == (503, "state_off")
            assert (await second.ask()).status == 200


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
    ],
)
async def test_what_is_wrong_with_a_batch_is_told_with_its_field(
    tmp_path: Path, wrong: dict[str, Any], param: str
) -> None:
    said = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"} | wrong
    async with through(tmp_path) as (house, _, _):
        answer = await house.ask(said, "/v1/batches")
        assert (answer.status, answer.error["param"]) == (400, param)
