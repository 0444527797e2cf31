"""Anthropic's API as the simulated provider speaks it, seen by the official SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from proxy.core import usage
from proxy.simulator import ALWAYS, Profile, Simulator, Style, profiles, serving
from proxy.simulator.messages import THOUGHT

ASKED: Any = {"model": "claude-test", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4, style=Style.ANTHROPIC)
ECHO = "echo: hello runs down the"
BATCH: Any = [{"custom_id": name, "params": ASKED} for name in ("a", "b")]


@asynccontextmanager
async def speaking(profile: Profile = FOUR_TOKENS) -> AsyncIterator[tuple[Simulator, AsyncAnthropic]]:
    async with serving(profile) as simulator:
        origin = simulator.base_url.removesuffix("/v1")
        async with AsyncAnthropic(base_url=origin, api_key="sk-test", max_retries=0) as client:
            yield simulator, client


async def test_a_message_echoes_the_last_thing_the_user_said_and_counts_its_tokens() -> None:
    blocks: Any = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    async with speaking() as (_, client):
        whole = await client.messages.create(**ASKED | {"messages": blocks}, system="Be brief, please.")
        capped = await client.messages.create(**ASKED | {"max_tokens": 1})
    assert whole.content[0].type == "text"
    assert whole.content[0].text == ECHO
    assert usage.of(whole.usage.model_dump()) == usage.Usage(input=5, output=4)  # 22 characters
    assert (whole.stop_reason, capped.stop_reason) == ("end_turn", "max_tokens")


async def test_a_streamed_message_is_the_same_in_typed_events() -> None:
    async with speaking() as (_, client), client.messages.stream(**ASKED, thinking={"type": "adaptive"}) as stream:
        kinds = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].type == "thinking"
    assert message.content[0].thinking == THOUGHT


async def test_a_profile_of_any_style_speaks_to_anthropic_s_clients_in_their_shape() -> None:
    async with speaking(replace(profiles.INSTANT, style=Style.OPENAI, models=("claude-test",))) as (simulator, client):
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(**ASKED | {"model": "other"})
        with pytest.raises(anthropic.BadRequestError) as wrong:
            await client.messages.create(**ASKED | {"max_tokens": 0})
        simulator.provider.outage = ALWAYS
        with pytest.raises(anthropic.InternalServerError) as broken:
            await client.messages.create(**ASKED)
        simulator.provider.outage, simulator.provider.out_of_money = None, ALWAYS
        with pytest.raises(anthropic.RateLimitError) as refused:
            await client.messages.create(**ASKED)
    errors = [error.value.type for error in (unknown, wrong, broken, refused)]
    assert errors == ["not_found_error", "invalid_request_error", "api_error", "rate_limit_error"]


async def test_a_batch_is_made_listed_ended_and_read_and_deleted() -> None:
    async with speaking() as (_, client):
        made = await client.messages.batches.create(requests=BATCH)
        listed = [batch.id async for batch in client.messages.batches.list()]
        ended = await client.messages.batches.retrieve(made.id)
        results = {line.custom_id: line.result async for line in await client.messages.batches.results(made.id)}
        await client.messages.batches.delete(made.id)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(made.id)
    assert (made.processing_status, made.request_counts.processing, made.results_url) == ("in_progress", 2, None)
    assert listed == [made.id]
    assert (ended.processing_status, ended.request_counts.succeeded) == ("ended", 2)
    assert list(results) == ["a", "b"]
    assert results["a"].type == "succeeded"
    assert results["a"].message.content[0].type == "text"
    assert results["a"].message.content[0].text == ECHO


async def test_a_batch_that_is_cancelled_has_no_answers() -> None:
    async with speaking() as (_, client):
        made = await client.messages.batches.create(requests=BATCH)
        cancelled = await client.messages.batches.cancel(made.id)
        ended = await client.messages.batches.retrieve(made.id)
        results = [line.result.type async for line in await client.messages.batches.results(made.id)]
        with pytest.raises(anthropic.BadRequestError):
            await client.messages.batches.create(requests=[])
    assert cancelled.processing_status == "canceling"
    assert (ended.request_counts.canceled, results) == (2, ["canceled", "canceled"])
