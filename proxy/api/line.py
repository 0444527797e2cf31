"""A client's WebSocket: from its upgrade to its close, whatever is said on it."""

from __future__ import annotations

import asyncio
from typing import Self

from aiohttp import WebSocketError, WSMsgType, web

from proxy.api.edge import Visit
from proxy.errors import ClientGone, Draining, GatewayError, InvalidRequest, Unauthorized
from proxy.plan import Plan, Route
from proxy.upstreams import Closing, Message

MESSAGE_LIMIT = 1 << 20  # bytes of a client's message; audio comes in pieces of a fraction of a second
READ_LIMIT = 4 * MESSAGE_LIMIT  # up to which a message is read, so that its client can read why it was refused
PING_SECONDS = 60.0  # of silence; who does not answer within half of it has left
CLOSE_SECONDS = 2.0  # for the client to close as well
GOING_AWAY, TOO_BIG, INTERNAL_ERROR = 1001, 1009, 1011  # RFC 6455, 7.4.1


def check_upgrade(request: web.BaseRequest) -> None:
    """Raises InvalidRequest: it is no upgrade to a WebSocket."""
    if not web.WebSocketResponse().can_prepare(_without_protocols_but(request, None)):
        raise InvalidRequest("this endpoint is a WebSocket; connect to it as one (`Upgrade: websocket`, version 13)")


def no_strange_page(request: web.BaseRequest, plan: Plan, route: Route) -> None:
    """A page of any origin may open a WebSocket to this machine, and no browser asks us first: it must know a key."""
    if "origin" not in request.headers or plan.needs_key:
        return
    if not all(target.upstream.passthrough for target in route.targets):
        raise Unauthorized("a page in a browser needs a caller's key; name callers in the gateway's configuration")


class ClientLine:
    """The client's end of a conversation; see `proxy.upstreams.Line`.

    Attributes:
        name: the request's id.
    """

    def __init__(self, socket: web.WebSocketResponse[bool], request: web.BaseRequest, name: str) -> None:
        self._socket, self._request, self.name = socket, request, name

    @classmethod
    async def accepted(cls, visit: Visit, protocol: str | None) -> Self:
        """Answer the client's upgrade."""
        socket = web.WebSocketResponse[bool](
            timeout=CLOSE_SECONDS,
            autoclose=False,
            heartbeat=PING_SECONDS,
            protocols=(protocol,) if protocol else (),
            compress=False,
            max_msg_size=READ_LIMIT,
            decode_text=False,
        )
        socket.headers.update(visit.answer.headers({}))
        request = _without_protocols_but(visit.request, protocol)
        try:
            await socket.prepare(request)
        except ConnectionError as error:
            raise ClientGone from error
        visit.answer.response = socket
        visit.answer.line = line = cls(socket, request, visit.record.request_id)
        return line

    @property
    def protocol(self) -> str | None:
        return self._socket.ws_protocol

    async def receive(self) -> Message | Closing:
        """
        Raises:
            InvalidRequest: what came is no message, or one of more than READ_LIMIT.
            ClientGone: the client left without a word.
        """
        message = await self._socket.receive()
        if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
            return Message(message.data, message.type is WSMsgType.TEXT)
        if message.type is WSMsgType.CLOSE:
            return Closing(message.data or 1000, message.extra or "")
        if message.type is WSMsgType.ERROR and isinstance(error := message.data, WebSocketError):
            raise InvalidRequest(f"the connection was closed with {error.code}: {error}")
        raise ClientGone

    async def send(self, message: Message) -> None:
        try:
            await self._socket.send_frame(message.data, WSMsgType.TEXT if message.is_text else WSMsgType.BINARY)
        except ConnectionError as error:
            raise ClientGone from error

    async def close(self, closing: Closing) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code=closing.code, message=closing.reason.encode())
        except TimeoutError:
            self.abort()

    async def fail(self, error: GatewayError) -> None:
        """The gateway ends it."""
        await self.close(Closing(GOING_AWAY if isinstance(error, Draining) else INTERNAL_ERROR, error.code))

    def abort(self) -> None:
        if (transport := self._request.transport) is not None:
            transport.abort()


def _without_protocols_but(request: web.BaseRequest, chosen: str | None) -> web.BaseRequest:
    """The request as aiohttp may see it: what it cannot choose among it would write to a log, a key among it."""
    headers = request.headers.copy()
    headers.popall("sec-websocket-protocol", None)
    if chosen:
        headers["sec-websocket-protocol"] = chosen
    return request.clone(headers=headers)
