"""What a request body asks for: read once, by the few fields that decide; all other bytes stay as they came."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from proxy.core.usage import TOKENS_MAX

CHARS_PER_TOKEN = 4.0  # OpenAI's rule of thumb for English; the limits learn the true ratio
_ENCODE = msgspec.json.encode
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
_TRUE = msgspec.Raw(b"true")
_FALSE = msgspec.Raw(b"false")


class Unreadable(ValueError):
    """The body is not a request that can be routed. The message says why; `param` names the field."""

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class _Thing(msgspec.Struct):
    id: str


_NAMED = msgspec.json.Decoder(str | _Thing)


class _Asked(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: dict[str, msgspec.Raw] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


_READ = msgspec.json.Decoder(_Asked)
_DECIDING = _Asked.__struct_fields__


@dataclass(slots=True)
class Asked:
    """
    Attributes:
        body: the bytes as the client sent them.
        model: as the client wrote it.
        stream: whether the answer is to be streamed.
        max_tokens: the most the answer may have, in [0, TOKENS_MAX]; None where the client set no bound.
        wants_usage: whether the client itself asked for the usage of a stream.
        is_charged: whether the provider charges anybody's limit of tokens for it.
    """

    body: bytes
    model: str
    stream: bool
    max_tokens: int | None
    wants_usage: bool
    is_charged: bool = True
    _fields: Mapping[str, msgspec.Raw] = field(default_factory=dict, repr=False)
    _stream_options: Mapping[str, msgspec.Raw] = field(default_factory=dict, repr=False)

    @property
    def input_tokens(self) -> float:
        """An estimate, before anybody has counted."""
        return len(self.body) / CHARS_PER_TOKEN if self.is_charged else 0.0

    @property
    def is_spent(self) -> bool:
        """Never: the body is held, and may be sent again and again."""
        return False

    def named(self, field: str) -> str:
        """The id that stands in a field, alone or as the `id` of an object; "" where there is none."""
        said = self._fields.get(field)
        if said is None:
            return ""
        try:
            thing = _NAMED.decode(said)
        except msgspec.ValidationError:
            return ""
        return thing if isinstance(thing, str) else thing.id

    def is_set(self, field: str, *, otherwise: bool) -> bool:
        """Whether a field says true; what it is taken to say where it says neither true nor false."""
        said = self._fields.get(field)
        return otherwise if said not in (_TRUE, _FALSE) else said == _TRUE

    def rewritten(self, model: str, *, ask_usage: bool) -> bytes:
        """The body for an upstream: the same bytes, or with another model or the wish for usage set in.

        Values that are not changed keep their bytes.
        """
        if not self.body or (model == self.model and not ask_usage):
            return self.body
        fields = dict(self._fields)
        if model != self.model:
            fields["model"] = msgspec.Raw(_ENCODE(model))
        if ask_usage:
            fields["stream_options"] = msgspec.Raw(_ENCODE({**self._stream_options, "include_usage": _TRUE}))
        return _ENCODE(fields)


def read(body: bytes, otherwise: str = "") -> Asked:
    """Read a JSON request body.

    Args:
        otherwise: the model where the body names none; "": it must.

    Raises:
        Unreadable: not a JSON object, no `model`, a field that decides has the wrong type, or one that stands twice.
    """
    try:
        if not body.isascii():
            body.decode()  # the reader below looks into no value that it does not decide by
        fields = _FIELDS.decode(body)
        deciding = {name: fields[name] for name in _DECIDING if name in fields}
        if otherwise and "model" not in deciding:
            deciding["model"] = msgspec.Raw(_ENCODE(otherwise))
        asked = _READ.decode(_ENCODE(deciding))
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise Unreadable("the body is nested too deeply", code="invalid_json") from None
    if (twice := _said_twice(body, fields)) is not None:
        raise Unreadable(
            f"the body has `{twice[:64]}` more than once; which one counts is anybody's guess", param=twice[:64]
        )
    if not asked.model:
        raise Unreadable("`model` is empty; name the model to call", code="missing_model", param="model")
    options = asked.stream_options or {}
    bounds = (asked.max_completion_tokens, asked.max_output_tokens, asked.max_tokens)
    bound = next((value for value in bounds if value is not None), None)
    return Asked(
        body=body,
        model=asked.model,
        stream=bool(asked.stream),
        max_tokens=None if bound is None else min(max(bound, 0), TOKENS_MAX),
        wants_usage=bytes(options.get("include_usage", b"")).strip() == b"true",
        _fields=fields,
        _stream_options=options,
    )


_KEY = re.compile(rb'\s*[{,]\s*("[^"\\]*(?:\\.[^"\\]*)*")\s*:\s*')


def _said_twice(body: bytes, fields: Mapping[str, msgspec.Raw]) -> str | None:
    """A key that stands twice in a JSON object, or None. Of such a key one reader takes the first, another the last.

    Args:
        body: the object.
        fields: what was read of it; of a key that stands twice, the place of the first and the value of the last.
    """
    if len(body) == 1 + sum([len(key) + len(value) + 4 for key, value in fields.items()]):
        return None  # every byte is accounted for: quotes, colon, and the comma or brace at either end
    at = 0
    for key, value in fields.items():
        found = _KEY.match(body, at)
        assert found is not None  # `at` is the place of a key, as far as nothing stood twice
        said = _TEXT.decode(found[1])
        if said != key or not body.startswith(value, found.end()):
            return said
        at = found.end() + len(value)
    rest = _KEY.match(body, at)
    return None if rest is None else _TEXT.decode(rest[1])


def _explained(said: str) -> Unreadable:
    """msgspec's message in the words of the API: `Expected `str`, got `int` - at `$.model``."""
    if "missing required field `model`" in said:
        return Unreadable("the body has no `model`; name the model to call", code="missing_model", param="model")
    what, _, where = said.partition(" - at `$")
    param = where.strip("`").lstrip(".") or None
    if param is None:
        return Unreadable(f"the body must be a JSON object: {what}", code="invalid_json")
    return Unreadable(f"`{param}` is of the wrong type: {what}", param=param)
