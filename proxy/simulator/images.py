"""OpenAI's images. One that is made is a PNG of the size asked for, in one colour that depends on the prompt alone; one
that is edited or varied comes back as it was sent."""

from __future__ import annotations

import hashlib
import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from proxy.simulator.answers import StreamedForm, WholeForm, event
from proxy.simulator.asks import Ask, BadAsk, decode
from proxy.simulator.forms import Form
from proxy.simulator.provider import Size

_PAINTER = "dall-e-2"  # the model of a request that names none
_LONGEST = 4096  # pixels
_encode = msgspec.json.encode


class _Generation(msgspec.Struct):
    prompt: str
    model: str = _PAINTER
    n: Annotated[int, msgspec.Meta(ge=1, le=10)] | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    stream: bool | None = None
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=3)] | None = None


@dataclass(frozen=True, slots=True)
class Painting(Ask):
    pixels: tuple[int, int] = (1024, 1024)
    as_url: bool = False
    partial_images: int = 0
    originals: tuple[bytes, ...] = ()

    @property
    def deed(self) -> str:
        return "image_edit" if self.originals else "image_generation"


def generation(body: bytes) -> Painting:
    """Raises BadAsk."""
    return _painting(decode(body, _Generation))


def edit(form: Form) -> Painting:
    """Raises BadAsk."""
    form.must("prompt")
    return variation(form)


def variation(form: Form) -> Painting:
    """Raises BadAsk."""
    form.file("image")
    fields: Mapping[str, Any] = {"prompt": "", **form.fields}
    try:
        said = msgspec.convert(fields, _Generation, strict=False)
    except msgspec.ValidationError as error:
        raise BadAsk(f"Invalid request: {error}.") from None
    return _painting(said, tuple(file.content for file in form.files["image"]))


def _painting(said: _Generation, originals: tuple[bytes, ...] = ()) -> Painting:
    if said.output_format not in (None, "png"):
        raise BadAsk(f"The simulated provider paints png; not '{said.output_format}'.")
    return Painting(
        said.model,
        (said.prompt,) * (said.n or 1),
        Size(len(said.prompt)),
        stream=bool(said.stream),
        pixels=_pixels(said.size or "auto"),
        as_url=said.response_format == "url",
        partial_images=said.partial_images or 0,
        originals=originals,
    )


def _pixels(said: str) -> tuple[int, int]:
    if said == "auto":
        return 1024, 1024
    width, _, height = said.partition("x")
    if width.isdecimal() and height.isdecimal() and 0 < int(width) <= _LONGEST and 0 < int(height) <= _LONGEST:
        return int(width), int(height)
    raise BadAsk(f"Invalid 'size': '{said}'. It is WIDTHxHEIGHT, each up to {_LONGEST}, or auto.")


class Picture(WholeForm, StreamedForm):
    ask: Painting

    def body(self) -> bytes:
        told = {"created": self.created, "output_format": "png", "size": self._size, "usage": self.usage()}
        return _encode({**told, "data": [self._shown(index) for index in range(len(self.ask.prompts))]})

    def opening(self) -> bytes:
        partial = f"{self.ask.deed}.partial_image"
        indices = range(self.ask.partial_images)
        return b"".join(event(partial, partial_image_index=index, **self._told(0)) for index in indices)

    def piece(self, index: int, words: str) -> bytes:
        return b""

    def closing(self) -> bytes:
        done = f"{self.ask.deed}.completed"
        return b"".join(event(done, usage=self.usage(), **self._told(index)) for index in range(len(self.ask.prompts)))

    def usage(self) -> dict[str, object]:
        entered, left = self.admitted.input_tokens, self.output_tokens
        details = {"text_tokens": entered, "image_tokens": 0}
        total = entered + left
        return {"input_tokens": entered, "input_tokens_details": details, "output_tokens": left, "total_tokens": total}

    @property
    def _size(self) -> str:
        return "{}x{}".format(*self.ask.pixels)

    def _packed(self, index: int) -> str:
        originals = self.ask.originals
        made = originals[index % len(originals)] if originals else png(*self.ask.pixels, self.ask.prompts[index])
        return b64encode(made).decode()

    def _shown(self, index: int) -> dict[str, object]:
        packed = self._packed(index)
        return {"url": f"data:image/png;base64,{packed}"} if self.ask.as_url else {"b64_json": packed}

    def _told(self, index: int) -> dict[str, object]:
        return {
            "b64_json": self._packed(index),
            "created_at": self.created,
            "size": self._size,
            "quality": "low",
            "background": "opaque",
            "output_format": "png",
        }


@lru_cache(64)
def png(width: int, height: int, prompt: str) -> bytes:
    """A picture in one colour."""
    head = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)  # one bit a pixel, into a palette of one
    row = bytes(1 + (width + 7) // 8)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (
            (b"IHDR", head),
            (b"PLTE", hashlib.sha256(prompt.encode()).digest()[:3]),
            (b"IDAT", zlib.compress(row * height, 1)),
            (b"IEND", b""),
        )
    )
