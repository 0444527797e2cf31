"""A provider's own Files and Batch API, asked by ordinary calls: the same relay, gate, retries and record as any other.

What is answered with 4xx is the batch's own matter, but for a refused credential and a limit; all else may be otherwise
later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from proxy.batches.inputs import Arrival
from proxy.collected import Collected
from proxy.core.asked import Asked
from proxy.core.batch import Batch, Mistake
from proxy.core.gate import Priority
from proxy.errors import ClientGone, GatewayError
from proxy.plan import Plan
from proxy.relay import Call, Policy, Runs, Wanted
from proxy.telemetry import Telemetry
from proxy.upstreams import Streamed

CALL_SECONDS = 600.0  # for a call to be let in; the sending of a large file is bounded by its upstream's own patience
ONCE = Policy(attempts=1)  # for what would be made twice
MARK = "penstock_batch"  # in the metadata of a batch there: the id that it has here
LISTED = 100
PIECE_BYTES = 1 << 18
_LATER = frozenset({401, 402, 403, 408, 425, 429})

Form = TypeVar("Form")


class NotNow(Exception):
    """It could not be done, and may be later.

    Attributes:
        reason: a word for `Pause`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Refused(Exception):
    """The provider will not take it, now or later.

    Attributes:
        status: its HTTP status.
    """

    def __init__(self, status: int, mistake: Mistake) -> None:
        super().__init__(mistake.message)
        self.status, self.mistake = status, mistake


class _Counts(msgspec.Struct):
    completed: int = 0
    failed: int = 0


class _Errors(msgspec.Struct):
    data: list[Mistake] = []


class Told(msgspec.Struct):
    """What a provider says of a batch of its own."""

    id: str
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: _Counts | None = None
    errors: _Errors | None = None
    metadata: dict[str, str] | None = None


class _File(msgspec.Struct):
    id: str


class _List(msgspec.Struct):
    data: list[Told]


@dataclass(slots=True)
class Provider:
    """The upstream that a batch is handed on to.

    Raises, all of it: NotNow, Refused.
    """

    relay: Runs
    telemetry: Telemetry
    plan: Callable[[], Plan]
    now: Callable[[], float]
    batch: Batch
    upstream: str

    @property
    def model(self) -> str:
        """The batch's, as the upstream knows it."""
        route = self.plan().route(self.batch.model)
        targets = () if route is None else route.targets
        names = (target.model for target in targets if target.upstream.name == self.upstream)
        return next(names, None) or self.batch.model

    async def upload(self, path: Path) -> str:
        """Send a file as the input of a batch; its id there."""
        size = (await asyncio.to_thread(path.stat)).st_size
        form = _Form(path, size, f"{self.batch.id}.jsonl")
        kind = f"multipart/form-data; boundary={_BOUNDARY}"
        body = await self._whole("POST", "/files", form, content_type=kind)
        return _read(body, _File).id

    async def find(self) -> Told | None:
        """The batch, if it has been made there already."""
        body = await self._whole("GET", f"/batches?limit={LISTED}")
        batches = _read(body, _List).data
        return next((told for told in batches if (told.metadata or {}).get(MARK) == self.batch.id), None)

    async def create(self, file_id: str) -> Told:
        said = {
            "input_file_id": file_id,
            "endpoint": self.batch.endpoint,
            "completion_window": self.batch.completion_window,
            "metadata": {MARK: self.batch.id},
        }
        return _read(await self._whole("POST", "/batches", _json(msgspec.json.encode(said)), policy=ONCE), Told)

    async def show(self, batch_id: str) -> Told:
        return _read(await self._whole("GET", f"/batches/{batch_id}"), Told)

    async def cancel(self, batch_id: str) -> None:
        """One that has ended, or is not there, needs none."""
        with suppress(Refused):
            await self._whole("POST", f"/batches/{batch_id}/cancel", _json(b"{}"))

    async def remove_file(self, file_id: str) -> None:
        """What is there no more need not go."""
        with suppress(Refused):
            await self._whole("DELETE", f"/files/{file_id}")

    async def download(self, file_id: str, into: Arrival) -> None:
        sink = _Spooled(into)
        await self._run("GET", f"/files/{file_id}/content", _json(b""), sink)
        await into.flush()

    async def _whole(
        self,
        method: str,
        path: str,
        wanted: Wanted | None = None,
        *,
        content_type: str = "application/json",
        policy: Policy | None = None,
    ) -> bytes:
        sink = Collected()
        await self._run(method, path, wanted or _json(b""), sink, content_type=content_type, policy=policy)
        return sink.body

    async def _run(
        self,
        method: str,
        path: str,
        wanted: Wanted,
        sink: Collected,
        *,
        content_type: str = "application/json",
        policy: Policy | None = None,
    ) -> None:
        plan, batch = self.plan(), self.batch
        if self.upstream not in plan.settings.upstreams:
            raise NotNow("model_not_found", f"the upstream {self.upstream}, which has the batch, is configured no more")
        operation = path[1:].partition("/")[0].partition("?")[0]
        record = self.telemetry.begin(operation, method, f"/v1/{operation}", request_id=batch.id, traceparent=None)
        record.linked, record.caller, record.priority = batch.traceparent, batch.owner, "batch"
        retry = plan.settings.retry
        call = Call(
            method=method,
            path=path,
            route=plan.direct(self.upstream),
            asked=wanted,
            headers={"content-type": content_type} if method == "POST" else {},
            credential={},
            priority=Priority.BATCH,
            caller=batch.owner,
            deadline=self.now() + CALL_SECONDS,
            policy=policy or Policy(retry.attempts, retry.base_seconds, retry.cap_seconds),
        )
        with self.telemetry.request(record):
            try:
                await self.relay.run(call, sink, record)
            except GatewayError as error:
                raise NotNow("connect" if error.code == "upstream_unreachable" else error.code, str(error)) from error
            except ClientGone:
                raise NotNow("answer_too_large", f"the answer of {self.upstream} is too long") from None
        if sink.broke is not None:
            raise NotNow(sink.broke.code, str(sink.broke)) from sink.broke
        if sink.status >= 400:
            raise self._refusal(record.attempts[-1].meaning.reason.value, sink)

    def _refusal(self, reason: str, sink: Collected) -> NotNow | Refused:
        if sink.status in _LATER or sink.status >= 500:
            word = "auth" if sink.status in (401, 403) else reason
            return NotNow(word, f"upstream {self.upstream} said {sink.status}")
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            said = msgspec.json.decode(sink.body, type=_Refusal).error
            return Refused(sink.status, Mistake(said.code or "invalid_request", said.message, param=said.param))
        return Refused(sink.status, Mistake("invalid_request", f"upstream {self.upstream} said {sink.status}"))


class _Said(msgspec.Struct):
    message: str
    code: str | None = None
    param: str | None = None


class _Refusal(msgspec.Struct):
    error: _Said


class _Spooled(Collected):
    """An answer that goes to the disk, but for a refusal."""

    __slots__ = ("_into",)

    def __init__(self, into: Arrival) -> None:
        super().__init__()
        self._into = into

    async def write(self, chunk: bytes) -> None:
        if self.status < 400:
            await self._into.write(chunk)
        else:
            await super().write(chunk)


def _json(body: bytes) -> Asked:
    return Asked(body, model="", stream=False, max_tokens=0, wants_usage=False, is_charged=False)


def _read(body: bytes, form: type[Form]) -> Form:
    try:
        return msgspec.json.decode(body, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise NotNow("upstream_garbage", f"the upstream's answer is none that a batch API gives: {error}") from None


_BOUNDARY = "penstock-2c1f9a5e7d3b4860"


class _Form:
    """A file on the disk as the form that an upload is; see `proxy.relay.Wanted`."""

    model = ""
    stream = False
    max_tokens = 0
    wants_usage = False
    input_tokens = 0.0  # the bytes of a file are no tokens
    is_spent = False  # the file can be read again

    def __init__(self, path: Path, size: int, name: str) -> None:
        self._path, self._size = path, size
        self._head = (
            f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        ).encode()
        self._tail = f"\r\n--{_BOUNDARY}--\r\n".encode()

    def rewritten(self, model: str, *, ask_usage: bool) -> Streamed:
        return Streamed(self._parts(), len(self._head) + self._size + len(self._tail))

    async def _parts(self) -> AsyncIterator[bytes]:
        yield self._head
        file = await asyncio.to_thread(self._path.open, "rb")
        try:
            while part := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield part
        finally:
            await asyncio.to_thread(file.close)
        yield self._tail
