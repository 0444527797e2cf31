"""The gateway that does the work: one that runs already, or one in a thread of this process, for the run."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import uvloop

from proxy.app import Gateway, allow_descriptors
from proxy.bulk.prompts import BadInput
from proxy.bulk.remote import Remote
from proxy.config import Secret, Settings

CALLER = "command-line"  # whose batches they are; the same each time, so that a run is found again


def running(settings: Settings | None, url: str | None, key: str) -> Remote:
    """A gateway that runs: the one that is named, else that of the settings, at its usual port.

    Raises:
        Unreachable: `url` is none.
    """
    if url:
        return Remote(url, key)
    assert settings is not None
    return Remote(f"http://127.0.0.1:{settings.server.port}", key)


@contextmanager
def gateway(settings: Settings | None, url: str | None, key: str, concurrency: str) -> Iterator[tuple[Remote, str]]:
    """A gateway to hand in to, and where it is in words.

    Args:
        settings: where one runs at its usual port, or how one is started; None only with `url`.
        url, key: of one that runs; None, "" where none is named.
        concurrency: `auto`, or most calls at once of one that is started.

    Raises:
        BadInput, Unreachable, OSError: there is none.
    """
    most = None if concurrency == "auto" else int(concurrency) if concurrency.isdecimal() else 0
    if most == 0:
        raise BadInput("--concurrency must be `auto` or a number above 0")
    remote = running(settings, url, key)
    if url or remote.is_there():
        if most is not None:
            raise BadInput(
                f"the gateway at {remote.url} paces itself; --concurrency is for one that this command starts"
            )
        yield remote, remote.url
        return
    assert settings is not None
    with _embedded(settings, concurrency=most) as own:
        yield own, f"a gateway of the command itself, with its state in {settings.state.path}"


@contextmanager
def _embedded(settings: Settings, *, concurrency: int | None = None) -> Iterator[Remote]:
    """On loopback, with a key that nobody else has.

    Args:
        settings: those of a gateway that is not running; its ports and callers are not used.
        concurrency: most calls in flight at once; None: as the settings have it.

    Raises:
        OSError: it could not start.
    """
    key = secrets.token_urlsafe(32)
    server = settings.server.model_copy(
        update={"host": "127.0.0.1", "port": 0, "admin_host": "127.0.0.1", "admin_port": 0, "tls": None}
    )
    gate = settings.gate.model_copy(update={"concurrency": concurrency or settings.gate.concurrency})
    own = settings.model_copy(update={"server": server, "gate": gate, "callers": {CALLER: Secret(key)}})
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        allow_descriptors()
        stop = asyncio.Event()
        async with Gateway(own) as gateway:
            started.set_result((gateway.port, asyncio.get_running_loop(), stop))
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())

    with ThreadPoolExecutor(1, "penstock gateway") as thread:
        ended = thread.submit(run)
        either: tuple[Future[Any], ...] = (started, ended)
        wait(either, return_when=FIRST_COMPLETED)
        if ended.done():
            ended.result()
        port, loop, stop = started.result()
        try:
            yield Remote(f"http://127.0.0.1:{port}", key)
        finally:
            loop.call_soon_threadsafe(stop.set)
