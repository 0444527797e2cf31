"""OpenAI's realtime endpoint: a WebSocket between a client and the upstream of its model.

    GET /v1/realtime?model=  -> the gate -> the upstream's own upgrade -> the client's -> messages both ways

Whatever goes wrong before the upstream has agreed is an ordinary answer; after it, an event of the session and a close.
"""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import parse_qsl, urlencode

import msgspec

from proxy.api import passthrough
from proxy.api.calling import call, routed
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Visit
from proxy.api.line import MESSAGE_LIMIT, TOO_BIG, ClientLine, check_upgrade, no_strange_page
from proxy.core.headers import subprotocols
from proxy.errors import ClientGone, GatewayError, InvalidRequest
from proxy.relay import Runs
from proxy.upstreams import Closing, Message, Upgrade

PATH = "/v1/realtime"
WITHOUT_MODEL = ("call_id", "intent")  # a call that there is already, or one that only transcribes


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
        no_strange_page(visit.request, visit.plan, route)

        async def accept(protocol: str | None) -> RealtimeLine:
            return await RealtimeLine.accepted(visit, protocol)

        await relay.run(call(visit, route, session, method="GET", accept=accept), visit.answer, record)

    return {PATH: Endpoint("realtime", PATH, {"GET": connect})}


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
        check_upgrade(request)
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


class RealtimeLine(ClientLine):
    """The client's end, as OpenAI's realtime SDKs understand it."""

    async def receive(self) -> Message | Closing:
        message = await super().receive()
        if isinstance(message, Message) and len(message.data) > MESSAGE_LIMIT:
            await self.close(Closing(TOO_BIG, f"a message may have {MESSAGE_LIMIT} bytes"))
            raise InvalidRequest(f"a message is larger than {MESSAGE_LIMIT} bytes")
        return message

    async def fail(self, error: GatewayError) -> None:
        """End the session with an error event."""
        event = {"type": "error", "event_id": f"event_{self.name}", **error.as_dict()}
        with suppress(ClientGone):
            await self.send(Message(msgspec.json.encode(event), is_text=True))
        await super().fail(error)
