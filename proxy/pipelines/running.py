"""One run of a pipeline: every step is an ordinary call, and what it gave is put into the templates of others.

    read -> [ step: when? -> map? -> call -> fits? -> (fallback | skip | fail) ]* -> the last step's answer

1. A step is a call like any other: same gate, same retries, same record, in the trace of the whole. The whole holds no
   place at the gate, so it never keeps one from its own steps.
2. A step begins as soon as all it waits for has ended. The last waits for all others, and its answer is the answer.
3. When one fails for good, those under way are cancelled; the error names it and keeps what the others gave.
4. What was paid for is remembered where the caller has a memory: a run that is made again begins where it stopped.
   Such a caller comes again, so what only time mends (no place at the gate, no money) is told to it, and not skipped.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import astuple, replace
from typing import Any

import msgspec

from proxy.collected import ANSWER_BYTES_MAX, Collected
from proxy.core import asked, batch, pipeline
from proxy.core.asked import Asked
from proxy.core.breaker import Breaker
from proxy.core.outcome import Outcome
from proxy.core.pipeline import INPUT, ITEM, OF_STEP, Unlisted, filled
from proxy.core.usage import Usage
from proxy.errors import (
    ClientGone,
    GatewayError,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    StepRefused,
    StepTimeout,
    StepUnfit,
    UpstreamError,
    UpstreamShut,
    UpstreamUnreachable,
)
from proxy.pipelines import asking
from proxy.pipelines.asking import Given, Spent
from proxy.pipelines.giving import Giving, LastStream
from proxy.plan import Pipeline, Route, Step
from proxy.relay import Call, Relay, Sink
from proxy.telemetry import Record, Run, StepTaken, Telemetry

CHAT = "/chat/completions"
NO_PLACE = (QueueFull, QueueTimeout)
MENDABLE = (UpstreamError, *NO_PLACE)  # what `on_error` is for


class Pipelines:
    """Runs calls: that of a pipeline step by step, any other by the relay.

    Args:
        now: the monotonic clock, in seconds.
        wall: seconds since the epoch.
    """

    def __init__(self, relay: Relay, telemetry: Telemetry, now: Callable[[], float], wall: Callable[[], float]) -> None:
        self.relay, self.telemetry, self.now, self.wall = relay, telemetry, now, wall

    def run(self, call: Call, sink: Sink, record: Record) -> Awaitable[None]:
        """As `Relay.run`, and raises what that raises.

        An error that a step ended with says so: `more` holds `step` and `completed_steps`. It may be raised after the
        answer has begun.
        """
        if call.route.pipeline is None:
            return self.relay.run(call, sink, record)
        return _Run(self, call.route.pipeline, call, sink, record).to_end()

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """The relay's."""
        return self.relay.breakers


class _Kept(msgspec.Struct, omit_defaults=True):
    """What a memory keeps of one call."""

    text: str
    value: Any
    result: str
    usage: tuple[int, int, int, int, int] | None = None
    cost: int | None = None


class _Run:
    def __init__(self, house: Pipelines, said: Pipeline, call: Call, sink: Sink, record: Record) -> None:
        wanted = call.asked
        if call.method != "POST" or call.path.partition("?")[0] != CHAT or not isinstance(wanted, Asked):
            raise InvalidRequest(f"`{record.model}` is a pipeline; ask for it at /v1{CHAT}", param="model")
        self._house, self._steps, self._call, self._record = house, said.steps, call, record
        self._last = said.steps[list(said.steps)[-1]]
        self._asked = asking.read(wanted.body)
        self._patience = call.deadline - record.arrived  # seconds that each step may wait for its place
        self._values = {INPUT: self._asked.text}
        self._gave: dict[str, Given] = {}
        self._calls: Counter[str] = Counter()
        self._spent = Spent()
        self._blamed: Record | None = None  # the call that failed last
        self._began = 0.0
        self._blocked = 0.0  # seconds that the last step's stream waited for the client
        self._giving = Giving(
            sink,
            record,
            self._spent,
            wants_usage=self._asked.wants_usage,
            tells=said.progress,
            now=house.now,
            created=int(house.wall()),
        )

    async def to_end(self) -> None:
        record = self._record
        run = record.run = Run()
        self._began = record.routed = self._house.now()
        try:
            await self._giving.open()
            await self._before_last()
            gave = await self._take(self._last)
            if gave.result == "failed":
                self._fail(None)
                return
            self._wait()
            if gave.is_passed:
                await self._giving.end()
            else:
                await self._giving.give(self._answer(), run.steps)
            record.outcome, record.end_reason = Outcome.OK, "done"
        except GatewayError as error:
            self._fail(error)
            raise
        finally:
            record.usage, record.cost = self._spent.usage, self._spent.cost
            self._wait()

    def _wait(self) -> None:
        """To the whole its steps are a wait, as long as they took; what the gateway spent on them is told with them."""
        record = self._record
        record.upstream_seconds = max(0.0, self._house.now() - self._began - self._blocked)

    async def _before_last(self) -> None:
        """All steps but the last, each as soon as those it waits for have ended."""
        waits = {name: step.waits_for for name, step in self._steps.items() if step is not self._last}
        begun: set[str] = set()

        def begin(group: asyncio.TaskGroup) -> None:
            for name in pipeline.ready(waits, begun, self._gave):
                begun.add(name)
                group.create_task(take(name, group))

        async def take(name: str, group: asyncio.TaskGroup) -> None:
            await self._take(self._steps[name])
            begin(group)

        async with _together() as group:
            begin(group)

    async def _take(self, step: Step) -> Given:
        """One step, whatever becomes of it."""
        began, result = self._house.now(), "cancelled"
        try:
            gave = await self._given(step)
            result = gave.result
        except GatewayError as error:
            result = "failed"
            self._name(error, step)
            raise
        finally:
            taken = StepTaken(step.label, result, began, self._house.now(), self._calls[step.name])
            assert self._record.run is not None
            self._record.run.steps.append(taken)
        self._gave[step.name] = gave
        self._values[OF_STEP + step.name] = gave.text
        if step is not self._last:
            await self._giving.tell(taken)
        return gave

    async def _given(self, step: Step) -> Given:
        said = step.said
        if (when := said.when) is not None and not pipeline.holds(
            filled(when.value, self._values),
            equals=when.equals,
            differs=when.differs,
            contains=when.contains,
            lacks=when.lacks,
        ):
            return Given(result="omitted")
        if said.map is None:
            return await self._remembered(step, step.name, self._values)
        try:
            items = pipeline.listed(filled(said.map.over, self._values))
        except Unlisted as error:
            if said.on_error.skip:
                return Given(result="skipped")
            raise StepUnfit(f"what it is mapped over {error}") from None
        return await self._mapped(step, items, said.map.concurrency)

    async def _mapped(self, step: Step, items: list[str], concurrency: int) -> Given:
        """The step for each item, so many at once; the order of the answers is that of the items."""
        gave: list[Any] = [None] * len(items)
        left = iter(enumerate(items))

        async def work() -> None:
            for index, item in left:
                one = await self._remembered(step, f"{step.name}/{index}", self._values | {ITEM: item})
                gave[index] = one.value

        async with _together() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(work())
        return Given(json.dumps(gave, ensure_ascii=False), gave)

    async def _remembered(self, step: Step, key: str, values: Mapping[str, str]) -> Given:
        """The call for `key`, or what it gave before."""
        memory = self._call.memory
        if memory is not None and (kept := memory.recall(key)) is not None:
            return self._recalled(msgspec.json.decode(kept, type=_Kept))
        spent = Spent()
        gave = await self._tried(step, key, values, spent)
        if memory is not None and step is not self._last:
            counts = None if spent.usage is None else astuple(spent.usage)
            await memory.keep(key, msgspec.json.encode(_Kept(gave.text, gave.value, gave.result, counts, spent.cost)))
        return gave

    def _recalled(self, kept: _Kept) -> Given:
        self._spent.add(None if kept.usage is None else Usage(*kept.usage), kept.cost)
        return Given(kept.text, kept.value, result=kept.result)

    async def _tried(self, step: Step, key: str, values: Mapping[str, str], spent: Spent) -> Given:
        """What the step's model gave, or what `on_error` puts in its place."""
        said, failed = step.said, None
        for route, model, result in (
            (step.route, said.model, "ok"),
            (step.fallback, said.on_error.fallback, "fallback"),
        ):
            if route is None or model is None:
                continue
            try:
                gave = await self._asked_for(step, route, model, key, values, spent)
            except MENDABLE as error:
                if self._giving.is_passing or (self._comes_again and isinstance(error, NO_PLACE)):
                    raise
                failed = error
            else:
                gave.result = result if gave.result == "ok" else gave.result
                return gave
        assert failed is not None
        if said.on_error.skip and not (self._comes_again and self._is_for_later(failed)):
            return Given(result="skipped")
        raise failed

    @property
    def _comes_again(self) -> bool:
        return self._call.memory is not None

    def _is_for_later(self, error: GatewayError) -> bool:
        """Whether any other call would have fared alike now, and may not in a while."""
        if isinstance(error, StepRefused):
            assert self._blamed is not None
            return batch.end_of(self._blamed.outcome, error.reason, error.status) in (batch.End.PAUSE, batch.End.AGAIN)
        return isinstance(error, UpstreamShut | UpstreamUnreachable)

    async def _asked_for(
        self, step: Step, route: Route, model: str, key: str, values: Mapping[str, str], spent: Spent
    ) -> Given:
        """One call of a step."""
        is_last = step is self._last
        streams = is_last and self._record.stream and step.said.map is None and step.said.output is None
        more = self._asked.fields if is_last else {}
        body = asking.request(step.name, step.said, model, values, more, stream=streams)
        record = self._house.telemetry.within(self._record, step.label)
        sink = LastStream(self._giving) if streams else Collected()
        self._calls[step.name] += 1
        with self._house.telemetry.request(record):
            try:
                await self._in_time(step, self._as_call(step, route, key, asked.read(body), record), sink, record)
                if isinstance(sink, Collected):
                    return asking.given(sink, record, step.said, is_last=is_last)
                return await self._passed(sink, step, record)
            except GatewayError:
                self._blamed = record
                raise
            finally:
                cost = self._house.telemetry.priced(record)
                for sum_of in (spent, self._spent):
                    sum_of.add(record.usage, cost)

    def _as_call(self, step: Step, route: Route, key: str, wanted: Asked, record: Record) -> Call:
        record.asked_model, record.model = wanted.model, route.name
        record.stream, record.max_tokens = wanted.stream, wanted.max_tokens
        headers = {**self._call.headers, "content-type": "application/json"}
        if (whole := headers.get("idempotency-key")) is not None:
            headers["idempotency-key"] = f"{whole}-{key}"  # or a second step would be answered with the first one's
        return replace(
            self._call,
            path=CHAT,
            route=route,
            asked=wanted,
            headers=headers,
            deadline=self._house.now() + self._patience,
            reports_usage=True,
            memory=None,
        )

    async def _in_time(self, step: Step, call: Call, sink: Sink, record: Record) -> None:
        seconds = step.said.timeout_seconds
        if seconds is not None:
            call.deadline = min(call.deadline, self._house.now() + seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._house.relay.run(call, sink, record)
        except TimeoutError:
            error = StepTimeout(f"took longer than the {seconds:g} s that it may")
            record.status, record.outcome = error.status, Outcome.FAILED
            record.error_type, record.error_source = error.word, error.source
            raise error from None
        except GatewayError as error:
            record.refused(error)
            raise
        except ClientGone:
            if not isinstance(sink, Collected):
                raise
            raise StepUnfit(f"its answer is longer than {ANSWER_BYTES_MAX >> 20} MiB; ask for less") from None

    async def _passed(self, sink: LastStream, step: Step, record: Record) -> Given:
        """The last step's stream has been passed on, as far as it went."""
        if sink.instead is not None:
            return asking.given(sink.instead, record, step.said, is_last=True)
        if sink.broken is not None:
            raise sink.broken
        whole = self._record
        whole.first_token, whole.finish_reason = record.first_token, record.finish_reason
        whole.response_id, whole.response_model = record.response_id, record.response_model
        self._blocked = record.client_seconds
        whole.client_seconds += record.client_seconds
        if record.outcome is not Outcome.OK:  # told in band, by the upstream itself
            self._blamed = record
            await self._giving.stop()
            return Given(result="failed", is_passed=True)
        return Given(is_passed=True)

    def _answer(self) -> Given:
        """What the last step gave; where it gave nothing, the last that did."""
        ran = (self._gave[name] for name in reversed(list(self._steps)))
        return next((gave for gave in ran if gave.result in ("ok", "fallback")), Given())

    def _name(self, error: GatewayError, step: Step) -> None:
        """Say in the error which step failed, and what those before it gave."""
        if "step" not in error.more:
            error.args = (f"step {step.name}: {error}",)
            gave = {name: one.value for name, one in self._gave.items() if one.result in ("ok", "fallback")}
            error.more |= {"step": step.name, "completed_steps": gave}

    def _fail(self, error: GatewayError | None) -> None:
        """The whole fails as the call did that it failed of."""
        record, blamed = self._record, self._blamed
        record.outcome = Outcome.FAILED
        if error is not None:
            record.error_type, record.error_source = error.word, error.source
        if blamed is not None:
            record.upstream = blamed.upstream
        if blamed is not None and blamed.outcome not in (Outcome.OK, Outcome.CANCELLED):
            record.outcome, record.end_reason = blamed.outcome, blamed.end_reason
            record.error_type, record.error_source = blamed.error_type, blamed.error_source


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks that all end with the block; the first error of one of them cancels the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failed:
        first: BaseException = failed
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__
