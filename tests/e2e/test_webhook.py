"""The end of a batch, told to the operator's address: signed, until it is taken, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from proxy.batches import webhook as announcing
from proxy.config import Batches, Secret, State, Webhook
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import House, Metrics, at, serving, settings, until_still
from tests.e2e.scripted import Act, Exchange, Scripted, answer, refusal
from tests.e2e.test_batches import ended, jsonl, request, submit

SECRET = "whsec_" + base64.b64encode(b"a secret of the operator's, not ours").decode()
TAKEN = answer({"ok": True})


@asynccontextmanager
async def telling(state: Path, url: str, **sections: Any) -> AsyncIterator[House]:
    """A gateway whose batches' ends are told at this address."""
    told = Batches(webhook=Webhook(url=url, secret=Secret(SECRET)))
    async with simulating(replace(profiles.INSTANT, output_tokens=4), remember=0) as simulator:
        said = {"state": State(path=str(state)), "batches": told} | sections
        async with serving(settings(at(simulator.base_url), **said)) as house:
            yield house


def address(receiver: Scripted) -> str:
    return f"{receiver.base_url.removesuffix('/v1')}/told?by=penstock"


def unwrapped(exchange: Exchange, secret: str = SECRET) -> Any:
    """The event, as the official SDK verifies it."""
    with OpenAI(api_key="unused", webhook_secret=secret) as client:
        return client.webhooks.unwrap(exchange.body, exchange.headers)


async def tried(house: House, result: str) -> Metrics:
    """The metrics, once they tell of a try that ended so."""
    for _ in range(500):
        if (metrics := await house.metrics())("batch_webhooks_total", result=result):
            return metrics
        await asyncio.sleep(0.01)
    raise AssertionError(metrics.text)


async def test_a_batch_that_is_completed_is_told_as_openai_would(tmp_path: Path, upstream: Scripted) -> None:
    upstream.plays(TAKEN)
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        batch = await ended(client, await submit(client, jsonl([request(1)])))
        exchange = await upstream.exchange()
        event = unwrapped(exchange)
        await tried(house, "delivered")
    assert (exchange.method, exchange.path) == ("POST", "/told?by=penstock")
    assert (event.type, event.data.id, event.created_at) == ("batch.completed", batch.id, batch.completed_at)
    assert exchange.headers["webhook-id"] == event.id
    assert "authorization" not in exchange.headers
    with pytest.raises(InvalidWebhookSignatureError):
        unwrapped(exchange, "whsec_" + base64.b64encode(b"another secret, of another operator").decode())


async def test_a_batch_that_fails_and_one_that_is_cancelled_are_told_too(tmp_path: Path, upstream: Scripted) -> None:
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        failed = await ended(client, await submit(client, b"no JSON\n"))
        assert failed.status == "failed"
        batch = await submit(client, jsonl(request(number) for number in range(2000)))
        await client.batches.cancel(batch.id)
        assert (await ended(client, batch)).status == "cancelled"
        await upstream.exchange(1)
    told = [unwrapped(exchange) for exchange in upstream.exchanges]
    assert [(event.type, event.data.id) for event in told] == [
        ("batch.failed", failed.id),
        ("batch.cancelled", batch.id),
    ]


async def test_an_event_that_is_not_taken_comes_again_under_the_same_id(
    tmp_path: Path, upstream: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "PAUSE_SECONDS", (0.01, 0.01))
    upstream.plays(refusal(500), refusal(404), TAKEN)
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        await ended(client, await submit(client, jsonl([request(1)])))
        await upstream.exchange(2)
        metrics = await tried(house, "delivered")
    assert metrics("batch_webhooks_total", result="failed") == 2
    assert len({exchange.headers["webhook-id"] for exchange in upstream.exchanges}) == 1
    assert len({unwrapped(exchange).data.id for exchange in upstream.exchanges}) == 1
    assert len(upstream.exchanges) == 3


async def test_an_event_that_was_not_taken_is_sent_by_the_next_process(tmp_path: Path, upstream: Scripted) -> None:
    upstream.plays([Act.SILENCE], TAKEN)
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        batch = await ended(client, await submit(client, jsonl([request(1)])))
        await upstream.exchange()
    async with telling(tmp_path, address(upstream)):
        await upstream.exchange(1)
    first, second = upstream.exchanges
    assert unwrapped(second).data.id == batch.id
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        assert (await client.batches.retrieve(batch.id)).status == "completed"
    assert len(upstream.exchanges) == 2


async def test_an_event_is_given_up_after_days_and_counted(
    tmp_path: Path, upstream: Scripted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announcing, "GIVE_UP_SECONDS", -1.0)
    upstream.plays(refusal(500))
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        await ended(client, await submit(client, jsonl([request(1)])))
        await tried(house, "dropped")
    assert "could not be told" in caplog.text
    caplog.clear()


async def test_of_a_batch_that_was_removed_nobody_is_told_and_nothing_turns_idly(
    tmp_path: Path, upstream: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcing, "PAUSE_SECONDS", (0.01, 0.01))
    rounds = 0
    tell_all = announcing.Announcer._tell_all

    async def counted(announcer: announcing.Announcer) -> float | None:
        nonlocal rounds
        rounds += 1
        return await tell_all(announcer)

    monkeypatch.setattr(announcing.Announcer, "_tell_all", counted)
    upstream.otherwise = refusal(500)
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        batch = await ended(client, await submit(client, jsonl([request(1)])))
        await upstream.exchange(2)
        await house.gateway._batches.remove(await house.gateway._batches.batch("", batch.id))
        await until_still(lambda: rounds)


async def test_what_ended_before_there_was_a_webhook_is_not_told(tmp_path: Path, upstream: Scripted) -> None:
    async with telling(tmp_path, address(upstream), batches=Batches()) as house, house.sdk() as client:
        await ended(client, await submit(client, jsonl([request(1)])))
    async with telling(tmp_path, address(upstream)) as house, house.sdk() as client:
        later = await ended(client, await submit(client, jsonl([request(1)])))
        await upstream.exchange()
    assert [unwrapped(exchange).data.id for exchange in upstream.exchanges] == [later.id]
