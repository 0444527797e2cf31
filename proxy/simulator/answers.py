"""The answers of OpenAI's endpoints, whole or as the events of a stream. When they are sent is the server's matter.

An answer is `echo: `, the prompt, and filler words up to its number of tokens, so that a test knows whose answer it
holds. A stream is `opening`, then `piece` after `piece`, then `closing`; or `failure` in the place of what is missing.
Where a tool or a schema is asked for, the text stands in JSON of that shape.
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


class Form:
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

    def written(self, words: str) -> str:
        """The text in the mould that was asked for. Of JSON that is cut off the end is missing."""
        mould = self.ask.mould
        return mould.before + mould.piece(words) + self.ending

    @property
    def ending(self) -> str:
        return "" if self.admitted.capped else self.ask.mould.after


class WholeForm(Form, ABC):
    """One that can be given whole."""

    @property
    def media_type(self) -> str:
        return "application/json"

    @abstractmethod
    def body(self) -> bytes: ...


class StreamedForm(Form, ABC):
    """One that can be told piece by piece, in events unless it says otherwise."""

    @property
    def stream_type(self) -> str:
        return "text/event-stream; charset=utf-8"

    @abstractmethod
    def opening(self) -> bytes: ...

    @abstractmethod
    def piece(self, index: int, words: str) -> bytes: ...

    @abstractmethod
    def closing(self) -> bytes: ...

    def failure(self) -> bytes:
        """b"" where there is no way to tell of it."""
        return b"data: %b\n\n" % _encode(wording.broken(self.profile.style))


def event(kind: str, **said: object) -> bytes:
    """One that says in its data, too, what it is."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **said}))


class _Choices(WholeForm, StreamedForm):
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

    def body(self) -> bytes:
        choices = [
            {"index": index, **self.choice(text(prompt, self.admitted.output_tokens))}
            for index, prompt in enumerate(self.ask.prompts)
        ]
        return _encode({**self._frame(self.whole_kind), "choices": choices, "usage": self.usage()})

    def closing(self) -> bytes:
        events = [self._event({"index": index, **self.finish()}) for index in range(len(self.ask.prompts))]
        if self.ask.include_usage:
            events.append(self._head + b'],"usage":%b}\n\n' % _encode(self.usage()))
        events.append(b"data: [DONE]\n\n")
        return b"".join(events)

    def _event(self, choice: dict[str, object]) -> bytes:
        return self._head + _encode(choice) + self._tail


class Chat(_Choices):
    prefix = "chatcmpl-"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.ask.tool and not self.admitted.capped else super().finish_reason

    def choice(self, words: str) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
        if self.ask.tool:
            message["tool_calls"] = [self._call(self.written(words))]
        else:
            message["content"] = self.written(words)
        return {"message": message, "logprobs": None, "finish_reason": self.finish_reason}

    def _call(self, arguments: str) -> dict[str, object]:
        function = {"name": self.ask.tool, "arguments": arguments}
        return {"id": "call_" + self.serial, "type": "function", "function": function}

    def opening(self) -> bytes:
        begun: dict[str, object] = {"role": "assistant", "content": "", "refusal": None}
        if self.ask.tool:
            begun |= {"content": None, "tool_calls": [{"index": 0, **self._call("")}]}
        indices = range(len(self.ask.prompts))
        return b"".join(self._delta(index, begun) + self._told(index, self.ask.mould.before) for index in indices)

    def piece(self, index: int, words: str) -> bytes:
        return self._told(index, self.ask.mould.piece(words))

    def closing(self) -> bytes:
        return b"".join(self._told(index, self.ending) for index in range(len(self.ask.prompts))) + super().closing()

    def _told(self, index: int, part: str) -> bytes:
        if not part:
            return b""
        if self.ask.tool:
            return self._delta(index, {"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}' % (index, _encode(part))
        return self._head + choice + self._tail

    def _delta(self, index: int, delta: dict[str, object]) -> bytes:
        return self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

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


class Embedding(WholeForm):
    @property
    def output_tokens(self) -> int:
        return 0

    def body(self) -> bytes:
        dimensions = self.ask.dimensions or self.profile.embedding_dimensions
        data: list[dict[str, object]] = []
        for index, prompt in enumerate(self.ask.prompts):
            values = vector(prompt, dimensions)
            packed = b64encode(struct.pack(f"<{dimensions}f", *values)).decode() if self.ask.base64 else values
            data.append({"object": "embedding", "index": index, "embedding": packed})
        tokens = self.admitted.input_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _encode({"object": "list", "data": data, "model": self.ask.model, "usage": usage})


_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)


class Moderation(WholeForm):
    """A text is of those categories whose names it holds."""

    @property
    def output_tokens(self) -> int:
        return 0

    def body(self) -> bytes:
        results = [self._result(prompt) for prompt in self.ask.prompts]
        return _encode({"id": "modr-" + self.serial, "model": self.ask.model, "results": results})

    @staticmethod
    def _result(prompt: str) -> dict[str, object]:
        found = {category: category in prompt.lower() for category in _CATEGORIES}
        return {
            "flagged": any(found.values()),
            "categories": found,
            "category_scores": {category: 0.9 if is_found else 0.0 for category, is_found in found.items()},
            "category_applied_input_types": {category: ["text"] for category in found},
        }
