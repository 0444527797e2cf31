"""Runs all open batches, each from its first state to its last.

    take -> [validating: lines checked and queued] -> [in progress: claim, run, finish] -> close

1. What an item came to is kept before anybody hears of it, and insisted on: where the store has no room, the result
   waits in memory and nothing new is claimed.
2. A claim is renewed as long as its item runs. Items are given back where they were refused, and when the gateway
   stops.
3. A batch that is cancelled takes nothing more; what waits at the gate is given up, what was sent is paid for and kept.
4. A batch whose time is over is closed as it stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from proxy.batches.handing import GRACE_SECONDS, Handing
from proxy.batches.inputs import Inputs, Reading
from proxy.batches.item import Items
from proxy.batches.lane import AHEAD, AHEAD_OF_ALL, Lane, Pause
from proxy.batches.provider import Provider
from proxy.batches.store import Item, Store
from proxy.config import PIPELINE
from proxy.core import batch as rules
from proxy.core.batch import Batch, End, Handed, Input, Mistake, NotPossible, Result, Status
from proxy.errors import StateUnavailable
from proxy.relay import Memory
from proxy.tasks import Tasks
from proxy.telemetry import BatchLevel, Record

log = logging.getLogger("penstock.batches")

CLAIM_SECONDS = 60.0  # how long a claim lasts unless it is renewed
RENEW_SECONDS = 20.0
SWEEP_SECONDS = 60.0
CANCEL_SECONDS = 600.0  # for what was sent when its batch was cancelled
INSIST_SECONDS = 2.0  # between two tries where nothing can be written
PULSE_SECONDS = 1.0

Said = ParamSpec("Said")
Answer = TypeVar("Answer")


class Notes(Protocol):
    """Where the runner writes down what it did; telemetry does."""

    def batch_item(self, end: str) -> None: ...

    def batch_finished(self, status: str, seconds: float) -> None: ...


@dataclass(slots=True, frozen=True, eq=False)
class Run:
    """An item under way."""

    item: Item
    record: Record
    task: asyncio.Task[None]

    @property
    def waits(self) -> bool:
        """Nothing of it is at an upstream, and it has no result yet."""
        return not self.record.ended and not self.record.is_sent


class Runner:
    """
    Args:
        refuse: what is wrong with a model for a batch; None: nothing.
        hands_on: the upstream that runs the batches of a model; "": they are run here.
        provider: asks that upstream.
        keep_seconds: how long batches that ended are kept.
        now, wall: the monotonic clock and the epoch's.

    Attributes:
        ends: set when a batch has ended.
    """

    def __init__(
        self,
        store: Store,
        inputs: Inputs,
        items: Items,
        notes: Notes,
        *,
        refuse: Callable[[Batch, str], Mistake | None],
        hands_on: Callable[[str], str],
        provider: Callable[[Batch, str], Provider],
        line_bytes_max: Callable[[], int],
        keep_seconds: Callable[[], float],
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.store, self.inputs, self.items, self.notes = store, inputs, items, notes
        self.refuse, self.line_bytes_max, self._keep_seconds = refuse, line_bytes_max, keep_seconds
        self.hands_on, self.provider = hands_on, provider
        self.now, self.wall = now, wall
        self.tasks = Tasks()
        self._lives: dict[str, Life] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._given_up: list[Item] = []  # by a drain
        self.ends = asyncio.Event()
        self._is_stuck = False  # the store could not be written, and that has been told

    async def start(self) -> int:
        """Take up all that is open; how many batches that are."""
        await self.tidy()
        batches = await self.store.open_batches()
        for batch in batches:
            self.take(batch)
        self.tasks.spawn("batches", self._pulse())
        return len(batches)

    def take(self, batch: Batch) -> None:
        life = self._lives[batch.id] = Life(self, batch)
        life.task = self.tasks.spawn(batch.id, life.live())

    def call_off(self, batch_id: str) -> None:
        """The batch has been cancelled, or is late."""
        if (life := self._lives.get(batch_id)) is not None:
            life.call_off()

    def lane(self, batch: Batch) -> Lane:
        return self._lanes.setdefault((batch.owner, batch.model), Lane(self.now, self._ahead))

    def _ahead(self) -> int:
        """How many items of a lane may stand before the gate."""
        return max(1, min(AHEAD, AHEAD_OF_ALL // len(self._lanes)))

    def pause(self, batch: Batch) -> Pause | None:
        """Why the batch does not go on; None: it does, or is over."""
        life, lane = self._lives.get(batch.id), self._lanes.get((batch.owner, batch.model))
        if life is None or life.batch.handed is not None:
            return None if life is None else life.pause
        return None if lane is None else lane.pause

    def level(self) -> BatchLevel:
        lives = self._lives.values()
        waiting = [life.batch.created_at for life in lives if life.left]
        jobs = {status.value: sum(life.batch.status is status for life in lives) for status in rules.OPEN}
        return BatchLevel(jobs, sum(life.left for life in lives), min(waiting, default=None))

    def report(self, most: int) -> list[dict[str, object]]:
        """The `most` oldest of the open batches, as JSON values."""
        oldest = sorted(self._lives.values(), key=lambda life: life.batch.created_at)[:most]
        return [self._told(life) for life in oldest]

    def _told(self, life: Life) -> dict[str, object]:
        batch, pause = life.batch, self.pause(life.batch)
        return {
            "id": batch.id,
            "owner": batch.owner,
            "model": batch.model,
            "status": batch.status.value,
            "items": batch.total,
            "left": life.left,
            "running": len(life.runs),
            "age_seconds": max(0.0, self.wall() - batch.created_at),
            "expires_seconds": max(0.0, batch.expires_at - self.wall()),
            "waits_for": "" if pause is None else pause.reason,
        }

    @property
    def open(self) -> int:
        """How many batches have not ended."""
        return len(self._lives)

    async def drain(self, seconds: float) -> bool:
        """Claim nothing more and give back what waits; whether all that was sent has ended within `seconds`."""
        for life in self._lives.values():
            self._given_up += life.rest()
        runs = [run.task for life in self._lives.values() for run in life.runs]
        if not runs:
            return True
        _, late = await asyncio.wait(runs, timeout=seconds)
        return not late

    async def stop(self) -> None:
        """End everything; what was claimed is queued again."""
        claims = self._given_up + [run.item for life in self._lives.values() for run in life.runs]
        await self.tasks.stop()
        try:
            await self.store.release(claims)
        except StateUnavailable:
            log.warning("%d claims could not be given back; they will be at the next start", len(claims))

    async def ended(self, batch: Batch) -> None:
        """A batch came to its end."""
        del self._lives[batch.id]
        lane = (batch.owner, batch.model)
        if not any((life.batch.owner, life.batch.model) == lane for life in self._lives.values()):
            self._lanes.pop(lane, None)
        self.ends.set()
        self.notes.batch_finished(batch.status.value, batch.ended_at - batch.created_at)
        log.info("%s is %s: %d done, %d failed", batch.id, batch.status.value, batch.completed, batch.failed)
        await self.tidy()

    async def tidy(self) -> None:
        """Remove the bytes that nobody needs."""
        await asyncio.to_thread(self.inputs.collect, await self.store.needed())

    async def insist(self, ask: Callable[Said, Awaitable[Answer]], *said: Said.args, **named: Said.kwargs) -> Answer:
        """What the store answers, however long it takes until it can (rule 1)."""
        while True:
            try:
                answer = await ask(*said, **named)
            except StateUnavailable as error:
                if not self._is_stuck:
                    log.warning("batches wait: %s", error)
                self._is_stuck = True
                await asyncio.sleep(INSIST_SECONDS)
            else:
                self._is_stuck = False
                return answer

    async def _pulse(self) -> None:
        renewed = swept = self.now()
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            now, wall = self.now(), self.wall()
            for life in list(self._lives.values()):
                if wall >= life.expires_at:
                    life.call_off()
            if now >= renewed + RENEW_SECONDS:
                renewed = now
                claims = [run.item for life in self._lives.values() for run in life.runs]
                if claims:
                    await self.insist(self.store.renew, claims, self.wall() + CLAIM_SECONDS)
            if now >= swept + SWEEP_SECONDS:
                swept = now
                await self._sweep()

    async def _sweep(self) -> None:
        gone = await self.insist(self.store.sweep, self.wall(), keep_seconds=self._keep_seconds())
        if gone.claims:
            log.warning("%d claims were not renewed in time; their items are run again", gone.claims)
            for life in self._lives.values():
                life.more.set()
        if gone.files or gone.batches:
            log.info("removed: %d files that have expired, %d batches that ended long ago", gone.files, gone.batches)
            await self.tidy()


class Life:
    """One batch, as long as it is open.

    Attributes:
        batch: as it was when its state last changed.
        left: its items that have not ended.
        runs: its items under way.
        more: set where there may be something to claim.
        pause: why the provider that it is handed on to cannot be asked; None: it can.
    """

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._runner = runner
        self.batch = batch
        self.left = batch.pending
        self.runs: set[Run] = set()
        self.more = asyncio.Event()
        self.pause: Pause | None = None
        self.task: asyncio.Task[None] | None = None
        self._working: asyncio.Task[None] | None = None
        self._handing: Handing | None = None
        self._is_called_off = False
        self._rests = False

    @property
    def expires_at(self) -> float:
        """When it is over as it stands."""
        return self.batch.expires_at + (0.0 if self.batch.handed is None else GRACE_SECONDS)

    async def live(self) -> None:
        while not self._is_called_off:
            self._working = working = self._runner.tasks.spawn(f"{self.batch.id} works", self._work())
            await asyncio.wait({working})
            if self._rests:
                return
            if working.cancelled() or working.exception() is None:
                break
            await asyncio.sleep(CLAIM_SECONDS)  # a mistake of ours, and logged; what it had claimed is free again
        await self._give_up_waiting()
        if self.batch.handed is not None and not self._hand().is_over:
            await self._withdraw()
            if self._rests:
                return
        await self._close()

    def _hand(self) -> Handing:
        runner, handed = self._runner, self.batch.handed
        assert handed is not None
        if self._handing is None:
            provider = runner.provider(self.batch, handed.upstream)
            self._handing = Handing(self, provider, runner.inputs, runner.wall)
        return self._handing

    async def _withdraw(self) -> None:
        """It is cancelled, or late: so it is where it was handed on to."""
        runner = self._runner
        batch = await runner.insist(runner.store.batch, self.batch.owner, self.batch.id)
        assert batch is not None
        self.batch = batch
        self._working = runner.tasks.spawn(f"{batch.id} is withdrawn", self._hand().withdraw())
        await asyncio.wait({self._working})

    def call_off(self) -> None:
        self._is_called_off = True
        if self._working is not None:
            self._working.cancel()

    def rest(self) -> list[Item]:
        """The gateway stops: claim nothing more, and give up what waits; what that was."""
        self._rests = True
        if self._working is not None:
            self._working.cancel()
        return self._give_up(run for run in self.runs if run.waits)

    async def _work(self) -> None:
        runner = self._runner
        if self.batch.status is Status.VALIDATING and self.batch.handed is None:
            with suppress(NotPossible):  # it has been cancelled meanwhile
                await self._validate()
        if self.batch.handed is not None:
            if self.batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
                await self._hand().follow()
            return
        if self.batch.status is not Status.IN_PROGRESS:
            return
        lane = runner.lane(self.batch)
        while self.left:
            room = await lane.room()
            self.more.clear()
            claims = await runner.insist(runner.store.claim, self.batch.id, room, runner.wall() + CLAIM_SECONDS)
            lane.give_back(room - len(claims))
            if claims:
                await self._start(claims, lane)
            else:
                await self.more.wait()

    async def _validate(self) -> None:
        """Check the input as a whole, and queue its lines."""
        runner, batch = self._runner, self.batch
        most = runner.line_bytes_max()
        found = Input(batch.endpoint, most)
        try:
            reading = Reading(runner.inputs.path(batch.input_file_id), found, most)
            try:
                while not reading.is_over:
                    lines = await asyncio.to_thread(reading.some)
                    if lines and not found.mistakes:
                        await runner.insist(runner.store.fill, batch.id, lines)
            finally:
                # handed to its thread at once, and not called back by a second cancelling
                await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, reading.close))
        except OSError as error:
            message = f"The input file cannot be read: {error.strerror}. Upload it again."
            found.mistakes.append(Mistake("input_file_unreadable", message))
        mistakes = found.mistakes or list(filter(None, (runner.refuse(batch, found.model),)))
        if mistakes:
            await self.move(Status.FAILED, mistakes=mistakes, total=0)
        elif batch.endpoint != rules.MESSAGES and (upstream := runner.hands_on(found.model)):
            await self.note(model=found.model, total=found.count, handed=Handed(upstream))
        else:
            await self.move(Status.IN_PROGRESS, model=found.model, total=found.count)
        self.left = self.batch.pending

    async def move(self, status: Status, **changes: object) -> None:
        runner = self._runner
        self.batch = await runner.insist(runner.store.move, self.batch.id, status, runner.wall(), **changes)

    async def note(self, **changes: object) -> None:
        self.batch = await self._runner.insist(self._runner.store.note, self.batch.id, **changes)

    async def unended(self) -> list[tuple[int, str]]:
        return await self._runner.insist(self._runner.store.unended, self.batch.id)

    async def adopt(self, results: Sequence[tuple[int, Result]]) -> None:
        runner = self._runner
        self.left = await runner.insist(runner.store.adopt, self.batch.id, results, runner.wall())
        for _, result in results:
            runner.notes.batch_item(End.DONE.value if result.is_done else End.FAILED.value)

    async def _start(self, claims: Sequence[Item], lane: Lane) -> None:
        runner = self._runner
        wanted = [(item.start, item.length) for item in claims]
        try:
            lines = await asyncio.to_thread(runner.inputs.lines, self.batch.input_file_id, wanted)
        except OSError as error:
            lane.give_back(len(claims))
            message = f"the input file cannot be read any more: {error.strerror}"
            for item in claims:
                line = rules.unanswered(self.batch.item_id(item.line), item.custom_id, "input_file_unreadable", message)
                await self._keep(item, Result(False, line))
            return
        for item, line in zip(claims, lines, strict=True):
            place = Place(lane)
            record = runner.items.begin(self.batch, item, place.leave)
            task = runner.tasks.spawn(record.request_id, self._run(item, line, record, place))
            run = Run(item, record, task)
            self.runs.add(run)
            task.add_done_callback(partial(self._over, run))

    def _over(self, run: Run, task: asyncio.Task[None]) -> None:
        self.runs.discard(run)

    async def _run(self, item: Item, line: bytes, record: Record, place: Place) -> None:
        runner, lane = self._runner, place.lane
        try:
            memory = await self._memory(item)
            ended = await runner.items.run(self.batch, item, line, record, memory)
        except asyncio.CancelledError:
            lane.given_up()
            raise
        finally:
            place.leave()
        runner.notes.batch_item(ended.end.value)
        if ended.result is not None:
            lane.answered()
            await self._keep(item, ended.result)
            return
        if ended.pause is not None:
            if lane.pause is None:
                log.warning("batches of %s wait: %s (%s)", self.batch.model, ended.pause.message, ended.pause.reason)
            lane.stop(ended.pause, ended.retry_after)
        else:
            lane.breathe(ended.retry_after)
        await runner.insist(runner.store.release, [item])
        self.more.set()

    async def _memory(self, item: Item) -> Memory | None:
        """Of a pipeline's steps; any other item has none."""
        runner = self._runner
        if not self.batch.model.startswith(PIPELINE):
            return None
        before = await runner.insist(runner.store.steps, item)

        async def keep(step: str, gave: bytes) -> None:
            await runner.insist(runner.store.keep_step, item, step, gave)

        return Steps(before, keep)

    async def _keep(self, item: Item, result: Result) -> None:
        runner = self._runner
        left = await runner.insist(runner.store.finish, item, result, runner.wall())
        if left is not None:
            self.left = left
            if not left:
                self.more.set()

    async def _give_up_waiting(self) -> None:
        """Rule 3; with time over nothing is waited for."""
        if not self.runs:
            return
        seconds = min(CANCEL_SECONDS, self.batch.expires_at - self._runner.wall())
        self._give_up(run for run in self.runs if run.waits)
        if self.runs:
            await asyncio.wait([run.task for run in self.runs], timeout=max(0.0, seconds))
        if late := list(self.runs):
            self._give_up(late)
            await asyncio.wait([run.task for run in late])

    @staticmethod
    def _give_up(runs: Iterable[Run]) -> list[Item]:
        given_up = []
        for run in runs:
            run.record.end_reason = "shutdown"
            run.task.cancel()
            given_up.append(run.item)
        return given_up

    async def _close(self) -> None:
        runner = self._runner
        while not self.batch.status.is_final:
            batch = await runner.insist(runner.store.batch, self.batch.owner, self.batch.id)
            assert batch is not None
            self.batch = batch
            if (status := _last_of(batch.status)) is not None:
                with suppress(NotPossible):  # it was cancelled at this very moment: look again
                    self.batch = await runner.insist(runner.store.close, batch.id, status, runner.wall())
        self.left = 0
        await runner.ended(self.batch)


class Steps:
    """What the steps of a pipeline gave, kept with their item; see `proxy.relay.Memory`."""

    def __init__(self, before: dict[str, bytes], keep: Callable[[str, bytes], Awaitable[None]]) -> None:
        self._before, self._keep = before, keep

    def recall(self, step: str) -> bytes | None:
        return self._before.get(step)

    async def keep(self, step: str, gave: bytes) -> None:
        await self._keep(step, gave)


class Place:
    """An item's place before the gate, left once: when the gate has decided, or when the run is over."""

    __slots__ = ("_is_left", "lane")

    def __init__(self, lane: Lane) -> None:
        self.lane, self._is_left = lane, False

    def leave(self) -> None:
        if not self._is_left:
            self._is_left = True
            self.lane.leave()


def _last_of(status: Status) -> Status | None:
    """The final state that a batch is closed with; one that is called off while it is open is late."""
    if status.is_final:
        return None
    return {Status.FINALIZING: Status.COMPLETED, Status.CANCELLING: Status.CANCELLED}.get(status, Status.EXPIRED)
