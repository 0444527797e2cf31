"""One call of a step: the request made of its templates, and what the answer to it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.collected import Collected
from proxy.config import Step as Said
from proxy.core import headers, schema
from proxy.core.pipeline import filled
from proxy.core.usage import Usage
from proxy.errors import InvalidRequest, StepRefused, StepUnfit
from proxy.telemetry import Record

OF_THE_WHOLE = frozenset({"model", "messages", "stream", "stream_options"})  # the rest of a request is the last step's


@dataclass(slots=True)
class Given:
    """What a step gave.

    Attributes:
        text: what `{steps.NAME}` stands for.
        value: the same as a JSON value; None: it gave none.
        choices: of the answer, as they came; empty where the text was put together here.
        result: ok, fallback, skipped, omitted; or failed, where the client has been told so already.
        is_passed: the client has it already.
    """

    text: str = ""
    value: Any = None
    choices: Sequence[Mapping[str, Any]] = ()
    result: str = "ok"
    is_passed: bool = False


@dataclass(slots=True)
class Spent:
    """What all calls so far took; cost in micro-dollars, None where it is not known."""

    usage: Usage | None = None
    cost: int | None = None

    def add(self, usage: Usage | None, cost: int | None) -> None:
        """A call without usage took nothing that is known; one without a price makes the sum unknown."""
        if usage is None:
            return
        if self.usage is None:
            self.usage, self.cost = usage, cost
            return
        before = self.usage
        self.usage = Usage(
            before.input + usage.input,
            before.output + usage.output,
            before.cached + usage.cached,
            before.cache_write + usage.cache_write,
            before.reasoning + usage.reasoning,
        )
        self.cost = None if self.cost is None or cost is None else self.cost + cost


@dataclass(slots=True)
class Asked:
    """What the whole was asked for: its text, and the fields of its request that are for the last step."""

    text: str
    fields: Mapping[str, Any]
    wants_usage: bool


def read(body: bytes) -> Asked:
    """Read the request for a pipeline: its input is the text of the last message of the user.

    Args:
        body: a JSON object.

    Raises:
        InvalidRequest: there is no such text.
    """
    try:
        said: dict[str, Any] = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None
    messages = said.get("messages")
    theirs = [one for one in messages if _is_users(one)] if isinstance(messages, list) else []
    if not theirs:
        raise InvalidRequest("`messages` holds no message of the user; its text is the input", param="messages")
    options = said.get("stream_options")
    return Asked(
        _text_of(theirs[-1].get("content")),
        {name: value for name, value in said.items() if name not in OF_THE_WHOLE},
        isinstance(options, dict) and options.get("include_usage") is True,
    )


def _is_users(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "user"


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("a pipeline takes text only; send `content` as a text", param="messages")
    return "".join(map(str, texts))


def request(
    name: str, said: Said, model: str, values: Mapping[str, str], more: Mapping[str, Any], *, stream: bool
) -> bytes:
    """The body of a step's request.

    Args:
        more: fields that hold where the step says nothing of its own.
    """
    if said.prompt is not None:
        messages = [{"role": "user", "content": filled(said.prompt, values)}]
    else:
        messages = [{"role": one.role, "content": filled(one.content, values)} for one in said.messages]
    fields: dict[str, Any] = {**more, **said.parameters}
    if said.max_tokens is not None:
        fields |= {"max_tokens": said.max_tokens}
    if said.output is not None:
        asked = {"name": _schema_name(name), "schema": said.output}
        fields |= {"response_format": {"type": "json_schema", "json_schema": asked}}
    return msgspec.json.encode({"model": model, "messages": messages, **fields, **({"stream": True} if stream else {})})


def _schema_name(step: str) -> str:
    """OpenAI takes letters, digits, `_` and `-` only, 64 at most."""
    return step.replace(".", "_")


def given(answer: Collected, record: Record, said: Said, *, is_last: bool) -> Given:
    """What a whole answer gave. The last step's may be without text: it may be the call of a tool.

    Raises:
        StreamTruncated: it broke off.
        StepRefused: it is an error of the upstream's.
        StepUnfit: it holds no text, or not what `output` asks for.
    """
    if answer.broke is not None:
        raise answer.broke
    if answer.status >= 400:
        raise _refusal(answer, record)
    try:
        choices = msgspec.json.decode(answer.body)["choices"]
        text = choices[0]["message"].get("content")
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        raise StepUnfit("its answer is no chat completion; is its model one for chats?") from None
    if not isinstance(text, str):
        if is_last and said.output is None:
            return Given(choices=choices)
        raise StepUnfit(f"its answer has no text (finish_reason {choices[0].get('finish_reason')})")
    return Given(text, text if said.output is None else _checked(text, said.output), choices)


def _checked(text: str, output: Mapping[str, Any]) -> Any:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise StepUnfit(f"its answer is not JSON, which was asked for: {error}") from None
    if (reason := schema.misfit(value, output)) is not None:
        raise StepUnfit(f"its answer does not fit the schema that was asked for: {reason}")
    return value


def _refusal(answer: Collected, record: Record) -> StepRefused:
    code, _, message = headers.error_of_body(answer.body)
    told = f"its upstream answered {answer.status}: {message[:500] or 'without a word'}"
    reason = record.attempts[-1].meaning.reason
    return StepRefused(told, status=answer.status, code=code or None, reason=reason)
