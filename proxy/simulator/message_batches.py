"""Anthropic's message batches, as far as a client can see: made, listed, ended when they are next looked at, deleted.

Every request succeeds; those of a batch that was cancelled first do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from proxy.simulator import answers
from proxy.simulator.asks import decode
from proxy.simulator.messages import Create

_TOKENS = 4  # of each answer
_encode = msgspec.json.encode


class _Request(msgspec.Struct):
    custom_id: str
    params: Create


class _Creation(msgspec.Struct):
    requests: Annotated[list[_Request], msgspec.Meta(min_length=1)]


@dataclass(slots=True)
class _Batch:
    id: str
    requests: list[_Request]
    created: datetime
    cancelled: datetime | None = None
    ended: datetime | None = None


class MessageBatches:
    """All batches of one provider."""

    def __init__(self) -> None:
        self._known: dict[str, _Batch] = {}

    def create(self, body: bytes, serial: str, base_url: str) -> dict[str, object]:
        """Raises BadAsk."""
        said = decode(body, _Creation)
        batch = _Batch(f"msgbatch_{serial}", said.requests, datetime.now(UTC))
        self._known[batch.id] = batch
        return _told(batch, base_url)

    def listed(self, base_url: str) -> dict[str, object]:
        """All of them, the latest first."""
        data = [_told(batch, base_url) for batch in reversed(self._known.values())]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}

    def show(self, identity: str, base_url: str) -> dict[str, object] | None:
        """It has ended by now; None: there is no such batch."""
        batch = self._known.get(identity)
        if batch is None:
            return None
        batch.ended = batch.ended or datetime.now(UTC)
        return _told(batch, base_url)

    def cancel(self, identity: str, base_url: str) -> dict[str, object] | None:
        batch = self._known.get(identity)
        if batch is None:
            return None
        if batch.ended is None:
            batch.cancelled = datetime.now(UTC)
        return _told(batch, base_url)

    def delete(self, identity: str, base_url: str) -> dict[str, object] | None:
        if self._known.pop(identity, None) is None:
            return None
        return {"id": identity, "type": "message_batch_deleted"}

    def results(self, identity: str) -> bytes | None:
        """A line for each request; None while there are none."""
        batch = self._known.get(identity)
        if batch is None or batch.ended is None:
            return None
        return b"".join(
            _encode({"custom_id": request.custom_id, "result": _result(batch, request)}) + b"\n"
            for request in batch.requests
        )


def _told(batch: _Batch, base_url: str) -> dict[str, object]:
    state = "ended" if batch.ended else "canceling" if batch.cancelled else "in_progress"
    became = {"ended": "canceled" if batch.cancelled else "succeeded"}.get(state, "processing")
    counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": state,
        "request_counts": counts | {became: len(batch.requests)},
        "created_at": _date(batch.created),
        "expires_at": _date(batch.created + timedelta(hours=24)),
        "ended_at": batch.ended and _date(batch.ended),
        "cancel_initiated_at": batch.cancelled and _date(batch.cancelled),
        "archived_at": None,
        "results_url": f"{base_url}/messages/batches/{batch.id}/results" if batch.ended else None,
    }


def _result(batch: _Batch, request: _Request) -> dict[str, object]:
    if batch.cancelled:
        return {"type": "canceled"}
    params = request.params
    message: dict[str, object] = {
        "id": f"msg_{batch.id.removeprefix('msgbatch_')}_{request.custom_id}",
        "type": "message",
        "role": "assistant",
        "model": params.model,
        "content": [{"type": "text", "text": answers.text(params.prompt, _TOKENS)}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": max(1, params.characters // 4), "output_tokens": _TOKENS},
    }
    return {"type": "succeeded", "message": message}


def _date(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")
