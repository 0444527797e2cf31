"""The answers of OpenAI's endpoints, whole or as the events of a stream. When they are sent is the server's matter.

An answer is `echo: `, the prompt, and filler words up to its number of tokens, so that a test knows whose answer it
holds. A stream is `opening`, then `piece` after `piece`, then `closing`; or `failure` in the place of what is missing.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Iterator
from math import sqrt
from typing import ClassVar

import msgspec

from proxy.simulator import wording
from proxy.simulator.asks import Ask
from proxy.simulator.profile import Profile
from proxy.simulator.provider import Admitted

_SENTENCE = "water runs down the long steel pipe and turns the wheel that lights a town"
_WORDS = tuple(f" {word}" for word in _SENTENCE.split())
_encode = msgspec.json.encode


def pieces(prompt: str, tokens: int, each: int) -> Iterator[tuple[int, str]]:
    """The text of one answer in pieces of `each` tokens: (tokens in it, text). The echo counts as the first token."""
    for begin in range(0, tokens, each):
        end = min(begin + each, tokens)
        words = "".join(_WORDS[number % len(_WORDS)] for number in range(max(1, begin), end))
        yield end - begin, f"echo: {prompt}{words}" if begin == 0 else words


def text(prompt: str, tokens: int) -> str:
    return next(words for _, words in pieces(prompt, tokens, tokens))


def vector(prompt: str, dimensions: int) -> list[float]:
    """A unit vector that depends on nothing but the text."""
    raw = [byte - 127.5 for byte in hashlib.shake_128(prompt.encode()).digest(dimensions)]
    length = sqrt(sum(value * value for value in raw))
    return [value / length for value in raw]


class Form(ABC):
    """How one endpoint writes one answer."""

    def __init__(self, ask: Ask, admitted: Admitted, profile: Profile, *, serial: str, created: int) -> None:
        self.ask = ask
        self.admitted = admitted
        self.profile = profile
        self.serial = serial
        self.created = created

    @property
    def output_tokens(self) -> int:
        return self.admitted.output_tokens * len(self.ask.prompts)

    @property
    def seconds(self) -> float:
        """From arrival to the end of the whole answer."""
        return self.admitted.first_token + self.output_tokens / self.admitted.tokens_per_second

    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.admitted.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.admitted.input_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    @abstractmethod
    def whole(self) -> dict[str, object]: ...


class StreamedForm(Form):
    """One that can be told in events too."""

    @abstractmethod
    def opening(self) -> bytes: ...

    @abstractmethod
    def piece(self, index: int, words: str) -> bytes: ...

    @abstractmethod
    def closing(self) -> bytes: ...

    def failure(self) -> bytes:
        return b"data: %b\n\n" % _encode(wording.broken(self.profile.style))


class _Choices(StreamedForm):
    """What chat and completions have in common: numbered choices, usage in a chunk of its own, `[DONE]`."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, ask: Ask, admitted: Admitted, profile: Profile, *, serial: str, created: int) -> None:
        super().__init__(ask, admitted, profile, serial=serial, created=created)
        self._head = b'data: %b,"choices":[' % _encode(self._frame(self.chunk_kind))[:-1]
        # Who asks for usage gets it in a last chunk, and a null in every other.
        self._tail = b'],"usage":null}\n\n' if ask.include_usage else b"]}\n\n"

    @property
    def finish_reason(self) -> str:
        return "length" if self.admitted.capped else "stop"

    def _frame(self, kind: str) -> dict[str, object]:
        return {
            "id": self.prefix + self.serial,
            "object": kind,
            "created": self.created,
            "model": self.ask.model,
            "service_tier": "default",
            "system_fingerprint": "fp_simulated",
        }

    @abstractmethod
    def choice(self, words: str) -> dict[str, object]: ...

    @abstractmethod
    def finish(self) -> dict[str, object]: ...

    def whole(self) -> dict[str, object]:
        choices = [
            {"index": index, **self.choice(text(prompt, self.admitted.output_tokens))}
            for index, prompt in enumerate(self.ask.prompts)
        ]
        return {**self._frame(self.whole_kind), "choices": choices, "usage": self.usage()}

    def closing(self) -> bytes:
        events = [
            self._head + _encode({"index": index, **self.finish()}) + self._tail
            for index in range(len(self.ask.prompts))
        ]
        if self.ask.include_usage:
            events.append(self._head + b'],"usage":%b}\n\n' % _encode(self.usage()))
        events.append(b"data: [DONE]\n\n")
        return b"".join(events)


class Chat(_Choices):
    prefix = "chatcmpl-"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def choice(self, words: str) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": words, "refusal": None, "annotations": []}
        return {"message": message, "logprobs": None, "finish_reason": self.finish_reason}

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(
            self._head + _encode({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}) + self._tail
            for index in range(len(self.ask.prompts))
        )

    def piece(self, index: int, words: str) -> bytes:
        choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % (index, _encode(words))
        return self._head + choice + self._tail

    def finish(self) -> dict[str, object]:
        return {"delta": {}, "logprobs": None, "finish_reason": self.finish_reason}


class Completion(_Choices):
    prefix = "cmpl-"
    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def choice(self, words: str) -> dict[str, object]:
        return {"text": words, "logprobs": None, "finish_reason": self.finish_reason}

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, words: str) -> bytes:
        choice = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}' % (index, _encode(words))
        return self._head + choice + self._tail

    def finish(self) -> dict[str, object]:
        return self.choice("")


class Embedding(Form):
    @property
    def output_tokens(self) -> int:
        return 0

    def whole(self) -> dict[str, object]:
        dimensions = self.ask.dimensions or self.profile.embedding_dimensions
        data: list[dict[str, object]] = []
        for index, prompt in enumerate(self.ask.prompts):
            values = vector(prompt, dimensions)
            packed = b64encode(struct.pack(f"<{dimensions}f", *values)).decode() if self.ask.base64 else values
            data.append({"object": "embedding", "index": index, "embedding": packed})
        tokens = self.admitted.input_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.ask.model, "usage": usage}


class Response(StreamedForm):
    """The typed events of /v1/responses: each says its name and its number, and no `[DONE]` follows."""

    def __init__(self, ask: Ask, admitted: Admitted, profile: Profile, *, serial: str, created: int) -> None:
        super().__init__(ask, admitted, profile, serial=serial, created=created)
        self._number = 0
        self._words: list[str] = []
        self._place: dict[str, object] = {"item_id": "msg_" + serial, "output_index": 0, "content_index": 0}

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

    def whole(self) -> dict[str, object]:
        return self._body(self._end, text(self.ask.prompts[0], self.admitted.output_tokens))

    def opening(self) -> bytes:
        return (
            self._event("response.created", {"response": self._body("in_progress", None)})
            + self._event("response.in_progress", {"response": self._body("in_progress", None)})
            + self._event("response.output_item.added", {"output_index": 0, "item": self._item("in_progress", None)})
            + self._event("response.content_part.added", {**self._place, "part": _part("")})
        )

    def piece(self, index: int, words: str) -> bytes:
        self._words.append(words)
        return self._event("response.output_text.delta", {**self._place, "delta": words, "logprobs": []})

    def closing(self) -> bytes:
        words = "".join(self._words)
        return (
            self._event("response.output_text.done", {**self._place, "text": words, "logprobs": []})
            + self._event("response.content_part.done", {**self._place, "part": _part(words)})
            + self._event("response.output_item.done", {"output_index": 0, "item": self._item(self._end, words)})
            + self._event(f"response.{self._end}", {"response": self._body(self._end, words)})
        )

    def failure(self) -> bytes:
        message = "The server had an error while processing your request."
        return self._event("error", {"code": "server_error", "message": message, "param": None})

    def _event(self, kind: str, said: dict[str, object]) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **said}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(event))

    def _item(self, status: str, words: str | None) -> dict[str, object]:
        content = [] if words is None else [_part(words)]
        return {
            "id": "msg_" + self.serial,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _body(self, status: str, words: str | None) -> dict[str, object]:
        """The response object; `words` None while there is no output yet."""
        return {
            "id": "resp_" + self.serial,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "max_output_tokens": self.ask.size.max_tokens,
            "metadata": {},
            "model": self.ask.model,
            "output": [] if words is None else [self._item(status, words)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": True,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None if words is None else self.usage(),
            "user": None,
        }


def _part(words: str) -> dict[str, object]:
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}
