"""The admin port: health, metrics, limits, the live page, reload. On an address that no client's path reaches."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.api import ui
from proxy.config import ConfigError
from proxy.telemetry import Telemetry


@dataclass(slots=True, frozen=True)
class Controls:
    """What the admin port may ask of the app.

    Attributes:
        ready: whether new calls are taken.
        key: what everything but health and the files of the live page asks for, as a bearer token; None: nothing is
            asked.
        reload: read the configuration anew and take it; raises ConfigError and changes nothing if it is wrong.
        limits: what is known of every limit; see `proxy.limits.report`.
        observe: note the levels of the gates for the scrape that follows; called on the event loop's thread.
        look: a snapshot of all figures, for the live page; called on the event loop's thread.
    """

    ready: Callable[[], bool]
    key: Callable[[], str | None]
    reload: Callable[[], Awaitable[Sequence[str]]]
    limits: Callable[[], Mapping[str, object]]
    observe: Callable[[], None]
    look: Callable[[], Mapping[str, object]]


_OPEN = frozenset({"/healthz", "/readyz"}) | ui.PATHS


def application(controls: Controls, telemetry: Telemetry) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        """The process lives."""
        return web.json_response({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        """New calls are taken here."""
        if controls.ready():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "draining"}, status=503)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        wanted = controls.key()
        if wanted is not None and request.path not in _OPEN:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode()):
                return web.json_response({"status": "refused", "problems": ["server.admin_key is needed"]}, status=401)
        return await handler(request)

    async def metrics(request: web.Request) -> web.Response:
        controls.observe()
        body, content_type = await asyncio.to_thread(telemetry.exposition, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def limits(_: web.Request) -> web.Response:
        return web.json_response(controls.limits())

    async def reload(_: web.Request) -> web.Response:
        try:
            notes = await controls.reload()
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            return web.json_response({"status": "refused", "problems": problems}, status=422)
        return web.json_response({"status": "reloaded", "notes": list(notes)})

    app = web.Application(middlewares=[guard])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/admin/limits", limits)
    app.router.add_post("/admin/reload", reload)
    ui.add_routes(app, ui.Feed(controls.look))
    return app
