"""The answer to the call of a pipeline: at once, or as a stream that is the last step's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from proxy.collected import Collected
from proxy.core.cost import MICRO
from proxy.core.sse import is_stream
from proxy.core.usage import Usage
from proxy.errors import GatewayError
from proxy.pipelines.asking import Given, Spent
from proxy.relay import Sink
from proxy.telemetry import Record, StepTaken

_END_MARK = re.compile(rb"^data: ?\[DONE\][ \r\n]*", re.MULTILINE)
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
_encode = msgspec.json.encode


class Giving:
    """
    Args:
        sink: the caller's.
        record: of the whole.
        spent: what its calls took, as far as they have ended.
        wants_usage: whether a stream is to tell it.
        tells: whether a stream tells of each step that has ended.
    """

    def __init__(
        self,
        sink: Sink,
        record: Record,
        spent: Spent,
        *,
        wants_usage: bool,
        tells: bool,
        now: Callable[[], float],
        created: int,
    ) -> None:
        self._sink, self._record, self._spent, self._now = sink, record, spent, now
        self._wants_usage, self._tells = wants_usage, tells and record.stream
        self.is_passing = False  # the last step's own answer is on its way to the client
        self._head = {"id": f"chatcmpl-{record.request_id}", "created": created, "model": record.model}

    @property
    def has_begun(self) -> bool:
        return self._record.first_byte is not None

    async def open(self) -> None:
        """The run has begun."""
        if self._tells:
            await self.begin(_EVENTS)
            await self.write(b": %b\n\n" % self._record.model.encode())

    async def tell(self, step: StepTaken) -> None:
        """A step has ended."""
        if self._tells:
            await self.write(f": step {step.name} {step.result}, {step.ended - step.started:.2f} s\n\n".encode())

    async def give(self, gave: Given, steps: Iterable[StepTaken]) -> None:
        """The answer, where the client has not got it yet."""
        choices = gave.choices or [_choice(gave.text)]
        if self._record.stream:
            await self.begin(_EVENTS)
            for choice in choices:
                told = {name: said for name, said in choice["message"].items() if said is not None}
                index = choice.get("index", 0)
                await self._event([{"index": index, "delta": told, "finish_reason": None}])
                await self._event([{"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}])
            await self.end()
            return
        body = _encode(
            {**self._head, "object": "chat.completion", "choices": choices, "usage": _told(self._spent.usage)}
            | {"penstock": {"cost_usd": _dollars(self._spent.cost), "steps": list(map(_of_step, steps))}}
        )
        await self.begin({"content-type": "application/json", "content-length": str(len(body))})
        await self.write(body)
        await self._finish()

    async def begin(self, headers: Mapping[str, str]) -> None:
        if not self.has_begun:
            self._record.first_byte, self._record.status = self._now(), 200
            await self._sink.start(200, headers)

    async def write(self, data: bytes) -> None:
        await self._sink.write(data)
        self._record.chunks += 1
        self._record.bytes_out += len(data)

    async def end(self) -> None:
        """The stream is whole."""
        if self._wants_usage:
            await self._event([], usage=_told(self._spent.usage))
        await self.write(b"data: [DONE]\n\n")
        await self._finish()

    async def stop(self) -> None:
        """The stream is over, and has said itself that it is not whole."""
        await self._finish()

    async def _finish(self) -> None:
        await self._sink.finish()
        self._record.last_byte = self._now()

    async def _event(self, choices: list[dict[str, Any]], **more: object) -> None:
        said = {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}
        await self.write(b"data: %b\n\n" % _encode(said))


class LastStream:
    """The last step's stream on its way to the client, less its end mark; see `proxy.relay.Sink`.

    Attributes:
        instead: the answer, where it is no stream: an error, most likely.
        broken: what broke it off after it had begun.
    """

    def __init__(self, giving: Giving) -> None:
        self._giving = giving
        self.instead: Collected | None = None
        self.broken: GatewayError | None = None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        if status < 400 and is_stream(headers):
            await self._giving.begin(_EVENTS)
            self._giving.is_passing = True
        else:
            self.instead = Collected()
            await self.instead.start(status, headers)

    async def write(self, chunk: bytes) -> None:
        if self.instead is not None:
            await self.instead.write(chunk)
            return
        if b"[DONE]" in chunk:
            chunk = _END_MARK.sub(b"", chunk)
        if chunk:
            await self._giving.write(chunk)

    async def finish(self) -> None:
        pass

    async def fail(self, error: GatewayError) -> None:
        self.broken = error


def _choice(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}


def _of_step(step: StepTaken) -> dict[str, object]:
    seconds = round(step.ended - step.started, 3)
    return {"step": step.name, "result": step.result, "seconds": seconds, "calls": step.calls}


def _dollars(cost: int | None) -> float | None:
    return None if cost is None else cost / MICRO


def _told(usage: Usage | None) -> dict[str, object] | None:
    """In OpenAI's shape."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
