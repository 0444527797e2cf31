"""One batch that its provider runs: handed on whole, looked at now and then, its results fetched at the end.

    its input -> uploaded there -> its batch made there -> looked at -> over: results into the rows of the store

1. What the provider calls the file and the batch is kept before anything else is asked of it. A batch whose name was
   lost on the way is found again by the mark that it bears, so it is made once.
2. The provider's states are ours, its mistakes the batch's. Results are kept as those of any batch, each once.
3. While the provider cannot be asked the batch waits, and says why.
4. A batch that is cancelled here is cancelled there; what it has done by then is fetched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from proxy.batches.inputs import Inputs
from proxy.batches.lane import Pause
from proxy.batches.provider import NotNow, Provider, Refused, Told
from proxy.core import batch as rules
from proxy.core import usage
from proxy.core.batch import Batch, Handed, Mistake, NotPossible, Result, Status
from proxy.errors import StateUnavailable

log = logging.getLogger("penstock.batches")

LOOK_SECONDS = 20.0  # between two looks at a batch there
CANCEL_SECONDS = 900.0  # for the provider to end a batch that is cancelled; OpenAI says ten minutes
GRACE_SECONDS = 3600.0  # past its own expiry, for the provider to say that it expired there
TAKEN_AT_ONCE = 500  # results that are kept in one commit
_OVER = frozenset({"completed", "expired", "cancelled"})


class Open(Protocol):
    """An open batch, and what may be done with it; each is kept when it returns."""

    batch: Batch
    pause: Pause | None

    async def note(self, **changes: object) -> None: ...

    async def move(self, status: Status, **changes: object) -> None:
        """Raises NotPossible."""

    async def unended(self) -> list[tuple[int, str]]: ...

    async def adopt(self, results: Sequence[tuple[int, Result]]) -> None: ...


class Handing:
    """
    Attributes:
        is_over: there, and all that it came to is kept here.
    """

    def __init__(self, life: Open, provider: Provider, inputs: Inputs, wall: Callable[[], float]) -> None:
        self._life, self._provider, self._inputs, self._wall = life, provider, inputs, wall
        self.is_over = False

    @property
    def _handed(self) -> Handed:
        handed = self._life.batch.handed
        assert handed is not None
        return handed

    async def follow(self) -> None:
        """Until the batch is over there, and kept here."""
        while not self.is_over:
            if await self._tried(self._step) and not self.is_over:
                await asyncio.sleep(LOOK_SECONDS)

    async def withdraw(self) -> None:
        """Rule 4."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_SECONDS):
                while not await self._tried(self._cancel):
                    pass
                await self.follow()

    async def _tried(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether this could be done; if not, it has been waited a while (rule 3)."""
        try:
            await step()
        except (NotNow, StateUnavailable) as error:
            reason = error.reason if isinstance(error, NotNow) else error.code
            self._life.pause = Pause(reason, str(error), self._wall())
            await asyncio.sleep(LOOK_SECONDS)
            return False
        except Refused as error:
            await self._refused(error)
        except OSError as error:
            message = f"the input file cannot be read any more: {error.strerror}"
            await self._fail([Mistake("input_file_unreadable", message)])
        self._life.pause = None
        return True

    async def _cancel(self) -> None:
        if not self._handed.batch_id and self._handed.file_id and (found := await self._provider.find()) is not None:
            await self._life.note(handed=msgspec.structs.replace(self._handed, batch_id=found.id))
        if self._handed.batch_id:
            await self._provider.cancel(self._handed.batch_id)
        else:
            self.is_over = True

    async def _step(self) -> None:
        life, provider = self._life, self._provider
        if not self._handed.file_id:
            async with self._sendable() as path:
                file_id = await provider.upload(path)
            await life.note(handed=msgspec.structs.replace(self._handed, file_id=file_id))
        if not self._handed.batch_id:
            told = await provider.find() or await provider.create(self._handed.file_id)
            await life.note(handed=msgspec.structs.replace(self._handed, batch_id=told.id))
        told = await provider.show(self._handed.batch_id)
        await self._take(told)

    async def _take(self, told: Told) -> None:
        life = self._life
        if told.status == "failed":
            mistakes = told.errors.data if told.errors is not None else []
            await self._fail(mistakes or [Mistake("batch_failed", "the provider failed the batch and said no more")])
            return
        if told.request_counts is not None:
            counts = told.request_counts
            handed = msgspec.structs.replace(self._handed, completed=counts.completed, failed=counts.failed)
            if handed != self._handed:
                await life.note(handed=handed)
        if told.status != "validating" and life.batch.status is Status.VALIDATING:
            with suppress(NotPossible):  # it has just been cancelled
                await life.move(Status.IN_PROGRESS)
        if told.status in _OVER:
            await self._fetch(told)
            if told.status == "cancelled":  # there, by whoever has the provider's account
                with suppress(NotPossible):
                    await life.move(Status.CANCELLING)
            elif told.status == "completed":
                await self._close_gaps()
            self.is_over = True
            await self._provider.remove_file(self._handed.file_id)

    async def _refused(self, error: Refused) -> None:
        """What the provider will never take, or has no more."""
        if self._life.batch.status is not Status.VALIDATING:
            log.error("%s: upstream %s has lost it: %s", self._life.batch.id, self._handed.upstream, error)
        await self._fail([error.mistake])

    async def _fail(self, mistakes: list[Mistake]) -> None:
        try:
            await self._life.move(Status.FAILED, mistakes=mistakes, total=0)
        except NotPossible:  # it was in progress, or is cancelled: what has no result has failed
            await self._close_gaps(f"the provider failed the batch: {mistakes[0].message}")
        self.is_over = True

    @asynccontextmanager
    async def _sendable(self) -> AsyncIterator[Path]:
        """The input as the provider is to get it. Raises OSError: it cannot be read."""
        batch = self._life.batch
        path, model = self._inputs.path(batch.input_file_id), self._provider.model
        if model == batch.model:
            yield path
            return
        async with self._inputs.arriving() as arrival:
            file = await asyncio.to_thread(path.open, "rb")
            try:
                while lines := await asyncio.to_thread(_renamed, file, model):
                    await arrival.write(lines)
            finally:
                await asyncio.to_thread(file.close)
            await arrival.flush()
            yield arrival.path

    # ── results ──

    async def _fetch(self, told: Told) -> None:
        """Keep every result that there is; what is kept already stays as it is."""
        numbers = {custom_id: line for line, custom_id in await self._life.unended()}
        for file_id, is_output in ((told.output_file_id, True), (told.error_file_id, False)):
            if file_id and numbers:
                async for results in self._results(file_id, numbers, is_output=is_output):
                    await self._life.adopt(results)

    async def _results(
        self, file_id: str, numbers: Mapping[str, int], *, is_output: bool
    ) -> AsyncIterator[list[tuple[int, Result]]]:
        async with self._inputs.arriving() as arrival:
            await self._provider.download(file_id, arrival)
            file = await asyncio.to_thread(arrival.path.open, "rb")
            try:
                while (results := await asyncio.to_thread(_some, file, numbers, is_output)) is not None:
                    yield results
            finally:
                await asyncio.to_thread(file.close)

    async def _close_gaps(self, message: str = "the provider gave no result for this request") -> None:
        """Items of which the provider says nothing have failed."""
        batch = self._life.batch
        left = await self._life.unended()
        for at in range(0, len(left), TAKEN_AT_ONCE):
            await self._life.adopt(
                [
                    (line, Result(False, rules.unanswered(batch.item_id(line), custom_id, "no_result", message)))
                    for line, custom_id in left[at : at + TAKEN_AT_ONCE]
                ]
            )


class _Response(msgspec.Struct):
    status_code: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None


class _Body(msgspec.Struct):
    usage: dict[str, object] | None = None


def _some(file: BinaryIO, numbers: Mapping[str, int], is_output: bool) -> list[tuple[int, Result]] | None:
    """The results in the next lines of a file, each with the number of its item; None at its end."""
    results: list[tuple[int, Result]] = []
    for _ in range(TAKEN_AT_ONCE):
        if not (text := file.readline()):
            return results or None
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            said = msgspec.json.decode(text, type=_Line)
            if (number := numbers.get(said.custom_id)) is not None:
                is_done = is_output and said.response is not None and said.response.status_code < 300
                results.append((number, Result(is_done, text.rstrip(b"\r\n") + b"\n", _used(said))))
    return results


def _used(said: _Line) -> usage.Usage | None:
    if said.response is None:
        return None
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return usage.of(msgspec.json.decode(said.response.body, type=_Body).usage)
    return None


def _renamed(file: BinaryIO, model: str) -> bytes:
    """The next requests of an input as a provider gets them that knows the model by this name; b"" at its end. All else
    keeps its bytes."""
    lines: list[bytes] = []
    while len(lines) < TAKEN_AT_ONCE and (text := file.readline()):
        if text := text.removeprefix(b"\xef\xbb\xbf").strip():
            fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
            body = msgspec.json.decode(fields["body"], type=dict[str, msgspec.Raw])
            body["model"] = msgspec.Raw(msgspec.json.encode(model))
            fields["body"] = msgspec.Raw(msgspec.json.encode(body))
            lines.append(msgspec.json.encode(fields) + b"\n")
    return b"".join(lines)
