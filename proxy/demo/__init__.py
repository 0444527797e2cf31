"""`penstock demo`: the same burst twice, straight to a provider with real limits and through the gateway.

    client.py   the naive client          side.py     one burst and its figures
    scrape.py   the gateway's /metrics    screen.py   what is shown

Client, gateway and provider run in one process, on free ports of loopback. Each side has a provider of its own, from
the same seed, so neither uses up the other's limits.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from importlib.util import find_spec

from rich.console import Console

from proxy.app import Gateway, allow_descriptors
from proxy.config import Model, Secret, Server, Settings, Upstream
from proxy.demo import screen
from proxy.demo.client import MODEL
from proxy.demo.side import Figures, Side
from proxy.simulator import Profile, profiles, serving
from proxy.tasks import Tasks

LOOK_SECONDS = 0.5
SLACK_SECONDS = 25.0  # for both bursts together, beyond what the limit takes; 300 calls end within 55 s, come what may
DESCRIPTORS_PER_CALL = 5  # both ends of the client's connection and of the upstream's, and one to spare
DESCRIPTORS_BESIDE = 200
PORT, ADMIN_PORT = 8080, 8081  # the defaults of `penstock serve`
INTERRUPTED = 130  # exit code of what SIGINT ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def run(
    *,
    keep: bool = False,
    calls: int = 300,
    seed: int = 0,
    console: Console | None = None,
    profile: Profile = profiles.TIGHT,
) -> int:
    """Show the demo. It ends by itself unless it is kept up; SIGINT and SIGTERM end it cleanly at any time.

    Args:
        keep: stay up after the summary, on the usual ports where they are free.
        calls: how many at once, >= 1.
        seed: of the simulated provider.
        profile: what the simulated provider is like.

    Returns:
        the exit code: 0 if the gateway answered all calls, in order.
    """
    console = console or Console(highlight=False)
    if find_spec("openai") is None:
        screen.no_sdk(console)
        return 1
    allow_descriptors(DESCRIPTORS_BESIDE + DESCRIPTORS_PER_CALL * calls)
    loop = asyncio.get_running_loop()
    code = INTERRUPTED
    try:
        async with asyncio.timeout(None) as patience:

            def stop() -> None:
                if not patience.expired():
                    patience.reschedule(loop.time())

            for name in _SIGNALS:
                loop.add_signal_handler(name, stop)
            screen.introduction(console, profile, calls)
            floor = limit_seconds(profile, calls)
            until = loop.time() + floor + SLACK_SECONDS
            async with serving(profile, seed=seed) as provider:
                straight = Side(provider, calls, base_url=provider.base_url)
                before = await _measured(straight, console, None, until)
            async with (
                serving(profile, seed=seed) as provider,
                Gateway(_settings(provider.base_url, usual_ports=keep)) as gateway,
            ):
                through = Side(
                    provider, calls, base_url=f"http://127.0.0.1:{gateway.port}/v1", admin_port=gateway.admin_port
                )
                after = await _measured(through, console, before, until)
                screen.summary(console, straight, through, (before, after), floor)
                code = 0 if after.answered == calls and after.in_order else 1
                if keep:
                    screen.directions(console, gateway.port, gateway.admin_port)
                    await asyncio.Event().wait()
            screen.directions(console, PORT)
    except TimeoutError:
        if not patience.expired():
            raise
        screen.stopped(console)
    finally:
        for name in _SIGNALS:
            loop.remove_signal_handler(name)
    return code


def limit_seconds(profile: Profile, calls: int) -> float:
    """How long the limit of requests takes for so many calls, however they are sent: what exceeds the burst, at the
    limit's pace. Of tokens these calls need far too few to matter."""
    limit = profile.requests_per_minute
    if not limit:
        return 0.0
    burst = limit if profile.requests_burst is None else profile.requests_burst
    return max(0.0, calls - burst) / limit * 60.0


async def _measured(side: Side, console: Console, before: Figures | None, until: float) -> Figures:
    """Run one side's burst in view; `before` is the result of the other side, where there is one."""
    tasks = Tasks()
    with screen.watching(console, before) as show:

        async def look() -> None:
            while True:
                show(await side.look())
                await asyncio.sleep(LOOK_SECONDS)

        tasks.spawn("demo screen", look())
        try:
            await side.burst(until)
        finally:
            await tasks.stop()
        result = await side.result()
        show(result)
    return result


def _settings(base_url: str, *, usual_ports: bool) -> Settings:
    port, admin_port = (_if_free(PORT), _if_free(ADMIN_PORT)) if usual_ports else (0, 0)
    return Settings(
        server=Server(port=port, admin_port=admin_port),
        upstreams={"simulator": Upstream(base_url=base_url, api_key=Secret("sk-simulated"))},
        models={MODEL: Model(upstreams=("simulator",))},
    )


def _if_free(port: int) -> int:
    """The port, or 0 for any other where somebody listens on it already."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return 0
    return port
