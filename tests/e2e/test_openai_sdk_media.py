"""Sound, pictures and moderations with the official SDK: through the gateway comes what the provider itself gives."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from base64 import b64decode, b64encode
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from proxy.simulator import profiles
from tests.e2e.simulated import straight, through

ALL_BYTES = bytes(range(256)) + b"\r\n--x\r\n\r\n"
SOUND = random.Random(1).randbytes(3 << 20) + ALL_BYTES  # more than what is kept of a form
LENGTHY = replace(profiles.INSTANT, output_tokens=400, tokens_per_second=40_000)
SPOKEN: Any = {"model": "tts-1", "voice": "alloy", "input": "hello"}


def heard(sound: bytes, name: str) -> str:
    return f"echo: {len(sound)} bytes of {name}, {hashlib.sha256(sound).hexdigest()}"


@pytest.mark.parametrize("form", ["mp3", "wav", "pcm"])
async def test_speech_is_the_provider_s_own_bytes(form: Any) -> None:
    async with through(LENGTHY) as (house, client, simulator), straight(simulator) as direct:
        own = await direct.audio.speech.create(**SPOKEN, response_format=form)
        whole = await client.audio.speech.create(**SPOKEN, response_format=form)
        async with client.audio.speech.with_streaming_response.create(**SPOKEN, response_format=form) as streamed:
            parts = [part async for part in streamed.iter_bytes()]
        metrics = await house.metrics()
    assert len(own.content) > 1 << 20
    assert whole.content == b"".join(parts) == own.content
    assert len(parts) > 10
    assert streamed.headers["content-type"] == own.response.headers["content-type"]
    assert "content-length" not in streamed.headers
    assert metrics("requests_total", operation="audio", outcome="ok") == 2


async def test_speech_in_events_holds_the_same_sound() -> None:
    async with through() as (_, client, _):
        bare = await client.audio.speech.create(**SPOKEN)
        async with client.audio.speech.with_streaming_response.create(**SPOKEN, stream_format="sse") as streamed:
            events: list[Any] = [line.removeprefix("data: ") async for line in streamed.iter_lines() if "data" in line]
    told = [json.loads(event) for event in events]
    assert b"".join(b64decode(event["audio"]) for event in told[:-1]) == bare.content
    assert told[-1]["type"] == "speech.audio.done"


async def test_sound_is_heard_as_it_was_sent() -> None:
    async with through() as (house, client, simulator):
        text = await client.audio.transcriptions.create(model="whisper-1", file=("a.wav", SOUND))
        plain = await client.audio.transcriptions.create(model="w", file=("a.wav", SOUND), response_format="text")
        long = await client.audio.transcriptions.create(
            model="w", file=("a.wav", ALL_BYTES), response_format="verbose_json"
        )
        subtitled = await client.audio.transcriptions.create(model="w", file=ALL_BYTES, response_format="vtt")
        streamed = [
            event
            async for event in await client.audio.transcriptions.create(model="w", file=("a.wav", SOUND), stream=True)
        ]
        with pytest.deprecated_call():  # which they are, and still served
            other = await client.audio.translations.create(model="w", file=("b.mp3", ALL_BYTES))
        metrics = await house.metrics()
    said = heard(SOUND, "a.wav")
    assert text.text.startswith(said)
    assert str(plain).startswith(said)
    assert long.text.startswith(heard(ALL_BYTES, "a.wav"))
    assert str(subtitled).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.0")
    done = streamed[-1]
    assert done.type == "transcript.text.done"
    assert done.text == text.text
    assert "".join(event.delta for event in streamed if event.type == "transcript.text.delta") == done.text
    assert other.text.startswith(heard(ALL_BYTES, "b.mp3"))
    assert len(simulator.seen) == 6
    assert metrics("requests_total", operation="audio", outcome="ok") == 6
    assert metrics("tokens_total", type="output") == 4 * 3  # as many as were told


async def test_pictures_are_painted_edited_and_varied() -> None:
    async with through() as (house, client, simulator), straight(simulator) as direct:
        own = await direct.images.generate(prompt="a pipe", model="gpt-image-1", size="1536x1024")
        made = await client.images.generate(prompt="a pipe", model="gpt-image-1", size="1536x1024")
        events = [
            event
            async for event in await client.images.generate(
                prompt="a pipe", model="gpt-image-1", size="1536x1024", stream=True, partial_images=2
            )
        ]
        edited = await client.images.edit(prompt="longer", image=[("a.png", SOUND), ("b.png", ALL_BYTES)], n=2)
        told = [event async for event in await client.images.edit(prompt="x", image=("a.png", SOUND), stream=True)]
        with pytest.deprecated_call():  # which it is, and still served
            varied = await client.images.create_variation(image=("a.png", ALL_BYTES))
        metrics = await house.metrics()
    painted = (own.data or [])[0].b64_json
    assert (made.data or [])[0].b64_json == painted
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert {event.b64_json for event in events} == {painted}
    assert [b64decode(image.b64_json or "") for image in edited.data or ()] == [SOUND, ALL_BYTES]
    assert [(event.type, b64decode(event.b64_json)) for event in told] == [("image_edit.completed", SOUND)]
    assert b64decode((varied.data or [])[0].b64_json or "") == ALL_BYTES
    assert metrics("requests_total", operation="images", outcome="ok") == 5


async def test_pictures_and_sound_in_a_chat_arrive_as_they_were_sent() -> None:
    packed = b64encode(SOUND).decode()
    parts: Any = [
        {"type": "text", "text": "hello"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{packed}"}},
        {"type": "input_audio", "input_audio": {"data": packed, "format": "wav"}},
    ]
    async with through() as (_, client, simulator):
        answered = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": parts}])
        came = json.loads(simulator.seen[0].body)
    assert answered.choices[0].message.content is not None
    assert answered.choices[0].message.content.startswith("echo: hello")
    assert came["messages"][0]["content"] == parts


async def test_texts_are_moderated() -> None:
    async with through() as (house, client, _):
        one = await client.moderations.create(input="no violence, please")
        two = await client.moderations.create(input=["fine", "self-harm"], model="omni-moderation-latest")
        metrics = await house.metrics()
    assert (one.results[0].flagged, one.results[0].categories.violence) == (True, True)
    assert [result.categories.self_harm for result in two.results] == [False, True]
    assert metrics("requests_total", operation="moderations", outcome="ok") == 2


@pytest.mark.parametrize("fault", ["abort_rate", "error_event_rate"])
async def test_sound_that_breaks_off_never_looks_whole(fault: str) -> None:
    async with through(replace(LENGTHY, **{fault: 1.0})) as (house, client, _):  # type: ignore[arg-type]  # a rate's name
        with pytest.raises(openai.APIConnectionError):
            await client.audio.speech.create(**SPOKEN)
        async with client.audio.speech.with_streaming_response.create(**SPOKEN, stream_format="sse") as streamed:
            told = (await streamed.read()).decode()
        await house.until_idle()
        metrics = await house.metrics()
    assert '"error"' in told
    assert "speech.audio.done" not in told
    assert metrics("requests_total", operation="audio", outcome="ok") == 0


async def test_the_synchronous_client_speaks_hears_and_paints(tmp_path: Path) -> None:
    def talk(base_url: str) -> None:
        file = tmp_path / "speech.wav"
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            with client.audio.speech.with_streaming_response.create(**SPOKEN, response_format="wav") as streamed:
                streamed.stream_to_file(file)
            assert file.read_bytes() == client.audio.speech.create(**SPOKEN, response_format="wav").content
            text = client.audio.transcriptions.create(model="whisper-1", file=file).text
            assert text.startswith(heard(file.read_bytes(), "speech.wav"))
            edited = client.images.edit(prompt="x", image=file)
            assert b64decode((edited.data or [])[0].b64_json or "") == file.read_bytes()

    async with through() as (house, _, _):
        await asyncio.to_thread(talk, house.base_url)
