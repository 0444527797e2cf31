"""Files and batches, as the endpoints ask for them.

The state is opened at its first use, or at the start where there is some already: a gateway that is never asked for
batches keeps nothing. Where it cannot be kept, this says so, and everything else works.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proxy.batches import sqlite
from proxy.batches.inputs import Arrival, Inputs
from proxy.batches.item import Items
from proxy.batches.lane import Pause
from proxy.batches.provider import Provider
from proxy.batches.runner import Runner
from proxy.batches.sqlite import SqliteStore
from proxy.batches.store import Page, Store
from proxy.batches.webhook import Announcer
from proxy.core.batch import MESSAGES, WINDOWS, Batch, File, Mistake, NotPossible, Status
from proxy.errors import NotFound, StateOff, StateUnavailable, WrongState
from proxy.plan import Plan
from proxy.relay import Runs
from proxy.tasks import Tasks
from proxy.telemetry import BatchLevel, Telemetry
from proxy.upstreams import Transport

log = logging.getLogger("penstock.batches")

READ_BYTES = 1 << 20
DAY = 86_400.0


@dataclass(slots=True, frozen=True)
class Wanted:
    """A batch as its caller asks for it; see `proxy.core.batch.Batch`."""

    endpoint: str
    input_file_id: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None
    traceparent: str = ""


@dataclass(slots=True, frozen=True)
class _State:
    store: Store
    inputs: Inputs
    runner: Runner


class Batches:
    """
    Args:
        directory: where state is kept; None: nowhere.
        plan: the plan in force.
        now, wall: the monotonic clock and the epoch's.

    Raises, all of it: StateOff, StateUnavailable.
    """

    def __init__(
        self,
        directory: Path | None,
        relay: Runs,
        telemetry: Telemetry,
        plan: Callable[[], Plan],
        transport: Transport,
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._directory, self._plan, self._telemetry, self._transport = directory, plan, telemetry, transport
        self._relay = relay
        self._items = Items(relay, telemetry, plan, now, wall)
        self._now, self._wall = now, wall
        self._opening = asyncio.Lock()
        self._tasks = Tasks()
        self._state: _State | None = None
        self._is_closed = False

    # ── its own life ──

    async def start(self) -> None:
        """Take up what was left open. Where the state cannot be opened, that is logged, and told to whoever asks."""
        if self._directory is None or not await asyncio.to_thread((self._directory / sqlite.FILE).exists):
            return
        try:
            await self._opened()
        except StateOff as error:
            log.warning("batches are off: %s (%s)", error, self._directory)

    async def drain(self, seconds: float) -> bool:
        """Start no item more, and give back what waits; whether all that was sent has ended within `seconds`."""
        return self._state is None or await self._state.runner.drain(seconds)

    async def stop(self) -> None:
        async with self._opening:
            self._is_closed = True
            state, self._state = self._state, None
        if state is not None:
            await state.runner.stop()
            await state.store.aclose()
        await self._tasks.stop()

    def level(self) -> BatchLevel:
        return BatchLevel() if self._state is None else self._state.runner.level()

    def report(self, most: int) -> tuple[list[dict[str, object]], int]:
        """The `most` oldest of the open batches, as JSON values, and how many there are besides."""
        if self._state is None:
            return [], 0
        told = self._state.runner.report(most)
        return told, self._state.runner.open - len(told)

    async def _opened(self) -> _State:
        """Whoever asks first may leave before it is open: the opening is nobody's own, and goes on for all others."""
        if self._state is not None:
            return self._state
        found = await asyncio.shield(self._tasks.spawn("open the state", self._found()))
        if isinstance(found, _State):
            return found
        raise found

    async def _found(self) -> _State | StateOff | StateUnavailable:
        async with self._opening:
            if self._state is None:
                try:
                    self._state = await self._open()
                except (StateOff, StateUnavailable) as error:
                    return error
            return self._state

    async def _open(self) -> _State:
        if self._directory is None or self._is_closed:
            raise StateOff(
                "this gateway keeps no state, so it has no files and batches; the operator can set state.path"
            )
        store = await asyncio.to_thread(SqliteStore.opened, self._directory)
        async with AsyncExitStack() as closing:  # what could not be opened whole is not kept from the next try
            closing.push_async_callback(store.aclose)
            state = await self._begun(store, self._directory)
            closing.pop_all()
        return state

    async def _begun(self, store: SqliteStore, directory: Path) -> _State:
        inputs = Inputs(directory / "files")
        await asyncio.to_thread(inputs.forget_arrivals)
        runner = Runner(
            store,
            inputs,
            self._items,
            self._telemetry,
            refuse=self._refuse,
            hands_on=self._hands_on,
            provider=partial(Provider, self._relay, self._telemetry, self._plan, self._now),
            line_bytes_max=lambda: self._plan().settings.server.max_body_bytes,
            keep_seconds=lambda: self._plan().settings.batches.keep_days * DAY,
            now=self._now,
            wall=self._wall,
        )
        announcer = Announcer(
            store,
            self._transport,
            lambda: self._plan().webhook,
            self._telemetry,
            runner.ends,
            now=self._now,
            wall=self._wall,
        )
        resumed = await runner.start()
        runner.tasks.spawn("webhook", announcer.run())
        log.info("state is kept in %s; %d batches go on", directory, resumed)
        return _State(store, inputs, runner)

    def _refuse(self, batch: Batch, model: str) -> Mistake | None:
        plan = self._plan()
        route = plan.route(model)
        if route is None:
            near = plan.nearest(model)
            hint = f" Did you mean '{near}'?" if near else ""
            return Mistake("model_not_found", f"The model '{model[:200]}' is not known here.{hint}", 1, "body.model")
        if (route.dialect == "anthropic") != (batch.endpoint == MESSAGES):
            message = f"The model '{model[:200]}' is served by an upstream that speaks {route.dialect}'s API."
            return Mistake("model_not_found", message, 1, "body.model")
        routes = [route] if route.pipeline is None else route.pipeline.routes
        if any(target.upstream.passthrough for each in routes for target in each.targets):
            message = f"The model '{model[:200]}' is called with each client's own key, and none is kept for a batch."
            return Mistake("model_not_found", message, 1, "body.model")
        return None

    def _hands_on(self, model: str) -> str:
        plan = self._plan()
        route = plan.route(model)
        if route is None or route.pipeline is not None or plan.settings.models[route.name].batch_mode == "gateway":
            return ""
        return route.targets[0].upstream.name

    # ── files ──

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[Arrival]:
        """A file that arrives; see `Inputs.arriving`."""
        state = await self._opened()
        async with state.inputs.arriving() as arrival:
            yield arrival

    async def add_file(self, owner: str, arrival: Arrival, filename: str, keep_seconds: int | None) -> File:
        """Keep what has arrived, as the input of a batch to come."""
        state = await self._opened()
        now = int(self._wall())
        kept = self._plan().settings.batches.keep_days * DAY if keep_seconds is None else keep_seconds
        file = File(
            id=f"file-{secrets.token_hex(16)}",
            owner=owner,
            purpose="batch",
            filename=filename,
            bytes=arrival.size,
            created_at=now,
            expires_at=now + int(kept),
        )
        await arrival.keep(file.id)
        await state.store.add_file(file)
        return file

    async def file(self, owner: str, file_id: str) -> File:
        """Raises: NotFound."""
        state = await self._opened()
        if (file := await state.store.file(owner, file_id)) is None:
            raise NotFound(f"there is no file `{file_id[:100]}`; GET /v1/files lists yours", param="file_id")
        return file

    async def files(self, owner: str, page: Page, purpose: str) -> list[File]:
        state = await self._opened()
        return await state.store.files(owner, page, purpose)

    async def remove_file(self, owner: str, file_id: str) -> None:
        """Raises: NotFound; WrongState: a batch still writes it."""
        state = await self._opened()
        file = await self.file(owner, file_id)
        if file.batch and not (await self.batch(owner, file.batch)).status.is_final:
            raise WrongState(f"{file.batch} still writes this file; cancel it first, or wait for its end")
        await state.store.remove_file(owner, file_id)
        await state.runner.tidy()

    async def content(self, file: File) -> AsyncIterator[bytes]:
        """The bytes of a file; of results, those that there are by now.

        Raises:
            NotFound: it was deleted meanwhile.
        """
        state = await self._opened()
        if not file.batch:
            async for part in _read(state.inputs.path(file.id)):
                yield part
            return
        batch = await self.batch(file.owner, file.batch)
        async for part in self.results(batch, done=file.id == batch.output_file_id):
            yield part

    async def results(self, batch: Batch, *, done: bool) -> AsyncIterator[bytes]:
        """The lines of what was answered, or of what failed, that there are by now: at least what `batch` counts."""
        state, after = await self._opened(), 0
        while lines := await state.store.lines(batch.id, done=done, after=after, most_bytes=READ_BYTES):
            after = lines[-1][0]
            yield b"".join(text for _, text in lines)

    # ── batches ──

    @property
    def are_kept(self) -> bool:
        return self._directory is not None

    async def submit(self, owner: str, wanted: Wanted) -> Batch:
        """A new batch, kept and under way.

        Raises:
            NotFound: the input is no file of this caller's.
        """
        state = await self._opened()
        await self.file(owner, wanted.input_file_id)
        now = int(self._wall())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            owner=owner,
            endpoint=wanted.endpoint,
            input_file_id=wanted.input_file_id,
            output_file_id=f"file-{secrets.token_hex(16)}",
            error_file_id=f"file-{secrets.token_hex(16)}",
            created_at=now,
            expires_at=now + WINDOWS[wanted.completion_window],
            completion_window=wanted.completion_window,
            output_seconds=wanted.output_seconds,
            metadata=wanted.metadata,
            traceparent=wanted.traceparent,
        )
        await state.store.create(batch)
        state.runner.take(batch)
        return batch

    async def batch(self, owner: str, batch_id: str) -> Batch:
        """Raises: NotFound."""
        state = await self._opened()
        if (batch := await state.store.batch(owner, batch_id)) is None:
            raise NotFound(f"there is no batch `{batch_id[:100]}`; GET /v1/batches lists yours", param="batch_id")
        return batch

    async def batches(self, owner: str, page: Page) -> list[Batch]:
        state = await self._opened()
        return await state.store.batches(owner, page)

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """The batch, cancelling; to cancel it again changes nothing.

        Raises:
            NotFound; WrongState: it has ended, or is about to.
        """
        state = await self._opened()
        batch = await self.batch(owner, batch_id)
        if batch.status is Status.CANCELLING:
            return batch
        try:
            batch = await state.store.move(batch_id, Status.CANCELLING, self._wall())
        except NotPossible as error:
            raise WrongState(f"the batch is {error.status.value}; it can no longer be cancelled") from None
        state.runner.call_off(batch_id)
        return batch

    async def remove(self, batch: Batch) -> None:
        """Forget a batch that has ended, and its results."""
        state = await self._opened()
        await state.store.remove(batch.id)
        await state.runner.tidy()

    def pause(self, batch: Batch) -> Pause | None:
        """Why the batch does not go on; None: it does, or is over."""
        return None if self._state is None else self._state.runner.pause(batch)


async def _read(path: Path) -> AsyncIterator[bytes]:
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        raise NotFound("the file has just been deleted") from None
    try:
        while part := await asyncio.to_thread(file.read, READ_BYTES):
            yield part
    finally:
        await asyncio.to_thread(file.close)
