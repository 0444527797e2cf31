"""One snapshot a second for all who look, made only while somebody does.

    tick -> snapshot -> one frame -> every tab, at its own pace

1. A snapshot is made once a second, however many tabs are open; with the last tab the ticking ends.
2. A tab has at most one frame under way. What a slow one misses is gone: the next frame says all there is to say.
3. A tab that takes nothing for `stalled_seconds` is cut off; one that left is noticed with the next frame.
4. When the gateway stops, every tab is told so and let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec
from aiohttp import web

TICK_SECONDS = 1.0
STALLED_SECONDS = 20.0
TABS_MAX = 100  # sockets, not memory; more are no people any more
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",
}
_BYE = b"event: bye\ndata: {}\n\n"

_encode = msgspec.json.Encoder().encode


class Feed:
    """
    Args:
        look: makes one snapshot; called on the event loop's thread.
        tick_seconds: between two snapshots.
        stalled_seconds: how long a tab may take nothing.

    Attributes:
        tabs: how many look now.
    """

    def __init__(
        self,
        look: Callable[[], Mapping[str, object]],
        *,
        tick_seconds: float = TICK_SECONDS,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self._look, self._tick_seconds, self._stalled_seconds = look, tick_seconds, stalled_seconds
        self.tabs = 0
        self._frame = b""
        self._ticked = asyncio.Event()  # one for each tick, so that nobody waits for a tick that is over
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer with frames until the client leaves or the gateway stops."""
        if self.tabs >= TABS_MAX:
            return web.json_response({"status": "refused", "problems": ["too many look already"]}, status=503)
        response = web.StreamResponse(headers=_HEADERS)
        self.tabs += 1
        try:
            self._begin()
            await response.prepare(request)
            await self._send(response)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # what is still to be written has no reader
        except ConnectionResetError:
            pass  # the client left
        finally:
            self.tabs -= 1
            if not self.tabs:
                self._stop()
        return response

    def close(self) -> None:
        """Let everybody go; who comes now is told at once that the gateway stops."""
        self._closed = True
        self._stop()
        self._ticked.set()

    async def _send(self, response: web.StreamResponse) -> None:
        sent = None
        while not self._closed:
            ticked = self._ticked
            if self._frame is not sent:
                sent = self._frame
                async with asyncio.timeout(self._stalled_seconds):
                    await response.write(sent)
            else:
                await ticked.wait()
        await response.write(_BYE)
        await response.write_eof()

    def _begin(self) -> None:
        if self._timer is None and not self._closed:
            self._tick()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._frame = b""

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._tick_seconds, self._tick)
        self._frame = b"data: " + _encode(self._look()) + b"\n\n"
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()
