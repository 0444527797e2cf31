"""The composition root: makes every part, joins them, reloads, stops. Only the command line imports it.

starting:   settings -> parts -> plan -> listeners
reloading:  read and check all -> new plan -> one assignment
stopping:   not ready -> nothing new is taken -> calls in flight end, or are told at the deadline and cut -> flushed
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import logging
import random
import resource
import signal
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from aiohttp import web

from proxy import config
from proxy.api import admin, anthropic, batches, files, jobs, openai, passthrough, realtime, stream
from proxy.api.answering import Streams
from proxy.api.connections import Patience, Server
from proxy.api.dialects import ANTHROPIC, OPENAI
from proxy.api.edge import Edge
from proxy.api.stored import Stored
from proxy.batches import Batches
from proxy.config import PIPELINE, ConfigError, Problem, Settings, tls
from proxy.core import pipeline
from proxy.core.concurrency import LEAST
from proxy.core.gate import Gate, Level, Priority
from proxy.core.pool import Pool
from proxy.limits.local import LocalLimits
from proxy.limits.report import report
from proxy.pipelines import Pipelines
from proxy.plan import Pipeline, Plan, Pools
from proxy.relay import Relay
from proxy.tasks import Tasks
from proxy.telemetry import AccountLevel, ConnectionLevel, GateLevel, Labels, Levels, Telemetry, Tracing
from proxy.upstreams.http import HttpTransport

log = logging.getLogger("penstock")

GATES_SHOWN = 60  # on the live page; behind a wildcard there may be a thousand, and nobody reads them
BATCHES_SHOWN = 20  # on the live page, the oldest
NAME_SHOWN = 128  # characters of a pool's name; behind a wildcard it ends with what a client wrote
PULSE_SECONDS = 0.1  # between two looks at how late the event loop is
CUT_SECONDS = 2.0  # for those that are cut off to be told so; one that does not read is not waited for
FLUSH_SECONDS = 5.0  # for logs and spans at the stop; a dead collector must not hold it up
DESCRIPTORS = 65_536  # open files wanted: two sockets for each call in flight
GARBAGE_AT = 10_000  # objects that are new and still there, before their garbage is looked for
BACKLOG = 4096  # connections not yet accepted; a burst of thousands of naive calls is what we are for


class Gateway:
    """One running gateway, for the length of an `async with` block.

    Args:
        settings: checked.
        load: reads the configuration anew, for `reload`; raises ConfigError.
        log_fd, audit_fd: the file descriptors of the access log and the audit log; None for no such log, whatever the
            settings say.

    Attributes:
        port, admin_port: those that were bound, once the block is entered.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[], Settings] | None = None,
        log_fd: int | None = None,
        audit_fd: int | None = None,
    ) -> None:
        now, wall = time.monotonic, time.time
        self._load = load or (lambda: settings)
        self._levels = Levels()
        self._tasks = Tasks()
        self._reloading = asyncio.Lock()
        self._pools = Pools(now)
        self.plan = Plan(settings, self._pools)
        self.limits = LocalLimits(Gate(Pool("process", "process"), settings.gate.queue_limit), now, wall)
        self._set_gate(settings)
        self.telemetry = Telemetry(
            _labels(self.plan),
            now=now,
            wall=wall,
            draw_bits=random.getrandbits,
            prices=self.plan.prices,
            tracing=Tracing(
                ratio=settings.telemetry.trace_ratio,
                slow_seconds=settings.telemetry.trace_slow_seconds,
                service_name=settings.telemetry.service_name,
                redact=settings.telemetry.redact,
            ),
            log_fd=log_fd if settings.telemetry.log else None,
            audit_fd=audit_fd if settings.telemetry.audit else None,
            slow_log_seconds=settings.telemetry.slow_log_seconds,
        )
        self.telemetry.levels(lambda: self._levels)
        self._transport = HttpTransport(self.telemetry.connections)
        self._relay = Relay(self.limits, self._transport, self.telemetry, now, wall)
        calls = Pipelines(self._relay, self.telemetry, now, wall)
        state = settings.state.path
        self._batches = Batches(
            None if state is None else Path(state), calls, self.telemetry, lambda: self.plan, self._transport, now, wall
        )
        stored = Stored()
        kept = {
            **files.endpoints(self._batches, calls, stored),
            **batches.endpoints(self._batches, self.telemetry),
            **jobs.endpoints(calls, self._batches, self.telemetry),
            **stream.endpoints(calls, self.telemetry, lambda: self.plan),
        }
        others = {dialect: passthrough.endpoints(calls, stored, dialect) for dialect in (OPENAI, ANTHROPIC)}
        endpoints = {
            OPENAI: others[OPENAI] | openai.endpoints(calls, stored) | realtime.endpoints(calls) | kept,
            ANTHROPIC: others[ANTHROPIC] | anthropic.endpoints(self._relay, stored, self._batches, self.telemetry),
        }
        self._streams = Streams(settings.server.ping_seconds, settings.server.write_stall_seconds)
        self._edge = Edge(lambda: self.plan, endpoints, self.telemetry, self._streams, now)
        self._runners: list[web.BaseRunner] = []
        self._tls: ssl.SSLContext | None = None
        self.port = 0
        self.admin_port = 0

    async def __aenter__(self) -> Gateway:
        server = self.plan.settings.server
        patience = Patience(server.idle_seconds, server.read_seconds, server.body_bytes_per_second)
        edge = Server(self._edge, patience, server.max_connections or _most_connections())
        controls = admin.Controls(
            lambda: not self._edge.draining, self._admin_key, self.reload, self._report, self._observe, self._look
        )
        try:
            self.admin_port = await self._listen(
                web.AppRunner(
                    self._audited(admin.application(controls, self.telemetry)), access_log=None, shutdown_timeout=1.0
                ),
                server.admin_host,
                server.admin_port,
            )
            # `drain` and `cut` wait for calls in flight; what is left after them ends at once. 0 would mean: never.
            self._tls = await asyncio.to_thread(_tls, server)
            self.port = await self._listen(
                web.ServerRunner(edge, shutdown_timeout=0.01), server.host, server.port, self._tls
            )
        except BaseException:
            await self._close()
            raise
        self._tasks.spawn("pulse", self._pulse())
        self._tasks.spawn("pings", self._streams.keep_alive())
        await self._batches.start()
        listeners = (f"{server.host}:{self.port}", f"{server.admin_host}:{self.admin_port}")
        self.telemetry.audit.started(self.telemetry.version, listeners)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = await self.drain(0.0)
        await self._edge.cut(CUT_SECONDS)
        self.telemetry.audit.stopped(drained=ended)
        await self._close()

    async def drain(self, seconds: float) -> bool:
        """Take nothing new, and wait until the calls in flight have ended, those of batches among them.

        Returns:
            whether all ended within `seconds`; the others are cut off when the block is left.
        """
        self.telemetry.draining(True)
        ended = await asyncio.gather(self._edge.drain(seconds), self._batches.drain(seconds))
        return all(ended)

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
                await asyncio.to_thread(self._renew_certificate, settings.server)
            except ConfigError as error:
                self.telemetry.reloaded(False)
                self.telemetry.audit.refused(len(error.problems))
                for problem in error.problems:
                    log.error("reload refused, the old configuration stays: %s", problem)
                raise
            places = self._places()
            old, self.plan = self.plan, Plan(settings, self._pools)
            self._set_gate(settings)
            self.telemetry.relabel(_labels(self.plan), self.plan.prices)
            for gate, now in self._places().items():
                if (before := places.get(gate, now)) != now:
                    self.telemetry.resized(gate, before, now)
            self.telemetry.reloaded(True)
            self.telemetry.audit.reloaded(dict(old.settings), dict(settings))
            notes = [
                f"{section} takes effect at the next start"
                for section in ("server", "state", "telemetry")
                if _fixed(getattr(old.settings, section)) != _fixed(getattr(settings, section))
            ]
            log.info("reloaded: %d models, %d upstreams", len(settings.models), len(settings.upstreams))
            for note in notes:
                log.warning(note)
            return notes

    def _renew_certificate(self, server: config.Server) -> None:
        if self._tls is not None and server.tls is not None:
            try:
                tls.renew(self._tls, server.tls.cert_file, server.tls.key_file)
            except tls.BadFile as error:  # changed since the configuration was checked
                raise ConfigError([Problem("server.tls", None, "server.tls", str(error))]) from None

    def _set_gate(self, settings: Settings) -> None:
        gate = settings.gate
        overload = frozenset(Priority[name.upper()] for name in gate.overload)
        self.limits.configure(gate.concurrency, gate.queue_limit, gate.weights, overload)

    async def _listen(self, runner: web.BaseRunner, host: str, port: int, context: ssl.SSLContext | None = None) -> int:
        self._runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, host, port, ssl_context=context, backlog=BACKLOG)
        await site.start()
        return int(runner.addresses[0][1])

    def _admin_key(self) -> str | None:
        key = self.plan.settings.server.admin_key
        return key.reveal() if key is not None else None

    def _report(self) -> Mapping[str, object]:
        pools = (self.limits.process, *self._pools)
        return report(pools, self.limits.levels(pools), self._relay.breakers, time.monotonic())

    def _look(self) -> Mapping[str, object]:
        """All figures of this moment, for the live page."""
        now, queue_limit = time.monotonic(), self.plan.settings.gate.queue_limit
        pools = (self.limits.process, *self._pools)
        levels = tuple(self.limits.levels(pools))
        waiting = {
            priority.name.lower(): sum(level.waiting.get(priority, 0) for level in levels) for priority in Priority
        }
        shown = _busiest(pools, levels)
        told = report(shown, levels, self._relay.breakers, now)
        batches, besides = self._batches.report(BATCHES_SHOWN)
        return self.telemetry.live.snapshot(self.plan.upstreams) | {
            "version": self.telemetry.version,
            "draining": self._edge.draining,
            "queue": {"waiting": waiting, "limit": queue_limit},
            "gates": [gate | {"pool": gate["pool"][:NAME_SHOWN]} for gate in told["limits"]],
            "gates_left_out": len(pools) - len(shown),
            "circuits": told["upstreams"],
            "batches": [batch | {"model": str(batch["model"])[:NAME_SHOWN]} for batch in batches],
            "batches_left_out": besides,
            "pipelines": [self._drawn(each) for each in self.plan.pipelines.values()],
        }

    def _drawn(self, said: Pipeline) -> Mapping[str, object]:
        """A pipeline as the live page draws it: its steps by stages, with what became of them."""
        figures = self.telemetry.live.steps(step.label for step in said.steps.values())
        stages = pipeline.stages({name: step.waits_for for name, step in said.steps.items()})
        return {
            "pipeline": said.name,
            "stages": [
                [
                    {
                        "step": name,
                        "model": said.steps[name].said.model,
                        "mapped": said.steps[name].said.map is not None,
                    }
                    | figures[said.steps[name].label]
                    for name in stage
                ]
                for stage in stages
            ],
        }

    def _audited(self, controls: web.Application) -> web.Application:
        """What changes the gateway, or is refused, leaves a line in the audit log."""

        async def tell(request: web.Request, response: web.StreamResponse) -> None:
            if request.method not in ("GET", "HEAD") or response.status in (401, 403):
                self.telemetry.audit.administered(request.method, request.path, response.status)

        controls.on_response_prepare.append(tell)
        return controls

    async def _pulse(self) -> None:
        """Feel how late the event loop is, and tell what changes with time alone."""
        while True:
            due = time.monotonic() + PULSE_SECONDS
            await asyncio.sleep(PULSE_SECONDS)
            now = time.monotonic()
            self.telemetry.beat(now - due)
            for name, breaker in self._relay.breakers.items():
                self.telemetry.circuit(name, breaker.state(now).value)

    def _observe(self) -> None:
        """Note all levels on the loop's own thread; the scrape renders them in another."""
        self.telemetry.settle()
        connections = tuple(ConnectionLevel(**asdict(level)) for level in self._transport.levels())
        self._levels = Levels(tuple(self._gates()), connections, tuple(self._accounts()), self._batches.level())

    def _places(self) -> dict[str, float]:
        """How many there are, by gate."""
        return {gate.name: gate.limit for gate in self._gates()}

    def _gates(self) -> Iterator[GateLevel]:
        process = self.limits.process
        bounds = {pool.label: (LEAST, pool.gradient.most) for pool in self._pools if pool.gradient is not None}
        for level in self.limits.levels((process, *self._pools)):
            yield GateLevel(
                level.label,
                float("inf") if level.concurrency is None else level.concurrency,
                level.in_use,
                {priority.name.lower(): count for priority, count in level.waiting.items()},
                self.plan.settings.gate.queue_limit if level.label == process.label else None,
                bounds.get(level.label),
                level.held_seconds + self._pools.past.get(level.label, 0.0),
                level.queued_seconds,
                level.full_seconds,
            )

    def _accounts(self) -> Iterator[AccountLevel]:
        """What is known of the providers' limits, by upstream and configured model."""
        now = time.monotonic()
        routes: dict[str, list[tuple[str, str]]] = {}
        for model, said in self.plan.settings.models.items():
            for upstream in said.upstreams:
                routes.setdefault(f"{upstream}/{said.upstream_model or model}", []).append((upstream, model))
        for pool in self._pools:
            if pool.rates is not None:
                for upstream, model in routes.get(pool.label, ()):
                    yield AccountLevel(upstream, model, pool.rates.snapshot(now))

    async def _close(self) -> None:
        await self._batches.stop()
        await self._tasks.stop()
        self.limits.close()
        for runner in reversed(self._runners):
            await runner.cleanup()
        await self._transport.close()
        await asyncio.to_thread(self.telemetry.close, FLUSH_SECONDS)


def _tls(server: config.Server) -> ssl.SSLContext | None:
    said = server.tls
    return None if said is None else tls.for_clients(said.cert_file, said.key_file, said.client_ca_file)


def _most_connections() -> int:
    """Half of the files that may be open: a call in flight has another connection, to its upstream."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (DESCRIPTORS if soft == resource.RLIM_INFINITY else soft) // 2


def _fixed(section: object) -> object:
    """What only a restart changes; of a certificate no more than whether there is one, and whether clients have one."""
    if not isinstance(section, config.Server):
        return section
    return section.model_copy(update={"tls": section.tls and (section.tls.client_ca_file or True)})


def _labels(plan: Plan) -> Labels:
    settings = plan.settings
    return Labels(
        models=(*settings.models, *(f"{PIPELINE}{name}" for name in plan.pipelines)),
        upstreams=tuple(settings.upstreams),
        callers=tuple(settings.callers) if settings.telemetry.per_caller else (),
        steps=tuple(step.label for each in plan.pipelines.values() for step in each.steps.values()),
        gates=plan.gates,
    )


def _busiest(pools: Sequence[Pool], levels: Iterable[Level]) -> list[Pool]:
    """All pools in their order; where there are more than people read, those with most calls in them or before them."""
    waiting = {level.label: sum(level.waiting.values()) for level in levels}
    busiest = set(
        heapq.nlargest(
            GATES_SHOWN, pools, key=lambda pool: (pool.label == "process", pool.in_use + waiting[pool.label])
        )
    )
    return [pool for pool in pools if pool in busiest]


def allow_descriptors(wanted: int = DESCRIPTORS) -> None:
    """Raise the soft limit of open files as far as the system lets us; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _keep_what_stands() -> None:
    """What has been made by now stays: looking through it for garbage again and again is a tenth of a call's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_AT, 10, 10)


async def serve(
    settings: Settings,
    load: Callable[[], Settings],
    *,
    log_fd: int | None = None,
    audit_fd: int | None = 2,
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

    async with Gateway(settings, load=load, log_fd=log_fd, audit_fd=audit_fd) as gateway:

        async def reload() -> None:
            try:
                await gateway.reload()
            except ConfigError:
                return  # told and counted by `reload`; the old plan runs on

        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.spawn("reload", reload()))
        _keep_what_stands()
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
