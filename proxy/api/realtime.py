"""OpenAI's realtime endpoint: a WebSocket between a client and the upstream of its model.

    GET /v1/realtime?model=  -> the gate -> the upstream's own upgrade -> the client's -> messages both ways

Whatever goes wrong before the upstream has agreed is an ordinary answer; after it, an event of the session and a close.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import parse_qsl, urlencode

import msgspec
from aiohttp import WebSocketError, WSMsgType, web

from proxy.api import passthrough
from proxy.api.calling import call, routed
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Visit
from proxy.core.headers import subprotocols
from proxy.errors import ClientGone, Draining, GatewayError, InvalidRequest, Unauthorized
from proxy.plan import Route
from proxy.relay import Runs
from proxy.upstreams import Closing, Message, Upgrade

PATH = "/v1/realtime"
WITHOUT_MODEL = ("call_id", "intent")  # a call that there is already, or one that only transcribes
MESSAGE_LIMIT = 1 << 20  # bytes of a client's message; audio comes in pieces of a fraction of a second
READ_LIMIT = 4 * MESSAGE_LIMIT  # up to which a message is read, so that its client can read why it was refused
PING_SECONDS = 60.0  # of silence; who does not answer within half of it has left
CLOSE_SECONDS = 2.0  # for the client to close as well
GOING_AWAY, TOO_BIG, INTERNAL_ERROR = 1001, 1009, 1011  # RFC 6455, 7.4.1


def endpoints(relay: Runs) -> dict[str, Endpoint]:
    """By path, for the edge."""

    async def connect(visit: Visit) -> None:
        session = Session.of(visit)
        record = visit.record
        record.asked_model = session.model  # no `stream`: how long people think is no figure of a model's speed
        if session.model:
            route = routed(visit.plan, session.model, OPENAI)
            record.model = route.name
        else:
            route = passthrough.routed(visit, OPENAI)
        _no_strange_page(visit, route)

        async def accept(protocol: str | None) -> ClientLine:
            return await ClientLine.accepted(visit, protocol)

        await relay.run(call(visit, route, session, method="GET", accept=accept), visit.answer, record)

    return {PATH: Endpoint("realtime", PATH, {"GET": connect})}


def _no_strange_page(visit: Visit, route: Route) -> None:
    """A page of any origin may open a WebSocket to this machine, and no browser asks us first: it must know a key."""
    if "origin" not in visit.request.headers or visit.plan.needs_key:
        return
    if not all(target.upstream.passthrough for target in route.targets):
        raise Unauthorized("a page in a browser needs a caller's key; name callers in the gateway's configuration")


class Session:
    """What is asked for, as `proxy.relay.Call` wants it. Nothing of it is counted before the upstream has."""

    stream = True
    max_tokens = 0
    wants_usage = True
    input_tokens = 0.0
    is_spent = False

    def __init__(self, model: str, query: list[tuple[str, str]], path: str, protocols: tuple[str, ...]) -> None:
        self.model = model
        self._query, self._path, self._protocols = query, path, protocols

    @classmethod
    def of(cls, visit: Visit) -> Session:
        """Raises InvalidRequest: it is no upgrade to a WebSocket, or does not name its model."""
        request = visit.request
        if not web.WebSocketResponse().can_prepare(_without_protocols_but(request, None)):
            raise InvalidRequest(
                "this endpoint is a WebSocket; connect to it as one (`Upgrade: websocket`, version 13)"
            )
        query = parse_qsl(visit.path.partition("?")[2], keep_blank_values=True)
        models = [value for name, value in query if name == "model"]
        needs_none = not models and any(name in WITHOUT_MODEL for name, _ in query)
        if not needs_none and (len(models) != 1 or not models[0]):
            raise InvalidRequest("name the model once, as ?model=", code="missing_model", param="model")
        protocols, _ = subprotocols(request.headers.get("sec-websocket-protocol", ""))
        return cls("".join(models), query, visit.path, protocols)

    def rewritten(self, model: str, *, ask_usage: bool) -> Upgrade:
        if model == self.model:
            return Upgrade(self._path, self._protocols)
        query = urlencode([(name, model if name == "model" else value) for name, value in self._query])
        return Upgrade(f"/realtime?{query}", self._protocols)


class ClientLine:
    """The client's end of the conversation; see `proxy.upstreams.Line`."""

    def __init__(self, socket: web.WebSocketResponse[bool], request: web.BaseRequest, name: str) -> None:
        self._socket, self._request, self._name = socket, request, name

    @classmethod
    async def accepted(cls, visit: Visit, protocol: str | None) -> ClientLine:
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
        message = await self._socket.receive()
        if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
            if len(message.data) > MESSAGE_LIMIT:
                await self.close(Closing(TOO_BIG, f"a message may have {MESSAGE_LIMIT} bytes"))
                raise InvalidRequest(f"a message is larger than {MESSAGE_LIMIT} bytes")
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

    def abort(self) -> None:
        if (transport := self._request.transport) is not None:
            transport.abort()

    async def fail(self, error: GatewayError) -> None:
        """End the session with an error event, as the SDKs understand it."""
        event = {"type": "error", "event_id": f"event_{self._name}", **error.as_dict()}
        with suppress(ClientGone):
            await self.send(Message(msgspec.json.encode(event), is_text=True))
        await self.close(Closing(GOING_AWAY if isinstance(error, Draining) else INTERNAL_ERROR, error.code))


def _without_protocols_but(request: web.BaseRequest, chosen: str | None) -> web.BaseRequest:
    """The request as aiohttp may see it: what it cannot choose among it would write to a log, a key among it."""
    headers = request.headers.copy()
    headers.popall("sec-websocket-protocol", None)
    if chosen:
        headers["sec-websocket-protocol"] = chosen
    return request.clone(headers=headers)
