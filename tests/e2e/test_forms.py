"""Forms that name a model: audio and images go to its upstream, and stream through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from proxy.api.uploads import KEPT
from proxy.config import Limits, Model
from tests.e2e.echoing import Echo, echoing
from tests.e2e.running import Answer, House, at, serving, settings, until
from tests.e2e.wire import request, wire

MIB = 1 << 20
SPEECH = "/v1/audio/transcriptions"
TEXT = b'{"text": "hello", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 5, "total_tokens": 19}}'
FORM = {"content-type": "multipart/form-data; boundary=b"}
WAV = b"RIFF\r\n--x\x00\xff"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def sound(size: int = 0) -> bytes:
    return part("file", WAV + b"x" * size, '; filename="a.wav"')


@asynccontextmanager
async def through(echo: Echo, models: Mapping[str, Model] | None = None) -> AsyncIterator[House]:
    everything = {"*": Model(upstreams=("up",))}
    said = settings(at(echo.base_url, limits=Limits(learn=False)), models=models or everything)
    async with serving(said) as house:
        yield house


async def send(house: House, body: bytes, path: str = SPEECH) -> Answer:
    return await house.ask(body, path, headers=FORM)


# ── the model is found wherever it stands, and nothing else is touched ──


@pytest.mark.parametrize("size", [0, KEPT, 3 * KEPT])
@pytest.mark.parametrize("first", ["file", "model"])
async def test_a_form_goes_to_its_models_upstream_as_it_is(first: str, size: int) -> None:
    parts = [sound(size), part("model", b"whisper-1")]
    body = form(*(parts if first == "file" else reversed(parts)), part("language", b"de"))
    async with echoing(says=TEXT) as echo, through(echo) as house:
        answer = await send(house, body)
        metrics = await house.metrics()
        await house.until_idle()
    (came,) = echo.came
    assert (answer.status, answer.body) == (200, TEXT)
    assert (came.size, came.body) == (len(body), body[: len(came.body)])
    assert came.headers["content-type"] == FORM["content-type"]
    assert int(came.headers["content-length"]) == len(body)
    assert metrics("requests_total", operation="audio", outcome="ok") == 1
    assert metrics("tokens_total", type="output") == 5


@pytest.mark.parametrize("size", [0, 3 * KEPT])
@pytest.mark.parametrize("first", ["file", "model"])
@pytest.mark.parametrize("there", ["s", "a-model-with-a-longer-name"])
async def test_of_a_model_with_another_name_there_only_the_name_changes(first: str, size: int, there: str) -> None:
    def said(model: bytes) -> bytes:
        parts = [sound(size), part("model", model)]
        return form(*(parts if first == "file" else reversed(parts)))

    models = {"speech": Model(upstreams=("up",), upstream_model=there)}
    async with echoing(says=TEXT) as echo, through(echo, models) as house:
        assert (await send(house, said(b"speech"))).status == 200
    wanted = said(there.encode())
    (came,) = echo.came
    assert (came.size, came.body) == (len(wanted), wanted[: len(came.body)])
    assert int(came.headers["content-length"]) == len(wanted)


async def test_a_form_that_was_kept_is_sent_again_even_from_disk() -> None:
    """The file came before the model, so all of it was kept; the other way round, it streamed."""
    body = form(sound(3 * KEPT), part("model", b"m"))
    async with echoing(status=503) as echo, through(echo) as house:
        assert (await send(house, body)).status == 503
        assert [came.size for came in echo.came] == [len(body)] * 3
        assert (await send(house, form(part("model", b"m"), sound(3 * KEPT)))).status == 503
        assert len(echo.came) == 4


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations"])
async def test_images_may_leave_the_model_to_the_provider(path: str) -> None:
    body = form(part("image", b"png", "; filename=a.png"))
    async with echoing(says=b'{"created": 1, "data": []}') as echo, through(echo) as house:
        assert (await send(house, body, path)).status == 200
        metrics = await house.metrics()
    assert echo.came[0].body == body
    assert metrics("requests_total", operation="images", model="*") == 1


async def test_moderations_and_images_may_leave_it_out_of_json_too() -> None:
    async with echoing(says=b"{}") as echo, through(echo) as house:
        for path in ("/v1/moderations", "/v1/images/generations"):
            assert (await house.ask(b'{"input": "x"}', path)).status == 200
        refused = await house.ask(b'{"input": "x"}', "/v1/audio/speech")
    assert [came.body for came in echo.came] == [b'{"input": "x"}'] * 2
    assert (refused.status, refused.error["code"]) == (400, "missing_model")


async def test_a_stream_of_events_is_counted() -> None:
    events = (
        b'event: transcript.text.delta\ndata: {"type":"transcript.text.delta","delta":"hi"}\n\n'
        b'event: transcript.text.done\ndata: {"type":"transcript.text.done","text":"hi",'
        b'"usage":{"type":"tokens","input_tokens":14,"output_tokens":3}}\n\n'
    )
    async with echoing(says=events, headers={"content-type": "text/event-stream"}) as echo, through(echo) as house:
        answer = await send(house, form(sound(), part("model", b"m"), part("stream", b"true")))
        metrics = await house.metrics()
    assert answer.body == events
    assert metrics("requests_total", operation="audio", stream="true", outcome="ok") == 1
    assert metrics("tokens_total", type="output") == 3


# ── what is wrong with a form is said ──

WRONG = {
    "no model": (form(sound()), "missing_model"),
    "an empty model": (form(sound(), part("model", b"")), "missing_model"),
    "two models": (form(part("model", b"a"), sound(), part("model", b"b")), "invalid_form"),
    "a model that is a file": (form(part("model", b"a", "; filename=x")), "invalid_form"),
    "a model of no text": (form(part("model", b"\xff")), "invalid_form"),
    "no end": (form(sound(), part("model", b"m")).removesuffix(b"--b--\r\n"), "invalid_form"),
    "a form in a form": (
        b"--b\r\nContent-Disposition: form-data; name=x\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n\r\n"
        + form(part("model", b"m")),
        "invalid_form",
    ),
    "too many parts": (form(*[part("x", b"")] * 1001, part("model", b"m")), "invalid_form"),
    "no header": (b"--b\r\nmodel\r\n\r\nm\r\n--b--", "invalid_form"),
    "JSON": (b'{"model": "m"}', "invalid_form"),
    "nothing": (b"", "invalid_form"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_form_that_cannot_be_read_is_refused(name: str) -> None:
    body, code = WRONG[name]
    async with echoing() as echo, through(echo) as house:
        answer = await send(house, body)
        metrics = await house.metrics()
        await house.until_idle()
    assert (answer.status, answer.error["code"], echo.came) == (400, code, [])
    assert metrics("requests_total", operation="audio", outcome="rejected") == 1


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 71]
)
async def test_a_boundary_must_be_named(kind: str) -> None:
    async with echoing() as echo, through(echo) as house:
        answer = await house.ask(form(part("model", b"m")), SPEECH, headers={"content-type": kind})
    assert (answer.status, answer.error["code"], echo.came) == (400, "invalid_form", [])


async def test_a_boundary_of_a_megabyte_is_no_header() -> None:
    kind = "multipart/form-data; boundary=" + "x" * MIB
    async with echoing() as echo, through(echo) as house, wire(house.port) as line:
        line.send(request(form(part("model", b"m")), SPEECH, headers={"content-type": kind}))
        assert await line.head() == 431
        await house.until_idle()
    assert echo.came == []


async def test_a_second_model_behind_what_has_streamed_ends_the_call() -> None:
    """The upstream never gets to see it."""
    body = form(part("model", b"m"), sound(4 * MIB), part("model", b"other"))
    async with echoing() as echo, through(echo) as house:
        answer = await send(house, body)
        await house.until_idle()
        await until(lambda: all(came.broke for came in echo.came), "the upload's end")
    assert (answer.status, answer.error["code"]) == (400, "invalid_form")
    assert all(b"other" not in came.body for came in echo.came)


# ── the official SDK ──


async def test_the_sdk_sends_and_gets_sound() -> None:
    async with echoing(says=TEXT) as echo, through(echo) as house, house.sdk() as client:
        heard = await client.audio.transcriptions.create(model="whisper-1", file=("a.wav", WAV))
        echo.says, echo.headers = WAV * 1000, {"content-type": "audio/mpeg"}
        spoken = await client.audio.speech.create(model="tts-1", voice="alloy", input="hello")
        async with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="alloy", input="hello"
        ) as streamed:
            parts = [chunk async for chunk in streamed.iter_bytes()]
    assert heard.text == "hello"
    assert spoken.content == b"".join(parts) == WAV * 1000


async def test_the_sdk_paints_and_edits() -> None:
    painted = b'{"created": 1, "data": [{"b64_json": "aGk="}], "usage": {"input_tokens": 1, "output_tokens": 2}}'
    async with echoing(says=painted) as echo, through(echo) as house, house.sdk() as client:
        made = await client.images.generate(model="gpt-image-1", prompt="a pipe")
        edited = await client.images.edit(model="gpt-image-1", image=("a.png", b"png"), prompt="a longer pipe")
        metrics = await house.metrics()
    assert made.data is not None
    assert edited.data is not None
    assert made.data[0].b64_json == edited.data[0].b64_json == "aGk="
    assert metrics("tokens_total", type="output") == 4
    assert len(echo.came) == 2


async def test_the_synchronous_sdk_sends_sound_and_is_told_of_a_form_without_a_model() -> None:
    def talk(base_url: str) -> str:
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            with pytest.raises(BadRequestError, match="no `model`"):
                client.audio.transcriptions.create(model="", file=("a.wav", WAV))
            return client.audio.transcriptions.create(model="whisper-1", file=("a.wav", WAV)).text

    async with echoing(says=TEXT) as echo, through(echo) as house:
        assert await asyncio.to_thread(talk, house.base_url) == "hello"


async def test_the_sdk_moderates() -> None:
    said = b'{"id": "modr-1", "model": "omni-moderation-latest", "results": []}'
    async with echoing(says=said) as echo, through(echo) as house:
        client: AsyncOpenAI
        async with house.sdk() as client:
            told = await client.moderations.create(input="hello")
    assert (told.id, len(echo.came)) == ("modr-1", 1)
