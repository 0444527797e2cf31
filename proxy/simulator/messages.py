"""Anthropic's messages: what is asked, and the answer whole or as the events of a stream.

A message echoes like every answer here. One that asks for thinking thinks first; one that must use a tool calls it with
what fits the tool's schema.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from proxy.simulator import answers, asks, wording
from proxy.simulator.answers import StreamedForm, WholeForm, event
from proxy.simulator.asks import Ask, Choice, Format, Tool, decode
from proxy.simulator.mould import Mould
from proxy.simulator.profile import Profile, Style
from proxy.simulator.provider import Admitted, Size

THOUGHT = "The water wants to run."
SIGNATURE = "c2lnbmVkIGJ5IHRoZSBzaW11bGF0b3I="
_MODELS = ("claude-opus-4-8", "claude-sonnet-4-6", "claude-haiku-4-5")  # listed where the profile names none
_encode = msgspec.json.encode


class _Block(msgspec.Struct):
    text: str | None = None
    content: Any = None  # of a tool's result: text, or blocks


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Block]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(
            block.text or (block.content if isinstance(block.content, str) else "") for block in self.content
        )


class _Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    type: str
    name: str | None = None


class _Thinking(msgspec.Struct):
    type: str


class _Output(msgspec.Struct):
    format: Format | None = None


class _Count(msgspec.Struct):
    model: str
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    system: str | list[_Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None

    @property
    def characters(self) -> int:
        system = self.system or ""
        read = len(system) if isinstance(system, str) else sum(len(block.text or "") for block in system)
        return read + sum(len(message.text) for message in self.messages)

    @property
    def prompt(self) -> str:
        asked = [message.text for message in self.messages if message.role == "user"]
        return asked[-1] if asked else self.messages[-1].text


class Create(_Count, kw_only=True):
    """The body that asks for a message."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    stream: bool | None = None
    output_config: _Output = msgspec.field(default_factory=_Output)

    def shaped(self) -> tuple[str, Mould]:
        """As `asks.shaped`."""
        chosen = self.tool_choice
        choice: Choice = None
        if chosen is not None and chosen.type in ("any", "tool"):
            choice = Tool(name=chosen.name) if chosen.name else "required"
        tools = [Tool(name=tool.name, parameters=tool.input_schema) for tool in self.tools or ()]
        return asks.shaped(tools, choice, self.output_config.format)


def creation(body: bytes) -> Ask:
    """Raises BadAsk."""
    said = decode(body, Create)
    tool, mould = said.shaped()
    return Ask(
        model=said.model,
        prompts=(said.prompt,),
        size=Size(said.characters, said.max_tokens),
        stream=bool(said.stream),
        tool=tool,
        mould=mould,
        thinks=said.thinking is not None and said.thinking.type != "disabled",
    )


def count(body: bytes) -> Ask:
    """Raises BadAsk."""
    said = decode(body, _Count)
    return Ask(said.model, (said.prompt,), Size(said.characters))


class Message(WholeForm, StreamedForm):
    """The typed events of /v1/messages: each says its name, the last is `message_stop`."""

    def __init__(self, ask: Ask, admitted: Admitted, profile: Profile, *, serial: str, created: int) -> None:
        super().__init__(ask, admitted, profile, serial=serial, created=created)
        self._index = 1 if ask.thinks else 0  # of the block that the words go into

    def usage(self) -> dict[str, object]:
        return self._input() | {"output_tokens": self.output_tokens}

    def _input(self) -> dict[str, object]:
        return {
            "input_tokens": self.admitted.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "service_tier": "standard",
        }

    @property
    def _stop_reason(self) -> str:
        if self.admitted.capped:
            return "max_tokens"
        return "tool_use" if self.ask.tool else "end_turn"

    def body(self) -> bytes:
        mould = self.ask.mould
        words = mould.before + mould.piece(answers.text(self.ask.prompts[0], self.admitted.output_tokens)) + mould.after
        told = self._block(msgspec.json.decode(words) if self.ask.tool else words)
        thought: dict[str, object] = {"type": "thinking", "thinking": THOUGHT, "signature": SIGNATURE}
        content = [thought, told] if self.ask.thinks else [told]
        return _encode(self._message(content, self._stop_reason, self.usage()))

    def opening(self) -> bytes:
        begun = self._message([], None, self._input() | {"output_tokens": 1})
        empty = self._block({}) if self.ask.tool else self._block("")
        return (
            event("message_start", message=begun)
            + (_thinking() if self.ask.thinks else b"")
            + event("content_block_start", index=self._index, content_block=empty)
            + event("ping")
            + self._told(self.ask.mould.before)
        )

    def piece(self, index: int, words: str) -> bytes:
        return self._told(self.ask.mould.piece(words))

    def closing(self) -> bytes:
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        return (
            self._told(self.ask.mould.after)
            + event("content_block_stop", index=self._index)
            + event("message_delta", delta=delta, usage={"output_tokens": self.output_tokens})
            + event("message_stop")
        )

    def failure(self) -> bytes:
        return b"event: error\ndata: %b\n\n" % _encode(wording.broken(Style.ANTHROPIC))

    def _told(self, part: str) -> bytes:
        if not part:
            return b""
        delta = {"type": "text_delta", "text": part}
        if self.ask.tool:
            delta = {"type": "input_json_delta", "partial_json": part}
        return event("content_block_delta", index=self._index, delta=delta)

    def _block(self, said: str | dict[str, Any]) -> dict[str, object]:
        """The block of the answer: text, or the use of a tool with this input."""
        if isinstance(said, str):
            return {"type": "text", "text": said}
        return {"type": "tool_use", "id": f"toolu_{self.serial}", "name": self.ask.tool, "input": said}

    def _message(
        self, content: list[dict[str, object]], stop: str | None, used: dict[str, object]
    ) -> dict[str, object]:
        return {
            "id": f"msg_{self.serial}",
            "type": "message",
            "role": "assistant",
            "model": self.ask.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": used,
        }


def _thinking() -> bytes:
    """The first block, all at once."""
    empty = {"type": "thinking", "thinking": "", "signature": ""}
    thought, signed = (
        {"type": "thinking_delta", "thinking": THOUGHT},
        {"type": "signature_delta", "signature": SIGNATURE},
    )
    return (
        event("content_block_start", index=0, content_block=empty)
        + event("content_block_delta", index=0, delta=thought)
        + event("content_block_delta", index=0, delta=signed)
        + event("content_block_stop", index=0)
    )


def models(names: tuple[str, ...]) -> dict[str, object]:
    """The list of these, or of the usual ones."""
    shown = names or _MODELS
    return {"data": [model(name) for name in shown], "has_more": False, "first_id": shown[0], "last_id": shown[-1]}


def model(name: str) -> dict[str, object]:
    return {
        "type": "model",
        "id": name,
        "display_name": name.replace("-", " ").title(),
        "created_at": "2026-02-04T00:00:00Z",
        "lifecycle": "active",
    }
