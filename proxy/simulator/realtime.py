"""OpenAI's realtime endpoint, as far as a client can see: a session over a WebSocket that echoes what it is told.

    session.created -> (conversation.item.create ... response.create -> response.* deltas -> response.done)*

Text and audio that come in are kept until a response is asked for; a response echoes the last text. A binary message is
sent back as it is. Every response is a call to the provider: it has its limits, its pace, and its refusals as events.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from proxy.simulator import answers
from proxy.simulator.provider import Admitted, Provider, Refused, Size

MESSAGE_LIMIT = 16 << 20  # bytes; an event with audio may have 15 MiB
_encode = msgspec.json.encode


class Session:
    """One connection that was accepted."""

    def __init__(self, provider: Provider, socket: web.WebSocketResponse, model: str, serial: str) -> None:
        self._provider, self._socket, self._model, self._serial = provider, socket, model, serial
        self._number = 0
        self._last = ""
        self._characters = 0

    async def run(self) -> None:
        """Answer until one side closes."""
        await self._tell("session.created", session=self._session())
        async for message in self._socket:
            if message.type is WSMsgType.BINARY:
                await self._socket.send_bytes(message.data)
            elif message.type is WSMsgType.TEXT:
                await self._hear(message.data)

    async def _hear(self, text: str) -> None:
        try:
            event = msgspec.json.decode(text, type=dict[str, Any])
        except msgspec.MsgspecError:
            await self._refuse("invalid_json", "The event is not a JSON object.")
            return
        kind = event.get("type")
        if kind == "session.update":
            await self._tell("session.updated", session=self._session())
        elif kind == "conversation.item.create":
            item = event.get("item") or {}
            self._last = "".join(part.get("text") or "" for part in item.get("content") or [])
            self._characters += len(self._last)
            await self._tell(
                "conversation.item.added", item=item | {"id": f"item_{self._number}", "object": "realtime.item"}
            )
        elif kind == "input_audio_buffer.append":
            self._characters += len(event.get("audio") or "")
        elif kind == "input_audio_buffer.commit":
            await self._tell("input_audio_buffer.committed", item_id=f"item_{self._number}", previous_item_id=None)
        elif kind == "response.create":
            await self._respond()
        else:
            await self._refuse("invalid_value", f"Invalid value: '{kind}'.")

    async def _respond(self) -> None:
        loop = asyncio.get_running_loop()
        decision = self._provider.arrive(loop.time(), Size(self._characters), self._model)
        if isinstance(decision, Refused):
            await self._refuse("rate_limit_exceeded", "Rate limit reached.")
            return
        try:
            await self._say(decision)
        finally:
            self._provider.leave(decision, loop.time())

    async def _say(self, admitted: Admitted) -> None:
        place: dict[str, Any] = {"response_id": f"resp_{self._number}", "item_id": f"item_{self._number}"}
        place |= {"output_index": 0, "content_index": 0}
        await self._tell("response.created", response=self._response(place, "in_progress", None))
        await asyncio.sleep(admitted.first_token)
        words = []
        for tokens, text in answers.pieces(self._last, admitted.output_tokens, self._provider.profile.chunk_tokens):
            words.append(text)
            await self._tell("response.output_text.delta", **place, delta=text)
            await asyncio.sleep(tokens / admitted.tokens_per_second)
        await self._tell("response.output_text.done", **place, text="".join(words))
        await self._tell("response.done", response=self._response(place, "completed", _usage(admitted)))

    def _session(self) -> dict[str, Any]:
        return {"type": "realtime", "object": "realtime.session", "id": f"sess_{self._serial}", "model": self._model}

    def _response(self, place: dict[str, Any], status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        told = {"object": "realtime.response", "id": place["response_id"], "status": status, "output": []}
        return told | {"usage": usage}

    async def _refuse(self, code: str, message: str) -> None:
        error = {"type": "invalid_request_error", "code": code, "message": message, "param": None, "event_id": None}
        await self._tell("error", error=error)

    async def _tell(self, kind: str, **said: Any) -> None:
        self._number += 1
        event = {"type": kind, "event_id": f"event_{self._serial}_{self._number}", **said}
        await self._socket.send_str(_encode(event).decode())


def _usage(admitted: Admitted) -> dict[str, Any]:
    entered, left = admitted.input_tokens, admitted.output_tokens
    return {
        "total_tokens": entered + left,
        "input_tokens": entered,
        "output_tokens": left,
        "input_token_details": {"text_tokens": entered, "audio_tokens": 0, "cached_tokens": 0},
        "output_token_details": {"text_tokens": left, "audio_tokens": 0},
    }
