"""The bodies that are sent, as far as a simulated answer depends on them: body -> `Ask`, or `BadAsk`.

Fields that do not matter here are let through unread, as the real API grows new ones all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec

from proxy.simulator.provider import Size

_Tokens = Annotated[int, msgspec.Meta(ge=1)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
_CHARACTERS_PER_TOKEN = 4


class BadAsk(Exception):
    """What is wrong with the body, in words for the client."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call wants."""

    model: str
    prompts: tuple[str, ...]  # one for each choice (or embedding) of the answer, in order
    size: Size
    stream: bool = False
    include_usage: bool = False
    dimensions: int | None = None  # of embeddings
    base64: bool = False  # embeddings as bytes
    tool: str = ""  # one that must be used
    thinks: bool = False  # before it answers


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Part(msgspec.Struct):
    text: str | None = None


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content or ())


class _Chat(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    n: _Choices | None = None


class _Completion(msgspec.Struct):
    model: str
    prompt: str | list[str | int | list[int]]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Tokens | None = None
    n: _Choices | None = None


class _Embedding(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: _Tokens | None = None
    encoding_format: str | None = None


class _Response(msgspec.Struct):
    model: str
    input: str | list[_Message]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: _Tokens | None = None


def chat(body: bytes) -> Ask:
    """The answer echoes the last message of the user (of anybody, where there is none)."""
    said = decode(body, _Chat)
    return Ask(
        model=said.model,
        prompts=(_last_user_text(said.messages),) * (said.n or 1),
        size=Size(sum(len(message.text) for message in said.messages), said.max_completion_tokens or said.max_tokens),
        stream=bool(said.stream),
        include_usage=said.stream_options is not None and said.stream_options.include_usage,
    )


def completion(body: bytes) -> Ask:
    said = decode(body, _Completion)
    prompts, characters = _texts(said.prompt)
    return Ask(
        model=said.model,
        prompts=tuple(prompt for prompt in prompts for _ in range(said.n or 1)),
        size=Size(characters, said.max_tokens),
        stream=bool(said.stream),
        include_usage=said.stream_options is not None and said.stream_options.include_usage,
    )


def embedding(body: bytes) -> Ask:
    said = decode(body, _Embedding)
    prompts, characters = _texts(said.input)
    return Ask(
        said.model, prompts, Size(characters), dimensions=said.dimensions, base64=said.encoding_format == "base64"
    )


def response(body: bytes) -> Ask:
    said = decode(body, _Response)
    prompt = said.input if isinstance(said.input, str) else _last_user_text(said.input)
    read = len(said.input) if isinstance(said.input, str) else sum(len(item.text) for item in said.input)
    size = Size(read + len(said.instructions or ""), said.max_output_tokens)
    return Ask(said.model, (prompt,), size, stream=bool(said.stream))


_Said = TypeVar("_Said")


def decode(body: bytes, form: type[_Said]) -> _Said:
    """Raises BadAsk."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise BadAsk(f"Invalid request: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadAsk("We could not parse the JSON body of your request.") from None


def _last_user_text(messages: Sequence[_Message]) -> str:
    for message in reversed(messages):
        if message.role == "user":
            return message.text
    return messages[-1].text if messages else ""


def _texts(said: str | list[str | int | list[int]]) -> tuple[tuple[str, ...], int]:
    """The prompts, each a text or a list of tokens, and how many characters they count as."""
    if isinstance(said, str):
        return (said,), len(said)
    tokens = [item for item in said if isinstance(item, int)]
    if tokens:
        return (str(tokens),), _CHARACTERS_PER_TOKEN * len(tokens)
    characters = 0
    items = [item for item in said if not isinstance(item, int)]
    for item in items:
        characters += len(item) if isinstance(item, str) else _CHARACTERS_PER_TOKEN * len(item)
    return tuple(str(item) for item in items), characters
