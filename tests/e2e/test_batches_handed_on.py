"""A batch that its provider runs: handed on whole to an upstream's own Files and Batch API.

The provider is another gateway, which runs batches itself in front of a simulated one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from proxy.batches import handing
from proxy.config import Gate, Limits, Model, State
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings
from tests.e2e.scripted import Scripted, answer, refusal
from tests.e2e.test_batches import ended, jsonl, request, submit

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
HANDED = {"m": Model(upstreams=("up",), upstream_model="theirs", batch_mode="upstream")}


@pytest.fixture(autouse=True)
def _looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "LOOK_SECONDS", 0.02)


@asynccontextmanager
async def providing(
    folder: Path, profile: Profile = FOUR_TOKENS, **sections: Any
) -> AsyncIterator[tuple[House, Simulator]]:
    """A provider with a batch API."""
    async with simulating(profile, remember=10_000) as simulator:
        said = settings(at(simulator.base_url), state=State(path=str(folder / "provider")), **sections)
        async with serving(said) as provider:
            yield provider, simulator


@asynccontextmanager
async def before(base_url: str, folder: Path, **sections: Any) -> AsyncIterator[tuple[House, AsyncOpenAI]]:
    said = {"models": HANDED, "state": State(path=str(folder / "state"))} | sections
    async with serving(settings(at(base_url, limits=Limits(learn=False)), **said)) as house, house.sdk() as client:
        yield house, client


async def content(client: AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


async def test_a_batch_is_run_by_the_upstream_and_its_results_are_fetched(tmp_path: Path) -> None:
    async with providing(tmp_path) as (provider, simulator), before(provider.base_url, tmp_path) as (house, client):
        batch = await submit(client, jsonl(request(number) for number in range(600)), metadata={"mine": "1"})
        batch = await ended(client, batch)
        results = await content(client, batch.output_file_id)
        async with provider.sdk() as there:
            (theirs,) = (await there.batches.list()).data
            files = (await there.files.list(purpose="batch")).data
        metrics = await house.metrics()
    assert batch.status == "completed"
    assert batch.metadata == {"mine": "1"}
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (600, 600, 0)
    assert [result["custom_id"] for result in results] == [f"c-{number}" for number in range(600)]
    assert results[0]["response"]["body"]["choices"][0]["message"]["content"].startswith("echo: hello")
    assert batch.usage is not None
    assert batch.usage.output_tokens == 4 * 600
    assert theirs.metadata == {"penstock_batch": batch.id}
    assert batch.model_extra is not None
    assert batch.model_extra["penstock"] == {"upstream": "up", "upstream_batch_id": theirs.id}
    assert files == []
    assert all(json.loads(seen.body)["model"] == "theirs" for seen in simulator.seen)
    assert metrics("requests_total", operation="chat") == 0
    assert metrics("requests_total", operation="files", outcome="ok") >= 3
    assert metrics("batch_items_total", outcome="done") == 600


async def test_failures_come_into_the_error_file_as_the_upstream_said_them(tmp_path: Path) -> None:
    async with (
        providing(tmp_path, replace(FOUR_TOKENS, models=("other",))) as (provider, _),
        before(provider.base_url, tmp_path) as (_, client),
    ):
        batch = await ended(client, await submit(client, jsonl(request(number) for number in range(5))))
        errors = await content(client, batch.error_file_id)
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert {error["response"]["body"]["error"]["code"] for error in errors} == {"model_not_found"}


async def test_what_the_provider_finds_wrong_fails_the_batch(tmp_path: Path, upstream: Scripted) -> None:
    upstream.plays(
        answer({"id": "file-there"}),
        answer({"data": []}),
        answer({"id": "batch_there", "status": "validating"}),
        answer(
            {
                "id": "batch_there",
                "status": "failed",
                "errors": {"data": [{"code": "token_limit_exceeded", "message": "too much", "line": None}]},
            }
        ),
    )
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await ended(client, await submit(client, jsonl([request(1)])))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["token_limit_exceeded"]


@pytest.mark.parametrize("end", ["failed", "lost"])
async def test_a_batch_that_fails_there_in_the_middle_fails_what_has_no_result(
    tmp_path: Path, upstream: Scripted, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    upstream.plays(
        answer({"id": "file-there"}),
        answer({"data": []}),
        answer({"id": "batch_there", "status": "validating"}),
        answer({"id": "batch_there", "status": "in_progress"}),
        answer({"id": "batch_there", "status": "failed"}) if end == "failed" else refusal(404, message="gone"),
    )
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await ended(client, await submit(client, jsonl(request(number) for number in range(3))))
        errors = await content(client, batch.error_file_id)
    assert batch.status == "completed"
    assert [error["error"]["code"] for error in errors] == ["no_result"] * 3
    assert ("has lost it" in caplog.text) == (end == "lost")
    caplog.clear()


async def test_an_upstream_without_a_batch_api_fails_the_batch_with_its_words(
    tmp_path: Path, upstream: Scripted
) -> None:
    upstream.otherwise = refusal(404, "unknown_url", message="no such path")
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await ended(client, await submit(client, jsonl([request(1)])))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert (batch.errors.data[0].code, batch.errors.data[0].message) == ("unknown_url", "no such path")


async def test_a_batch_goes_on_at_the_next_start_and_is_made_there_once(tmp_path: Path) -> None:
    slow = replace(FOUR_TOKENS, first_token_seconds=0.1)
    async with providing(tmp_path, slow, gate=Gate(concurrency=1)) as (provider, _):
        async with before(provider.base_url, tmp_path) as (_, client):
            batch = await submit(client, jsonl(request(number) for number in range(12)))
            while batch.status != "in_progress":
                batch = await client.batches.retrieve(batch.id)
        async with before(provider.base_url, tmp_path) as (_, client):
            assert (await ended(client, batch)).status == "completed"
        async with provider.sdk() as there:
            assert len((await there.batches.list()).data) == 1


async def test_a_batch_whose_name_there_was_lost_is_found_by_its_mark(tmp_path: Path, upstream: Scripted) -> None:
    upstream.plays(answer({"id": "file-there"}), answer({"data": []}), refusal(500))
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await submit(client, jsonl([request(1)]))
        await upstream.exchange(3)  # it is looked for again
        there = {"id": "batch_there", "status": "completed", "metadata": {"penstock_batch": batch.id}}
        upstream.otherwise = answer({"data": [there], **there})
        batch = await ended(client, batch)
        errors = await content(client, batch.error_file_id)
    made = [exchange for exchange in upstream.exchanges if (exchange.method, exchange.path) == ("POST", "/v1/batches")]
    assert len(made) == 1
    assert errors[0]["error"]["code"] == "no_result"


async def test_a_cancel_is_handed_on_and_what_was_done_is_fetched(tmp_path: Path) -> None:
    limited = replace(FOUR_TOKENS, requests_per_minute=60.0, requests_burst=5.0)
    async with providing(tmp_path, limited) as (provider, _), before(provider.base_url, tmp_path) as (_, client):
        batch = await submit(client, jsonl(request(number) for number in range(50)))
        while batch.request_counts is None or not batch.request_counts.completed:
            batch = await client.batches.retrieve(batch.id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch)
        done = await content(client, batch.output_file_id)
        errors = await content(client, batch.error_file_id)
        async with provider.sdk() as there:
            (theirs,) = (await there.batches.list()).data
    assert (batch.status, theirs.status) == ("cancelled", "cancelled")
    assert len(done) >= 1
    assert len(done) + len(errors) == 50
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}


async def test_a_provider_that_is_not_there_pauses_the_batch_and_says_so(tmp_path: Path, upstream: Scripted) -> None:
    upstream.otherwise = refusal(401, "invalid_api_key")
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await submit(client, jsonl([request(1)]))
        await upstream.exchange(2)
        batch = await client.batches.retrieve(batch.id)
        assert batch.status == "validating"
        assert batch.model_extra is not None
        assert batch.model_extra["penstock"]["paused"]["reason"] == "auth"
        await client.batches.cancel(batch.id)
        assert (await ended(client, batch)).status == "cancelled"


async def test_results_that_come_in_any_order_and_twice_are_kept_once_in_the_input_s(
    tmp_path: Path, upstream: Scripted
) -> None:
    def line(number: int) -> bytes:
        body = {
            "choices": [{"message": {"content": str(number)}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        }
        said = {"id": "there", "custom_id": f"c-{number}", "response": {"status_code": 200, "body": body}}
        return json.dumps(said).encode() + b"\n"

    there = {"id": "batch_there", "status": "expired", "output_file_id": "file-out"}
    upstream.plays(
        answer({"id": "file-there"}),
        answer({"data": []}),
        answer({"id": "batch_there", "status": "validating"}),
        answer(there),
        answer(line(3) + line(1) + b"no JSON\n" + line(9) + line(1)),
    )
    async with before(upstream.base_url, tmp_path) as (_, client):
        batch = await ended(client, await submit(client, jsonl(request(number) for number in range(5))))
        done = await content(client, batch.output_file_id)
        errors = await content(client, batch.error_file_id)
    assert batch.status == "expired"
    assert [result["custom_id"] for result in done] == ["c-1", "c-3"]
    assert [error["error"]["code"] for error in errors] == ["batch_expired"] * 3
    assert batch.usage is not None
    assert batch.usage.total_tokens == 6


async def test_jobs_are_handed_on_too(tmp_path: Path) -> None:
    async with providing(tmp_path) as (provider, _), before(provider.base_url, tmp_path) as (house, _):
        answered = await house.ask({"prompts": ["a", "b"], "model": "m"}, "/batch")
        said: dict[str, Any] = {"status": "queued"}
        async with asyncio.timeout(10.0):
            while said["status"] in ("queued", "running"):
                said = (await house.ask(b"", f"/batch/{answered.json['job_id']}", method="GET")).json
    assert said["status"] == "completed"
    assert [result[:7] for result in said["results"]] == ["echo: a", "echo: b"]
