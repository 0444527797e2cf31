"""The rest of OpenAI's API at the simulated provider: what is wrong there, what it keeps, and how much."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from proxy.simulator import files, forms, profiles, responses, serving
from proxy.simulator.asks import BadAsk

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
HELLO: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def speaking(**changes: Any) -> AsyncIterator[AsyncOpenAI]:
    async with (
        serving(replace(FOUR_TOKENS, **changes)) as simulator,
        AsyncOpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0) as client,
    ):
        yield client


def pixels(png: bytes) -> tuple[int, int, int]:
    """Width, height, and how many bytes its picture has."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data = 8, b""
    while at < len(png):
        (length,), kind = struct.unpack_from(">I", png, at), png[at + 4 : at + 8]
        chunk = png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length)[0] == zlib.crc32(kind + chunk)
        data += chunk if kind == b"IDAT" else b""
        at += 12 + length
    width, height = struct.unpack_from(">II", png, 16)
    return width, height, len(zlib.decompress(data))


async def test_a_picture_has_the_size_it_was_asked_for_in() -> None:
    async with speaking() as client:
        made = await client.images.generate(prompt="a pipe", size="256x256", n=2, response_format="b64_json")
        other = await client.images.generate(prompt="a wheel", size="1536x1024", response_format="url")
    assert made.data is not None
    assert other.data is not None
    first, second = (b64decode(image.b64_json or "") for image in made.data)
    assert first == second
    assert pixels(first) == (256, 256, 256 * 33)
    packed = (other.data[0].url or "").removeprefix("data:image/png;base64,")
    assert pixels(b64decode(packed))[:2] == (1536, 1024)


async def test_speech_is_as_long_as_its_words_and_depends_on_them_alone() -> None:
    async with speaking() as client:
        said = [
            await client.audio.speech.create(model="tts", voice="alloy", input=words, response_format=form)
            for words in ("hello", "hello", "water")
            for form in ("wav", "mp3", "pcm")
        ]
    wav, mp3, pcm = (each.content for each in said[:3])
    assert [each.content for each in said[3:6]] == [wav, mp3, pcm]
    assert [each.content == same for each, same in zip(said[6:], (wav, mp3, pcm), strict=True)] == [False] * 3
    assert wav[44:] == pcm
    with wave.open(io.BytesIO(wav)) as sound:
        assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (24_000, 1, 2)
    words = 5  # echo: hello runs down the
    assert len(pcm) == words * 24_000 // 4 * 2
    assert len(mp3) == words * 10 * 384
    assert all(mp3[at : at + 2] == b"\xff\xfb" for at in range(0, len(mp3), 384))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda client: client.images.generate(prompt="x", size="0x9"), "Invalid 'size'"),
        (lambda client: client.images.generate(prompt="x", output_format="webp"), "paints png"),
        (lambda client: client.images.edit(prompt="x", image=b"png", n=11), "Invalid request"),
        (lambda client: client.images.edit(prompt="", image=b"png"), "'prompt'"),
        (lambda client: client.images.edit(prompt="x", image=b"png", n="many"), "Invalid request"),
        (
            lambda client: client.uploads.create(bytes=-1, filename="a", mime_type="b", purpose="evals"),
            "Invalid request",
        ),
        (
            lambda client: client.audio.speech.create(model="m", input="x", voice="v", response_format="opus"),
            "speaks mp3, wav, pcm",
        ),
        (
            lambda client: client.audio.transcriptions.create(model="m", file=b"x", response_format="odd"),
            "'response_format'",
        ),
        (
            lambda client: client.chat.completions.create(model="m", messages=HELLO, tool_choice="required"),
            "not found in 'tools'",
        ),
        (
            lambda client: client.responses.create(model="m", input="x", previous_response_id="resp_lost"),
            "'resp_lost' not found",
        ),
        (
            lambda client: client.responses.create(model="m", input="x", background=True, store=False),
            "must be stored",
        ),
        (lambda client: client.files.create(file=b"x", purpose="fun"), "Invalid 'purpose'"),
        (lambda client: client.files.list(limit=0), "Invalid 'limit'"),
    ],
)
async def test_what_is_asked_for_in_vain_is_told(ask: Any, says: str) -> None:
    async with speaking() as client:
        with pytest.raises(openai.BadRequestError, match=says):
            await ask(client)


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("application/json", b"{}", "multipart/form-data, with a boundary"),
        ("multipart/form-data", b"--b--", "multipart/form-data, with a boundary"),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="file"', "breaks off"),
        (FORM, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", "no name"),
        (FORM, b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nevals\r\n--b--\r\n", "file: 'file'"),
    ],
)
def test_a_form_that_is_none_is_told(kind: str, body: bytes, says: str) -> None:
    with pytest.raises(BadAsk, match=says):
        forms.read(body, kind).file("file")


PIECES = st.sampled_from(
    [
        b"--b",
        b"--b--",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; name=file",
        b'; filename="',
        b'"',
        b"\xff",
        b"n",
    ]
)
KINDS = st.just(FORM) | st.text('multipart/form-data; boundary=b"\n\0é', max_size=40)


@given(parts=st.lists(PIECES, max_size=12), kind=KINDS)
def test_whatever_is_said_to_be_a_form_is_read_or_refused(parts: list[bytes], kind: str) -> None:
    with suppress(BadAsk):
        form = forms.read(b"".join(parts), kind)
        assert all(file.content in b"".join(parts) for found in form.files.values() for file in found)


async def test_an_answer_that_is_cut_off_is_no_whole_json() -> None:
    async with speaking() as client:
        cut = await client.chat.completions.create(
            model="m", messages=HELLO, max_tokens=1, response_format={"type": "json_object"}
        )
        called = await client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL], tool_choice="required")
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ('{"text":"echo: hello', "length")
    calls = called.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert (calls[0].function.arguments, called.choices[0].finish_reason) == ("{}", "tool_calls")


async def test_files_and_parts_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT_BYTES", 10_000)
    async with speaking() as client:
        kept = await client.files.create(file=b"x" * 6000, purpose="evals")
        with pytest.raises(openai.BadRequestError, match="delete some"):
            await client.files.create(file=b"x" * 6000, purpose="evals")
        upload = await client.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="evals")
        with pytest.raises(openai.BadRequestError, match="delete some"):
            await client.uploads.parts.create(upload.id, data=b"x" * 3000)
        await client.uploads.cancel(upload.id)
        await client.files.delete(kept.id)
        await client.files.create(file=b"x" * 10_000, purpose="evals")


async def test_responses_that_nobody_asks_for_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "KEPT_BYTES", 5000)
    async with speaking() as client:
        made = [await client.responses.create(model="m", input=str(number)) for number in range(6)]
        await client.responses.retrieve(made[-1].id)
        with pytest.raises(openai.NotFoundError, match=made[0].id):
            await client.responses.retrieve(made[0].id)


@pytest.mark.parametrize("fault", ["abort_rate", "error_event_rate"])
async def test_speech_that_breaks_does_not_end_as_if_it_were_whole(fault: str) -> None:
    async with speaking(**{fault: 1.0}) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.audio.speech.create(model="tts", voice="alloy", input="hello")
