"""The composition root: makes every part, joins them, reloads, stops. Only the command line imports it.

starting:   settings -> parts -> plan -> listeners
reloading:  read and check all -> new plan -> one assignment
stopping:   not ready -> nothing new is taken -> calls in flight end, or are cut at the deadline -> flushed
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from aiohttp import web

from proxy.api import admin, openai
from proxy.api.edge import Edge
from proxy.config import ConfigError, Settings
from proxy.core.gate import Gate
from proxy.core.pool import Pool
from proxy.limits.local import LocalLimits
from proxy.limits.report import report
from proxy.plan import Plan, Pools
from proxy.relay import Relay
from proxy.tasks import Tasks
from proxy.telemetry import GateLevel, Labels, Telemetry, Tracing
from proxy.upstreams.http import HttpTransport

log = logging.getLogger("penstock")

FLUSH_SECONDS = 5.0  # for logs and spans at the stop; a dead collector must not hold it up
KEEP_ALIVE_SECONDS = 75.0  # of an idle client connection; longer than most clients keep theirs
DESCRIPTORS = 65_536  # open files wanted: two sockets for each call in flight
BACKLOG = 4096  # connections not yet accepted; a burst of thousands of naive calls is what we are for


class Gateway:
    """One running gateway, for the length of an `async with` block.

    Args:
        settings: checked.
        load: reads the configuration anew, for `reload`; raises ConfigError.
        log_fd: the file descriptor of the access log; None for no log, whatever the settings say.

    Attributes:
        port, admin_port: those that were bound, once the block is entered.
    """

    def __init__(
        self, settings: Settings, *, load: Callable[[], Settings] | None = None, log_fd: int | None = None
    ) -> None:
        now, wall = time.monotonic, time.time
        self._load = load or (lambda: settings)
        self._levels: list[GateLevel] = []
        self._reloading = asyncio.Lock()
        self._pools = Pools()
        self.plan = Plan(settings, self._pools)
        self.limits = LocalLimits(
            Gate(Pool("process", "process", settings.gate.concurrency), settings.gate.queue_limit), now, wall
        )
        self.telemetry = Telemetry(
            _labels(self.plan),
            now=now,
            wall=wall,
            draw_bits=random.getrandbits,
            tracing=Tracing(
                ratio=settings.telemetry.trace_ratio,
                slow_seconds=settings.telemetry.trace_slow_seconds,
                service_name=settings.telemetry.service_name,
            ),
            log_fd=log_fd if settings.telemetry.log else None,
        )
        self.telemetry.levels(lambda: self._levels)
        self._transport = HttpTransport()
        relay = Relay(self.limits, self._transport, self.telemetry, now, wall)
        self._edge = Edge(lambda: self.plan, openai.endpoints(relay), self.telemetry, now)
        self._runners: list[web.BaseRunner] = []
        self.port = 0
        self.admin_port = 0

    async def __aenter__(self) -> Gateway:
        server = self.plan.settings.server
        edge = web.Server(
            self._edge,
            handler_cancellation=True,  # else a handler runs on after its client has left
            access_log=None,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            auto_decompress=False,
        )
        controls = admin.Controls(
            lambda: not self._edge.draining, self._admin_key, self.reload, self._report, self._observe
        )
        try:
            self.admin_port = await self._listen(
                web.AppRunner(admin.application(controls, self.telemetry), access_log=None, shutdown_timeout=1.0),
                server.admin_host,
                server.admin_port,
            )
            # `drain` waits for calls in flight; what is left after it is cut off at once.
            self.port = await self._listen(web.ServerRunner(edge, shutdown_timeout=0.0), server.host, server.port)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain(0.0)
        await self._close()

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait until the calls in flight have ended.

        Returns:
            whether all ended within `seconds`; the others are cut off when the block is left.
        """
        self.telemetry.draining(True)
        return await self._edge.drain(seconds)

    async def reload(self) -> Sequence[str]:
        """Read the configuration anew and take it; no call and no waiter is dropped.

        Returns:
            notes on what only a restart can change.

        Raises:
            ConfigError: it is wrong. The old plan stays in force.
        """
        async with self._reloading:
            try:
                settings = await asyncio.to_thread(self._load)
            except ConfigError as error:
                self.telemetry.reloaded(False)
                for problem in error.problems:
                    log.error("reload refused, the old configuration stays: %s", problem)
                raise
            old, self.plan = self.plan, Plan(settings, self._pools)
            self.limits.resize(settings.gate.concurrency, settings.gate.queue_limit)
            self.telemetry.relabel(_labels(self.plan))
            self.telemetry.reloaded(True)
            notes = [
                f"{section} takes effect at the next start"
                for section in ("server", "telemetry")
                if getattr(old.settings, section) != getattr(settings, section)
            ]
            log.info("reloaded: %d models, %d upstreams", len(settings.models), len(settings.upstreams))
            for note in notes:
                log.warning(note)
            return notes

    async def _listen(self, runner: web.BaseRunner, host: str, port: int) -> int:
        self._runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, host, port, backlog=BACKLOG)
        await site.start()
        return int(runner.addresses[0][1])

    def _admin_key(self) -> str | None:
        key = self.plan.settings.server.admin_key
        return key.reveal() if key is not None else None

    def _report(self) -> Sequence[Mapping[str, object]]:
        pools = (self.limits.process, *self._pools)
        return report(pools, self.limits.levels(pools), time.monotonic())

    def _observe(self) -> None:
        """Note the gates' levels on the loop's own thread; the scrape renders them in another."""
        process = self.limits.process
        self._levels = [
            GateLevel(
                level.label,
                float("inf") if level.concurrency is None else level.concurrency,
                level.in_use,
                {priority.name.lower(): count for priority, count in level.waiting.items()},
                self.plan.settings.gate.queue_limit if level.label == process.label else None,
            )
            for level in self.limits.levels((process, *self._pools))
        ]

    async def _close(self) -> None:
        self.limits.close()
        for runner in reversed(self._runners):
            await runner.cleanup()
        await self._transport.close()
        await asyncio.to_thread(self.telemetry.close, FLUSH_SECONDS)


def _labels(plan: Plan) -> Labels:
    settings = plan.settings
    return Labels(
        models=tuple(settings.models),
        upstreams=tuple(settings.upstreams),
        callers=tuple(settings.callers),
        gates=plan.gates,
    )


def allow_descriptors(wanted: int = DESCRIPTORS) -> None:
    """Raise the soft limit of open files as far as the system lets us; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def serve(
    settings: Settings,
    load: Callable[[], Settings],
    *,
    log_fd: int | None = None,
    ready: Callable[[Gateway], None] = lambda gateway: None,
) -> bool:
    """Run a gateway until SIGTERM or SIGINT, then drain it; a second signal cuts the drain short. SIGHUP reloads.

    Returns:
        whether every call in flight ended before the deadline.
    """
    allow_descriptors()
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()
    tasks = Tasks()

    def ask_to_stop() -> None:
        (hurry if stop.is_set() else stop).set()

    async with Gateway(settings, load=load, log_fd=log_fd) as gateway:

        async def reload() -> None:
            try:
                await gateway.reload()
            except ConfigError:
                return  # told and counted by `reload`; the old plan runs on

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.spawn("reload", reload()))
        ready(gateway)
        await stop.wait()
        seconds = gateway.plan.settings.server.drain_seconds
        log.info("stopping; calls in flight have %.0f s", seconds)
        drain = asyncio.ensure_future(gateway.drain(seconds))
        waiting = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({drain, waiting}, return_when=asyncio.FIRST_COMPLETED)
        ended = drain.done() and drain.result()
        drain.cancel()
        waiting.cancel()
        await tasks.stop()
    return ended
