"""curl through the gateway, as a person or a shell script calls it."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.config import Secret
from proxy.simulator import profiles
from tests.e2e import programs
from tests.e2e.programs import Ran
from tests.e2e.running import ASK, CHAT, House
from tests.e2e.simulated import SAID, straight, through

KEY = "sk-team-0123456789abcdef"
JSON = ("-H", "content-type: application/json")
STREAMED = json.dumps(ASK | {"stream": True})
LARGE = random.Random(3).randbytes(5 << 20)


async def curl(url: str, *options: str, given: bytes = b"") -> Ran:
    """Quiet but for errors."""
    return await programs.run(programs.found("curl"), "-sS", *options, url, given=given)


async def ask(house: House, *options: str, said: object = ASK, path: str = CHAT) -> Ran:
    text = said if isinstance(said, str) else json.dumps(said)
    return await curl(house.origin + path, *JSON, *options, "-d", text)


def text(answer: bytes) -> str:
    return json.loads(answer)["choices"][0]["message"]["content"]


def told(stream: bytes) -> str:
    events = [line[6:] for line in stream.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


async def test_a_call_is_answered_with_its_headers() -> None:
    async with through() as (house, _, _):
        answered = await ask(house, "-i")
    head, _, body = answered.out.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nx-request-id: req_" in head.lower()
    assert text(body) == SAID


@pytest.mark.parametrize("version", ["-0", "--http1.1"])
async def test_a_stream_is_written_as_it_comes(version: str) -> None:
    """HTTP/1.0 knows no chunks: its connection ends with the answer."""
    async with through() as (house, _, _):
        streamed = await ask(house, "-N", version, "-i", said=STREAMED)
        whole = await ask(house, version)
    head, _, body = streamed.out.partition(b"\r\n\r\n")
    assert streamed.code == whole.code == 0
    assert (b"transfer-encoding: chunked" in head.lower()) == (version != "-0")
    assert told(body) == text(whole.out) == SAID


async def test_one_connection_serves_many_calls() -> None:
    async with through() as (house, _, _):
        url = house.base_url + "/models"
        many = await curl(url, *[url] * 9, "-w", "%{num_connects}", "-o", "/dev/null", *["-o", "/dev/null"] * 9)
    assert many.out == b"1" + b"0" * 9


async def test_a_form_with_a_file_is_uploaded(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(LARGE)
    async with through() as (house, _, _):
        url = house.base_url + "/audio/transcriptions"
        heard = await curl(url, "-F", f"file=@{file}", "-F", "model=whisper-1")
    digest = hashlib.sha256(LARGE).hexdigest()
    assert json.loads(heard.out)["text"].startswith(f"echo: {len(LARGE)} bytes of a.wav, {digest}")


async def test_a_file_goes_there_and_back(tmp_path: Path) -> None:
    file, back = tmp_path / "a.bin", tmp_path / "back.bin"
    file.write_bytes(LARGE)
    async with through() as (house, _, _):
        files = house.base_url + "/files"
        made = json.loads((await curl(files, "-F", "purpose=user_data", "-F", f"file=@{file}")).out)
        whole = await curl(f"{files}/{made['id']}/content", "-o", str(back), "-w", "%{http_code}")
        deleted = await curl(f"{files}/{made['id']}", "-X", "DELETE")
    assert (made["filename"], made["bytes"], whole.out) == ("a.bin", len(LARGE), b"200")
    assert back.read_bytes() == LARGE
    assert json.loads(deleted.out)["deleted"] is True


async def test_what_comes_from_a_pipe_is_sent_in_chunks() -> None:
    async with through() as (house, _, simulator):
        chunked = ("-X", "POST", *JSON, "-H", "transfer-encoding: chunked", "-T", "-")
        answered = await curl(house.origin + CHAT, *chunked, given=json.dumps(ASK).encode())
        passed = await curl(house.base_url + "/anything", *chunked, given=LARGE)
        last = simulator.seen[-1]
    assert text(answered.out) == SAID
    assert (passed.code, last.method, last.path, last.body) == (0, "POST", "/v1/anything", LARGE)


@pytest.mark.parametrize("key", [KEY, "sk-wrong"])
async def test_a_large_body_is_asked_for_only_where_it_is_wanted(key: str, tmp_path: Path) -> None:
    """curl waits with it, `Expect: 100-continue`."""
    file = tmp_path / "large.json"
    file.write_text(json.dumps(ASK | {"filler": "x" * (2 << 20)}))
    async with through(callers={"team": Secret(KEY)}) as (house, _, _):
        answered = await curl(
            house.origin + CHAT,
            *(*JSON, "-H", f"authorization: Bearer {key}", "-H", "expect: 100-continue", "--expect100-timeout", "15"),
            *("--data-binary", f"@{file}", "-w", "\n%{http_code} %{size_upload}"),
        )
    body, _, figures = answered.out.rpartition(b"\n")
    if key == KEY:
        assert (text(body), figures.decode()) == (SAID, f"200 {file.stat().st_size}")
    else:
        assert (json.loads(body)["error"]["code"], figures) == ("invalid_api_key", b"401 0")


async def test_binary_sound_goes_into_a_file(tmp_path: Path) -> None:
    file = tmp_path / "speech.mp3"
    said = {"model": "tts-1", "voice": "alloy", "input": "hello"}
    async with through() as (house, _, simulator), straight(simulator) as direct:
        own = await direct.audio.speech.create(**said)
        spoken = await ask(house, "-o", str(file), said=said, path="/v1/audio/speech")
    assert (spoken.code, spoken.out) == (0, b"")
    assert file.read_bytes() == own.content


async def test_what_is_stored_is_deleted() -> None:
    async with through() as (house, client, _):
        made = await client.responses.create(model="m", input="hello")
        url = f"{house.base_url}/responses/{made.id}"
        deleted = await curl(url, "-X", "DELETE")
        again = await curl(url, "-X", "DELETE", "-w", " %{http_code}")
    assert json.loads(deleted.out)["deleted"] is True
    assert again.out.endswith(b" 404")


async def test_the_head_of_an_answer_has_no_body() -> None:
    async with through() as (house, _, _):
        passed = await curl(house.base_url + "/containers/cntr_lost", "-I")
        refused = await curl(house.base_url + "/models", "-I")
    assert (passed.code, refused.code) == (0, 0)
    assert passed.out.startswith(b"HTTP/1.1 404 ")
    assert refused.out.startswith(b"HTTP/1.1 405 ")
    assert passed.out.endswith(b"\r\n\r\n")


async def test_http_2_is_refused_at_once_and_an_offer_of_it_is_overlooked() -> None:
    async with through() as (house, _, _):
        refused = await ask(house, "--http2-prior-knowledge", "-m", "5")
        offered = await ask(house, "--http2", "-w", " %{http_version}")
        await house.until_idle()
        metrics = await house.metrics()
    assert refused.code not in (0, 28), "it was answered, or waited in vain"  # what it is told is HTTP/1: it reads none
    assert metrics("requests_total", outcome="rejected", code="400") == 1
    assert offered.out.endswith(b" 1.1")
    assert text(offered.out.rpartition(b" ")[0]) == SAID
    assert metrics("requests_total", outcome="ok") == 1


async def test_an_answer_that_may_be_compressed_is_understood() -> None:
    async with through() as (house, _, _):
        answered = await ask(house, "--compressed")
    assert text(answered.out) == SAID


async def test_a_client_that_has_read_enough_leaves_nothing_behind() -> None:
    endless = replace(profiles.INSTANT, output_tokens=100_000, tokens_per_second=50.0)
    async with through(endless) as (house, _, simulator):
        command = [programs.found("curl"), "-sN", *JSON, "-d", STREAMED, house.origin + CHAT]
        read = await programs.run("sh", "-c", f"{shlex.join(command)} | head -n 3")
        await house.until_idle()
        metrics = await house.metrics()
    assert b"echo: hello" in read.out
    assert metrics("requests_total", outcome="cancelled") == 1
    assert simulator.provider.stats.in_flight == 0
