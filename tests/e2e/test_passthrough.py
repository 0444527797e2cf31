"""What the gateway need not understand comes through as it is, both ways."""

from __future__ import annotations

import asyncio
import hashlib
import re
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.api import passthrough
from proxy.config import Limits, Model, Passthrough, Server, Upstream
from proxy.telemetry import catalogue
from tests.e2e.echoing import Echo, echoing
from tests.e2e.running import UPSTREAM_KEY, House, at, serving, settings, until
from tests.e2e.wire import request, wire

PATHS = Path(__file__).with_name("openai_paths.tsv")
OPERATIONS = [line.split("\t") for line in PATHS.read_text().splitlines() if not line.startswith("#")]
OWN = "/batches"  # answered by the gateway itself
MIB = 1 << 20
QUIET = Limits(learn=False)


@asynccontextmanager
async def through(echo: Echo, **sections: Any) -> AsyncIterator[House]:
    async with serving(settings(at(echo.base_url, limits=QUIET), **sections)) as house:
        yield house


def put_in(path: str) -> str:
    """A path with ids in its places."""
    return re.sub(r"\{(\w+)\}", lambda name: f"{name[1]}-1aB_{len(name[1])}", path)


def body_for(content: str) -> tuple[bytes, str]:
    """A body of that content which names a model, and its content type."""
    if content.startswith("multipart"):
        part = b'--b-1\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        body = part % (b"model", b"m") + part % (b"purpose", "assistants \u2028".encode()) + b"--b-1--\r\n"
        return body, "multipart/form-data; boundary=b-1"
    if content == "-":
        return b"", ""
    return b'{ "model" : "m",\n"input": "\xe2\x80\xa8", "n": 1.50 }', "application/json"


# ── all of it ──


async def test_every_operation_of_openai_comes_through_as_it_is() -> None:
    """Method, path, query, body and its type one way; status, body and what may be told the other."""
    said = {"etag": '"e-1"', "openai-version": "2020-10-01"}
    async with echoing(status=207, headers=said) as echo, through(echo) as house:
        for path, method, contents, _ in OPERATIONS:
            if path.startswith(OWN):
                continue
            for content in contents.split(","):
                body, kind = body_for(content)
                asked = f"/v1{put_in(path)}{'&' if '?' in path else '?'}limit=2&after=a%2Fb+c"
                headers = {"content-type": kind, "openai-beta": "assistants=v2", "cookie": "no"}
                answer = await house.ask(body, asked, method=method, headers=headers)
                came = echo.came[-1]
                assert (answer.status, answer.headers["etag"]) == (207, '"e-1"'), asked
                assert (came.method, came.path, came.body) == (method, asked, body)
                assert came.headers.get("content-type", "") == kind
                assert came.headers["openai-beta"] == "assistants=v2"
                assert came.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
                assert "cookie" not in came.headers
        metrics = await house.metrics()
        await house.until_idle()
    assert len(OPERATIONS) == 288
    assert metrics("requests_total") == metrics("requests_total", outcome="ok") == len(echo.came) >= 284
    assert metrics("requests_total", operation="passthrough") == 0
    assert metrics("requests_total", operation="vector_stores") == 16


async def test_every_first_segment_of_openai_is_a_word_that_is_counted() -> None:
    firsts = {path.split("?")[0].split("/")[1] for path, *_ in OPERATIONS}
    assert firsts == set(passthrough.OPERATIONS)
    assert firsts | {passthrough.UNKNOWN} <= set(catalogue.OPERATIONS)


@pytest.mark.parametrize("method", passthrough.METHODS)
async def test_a_path_nobody_knows_comes_through(method: str) -> None:
    async with echoing(status=409) as echo, through(echo) as house:
        answer = await house.ask(b"", "/v1/new/thing/x-1?a=b", method=method)
        metrics = await house.metrics()
    assert answer.status == 409
    assert [(came.method, came.path) for came in echo.came] == [(method, "/v1/new/thing/x-1?a=b")] * len(echo.came)
    assert metrics("requests_total", operation="passthrough", code="409") == 1
    assert 'route="' not in metrics.text


async def test_an_answer_without_a_body_comes_through() -> None:
    async with echoing(status=204) as echo, through(echo) as house:
        answer = await house.ask(b"", "/v1/containers/cntr_1", method="DELETE", headers={})
        head = await house.ask(b"", "/v1/uploads/file-1/content", method="HEAD")
    assert (answer.status, answer.body) == (204, b"")
    assert (head.status, head.body) == (204, b"")


async def test_the_head_of_a_file_comes_through() -> None:
    async with echoing(headers={"etag": "e-1"}) as echo, through(echo) as house:
        answer = await house.ask(b"", "/v1/uploads/file-1/content", method="HEAD")
        metrics = await house.metrics()
    assert (answer.status, answer.headers["etag"], answer.body) == (200, "e-1", b"")
    assert metrics("requests_total", operation="uploads", outcome="ok") == 1


async def test_a_part_of_a_file_can_be_asked_for() -> None:
    said = {"content-range": "bytes 0-1/9", "accept-ranges": "bytes"}
    async with echoing(status=206, headers=said) as echo, through(echo) as house:
        answer = await house.ask(b"", "/v1/uploads/file-1/content", method="GET", headers={"range": "bytes=0-1"})
    assert (answer.status, answer.headers["content-range"]) == (206, "bytes 0-1/9")
    assert echo.came[0].headers["range"] == "bytes=0-1"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("http://localhost:{port}/v1/evals/e-1", None),
        ("http://127.0.0.1:{port}/v1/evals/e-1?x=1", "/v1/evals/e-1?x=1"),
        ("e-2", "/v1/e-2"),
        ("https://store.example/f-1?sig=a", "https://store.example/f-1?sig=a"),
        (f"https://store.example/{UPSTREAM_KEY}", None),
    ],
)
@pytest.mark.parametrize("status", [201, 307, 409])
async def test_a_location_is_one_that_the_client_can_go_to(status: int, place: str, told: str | None) -> None:
    async with echoing(status=status) as echo, through(echo) as house:
        echo.headers["location"] = place.format(port=echo.port)
        answer = await house.http.post(house.base_url + "/evals", allow_redirects=False)
    assert (answer.status, answer.headers.get("location")) == (status, told)


async def test_a_packed_body_stays_packed() -> None:
    async with echoing() as echo, through(echo) as house:
        await house.ask(b"\x1f\x8b\x08", "/v1/evals", headers={"content-encoding": "gzip"})
    assert (echo.came[0].body, echo.came[0].headers["content-encoding"]) == (b"\x1f\x8b\x08", "gzip")


# ── where it goes ──


async def named(*where: str | None, **sections: Any) -> list[str]:
    """Which of the upstreams `one`, `two`, `claude` got the requests that asked for `where`."""
    async with echoing() as one, echoing() as two, echoing() as claude:
        upstreams = {
            "claude": at(claude.base_url, dialect="anthropic"),
            "one": at(one.base_url),
            "two": at(two.base_url),
        }
        async with serving(settings(upstreams, **sections)) as house:
            for name in where:
                headers = {} if name is None else {"x-penstock-upstream": name}
                assert (await house.ask(b"", "/v1/uploads", method="GET", headers=headers)).status == 200
        came = {"one": one, "two": two, "claude": claude}
        return [name for name, echo in came.items() for _ in echo.came]


async def test_it_goes_to_the_upstream_that_the_configuration_names() -> None:
    everything = {"*": Model(upstreams=("one",))}
    assert await named(None, models=everything, passthrough=Passthrough(upstream="two")) == ["two"]


async def test_else_to_the_upstream_of_all_models() -> None:
    models = {"m": Model(upstreams=("one",)), "*": Model(upstreams=("two",))}
    assert await named(None, models=models) == ["two"]


async def test_else_to_the_first_that_speaks_openais_api() -> None:
    models = {"*": Model(upstreams=("claude",)), "m": Model(upstreams=("one", "two"))}
    assert await named(None, models=models) == ["one"]


async def test_or_to_the_one_that_the_client_names() -> None:
    models = {"m": Model(upstreams=("one",))}
    assert await named("two", "claude", models=models) == ["two", "claude"]


async def test_a_name_that_is_no_upstream_is_refused() -> None:
    async with echoing() as echo, through(echo) as house:
        answer = await house.ask(b"", "/v1/uploads", method="GET", headers={"x-penstock-upstream": "http://elsewhere"})
    assert (answer.status, answer.error["param"]) == (400, "x-penstock-upstream")
    assert echo.came == []


async def test_without_an_upstream_for_it_the_answer_says_which_setting_is_missing() -> None:
    async with echoing() as echo:
        claude: Upstream = at(echo.base_url, dialect="anthropic")
        async with serving(settings(claude)) as house:
            answer = await house.ask(b"", "/v1/uploads", method="GET")
    assert (answer.status, answer.error["code"]) == (404, "unknown_path")
    assert "passthrough.upstream" in answer.error["message"]


async def test_it_can_be_switched_off() -> None:
    async with echoing() as echo, through(echo, passthrough=Passthrough(enabled=False)) as house:
        answer = await house.ask(b"", "/v1/uploads", method="GET")
        chat = await house.ask()
    assert (answer.status, answer.error["code"], chat.status) == (404, "unknown_path", 200)
    assert len(echo.came) == 1


# ── which paths may be asked for ──

CROOKED = [
    "/v1/uploads/../admin",
    "/v1/uploads/%2e%2e/admin",
    "/v1//files",
    "/v1/uploads/a%2fb",
    "/v1/uploads/a%5Cb",
    "/v1/uploads/a\\b",
    "/v1/uploads/%00",
    "/v1/uploads/a%0d%0ab",
    "/v1/./files",
    "/v1/uploads/#x",
    "/v1/uploads/\x7f",
    "/v1/uploads/\xe9",
]


@pytest.mark.parametrize("path", CROOKED)
async def test_a_crooked_path_goes_nowhere(path: str) -> None:
    async with echoing() as echo, through(echo) as house, wire(house.port) as line:
        line.send(request(b"", path, method="GET"))
        assert await line.head() in (400, 404)
        await house.until_idle()
    assert echo.came == []


async def test_an_encoded_letter_is_the_letter() -> None:
    """So no spelling of a path leads past an endpoint that is understood."""
    async with echoing() as echo, through(echo) as house:
        await house.ask(b"", "/v1/%75ploads/a%20b", method="GET")
        refused = await house.ask(b"{}", "/v1/%63hat/completions")
        metrics = await house.metrics()
    assert (echo.came[0].path, refused.status) == ("/v1/uploads/a%20b", 400)
    assert metrics("requests_total", operation="uploads") == metrics("requests_total", operation="chat") == 1


# ── it is a call like any other ──


async def test_it_waits_its_turn_and_is_tried_again() -> None:
    async with echoing(status=503) as echo, through(echo) as house:
        reading = await house.ask(b"", "/v1/uploads", method="GET")
        writing = await house.ask({"a": 1}, "/v1/threads")
        metrics = await house.metrics()
    assert (reading.status, writing.status) == (503, 503)
    assert reading.headers["x-should-retry"] == "false"
    assert len(echo.came) == 6
    assert metrics("upstream_attempts_total", result="503") == 6
    assert metrics("gate_admissions_total", result="immediate") >= 2


async def test_a_place_is_held_for_as_long_as_it_lasts() -> None:
    hold = asyncio.Event()
    async with echoing(hold=hold) as echo, through(echo) as house:
        asking = asyncio.create_task(house.ask({"a": 1}, "/v1/threads"))
        await echo.begun.wait()
        assert house.in_flight == 1
        hold.set()
        await asking
        await house.until_idle()


# ── bodies that stream through ──


async def sized(total: int, part: int = MIB) -> AsyncIterator[bytes]:
    for at_byte in range(0, total, part):
        yield bytes([at_byte // part % 251]) * min(part, total - at_byte)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def digest_of(total: int) -> str:
    digest = hashlib.sha256()
    async for part in sized(total):
        digest.update(part)
    return digest.hexdigest()


async def send(house: House, total: int, *, known: bool, method: str = "POST", path: str = "/v1/uploads") -> int:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    if known:
        headers["content-length"] = str(total)
    async with house.http.request(method, house.origin + path, data=sized(total), headers=headers) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("total", [1, MIB - 1, MIB, MIB + 1, 5 * MIB + 7])
async def test_a_body_comes_through_whole(total: int, known: bool) -> None:
    async with echoing() as echo, through(echo) as house:
        assert await send(house, total, known=known) == 200
        metrics = await house.metrics()
    came = echo.came[0]
    assert (came.size, came.digest) == (total, await digest_of(total))
    if known or total < MIB or total > 2 * MIB:  # between, it depends on how much came with the last part that was kept
        assert ("content-length" in came.headers) == (known or total < MIB)
    assert metrics("request_bytes_total", operation="uploads", direction="in") == total


async def test_200_mb_stream_through_in_little_memory() -> None:
    most = 0

    async def watched(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        nonlocal most
        async for part in parts:
            most = max(most, resident())
            yield part

    total = 200 * MIB
    async with echoing() as echo, through(echo) as house:
        await send(house, 8 * MIB, known=True)
        before = resident()
        headers = {"content-length": str(total)}
        async with house.http.post(f"{house.base_url}/uploads", data=watched(sized(total)), headers=headers) as answer:
            assert answer.status == 200
    assert (echo.came[1].size, echo.came[1].digest) == (total, await digest_of(total))
    assert most - before < 30 * MIB, f"{(most - before) / MIB:.0f} MiB"


async def test_a_slow_upstream_stops_the_client() -> None:
    """Back-pressure reaches from the upstream to whoever sends."""
    hold, sent = asyncio.Event(), 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal sent
        async for part in sized(64 * MIB):
            yield part
            sent += len(part)

    async with echoing(hold=hold) as echo, through(echo) as house:
        asking = asyncio.create_task(house.http.post(f"{house.base_url}/uploads", data=counted()).__aenter__())
        await echo.begun.wait()
        last = -1
        while sent != last:
            last = sent
            await asyncio.sleep(0.1)
        assert sent < 32 * MIB
        hold.set()
        (await asking).release()
    assert echo.came[0].size == 64 * MIB


async def test_a_body_that_was_kept_is_sent_again_and_one_that_was_not_is_not() -> None:
    async with echoing(status=503) as echo, through(echo) as house:
        assert await send(house, MIB - 1, known=True) == 503
        kept = len(echo.came)
        assert await send(house, 3 * MIB, known=True) == 503
        streamed = len(echo.came) - kept
        metrics = await house.metrics()
    assert (kept, streamed) == (3, 1)
    assert metrics("requests_total", operation="uploads", outcome="overloaded", code="503") == 2


async def test_who_sent_a_body_that_was_not_kept_may_send_it_again() -> None:
    async with echoing(status=503) as echo, through(echo) as house:
        answer = await house.ask(b"x" * 3 * MIB, "/v1/uploads")
    assert "x-should-retry" not in answer.headers


async def test_an_answer_before_the_body_is_whole_is_passed_on_and_ends_the_upload() -> None:
    async with echoing(refuses=True, status=413) as echo, through(echo) as house, wire(house.port) as line:
        total = 500 * MIB
        line.send(f"POST /v1/uploads HTTP/1.1\r\nhost: penstock\r\ncontent-length: {total}\r\n\r\n".encode())
        line.send(b"x" * 3 * MIB)
        assert await line.head() == 413
        await house.until_idle()
        again = await house.ask(b"", "/v1/uploads", method="GET")
    assert again.status == 413
    assert len(echo.came) == 2


async def test_a_client_that_leaves_mid_upload_ends_it_upstream() -> None:
    async with echoing() as echo, through(echo) as house:
        async with wire(house.port) as line:
            line.send(request(b"x" * 3 * MIB, "/v1/uploads", headers={"content-length": "99999999"}))
            await echo.begun.wait()
            line.vanish()
        await house.until_idle()
        await until(lambda: echo.came[0].broke, "the upstream's connection to end")
        metrics = await house.metrics()
    assert metrics("requests_total", operation="uploads", outcome="cancelled", code="499") == 1
    assert metrics("upstream_attempts_total", result="cancelled") == 1


async def test_a_body_in_broken_chunks_ends_the_upload_and_is_told() -> None:
    async with echoing() as echo, through(echo) as house, wire(house.port) as line:
        line.send(b"POST /v1/uploads HTTP/1.1\r\nhost: penstock\r\ntransfer-encoding: chunked\r\n\r\n")
        line.send(b"200000\r\n" + b"x" * 2 * MIB + b"\r\nno number\r\n")
        answer = await line.answer()
        await house.until_idle()
        metrics = await house.metrics()
    assert answer.status == 400
    assert metrics("requests_total", operation="uploads", outcome="rejected", code="400") == 1
    assert metrics("requests_total") == 1
    assert all(came.broke for came in echo.came)


async def test_a_body_that_stops_coming_ends_the_upload_and_is_told() -> None:
    said = Server(port=0, admin_port=0, read_seconds=0.2)
    async with echoing() as echo, through(echo, server=said) as house, wire(house.port) as line:
        line.send(b"POST /v1/uploads HTTP/1.1\r\nhost: penstock\r\ncontent-length: 9000000\r\n\r\n" + b"x" * 2 * MIB)
        answer = await line.answer()
        await house.until_idle()
        await until(lambda: echo.came[0].broke, "the upstream's connection to end")
    assert (answer.status, answer.error["code"]) == (408, "request_too_slow")


@pytest.mark.parametrize("known", [True, False])
async def test_a_body_beyond_the_bound_is_refused(known: bool) -> None:
    said = Server(port=0, admin_port=0, max_upload_bytes=2 * MIB)
    async with echoing() as echo, through(echo, server=said) as house, wire(house.port) as line:
        if known:
            line.send(b"POST /v1/uploads HTTP/1.1\r\nhost: penstock\r\ncontent-length: %d\r\n\r\n" % (2 * MIB + 1))
        else:
            line.send(b"POST /v1/uploads HTTP/1.1\r\nhost: penstock\r\ntransfer-encoding: chunked\r\n\r\n")
            line.send((b"100000\r\n" + b"x" * MIB + b"\r\n") * 3)
        answer = await line.answer()
        await house.until_idle()
        metrics = await house.metrics()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert "max_upload_bytes" in answer.error["message"]
    assert metrics("requests_total", outcome="rejected", code="413") == 1
    assert all(came.broke for came in echo.came)
