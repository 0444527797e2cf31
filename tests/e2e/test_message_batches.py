"""Anthropic's Message Batches, run by the gateway itself and driven by Anthropic's SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types.messages import MessageBatch

from proxy.config import Model, Secret, State
from proxy.simulator import Profile, Simulator, profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, at, serving, settings, until
from tests.e2e.scripted import Scripted, answer

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
ONE, OTHER = "caller-key-one-0123456789", "caller-key-two-0123456789"
ASKED: Any = {"model": "claude", "max_tokens": 64, "messages": [{"role": "user", "content": "hello"}]}


def requests(count: int, **said: Any) -> Any:
    return [{"custom_id": f"c-{number}", "params": ASKED | said} for number in range(count)]


@asynccontextmanager
async def through(
    folder: Path, profile: Profile = FOUR_TOKENS, **sections: Any
) -> AsyncIterator[tuple[House, AsyncAnthropic, Simulator]]:
    async with simulating(profile, remember=1000) as simulator:
        up = at(simulator.base_url, dialect="anthropic")
        async with (
            serving(settings(up, state=State(path=str(folder / "state")), **sections)) as house,
            sdk(house) as client,
        ):
            yield house, client, simulator


def sdk(house: House, key: str = "sk-client") -> AsyncAnthropic:
    return AsyncAnthropic(base_url=house.origin, api_key=key, max_retries=0)


async def ended(client: AsyncAnthropic, batch: MessageBatch) -> MessageBatch:
    async with asyncio.timeout(15.0):
        while batch.processing_status != "ended":
            await asyncio.sleep(0.02)
            batch = await client.messages.batches.retrieve(batch.id)
    return batch


async def results(client: AsyncAnthropic, batch: MessageBatch) -> dict[str, Any]:
    return {line.custom_id: line.result async for line in await client.messages.batches.results(batch.id)}


async def test_the_whole_life_of_a_message_batch(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, client, simulator):
        made = await client.messages.batches.create(requests=requests(30))
        assert made.processing_status == "in_progress"
        assert made.request_counts.processing == 30
        batch = await ended(client, made)
        told = await results(client, batch)
        listed = [each.id async for each in client.messages.batches.list()]
        deleted = await client.messages.batches.delete(batch.id)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(batch.id)
        metrics = await house.metrics()
    counts = batch.request_counts
    assert (counts.succeeded, counts.processing, counts.errored, counts.canceled, counts.expired) == (30, 0, 0, 0, 0)
    assert batch.results_url == f"/v1/messages/batches/{batch.id}/results"
    assert batch.ended_at is not None
    assert set(told) == {f"c-{number}" for number in range(30)}
    assert all(result.type == "succeeded" for result in told.values())
    assert told["c-0"].message.content[0].text.startswith("echo: hello")
    assert (listed, deleted.id) == ([batch.id], batch.id)
    assert all(seen.path == "/v1/messages" for seen in simulator.seen)
    assert all(seen.headers["anthropic-version"] for seen in simulator.seen)
    assert metrics("requests_total", operation="messages", outcome="ok") == 30
    assert metrics("batch_items_total", outcome="done") == 30
    assert metrics("tokens_total", type="output") == 120


async def test_an_item_that_the_upstream_refuses_has_errored_in_its_words(tmp_path: Path, upstream: Scripted) -> None:
    wrong = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    upstream.otherwise = answer(wrong, 400)
    up = at(upstream.base_url, dialect="anthropic")
    async with serving(settings(up, state=State(path=str(tmp_path)))) as house, sdk(house) as client:
        batch = await ended(client, await client.messages.batches.create(requests=requests(2)))
        told = await results(client, batch)
    assert batch.request_counts.errored == 2
    assert [(result.type, result.error.error.message) for result in told.values()] == [("errored", "too long")] * 2


async def test_what_was_not_run_when_it_is_cancelled_is_canceled(tmp_path: Path) -> None:
    slow = replace(FOUR_TOKENS, requests_per_minute=1, requests_burst=5)
    async with through(tmp_path, slow) as (house, client, simulator):
        batch = await client.messages.batches.create(requests=requests(20))
        await until(lambda: len(simulator.seen) >= 5)
        early = await house.ask(b"", f"/v1/messages/batches/{batch.id}/results", method="GET")
        assert (early.status, "not ended" in early.error["message"]) == (400, True)
        with pytest.raises(anthropic.APIStatusError, match="cancel it first"):
            await client.messages.batches.delete(batch.id)
        cancelled = await client.messages.batches.cancel(batch.id)
        assert cancelled.processing_status == "canceling"
        assert cancelled.cancel_initiated_at is not None
        batch = await ended(client, batch)
        told = await results(client, batch)
    counts = batch.request_counts
    assert counts.succeeded + counts.canceled == 20
    assert counts.canceled == sum(result.type == "canceled" for result in told.values()) > 0


async def test_a_message_batch_goes_on_at_the_next_start(tmp_path: Path) -> None:
    slow = replace(FOUR_TOKENS, requests_per_minute=1, requests_burst=5)
    async with through(tmp_path, slow) as (_, client, simulator):
        batch = await client.messages.batches.create(requests=requests(20))
        await until(lambda: len(simulator.seen) >= 5)
    async with through(tmp_path) as (_, client, _):
        assert (await ended(client, batch)).request_counts.succeeded == 20


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": [{"custom_id": "a b", "params": ASKED}]}, "custom_id"),
        ({"requests": [{"custom_id": "a"}]}, "params"),
        ({"requests": [{"custom_id": "a", "params": {"max_tokens": 1}}]}, "requests.0.params"),
        ({"requests": [{"custom_id": "a", "params": ASKED}] * 2}, "duplicate"),
        ({"requests": [{"custom_id": "a", "params": ASKED | {"stream": True}}]}, "streamed"),
        ({"requests": [*requests(1), {"custom_id": "b", "params": ASKED | {"model": "other"}}]}, "same model"),
        (b"{", "JSON"),
    ],
)
async def test_what_is_wrong_with_a_message_batch_is_told_at_once(tmp_path: Path, said: object, word: str) -> None:
    async with through(tmp_path) as (house, client, _):
        answered = await house.ask(said, "/v1/messages/batches", headers={"anthropic-version": "2023-06-01"})
        assert (answered.status, answered.json["type"]) == (400, "error")
        assert word in answered.error["message"]
        assert [each async for each in client.messages.batches.list()] == []


async def test_the_list_has_pages_both_ways(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, client, _):
        made = [(await client.messages.batches.create(requests=requests(1))).id for _ in range(5)]
        answered = await house.ask({"prompts": ["no message batch"], "model": "claude"}, "/batch")
        assert answered.error["code"] == "wrong_dialect"
        newest = made[::-1]
        assert [each.id async for each in client.messages.batches.list(limit=2)] == newest
        page = await client.messages.batches.list(limit=2, after_id=newest[1])
        assert ([each.id for each in page.data], page.has_more) == (newest[2:4], True)
        page = await client.messages.batches.list(limit=2, before_id=newest[3])
        assert ([each.id for each in page.data], page.has_more) == (newest[1:3], True)
        page = await client.messages.batches.list(limit=5, before_id=newest[1])
        assert ([each.id for each in page.data], page.has_more) == (newest[:1], False)


async def test_a_caller_s_message_batches_are_nobody_else_s(tmp_path: Path) -> None:
    callers = {"one": Secret(ONE), "two": Secret(OTHER)}
    async with through(tmp_path, callers=callers) as (house, _, _), sdk(house, ONE) as one, sdk(house, OTHER) as other:
        batch = await ended(one, await one.messages.batches.create(requests=requests(1)))
        assert [each async for each in other.messages.batches.list()] == []
        for asking in (
            other.messages.batches.retrieve(batch.id),
            other.messages.batches.results(batch.id),
            other.messages.batches.cancel(batch.id),
            other.messages.batches.delete(batch.id),
        ):
            with pytest.raises(anthropic.NotFoundError) as foreign:
                await asking
            assert "there is no message batch" in str(foreign.value)
        assert (await one.messages.batches.retrieve(batch.id)).id == batch.id


async def test_where_its_provider_is_to_run_them_they_are_passed_on_and_still_their_maker_s(tmp_path: Path) -> None:
    callers = {"one": Secret(ONE), "two": Secret(OTHER)}
    models = {"claude": Model(upstreams=("up",), batch_mode="upstream")}
    async with (
        through(tmp_path, callers=callers, models=models) as (house, _, simulator),
        sdk(house, ONE) as one,
        sdk(house, OTHER) as other,
    ):
        batch = await ended(one, await one.messages.batches.create(requests=requests(1)))
        assert [seen.path for seen in simulator.seen][:1] == ["/v1/messages/batches"]
        with pytest.raises(anthropic.NotFoundError):
            await other.messages.batches.retrieve(batch.id)
        assert (await one.messages.batches.retrieve(batch.id)).id == batch.id
