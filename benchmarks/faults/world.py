"""A gateway as production makes it, an upstream that plays whatever fault it is given, and clients over raw sockets.

Everything is in one process and talks over loopback, so that what is left behind can be counted: calls in flight,
tasks, descriptors, records, and the upstream's key wherever it must not be.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from proxy.config import Gate, Limits, Model, Retry, Server, Settings
from tests.e2e.running import ASK, CHAT, UPSTREAM_KEY, House, at, descriptors, serving, settings, until
from tests.e2e.scripted import DONE, Exchange, Play, Scripted, scripted
from tests.e2e.wire import Wire, request

AT_A_TIME = 24  # calls
PATIENCE_SECONDS = 20.0  # a call that takes longer hangs
PING = b": ping\n\n"
STREAM = ASK | {"stream": True}


@dataclass(slots=True)
class Heard:
    """What a client heard of an answer."""

    status: int = 0  # 0: nothing that was HTTP
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False  # as HTTP has it: its last chunk came, or all of its length

    @property
    def says_so(self) -> bool:
        """Whether it ends with an error event, and nothing else looks like its end."""
        before, mark, error = self.body.rpartition(b"event: error\ndata: ")
        return mark != b"" and b'"error"' in error and error.count(b"\n") == 2 and DONE not in before

    def is_true_to(self, events: bytes) -> bool:
        """A stream that is what the upstream sent, or as much of it as came and the word that it broke off; or an
        error, when nothing had come."""
        if not self.is_whole:
            return False
        if self.status != 200:
            return self.status in (502, 504) and b"upstream_" in self.body
        if self.told == events:
            return True
        sent = self.told.rpartition(b"event: error\n")[0]
        return self.says_so and sent != events and events.startswith(sent) and (not sent or sent.endswith(b"\n\n"))

    @property
    def told(self) -> bytes:
        """Without the gateway's own comments."""
        return self.body.replace(PING, b"")


class World:
    """
    Attributes:
        tried, lost: calls by case; those that were not answered as they should be.
        problems: what was wrong, with the case it was found after.
    """

    def __init__(self, house: House, upstream: Scripted, log: int) -> None:
        self.house, self.upstream = house, upstream
        self.tried: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.problems: list[str] = []
        self._log = log
        self._numbers = count()
        self._plays: dict[str, Play] = {}
        self._exchanges: dict[str, Exchange] = {}
        self._idle: list[Wire] = []
        self._begun = 0  # requests that the gateway must have a record of
        upstream.improvises = self._play
        house.gateway._relay._draw = lambda: 1.0 - 1e-12  # a breaker turns nobody away: each call is to meet its fault

    def _play(self) -> Play:
        exchange = self.upstream.exchanges.pop()
        key = exchange.headers["idempotency-key"]
        self._exchanges[key] = exchange
        return self._plays[key]

    async def exchange(self, key: str) -> Exchange:
        """The request of that name, once it has come to the upstream."""
        await until(lambda: key in self._exchanges, f"{key} upstream", seconds=PATIENCE_SECONDS)
        return self._exchanges[key]

    async def run(self, name: str, trials: Iterable[Trial]) -> None:
        """Make the trials of a case, some at a time, and look at what they left behind.

        Args:
            trials: each makes one call, or what else the case is about, and returns whether that survived.
        """
        queue = iter(trials)

        async def work() -> None:
            for trial in queue:
                self.tried[name] += 1
                survived = False
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        survived = await trial(self)
                if not survived:
                    self.lost[name] += 1

        await asyncio.gather(*(work() for _ in range(AT_A_TIME)))
        self.problems += [f"{name}: {problem}" for problem in await self._left_behind()]

    async def call(self, play: Play, said: object = STREAM, path: str = CHAT) -> Heard:
        """One call whose upstream plays `play`, and all that is heard of it."""
        line, _ = await self.begin(play, said, path)
        heard = await hear(line)
        if heard.is_whole and "close" not in heard.headers.get("connection", ""):
            self._idle.append(line)
        else:
            line.writer.transport.abort()
        return heard

    async def begin(self, play: Play, said: object = STREAM, path: str = CHAT) -> tuple[Wire, str]:
        """Send a request; its connection, and its name among the plays."""
        key = f"trial-{next(self._numbers)}"
        self._plays[key] = play
        line = self._idle.pop() if self._idle else await self.line()
        self._begun += 1
        line.send(request(said, path, headers={"idempotency-key": key}))
        return line, key

    async def line(self) -> Wire:
        return Wire(*await asyncio.open_connection("127.0.0.1", self.house.port, limit=1 << 16))

    async def raw(self, data: bytes, *, ends: bool = False) -> Heard:
        """Send bytes as they are; what is answered. With `ends`, the connection is waited for to end behind it."""
        line = await self.line()
        self._begun += 1
        line.send(data)
        try:
            heard = await hear(line)
            if ends:
                heard.is_whole &= await line.reader.read() == b""
            return heard
        finally:
            line.writer.transport.abort()

    async def _left_behind(self) -> list[str]:
        """What section "invariants" of docs/faults.md promises, where it does not hold."""
        problems = []
        for line in self._idle:
            line.writer.transport.abort()
        self._idle.clear()
        try:
            await self.house.until_idle()
            await until(lambda: not self.house.gateway.telemetry._open, "records closed")
        except AssertionError as error:
            problems.append(str(error))
        metrics = await self.house.metrics()
        if (recorded := metrics("requests_total")) != self._begun:
            problems.append(f"{self._begun} requests, {recorded:.0f} records")
        families = ("requests_in_flight", "streams_in_flight", "gate_in_use", "gate_queue_depth")
        problems += [f"{family} is {metrics(family):.0f}" for family in families if metrics(family)]
        now = asyncio.get_running_loop().time()
        reserved = {pool.label: pool.rates.snapshot(now).reserved for pool in self.house.gateway._pools if pool.rates}
        problems += [f"{label}: {tokens:.0f} tokens reserved" for label, tokens in reserved.items() if tokens > 1.0]
        if UPSTREAM_KEY in metrics.text:
            problems.append("the upstream's key stands in the metrics")
        self._plays.clear()
        self._exchanges.clear()
        return problems

    async def at_rest(self) -> tuple[int, int]:
        """Tasks and descriptors there are when nothing goes on; kept connections to the upstream are closed."""
        await self.house.gateway._transport.close()
        await until(lambda: not self.upstream.connections, "the upstream is left")
        await asyncio.sleep(0)  # what has ended is over
        return len(asyncio.all_tasks()), len(descriptors())

    def leaks(self) -> bool:
        """Whether the upstream's key stands in the logs."""
        self.house.gateway.telemetry.flush(5.0)
        size = os.fstat(self._log).st_size
        return UPSTREAM_KEY.encode() in os.pread(self._log, size, 0)


Trial = Callable[[World], Awaitable[bool]]


async def hear(line: Wire) -> Heard:
    heard = Heard()
    try:
        heard.status = await line.head()
        heard.headers = line.headers
        if "content-length" in line.headers:
            heard.body = await line.reader.readexactly(int(line.headers["content-length"]))
        else:
            while part := await line.chunk():
                heard.body += part
        heard.is_whole = True
    except asyncio.IncompleteReadError as error:
        heard.body += error.partial
    except (ConnectionError, ValueError, IndexError):  # it is gone, or what came is no HTTP
        pass
    return heard


def configuration(upstream: Scripted) -> Settings:
    """One upstream: in both dialects, with short deadlines, and with answers that are read on."""
    free = Limits(learn=False)
    upstreams = {
        "up": at(upstream.base_url, limits=free),
        "claude": at(upstream.base_url, limits=free, dialect="anthropic"),
        "hasty": at(upstream.base_url, limits=free, first_byte_seconds=0.2, idle_seconds=0.2),
        "draining": at(upstream.base_url, limits=free, drain_seconds=0.5),
    }
    models = {"*": Model(upstreams=("up",))} | {name: Model(upstreams=(name,)) for name in upstreams if name != "up"}
    server = Server(port=0, admin_port=0, ping_seconds=0.1, write_stall_seconds=0.3, read_seconds=1.0)
    return settings(upstreams, models=models, server=server, retry=Retry(attempts=1), gate=Gate(concurrency=200))


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryFile() as log:
        async with scripted() as upstream, serving(configuration(upstream), log_fd=log.fileno()) as house:
            yield World(house, upstream, log.fileno())


def chance(seed: int, name: str) -> random.Random:
    return random.Random(f"{seed} {name}")
