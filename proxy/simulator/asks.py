"""The bodies that are sent, as far as a simulated answer depends on them: body -> `Ask`, or `BadAsk`.

Fields that do not matter here are let through unread, as the real API grows new ones all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from proxy.simulator.mould import ANY_JSON, PLAIN, Mould, fitting
from proxy.simulator.provider import Size

Tokens = Annotated[int, msgspec.Meta(ge=1)]
_Choices = Annotated[int, msgspec.Meta(ge=1, le=128)]
_CHARACTERS_PER_TOKEN = 4


class BadAsk(Exception):
    """What is wrong with the request, in words for the client."""

    status: ClassVar[int] = 400

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class NoSuch(BadAsk):
    """There is nothing of that name."""

    status = 404


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
    mould: Mould = PLAIN  # of the answer, or of what the tool is called with
    thinks: bool = False  # before it answers


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Part(msgspec.Struct):
    text: str | None = None


class Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content or ())


class Function(msgspec.Struct):
    name: str = ""
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """One that may be used, or the choice of it: chat has its function within, responses have it here."""

    type: str = "function"
    function: Function | None = None
    name: str = ""
    parameters: dict[str, Any] | None = None

    @property
    def called(self) -> Function:
        return self.function or Function(self.name, self.parameters)


Choice = Literal["none", "auto", "required"] | Tool | None


class _Schema(msgspec.Struct):
    schema: dict[str, Any] = {}


class Format(msgspec.Struct):
    """What the answer must look like: chat has its schema within, responses have it here."""

    type: str = "text"
    json_schema: _Schema | None = None
    schema: dict[str, Any] | None = None


class _Chat(msgspec.Struct):
    model: str
    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: Choice = None
    response_format: Format | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: _Choices | None = None


class _Completion(msgspec.Struct):
    model: str
    prompt: str | list[str | int | list[int]]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Tokens | None = None
    n: _Choices | None = None


class _Embedding(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: Tokens | None = None
    encoding_format: str | None = None


class _Moderation(msgspec.Struct):
    input: str | list[str | _Part]
    model: str = "omni-moderation-latest"


def chat(body: bytes) -> Ask:
    """The answer echoes the last message of the user (of anybody, where there is none)."""
    said = decode(body, _Chat)
    tool, mould = shaped(said.tools, said.tool_choice, said.response_format)
    return Ask(
        model=said.model,
        prompts=(last_user_text(said.messages),) * (said.n or 1),
        size=Size(sum(len(message.text) for message in said.messages), said.max_completion_tokens or said.max_tokens),
        stream=bool(said.stream),
        tool=tool,
        mould=mould,
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


def moderation(body: bytes) -> Ask:
    """A text for each result: a list of parts has one."""
    said = decode(body, _Moderation)
    items = [said.input] if isinstance(said.input, str) else said.input
    texts = tuple(item for item in items if isinstance(item, str))
    texts = texts or ("".join(item.text or "" for item in items if isinstance(item, _Part)),)
    return Ask(said.model, texts, Size(sum(map(len, texts))))


def shaped(tools: Sequence[Tool] | None, choice: Choice, wanted: Format | None) -> tuple[str, Mould]:
    """The tool that must be used, "" where none must; and what it is called with, or the answer, looks like.

    Raises BadAsk.
    """
    try:
        if choice == "required" or (isinstance(choice, Tool) and choice.type == "function"):
            name = choice.called.name if isinstance(choice, Tool) else ""
            for tool in tools or ():
                if tool.type == "function" and name in ("", tool.called.name):
                    return tool.called.name, fitting(tool.called.parameters or {"type": "object"})
            raise BadAsk(f"Tool choice '{name or choice}' not found in 'tools' parameter.")
        if wanted is not None and wanted.type == "json_schema":
            return "", fitting(wanted.json_schema.schema if wanted.json_schema else wanted.schema or {})
    except (ValueError, TypeError, AttributeError) as error:  # of a schema that is none
        raise BadAsk(f"Invalid schema: {error}.") from None
    return "", ANY_JSON if wanted is not None and wanted.type == "json_object" else PLAIN


_Said = TypeVar("_Said")


def decode(body: bytes, form: type[_Said]) -> _Said:
    """Raises BadAsk."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise BadAsk(f"Invalid request: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadAsk("We could not parse the JSON body of your request.") from None


def last_user_text(messages: Sequence[Message]) -> str:
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
