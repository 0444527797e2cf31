"""One item as an ordinary call: the same relay, gate, retries and record as any other; only its sink differs.

line -> Call(priority batch, caller the owner, deadline the batch's expiry) -> Relay.run -> what became of it
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from proxy.batches.lane import Pause
from proxy.batches.store import Item
from proxy.collected import ANSWER_BYTES_MAX, Collected
from proxy.core import asked, batch
from proxy.core.batch import Batch, End, Result
from proxy.core.gate import Priority
from proxy.core.headers import ANTHROPIC_VERSION
from proxy.core.outcome import Outcome, Reason
from proxy.errors import (
    BodyTooLarge,
    ClientGone,
    Draining,
    GatewayError,
    Internal,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    StepRefused,
    UpstreamError,
    UpstreamShut,
    UpstreamUnreachable,
)
from proxy.plan import Plan, Route
from proxy.relay import Call, Memory, Policy, Runs
from proxy.telemetry import Record, Telemetry, story

log = logging.getLogger("penstock.batches")

CLAIMS_MAX = 3  # of an item whose upstream fails it; each has the retries of any call
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
    batch.MESSAGES: "messages",
}


@dataclass(slots=True, frozen=True)
class Ended:
    """What became of an item.

    Attributes:
        result: of DONE and FAILED.
        pause: of PAUSE.
        retry_after: seconds until others are to be run, 0.0 for at once; None: nobody said.
    """

    end: End
    result: Result | None = None
    pause: Pause | None = None
    retry_after: float | None = None


class Items:
    """Runs items.

    Args:
        plan: the plan in force; an item keeps the one that it began with.
        now, wall: the monotonic clock and the epoch's.
    """

    def __init__(
        self,
        relay: Runs,
        telemetry: Telemetry,
        plan: Callable[[], Plan],
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._relay, self._telemetry, self._plan = relay, telemetry, plan
        self._now, self._wall = now, wall

    def begin(self, of: Batch, item: Item, decided: Callable[[], None]) -> Record:
        """The record of a run; `decided` is called when the gate has let it in, or refused it."""
        operation = OPERATIONS[of.endpoint]
        item_id = of.item_id(item.line)
        record = self._telemetry.begin(operation, "POST", of.endpoint, request_id=item_id, traceparent=None)
        record.linked = of.traceparent
        record.caller, record.priority, record.asked_model = of.owner, "batch", of.model
        record.decided = decided
        return record

    async def run(self, of: Batch, item: Item, line: bytes, record: Record, memory: Memory | None) -> Ended:
        """One claim's run. What nobody foresaw is logged, and is the item's failure: it would be so again."""
        sink = Collected()
        with self._telemetry.request(record):
            try:
                plan = self._plan()
                route = plan.route(of.model)
                if route is None:
                    raise ModelNotFound(f"the model `{of.model}` is not known here any more")
                record.model = route.name
                await self._relay.run(self._call(of, line, record, route, plan, memory), sink, record)
            except GatewayError as error:
                return self._refused(of, item, record, error)
            except ClientGone:
                record.outcome, record.status = Outcome.REJECTED, BodyTooLarge.status
                record.error_type, record.error_source = BodyTooLarge.word, BodyTooLarge.source
                message = f"the answer is longer than {ANSWER_BYTES_MAX >> 20} MiB; ask for less"
                return Ended(End.FAILED, self._unanswered(of, item, "answer_too_large", message))
            except Exception as error:  # noqa: BLE001  # as at the edge: counted and logged, once
                log.error("item %s failed: %s", record.request_id, story(error))
                record.outcome = Outcome.FAILED
                record.error_type, record.error_source = Internal.word, Internal.source
                message = f"internal error; it is logged as {record.request_id}"
                return Ended(End.FAILED, self._unanswered(of, item, Internal.default_code, message))
        return self._answered(of, item, record, sink)

    def _call(self, of: Batch, line: bytes, record: Record, route: Route, plan: Plan, memory: Memory | None) -> Call:
        wanted = asked.read(batch.body_of(line))
        record.max_tokens, record.bytes_in = wanted.max_tokens, len(wanted.body)
        retry = plan.settings.retry
        return Call(
            method="POST",
            path=of.endpoint.removeprefix("/v1"),
            route=route,
            asked=wanted,
            headers={
                "content-type": "application/json",
                "idempotency-key": record.request_id,
                **(ANTHROPIC_VERSION if of.endpoint == batch.MESSAGES else {}),
            },
            credential={},
            priority=Priority.BATCH,
            caller=of.owner,
            deadline=self._now() + of.expires_at - self._wall(),
            policy=Policy(retry.attempts, retry.base_seconds, retry.cap_seconds),
            reports_usage=False,
            memory=memory,
        )

    def _answered(self, of: Batch, item: Item, record: Record, sink: Collected) -> Ended:
        if record.run is not None:  # a pipeline that failed has raised
            line = batch.answered(record.request_id, item.custom_id, sink.status, record.request_id, sink.body)
            return Ended(End.DONE, Result(True, line, record.usage))
        last = record.attempts[-1]
        end = batch.end_of(record.outcome, last.meaning.reason, sink.status)
        if end is End.PAUSE:
            return self._pause(last.meaning.reason.value, f"upstream {record.upstream} said {sink.status}", None)
        if end is End.AGAIN:
            return Ended(End.AGAIN, retry_after=last.retry_after)
        if end is End.FAILED and self._may_run_again(record, item):
            return Ended(End.AGAIN, retry_after=0.0)  # its own trouble: the others need not wait for it
        if sink.broke is not None:
            return Ended(End.FAILED, self._unanswered(of, item, sink.broke.code, str(sink.broke)))
        request_id = last.request_id or record.request_id
        line = batch.answered(record.request_id, item.custom_id, sink.status, request_id, sink.body)
        return Ended(end, Result(end is End.DONE, line, record.usage))

    def _refused(self, of: Batch, item: Item, record: Record, error: GatewayError) -> Ended:
        record.status = error.status
        if not isinstance(error, UpstreamError):  # the relay has said what became of an attempt
            record.outcome = Outcome.REJECTED
            record.error_type, record.error_source = error.word, error.source
        if isinstance(error, QueueFull | QueueTimeout | Draining):
            return Ended(End.AGAIN, retry_after=error.retry_after)
        if isinstance(error, UpstreamShut):
            # Where it only fails, a share of the calls is turned away, and what is turned away counts: asked by the
            # second, it would never be found well again.
            reason = self._relay.breakers[record.upstream].reason
            word = "failing" if reason is Reason.NONE else reason.value
            return self._pause(word, str(error), error.retry_after)
        if isinstance(error, UpstreamUnreachable):
            return self._pause(Reason.CONNECT.value, str(error), None)
        if isinstance(error, ModelNotFound):  # a reload took it away, and another may give it back
            return self._pause(error.code, str(error), None)
        if isinstance(error, StepRefused):
            end = batch.end_of(record.outcome, error.reason, error.status)
            if end is End.PAUSE:
                return self._pause(error.reason.value, str(error), None)
            if end is End.AGAIN:
                return Ended(End.AGAIN)
        if self._may_run_again(record, item):
            return Ended(End.AGAIN, retry_after=0.0)
        if error.more:  # what a pipeline tells with it
            body = msgspec.json.encode(error.as_dict())
            line = batch.answered(record.request_id, item.custom_id, error.status, record.request_id, body)
            return Ended(End.FAILED, Result(False, line))
        return Ended(End.FAILED, self._unanswered(of, item, error.code, str(error)))

    @staticmethod
    def _may_run_again(record: Record, item: Item) -> bool:
        return record.outcome in (Outcome.FAILED, Outcome.TRUNCATED) and item.attempt < CLAIMS_MAX

    def _pause(self, reason: str, message: str, seconds: float | None) -> Ended:
        return Ended(End.PAUSE, pause=Pause(reason, message, self._wall()), retry_after=seconds)

    @staticmethod
    def _unanswered(of: Batch, item: Item, code: str, message: str) -> Result:
        return Result(False, batch.unanswered(of.item_id(item.line), item.custom_id, code, message))
