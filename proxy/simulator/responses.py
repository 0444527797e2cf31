"""OpenAI's responses: what is asked, the answer whole or as typed events, and those that are stored.

    body -> Asked (what it goes on from is looked up) -> Response -> kept with its last byte, unless `store` is false

A response that is to be made in the background is queued, and has been made when it is next looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from proxy.simulator import asks
from proxy.simulator.answers import StreamedForm, WholeForm, event, text
from proxy.simulator.asks import Ask, BadAsk, Choice, Format, Message, NoSuch, Tool
from proxy.simulator.profile import Profile
from proxy.simulator.provider import Admitted, Size
from proxy.simulator.rooms import Deed, Sent, listed

KEPT_BYTES = 64 << 20  # of stored responses; those that nobody has asked for the longest are forgotten
_encode = msgspec.json.encode


class _Text(msgspec.Struct):
    format: Format = msgspec.field(default_factory=Format)


class _Creation(msgspec.Struct):
    model: str
    input: str | list[Message] = ""
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: asks.Tokens | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice = None
    text: _Text = msgspec.field(default_factory=_Text)
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None


@dataclass(frozen=True, slots=True)
class Asked(Ask):
    said: dict[str, Any] | None = None  # the body, for what is told again
    in_background: bool = False


class Response(WholeForm, StreamedForm):
    """Each event of the stream says its name and its number, and no `[DONE]` follows."""

    ask: Asked

    def __init__(
        self,
        ask: Ask,
        admitted: Admitted,
        profile: Profile,
        keep: Callable[[Response, dict[str, object]], None],
        *,
        serial: str,
        created: int,
    ) -> None:
        super().__init__(ask, admitted, profile, serial=serial, created=created)
        self._keep = keep
        self._number = 0
        self._words: list[str] = []
        self._place: dict[str, object] = {"item_id": self._item_id, "output_index": 0}
        if not ask.tool:
            self._place["content_index"] = 0

    @property
    def id(self) -> str:
        return "resp_" + self.serial

    @property
    def _item_id(self) -> str:
        return ("fc_" if self.ask.tool else "msg_") + self.serial

    @property
    def seconds(self) -> float:
        return 0.0 if self.ask.in_background else super().seconds

    def usage(self) -> dict[str, object]:
        return {
            "input_tokens": self.admitted.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.admitted.input_tokens + self.output_tokens,
        }

    @property
    def _end(self) -> str:
        return "incomplete" if self.admitted.capped else "completed"

    def body(self) -> bytes:
        whole = self.told(self._end, self.written(text(self.ask.prompts[0], self.admitted.output_tokens)))
        self._keep(self, whole)
        return _encode(self.told("queued", None) if self.ask.in_background else whole)

    def opening(self) -> bytes:
        begun = self._event("response.created", response=self.told("in_progress", None))
        begun += self._event("response.in_progress", response=self.told("in_progress", None))
        begun += self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        if not self.ask.tool:
            begun += self._event("response.content_part.added", **self._place, part=_part(""))
        return begun + self._told(self.ask.mould.before)

    def piece(self, index: int, words: str) -> bytes:
        return self._told(self.ask.mould.piece(words))

    def _told(self, part: str) -> bytes:
        if not part:
            return b""
        self._words.append(part)
        if self.ask.tool:
            return self._event("response.function_call_arguments.delta", **self._place, delta=part)
        return self._event("response.output_text.delta", **self._place, delta=part, logprobs=[])

    def closing(self) -> bytes:
        ended = self._told(self.ending)
        words = "".join(self._words)
        if self.ask.tool:
            ended += self._event("response.function_call_arguments.done", **self._place, arguments=words)
        else:
            ended += self._event("response.output_text.done", **self._place, text=words, logprobs=[])
            ended += self._event("response.content_part.done", **self._place, part=_part(words))
        whole = self.told(self._end, words)
        self._keep(self, whole)
        ended += self._event("response.output_item.done", output_index=0, item=self._item(self._end, words))
        return ended + self._event(f"response.{self._end}", response=whole)

    def failure(self) -> bytes:
        message = "The server had an error while processing your request."
        return self._event("error", code="server_error", message=message, param=None)

    def _event(self, kind: str, **said: object) -> bytes:
        told = event(kind, sequence_number=self._number, **said)
        self._number += 1
        return told

    def _item(self, status: str, words: str | None) -> dict[str, object]:
        if self.ask.tool:
            return {
                "id": self._item_id,
                "type": "function_call",
                "status": status,
                "call_id": "call_" + self.serial,
                "name": self.ask.tool,
                "arguments": words or "",
            }
        content = [] if words is None else [_part(words)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def told(self, status: str, words: str | None) -> dict[str, object]:
        """The response object; `words` None while there is no output yet."""
        said = self.ask.said or {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": self.ask.in_background,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": said.get("instructions"),
            "max_output_tokens": self.ask.size.max_tokens,
            "metadata": said.get("metadata") or {},
            "model": self.ask.model,
            "output": [] if words is None else [self._item(status, words)],
            "parallel_tool_calls": True,
            "previous_response_id": said.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None},
            "store": said.get("store") is not False,
            "temperature": 1.0,
            "text": said.get("text") or {"format": {"type": "text"}},
            "tool_choice": said.get("tool_choice") or "auto",
            "tools": said.get("tools") or [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None if words is None else self.usage(),
            "user": None,
        }


def _part(words: str) -> dict[str, object]:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


@dataclass(frozen=True, slots=True)
class _Stored:
    told: bytes  # what is shown
    becomes: bytes | None  # and what is shown once it has been made; None: it has been
    items: bytes  # of its input
    characters: int  # that whoever goes on from it reads again
    in_background: bool

    @property
    def size(self) -> int:
        return len(self.told) + len(self.becomes or b"") + len(self.items)


class Responses:
    """All that one provider stores."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, _Stored] = OrderedDict()
        self._size = 0

    def deeds(self) -> list[tuple[str, str, Deed]]:
        one = "/v1/responses/{id}"
        return [
            ("GET", one, self._show),
            ("DELETE", one, self._delete),
            ("GET", one + "/input_items", self._items),
            ("POST", one + "/cancel", self._cancel),
        ]

    def read(self, body: bytes) -> Asked:
        """Raises BadAsk, among others for a response to go on from that is not here."""
        said = asks.decode(body, _Creation)
        tool, mould = asks.shaped(said.tools, said.tool_choice, said.text.format)
        read = len(said.input) if isinstance(said.input, str) else sum(len(item.text) for item in said.input)
        read += len(said.instructions or "")
        if (before := said.previous_response_id) is not None:
            if before not in self._stored:
                message = f"Previous response with id '{before}' not found."
                raise BadAsk(message, "previous_response_not_found")
            read += self._stored[before].characters
        if said.background and said.store is False:
            raise BadAsk("Background responses must be stored; leave `store` out.")
        return Asked(
            model=said.model,
            prompts=(said.input if isinstance(said.input, str) else asks.last_user_text(said.input),),
            size=Size(read, said.max_output_tokens),
            stream=bool(said.stream),
            tool=tool,
            mould=mould,
            said=msgspec.json.decode(body),
            in_background=bool(said.background),
        )

    def form(self, ask: Ask, admitted: Admitted, profile: Profile, *, serial: str, created: int) -> Response:
        return Response(ask, admitted, profile, self._keep, serial=serial, created=created)

    def _keep(self, response: Response, whole: dict[str, object]) -> None:
        ask = response.ask
        if not whole["store"]:
            return
        told, becomes = _encode(whole), None
        if ask.in_background and not ask.stream:
            told, becomes = _encode(response.told("queued", None)), told
        characters = ask.size.characters + 4 * response.output_tokens
        self._put(response.id, _Stored(told, becomes, _items_of(response), characters, ask.in_background))

    def _put(self, identity: str, stored: _Stored) -> None:
        self._stored[identity] = stored
        self._size += stored.size
        while self._size > KEPT_BYTES:
            self._size -= self._stored.popitem(last=False)[1].size

    def _take(self, identity: str) -> _Stored:
        stored = self._stored.pop(identity, None)
        if stored is None:
            raise NoSuch(f"Response with id '{identity}' not found.")
        self._size -= stored.size
        return stored

    def _find(self, identity: str) -> _Stored:
        """As it is shown; looked at, it has been made."""
        stored = self._take(identity)
        if stored.becomes is not None:
            stored = replace(stored, told=stored.becomes, becomes=None)
        self._put(identity, stored)
        return stored

    def _show(self, sent: Sent) -> bytes:
        if sent.query.get("stream") == "true":
            raise BadAsk("A stored response is not streamed here; leave `stream` out.")
        return self._find(sent.id).told

    def _items(self, sent: Sent) -> bytes:
        return self._find(sent.id).items

    def _delete(self, sent: Sent) -> bytes:
        self._take(sent.id)
        return _encode({"id": sent.id, "object": "response", "deleted": True})

    def _cancel(self, sent: Sent) -> bytes:
        stored = self._take(sent.id)
        if stored.becomes is not None:
            told = msgspec.json.decode(stored.told) | {"status": "cancelled"}
            stored = replace(stored, told=_encode(told), becomes=None)
        self._put(sent.id, stored)
        if not stored.in_background:
            raise BadAsk("Cannot cancel a synchronous response.")
        return stored.told


def _items_of(response: Response) -> bytes:
    """The list of what was put in."""
    given = (response.ask.said or {}).get("input", [])
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = [
        {"id": f"item_{response.serial}{number}", "type": "message", "status": "completed"} | item
        for number, item in enumerate(given)
    ]
    return listed(items)
