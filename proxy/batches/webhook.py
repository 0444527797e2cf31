"""Tells one address, the operator's, that a batch has ended: OpenAI's events, signed as Standard Webhooks are.

    a batch ends, and that it is to be told is in the same commit -> POST, again and again -> answered 2xx -> told

1. An event is sent until it is answered with 2xx, whatever happens to this process; so it may come twice, under the
   same `webhook-id`.
2. Pauses grow, by chance, up to `PAUSE_SECONDS`; after `GIVE_UP_SECONDS` it is given up, and that is logged.
3. Nobody but the operator says where events go: no caller can make the gateway call an address.

Source: standardwebhooks.com, "Verifying webhook signatures"; OpenAI's API reference, "Webhook events".
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from proxy.batches.store import Store
from proxy.core import backoff
from proxy.core.batch import Batch
from proxy.errors import StateUnavailable
from proxy.plan import Webhook
from proxy.upstreams import AttemptFailed, Transport

log = logging.getLogger("penstock.batches")

PAUSE_SECONDS = (5.0, 3600.0)  # the first is drawn from up to the one, none from more than the other
GIVE_UP_SECONDS = 72 * 3600.0  # after the batch's end, as OpenAI does
ANSWER_BYTES = 1 << 16  # of the answer, which nobody reads


class Notes(Protocol):
    """Where it is written down what became of events; telemetry does."""

    def batch_webhook(self, result: str) -> None: ...


@dataclass(slots=True, frozen=True)
class _Try:
    failures: int
    due: float  # when it is tried again


class Announcer:
    """
    Args:
        webhook: where events go; None: nowhere, then a batch's end counts as told.
        now, wall: the monotonic clock and the epoch's.
        ends: set when a batch has ended.
        draw: random numbers in [0, 1).
    """

    def __init__(
        self,
        store: Store,
        transport: Transport,
        webhook: Callable[[], Webhook | None],
        notes: Notes,
        ends: asyncio.Event,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._transport, self._webhook, self._notes = store, transport, webhook, notes
        self._ends, self._now, self._wall, self._draw = ends, now, wall, draw
        self._tries: dict[str, _Try] = {}  # by batch, of those that have failed

    async def run(self) -> None:
        """Tell what is to be told, for ever."""
        while True:
            self._ends.clear()
            try:
                seconds = await self._tell_all()
            except StateUnavailable as error:
                seconds = error.retry_after or PAUSE_SECONDS[0]
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ends.wait()

    async def _tell_all(self) -> float | None:
        """One round; seconds until the next one, None where nothing is left."""
        batches = {batch.id: batch for batch in await self._store.untold()}
        self._tries = {
            name: tried for name, tried in self._tries.items() if name in batches
        }  # it may have been removed
        for name, batch in batches.items():
            if name not in self._tries or self._tries[name].due <= self._now():
                await self._tell(batch)
        due = [tried.due for tried in self._tries.values()]
        return max(0.0, min(due) - self._now()) if due else None

    async def _tell(self, batch: Batch) -> None:
        webhook = self._webhook()
        if webhook is not None:
            result = await self._tried(batch, webhook)
            self._notes.batch_webhook(result)
            if result == "failed":
                self._try_later(batch)
                return
        await self._store.mark_told(batch.id)
        self._tries.pop(batch.id, None)

    async def _tried(self, batch: Batch, webhook: Webhook) -> str:
        """A word of the metric: delivered, failed or dropped."""
        if await self._is_taken(batch, webhook):
            return "delivered"
        if self._wall() < batch.ended_at + GIVE_UP_SECONDS:
            return "failed"
        hours = GIVE_UP_SECONDS / 3600
        log.error("that %s is %s could not be told for %.0f h", batch.id, batch.status.value, hours)
        return "dropped"

    def _try_later(self, batch: Batch) -> None:
        failures = self._tries[batch.id].failures + 1 if batch.id in self._tries else 1
        base, cap = PAUSE_SECONDS
        pause = backoff.delay(failures - 1, self._draw(), base=base, cap=cap, retry_after=None)
        self._tries[batch.id] = _Try(failures, self._now() + pause)

    async def _is_taken(self, batch: Batch, webhook: Webhook) -> bool:
        body = event(batch)
        headers = {"content-type": "application/json", **signed(event_id(batch), int(self._wall()), body, webhook.key)}
        try:
            async with self._transport.send(webhook.target, "POST", "", headers, body) as reply:
                await reply.body(ANSWER_BYTES)
                why = str(reply.status)
                if 200 <= reply.status < 300:
                    return True
        except AttemptFailed as error:
            why = str(error)
        log.warning("the webhook was not told that %s is %s: %s", batch.id, batch.status.value, why)
        return False


def event_id(batch: Batch) -> str:
    """The same at every attempt."""
    return f"evt_{batch.id.removeprefix('batch_')}"


def event(batch: Batch) -> bytes:
    """OpenAI's event of a batch that has ended."""
    return msgspec.json.encode(
        {
            "object": "event",
            "id": event_id(batch),
            "type": f"batch.{batch.status.value}",
            "created_at": batch.ended_at,
            "data": {"id": batch.id},
        }
    )


def signed(event_id: str, timestamp: int, body: bytes, key: bytes) -> dict[str, str]:
    """The headers by which its receiver knows an event for ours."""
    content = f"{event_id}.{timestamp}.".encode() + body
    signature = b64encode(hmac.digest(key, content, "sha256")).decode()
    return {"webhook-id": event_id, "webhook-timestamp": str(timestamp), "webhook-signature": f"v1,{signature}"}
