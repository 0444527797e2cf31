"""A gateway in a process of its own that can be killed, and that kills itself at a named point if it is told one."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import uvloop

from proxy.app import Gateway, serve
from proxy.batches.inputs import Arrival, Inputs
from proxy.batches.item import Items
from proxy.batches.runner import Life
from proxy.batches.sqlite import SqliteStore, _Writer
from proxy.config import Gate, Limits, Model, Secret, Server, Settings, State, Telemetry, Upstream

# A function of the gateway's, and whether to die before it is called or when it has returned.
POINTS: dict[str, tuple[type, str, bool]] = {
    "upload written": (Arrival, "_flush", True),
    "upload kept, no row yet": (Arrival, "_keep", True),
    "file added": (SqliteStore, "add_file", True),
    "batch created": (SqliteStore, "create", True),
    "lines queued": (SqliteStore, "fill", True),
    "state moved": (SqliteStore, "move", True),
    "claimed": (SqliteStore, "claim", True),
    "about to send": (Items, "run", False),
    "answered": (Items, "run", True),
    "before a commit": (_Writer, "_committed", False),
    "committed, nobody told": (_Writer, "_committed", True),
    "result kept": (SqliteStore, "finish", True),
    "about to close": (SqliteStore, "close", False),
    "closed": (SqliteStore, "close", True),
    "inputs collected": (Inputs, "collect", True),
    "batch over": (Life, "_close", True),
}

OFTEN = frozenset({"claimed", "about to send", "answered", "before a commit", "committed, nobody told", "result kept"})


@dataclass(slots=True)
class Running:
    """A gateway that is up."""

    process: ForkServerProcess
    port: int

    @property
    def is_up(self) -> bool:
        return self.process.is_alive()

    @property
    def memory(self) -> int:
        """Bytes that it has in memory now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def cpu_seconds(self) -> float:
        said = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(said[11]) + int(said[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Nursery:
    """Gateways are forked from a process that has imported everything, so that a new life takes little time."""

    def __init__(self, state: Path, provider: str, limits: Limits | None = None) -> None:
        self._state, self._provider, self._limits = state, provider, limits or Limits(learn=False)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def begin(self, point: str = "", passes: int = 0) -> Running | None:
        """Start a gateway; None: it died at its point before it was up.

        Args:
            point: of POINTS; it kills itself there when it comes by for the `passes`-th time.
        """
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_live, args=(theirs, str(self._state), self._provider, self._limits, point, passes)
        )
        process.start()
        theirs.close()
        try:
            return Running(process, ours.recv())
        except EOFError:
            process.join()
            return None
        finally:
            ours.close()


def _live(parent: Connection, state: str, provider: str, limits: Limits, point: str, passes: int) -> None:
    logging.disable(logging.WARNING)
    if point:
        _die_at(*POINTS[point], passes)
    settings = Settings(
        server=Server(port=0, admin_port=0),
        upstreams={"up": Upstream(base_url=provider, api_key=Secret("sk-benchmark"), limits=limits)},
        models={"*": Model(upstreams=("up",))},
        gate=Gate(concurrency=64),
        state=State(path=state),
        telemetry=Telemetry(log=False, audit=False),
    )

    def ready(gateway: Gateway) -> None:
        parent.send(gateway.port)
        parent.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, lambda: settings, audit_fd=None, ready=ready))


def _die_at(of: type, name: str, after: bool, passes: int) -> None:
    """Let the `passes`-th call of this function be the last thing that this process does."""
    function = getattr(of, name)
    left = [passes]

    def passed() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    async def waited(*args: Any, **named: Any) -> Any:
        with _around(after, passed):
            return await function(*args, **named)

    @functools.wraps(function)
    def called(*args: Any, **named: Any) -> Any:
        with _around(after, passed):
            return function(*args, **named)

    setattr(of, name, waited if asyncio.iscoroutinefunction(function) else called)


@contextmanager
def _around(after: bool, passed: Callable[[], None]) -> Iterator[None]:
    if not after:
        passed()
    yield
    if after:
        passed()
