"""The service of small jobs as a WebSocket: any number of prompts on one connection, several at once.

    GET /stream   {prompt, messages?, model?, system?, max_tokens?, id?}  ->  {token} ... {done, usage, finish_reason}
                  {cancel: id}                                            ->  {error}, the prompt's last message

1. A prompt is an ordinary call, with a record and a place of its own. All that is said of it has its `id`, where it has
   one. Its last message is `done` or `error`; then the `id` is free again.
2. Whatever is wrong with a message is told, and the connection stays. Only what is no WebSocket message ends it.
3. A client that reads slowly stops the reading of its upstreams; one that takes nothing for long is dropped.
4. A client that leaves takes its prompts with it.
5. When the gateway stops, no prompt is taken any more; the connection is closed when the last one has ended, or is cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from proxy.api import calling, edge
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Visit
from proxy.api.jobs import CHAT, Said, error_of, model_of, read, result_of
from proxy.api.line import CLOSE_SECONDS, GOING_AWAY, MESSAGE_LIMIT, ClientLine, check_upgrade, no_strange_page
from proxy.core import sse
from proxy.core.headers import subprotocols
from proxy.core.outcome import Outcome
from proxy.core.usage import Usage
from proxy.errors import (
    BodyTooLarge,
    Cancelled,
    ClientGone,
    ClientStalled,
    Draining,
    GatewayError,
    InvalidRequest,
    NotFound,
    QueueFull,
    Unauthorized,
)
from proxy.plan import Plan
from proxy.relay import STOPPING, Call, Runs
from proxy.tasks import Tasks
from proxy.telemetry import Record, Telemetry
from proxy.upstreams import Closing, Message
from proxy.watch import Late, Watch

PATH = "/stream"
AT_ONCE = 100  # prompts of one connection; who wants more opens another
ANSWER_LIMIT = 4 << 20  # bytes of an answer, or of an event of one, that is held in memory
CANCELLED = "cancelled"  # the message of a cancellation that a client asked for

_Id = Annotated[str, msgspec.Meta(max_length=200)] | Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)] | None
_encode = msgspec.json.encode


class _Asked(Said, kw_only=True):
    """A prompt, or the wish to end one."""

    prompt: str = ""
    messages: tuple[dict[str, msgspec.Raw], ...] = ()
    id: _Id = None
    cancel: _Id | UnsetType = UNSET


class _Named(msgspec.Struct):
    id: _Id = None


def endpoints(relay: Runs, telemetry: Telemetry, plan: Callable[[], Plan]) -> dict[str, Endpoint]:
    """By path, for the edge; `plan` is the one in force, and a prompt keeps the one that it arrived with."""

    async def connect(visit: Visit) -> None:
        check_upgrade(visit.request)
        protocols, _ = subprotocols(visit.request.headers.get("sec-websocket-protocol", ""))
        line = await ClientLine.accepted(visit, protocols[0] if protocols else None)
        record = visit.record
        record.status, record.first_byte = 101, visit.now()
        closing = await Connection(visit, line, relay, telemetry, plan).serve()
        record.outcome, record.last_byte = Outcome.OK, visit.now()
        await line.close(closing)

    return {PATH: Endpoint("stream", PATH, {"GET": connect})}


class Connection:
    """One client's prompts.

    Attributes:
        running: those whose last message has not been sent, by id.
    """

    def __init__(
        self, visit: Visit, line: ClientLine, relay: Runs, telemetry: Telemetry, plan: Callable[[], Plan]
    ) -> None:
        self._visit, self._line, self._relay, self._telemetry, self._plan = visit, line, relay, telemetry, plan
        self._tasks = Tasks()
        self._count = 0
        self.running: dict[_Id, Prompt] = {}
        self.empty = asyncio.Event()

    async def serve(self) -> Closing:
        """Take what the client sends until it closes, or the gateway stops; what the other side is to be closed with.

        Raises:
            ClientGone, InvalidRequest: as `ClientLine.receive`.
        """
        reading = self._tasks.spawn("prompts", self._read())
        ending = self._tasks.spawn("the end of prompts", self._end())
        message = ""
        try:
            await asyncio.wait((reading, ending), return_when=asyncio.FIRST_COMPLETED)
            ended = reading.result() if reading.done() else ending.result()
            if isinstance(ended, Exception):
                raise ended
            return ended
        except asyncio.CancelledError as stop:
            message = STOPPING if STOPPING in stop.args else ""
            raise
        finally:
            for prompt in list(self.running.values()):
                prompt.cancel(message)
            await self._tasks.stop()

    async def _end(self) -> Closing:
        """Rule 5."""
        await self._visit.stopping.wait()
        while self.running:
            self.empty.clear()
            await self.empty.wait()
        return Closing(GOING_AWAY, Draining.default_code)

    async def _read(self) -> Closing | Exception:
        """Take messages until the client closes, or is lost: then what is to be raised for it."""
        patience = self._visit.plan.settings.server.write_stall_seconds
        try:
            async with Watch[str]() as watch:
                while not isinstance(message := await self._line.receive(), Closing):
                    watch.expect("taken", patience)
                    await self._take(message.data)
                    watch.rest()
                return message
        except Late:
            self._line.abort()
            return ClientStalled()
        except (ClientGone, InvalidRequest) as error:
            return error

    async def _take(self, message: bytes) -> None:
        """One message of the client's."""
        record = self._begin(message)
        try:
            if len(message) > MESSAGE_LIMIT:
                raise BodyTooLarge(f"a message may have {MESSAGE_LIMIT} bytes; POST /complete takes longer prompts")
            asked = read(message, _Asked)
            if asked.cancel is not UNSET:
                self._cancel(asked)
                return
            prompt = self._prompt(asked, record)
        except GatewayError as error:
            with self._telemetry.request(record):
                edge.refused(record, error)
                record.status = error.status
                # of an id that is taken nothing is said: it would be taken for the end of the prompt that has it
                await self._line.send(_message(None if error.param == "id" else _id_of(message), error.as_dict()))
        else:
            self.running[prompt.id] = prompt
            prompt.task = self._tasks.spawn(record.request_id, prompt.run(self._relay, self._telemetry))
            await asyncio.sleep(0)  # it begins before it can be cancelled

    def _begin(self, message: bytes) -> Record:
        self._count += 1
        mine = self._visit.record
        record = self._telemetry.begin(
            "complete", "GET", PATH, request_id=f"{mine.request_id}-{self._count}", traceparent=None
        )
        record.linked = self._telemetry.traceparent(mine)
        record.caller, record.bytes_in, record.body_read = mine.caller, len(message), record.arrived
        return record

    def _cancel(self, asked: _Asked) -> None:
        assert asked.cancel is not UNSET
        if asked != _Asked(cancel=asked.cancel):
            raise InvalidRequest("`cancel` stands alone; send a prompt as a message of its own", param="cancel")
        if (prompt := self.running.get(asked.cancel)) is None:
            raise NotFound(f"no prompt with the id {_encode(asked.cancel).decode()} is running", param="cancel")
        prompt.cancel(CANCELLED)

    def _prompt(self, asked: _Asked, record: Record) -> Prompt:
        """Raises GatewayError: it cannot be taken."""
        plan = self._plan()
        if self._visit.stopping.is_set():
            raise Draining("the gateway is stopping; connect again, another one will answer", retry_after=1.0)
        if plan.needs_key and record.caller not in plan.settings.callers:
            raise Unauthorized("the key of this connection is not known here any more")
        if not asked.prompt and not asked.messages:
            raise InvalidRequest("send a `prompt`, or `messages`", param="prompt")
        if asked.id in self.running:
            raise InvalidRequest("a prompt with this `id` is running; give each one of its own", param="id")
        if len(self.running) >= AT_ONCE:
            raise QueueFull(f"{AT_ONCE} prompts of this connection are running; wait for one to end", retry_after=1.0)
        visit = replace(self._visit, plan=plan, record=record)
        return Prompt(self, self._line, asked.id, visit, _called(visit, asked))


def _called(visit: Visit, asked: _Asked) -> Call:
    plan, record = visit.plan, visit.record
    wanted = calling.read(asked.body(asked.prompt, model_of(asked.model, plan), asked.messages, stream=True))
    record.asked_model, record.stream, record.max_tokens = wanted.model, True, wanted.max_tokens
    route = calling.routed(plan, wanted.model, OPENAI)
    record.model = route.name
    no_strange_page(visit.request, plan, route)
    call = calling.call(visit, route, wanted, path=CHAT.removeprefix("/v1"), reports_usage=True)
    return replace(call, headers={**call.headers, "content-type": "application/json"})


class Prompt:
    """One prompt, and the relay's sink for its answer; see `proxy.relay.Sink`.

    Attributes:
        task: the one that `run` is run by.
    """

    task: asyncio.Task[None]

    def __init__(self, connection: Connection, line: ClientLine, name: _Id, visit: Visit, call: Call) -> None:
        self._connection, self._line, self.id, self._visit, self._call = connection, line, name, visit, call
        self._status = 0
        self._streams = False
        self._held = b""  # of a stream: the line that is not whole yet; else: the answer so far
        self._error: object = None  # what the stream told of

    def cancel(self, why: str) -> None:
        self.task.cancel(why)

    async def run(self, relay: Runs, telemetry: Telemetry) -> None:
        """Answer it; its last message has been sent, or its client is gone."""
        record = self._visit.record
        with telemetry.request(record):
            try:
                await self._answer(relay, record)
            except GatewayError as error:
                edge.refused(record, error)
                if record.outcome is Outcome.CANCELLED:  # it was answered, but with no chat completion
                    record.outcome = Outcome.FAILED
                    record.error_type, record.error_source = error.word, error.source
                await self._fail(error)
            except ClientGone as gone:
                edge.left(record, "client_stalled" if isinstance(gone, ClientStalled) else "client_disconnect")
            except asyncio.CancelledError as stop:
                await self._stop(stop, record)
                raise
            except Exception as error:  # noqa: BLE001  # as at the edge: counted and logged, once
                await self._fail(edge.unforeseen(record, error))
            finally:
                self._visit.bodies.leave(self._visit.held)
                self._leave()

    async def _answer(self, relay: Runs, record: Record) -> None:
        try:
            async with Watch[str]() as self._watch:
                await self._visit.hold(record.bytes_in)
                await relay.run(self._call, self, record)
        except Late:
            self._line.abort()
            raise ClientStalled from None

    async def _stop(self, stop: asyncio.CancelledError, record: Record) -> None:
        """The gateway, or the client, ends it. Whoever can be told is told."""
        if STOPPING in stop.args and record.outcome is Outcome.CANCELLED:
            await self._fail(edge.cut_off(record, has_begun=record.first_byte is not None))
            return
        edge.left(record, "client_disconnect")
        if CANCELLED in stop.args:
            await self._fail(Cancelled("the prompt was cancelled by its client"))

    async def _fail(self, error: GatewayError) -> None:
        if self._connection.running.get(self.id) is not self:
            return  # its last word has been said
        self._visit.record.status = error.status if self._visit.record.first_byte is None else 200
        self._leave()
        with suppress(ClientGone, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._line.send(_message(self.id, error.as_dict()))

    # ── the sink ──

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self._status, self._streams = status, sse.is_stream(headers)

    async def write(self, chunk: bytes) -> None:
        self._held += chunk
        if self._streams:
            end = max(self._held.rfind(b"\n"), self._held.rfind(b"\r")) + 1
            whole, self._held = self._held[:end], self._held[end:]
            await self._tell(whole)
        if len(self._held) > ANSWER_LIMIT:
            raise InvalidRequest(f"the answer has a part of more than {ANSWER_LIMIT} bytes; ask for less")

    async def finish(self) -> None:
        record = self._visit.record
        if self._status >= 400:
            await self._say_last({"error": error_of(self._status, self._held)})
            return
        if self._streams:
            await self._tell(self._held)
        elif text := result_of(self._held):
            await self._say({"token": text})
        if self._error is not None:
            await self._say_last({"error": self._error})
            return
        used = None if record.usage is None else _told(record.usage)
        await self._say_last({"done": True, "usage": used, "finish_reason": record.finish_reason or None})

    async def fail(self, error: GatewayError) -> None:
        await self._say_last(error.as_dict())

    async def _tell(self, events: bytes) -> None:
        """Pass on the text of these events, as one message."""
        text = ""
        for event in sse.events(events):
            self._error = event.get("error", self._error)
            text += _text(event)
        if text:
            await self._say({"token": text})

    async def _say(self, said: Mapping[str, object]) -> None:
        self._watch.expect("taken", self._visit.plan.settings.server.write_stall_seconds)
        await self._line.send(_message(self.id, said))
        self._watch.rest()

    async def _say_last(self, said: Mapping[str, object]) -> None:
        self._leave()
        await self._say(said)

    def _leave(self) -> None:
        """Its id is free again."""
        running = self._connection.running
        if running.get(self.id) is self:
            del running[self.id]
            if not running:
                self._connection.empty.set()


def _message(name: _Id, said: Mapping[str, object]) -> Message:
    return Message(_encode(said if name is None else {"id": name, **said}), is_text=True)


def _id_of(message: bytes) -> _Id:
    """The id of a message that cannot be taken, as far as it can be read."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(message, type=_Named).id
    return None


def _told(used: Usage) -> dict[str, int]:
    return {"input_tokens": used.input, "output_tokens": used.output, "total_tokens": used.input + used.output}


def _text(event: Mapping[str, object]) -> str:
    """The words of one event of a chat stream."""
    match event.get("choices"):
        case [{"delta": {"content": str(text)}}, *_]:
            return text
    return ""
