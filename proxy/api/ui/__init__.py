"""The live page: static files, and the feed they are fed with.

    /ui/        index.html and what it names, from this package; no build step, and nothing from another host
    /ui/live    snapshots as server-sent events, one a second

The files hold no figures, so they are given to anybody who reaches the admin port; the feed asks for its key.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from proxy.api.ui.feed import Feed

__all__ = ["HOME", "LIVE", "PATHS", "Feed", "add_routes"]

HOME = "/ui/"
LIVE = "/ui/live"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {
    HOME + ("" if file.name == "index.html" else file.name): (file.read_bytes(), _TYPES[file.suffix])
    for file in sorted(Path(__file__).parent.iterdir())
    if file.suffix in _TYPES
}
_HEADERS = {
    # Everything from here, nothing inline, and no string is ever made markup: what a client wrote stays text.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # after an upgrade the page and its figures must not be of two versions
}
PATHS = frozenset({HOME.rstrip("/"), *_FILES})  # what is given without a key


def add_routes(app: web.Application, feed: Feed) -> None:
    """Serve the page, and its feed until the application shuts down."""

    async def home(_: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": "ui/"})  # relative: it may stand behind a prefix

    async def file(request: web.Request) -> web.Response:
        body, content_type = _FILES[request.path]
        return web.Response(body=body, headers=_HEADERS | {"Content-Type": content_type})

    async def live(request: web.Request) -> web.StreamResponse:
        return await feed.serve(request)

    async def stop(_: web.Application) -> None:
        feed.close()

    app.router.add_get(HOME.rstrip("/"), home)
    for path in _FILES:
        app.router.add_get(path, file)
    app.router.add_get(LIVE, live, allow_head=False)
    app.on_shutdown.append(stop)
