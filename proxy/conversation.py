"""A WebSocket passed through: whole messages, in both directions, until one side closes.

    client --pump--> upstream
    client <--pump-- upstream      read on the side: usage, first token

1. A pump reads its next message when the last one was taken: a slow side stops the reading of the other.
2. Text and binary stay what they are. Pings are answered by each side's own connection.
3. What one side closes with, the other is closed with.
4. An upstream that is lost is its failure, and a client that is lost the client's. Who takes nothing for
   STALL_SECONDS is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from proxy.core import outcome
from proxy.core.outcome import Meaning, Outcome, Reason
from proxy.core.realtime import Reader
from proxy.errors import ClientGone, InvalidRequest
from proxy.tasks import Tasks
from proxy.telemetry import Record
from proxy.upstreams import AttemptFailed, Closing, Line
from proxy.watch import Late, Watch

STALL_SECONDS = 60.0  # that a side may take nothing of what is sent to it
_WELL = (1000, 1001)  # codes of an upstream that ends a session as it should


@dataclass(slots=True, frozen=True)
class Ending:
    """How a conversation ended.

    Attributes:
        closed, other: the side that closed, and the one that is still to be told.
    """

    closed: Line
    other: Line
    closing: Closing
    meaning: Meaning

    async def finish(self) -> None:
        """Close both: the one that did not with what the other said, the one that did as it asked."""
        await self.other.close(self.closing)
        await self.closed.close(self.closing)


async def hold(client: Line, upstream: Line, record: Record, now: Callable[[], float]) -> Ending:
    """Pass messages both ways until one side closes; the other is not told yet.

    Raises:
        AttemptFailed: the upstream was lost.
        ClientGone: the client was.
        InvalidRequest: the client sent what no WebSocket carries, or too much at once.
    """
    tasks, reader, began = Tasks(), Reader(), now()

    def heard(message: bytes) -> None:
        record.chunks += 1
        record.bytes_out += len(message)
        reader.hear(message)
        if reader.first_token and record.first_token is None:
            record.first_token = now()

    def said(message: bytes) -> None:
        record.bytes_in += len(message)

    up = tasks.spawn("realtime to the upstream", _pump(client, upstream, said, AttemptFailed(Reason.IDLE, "stalled")))
    down = tasks.spawn("realtime to the client", _pump(upstream, client, heard, ClientGone("stalled")))
    try:
        await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        first, closed, other = (down, upstream, client) if down.done() else (up, client, upstream)
        ended = first.result()
        if isinstance(ended, Exception):
            raise ended
        went_well = closed is client or ended.code in _WELL
        meaning = outcome.OK if went_well else outcome.of_failure(Reason.ERROR_EVENT, begun=True)
        return Ending(closed, other, ended, meaning)
    finally:
        await tasks.stop()
        if not up.cancelled():  # its connection may be closed by now, and this wait cancelled for it
            _note(record, up.result())
        record.upstream_seconds += now() - began
        record.usage, record.finish_reason = reader.usage, reader.finish_reason
        record.response_id, record.response_model = reader.session_id, reader.model


def _note(record: Record, ended: Closing | Exception) -> None:
    """How the client ended it."""
    if isinstance(ended, Closing):
        record.outcome = Outcome.OK
    elif isinstance(ended, InvalidRequest):
        record.outcome = Outcome.REJECTED
        record.error_type, record.error_source = ended.word, ended.source


async def _pump(source: Line, sink: Line, note: Callable[[bytes], None], stalled: Exception) -> Closing | Exception:
    """Carry messages until `source` closes, or one of the two is lost: then what is to be raised for it."""
    try:
        async with Watch[str]() as watch:
            while not isinstance(message := await source.receive(), Closing):
                note(message.data)
                watch.expect("taken", STALL_SECONDS)
                await sink.send(message)
                watch.rest()
            return message
    except Late:
        sink.abort()
        return stalled
    except (AttemptFailed, ClientGone, InvalidRequest) as error:
        return error
