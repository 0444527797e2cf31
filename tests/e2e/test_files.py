"""Files: those of batches are the gateway's own, all others are kept by the upstream; one endpoint for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from proxy.api.uploads import KEPT
from proxy.config import Limits, Passthrough, Secret, State
from tests.e2e.echoing import echoing
from tests.e2e.keeping import Keeper, keeping
from tests.e2e.running import Answer, House, at, serving, settings
from tests.e2e.wire import request, wire

FILES = "/v1/files"
FORM = {"content-type": "multipart/form-data; boundary=b"}
QUIET = Limits(learn=False)


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def a_file(content: bytes) -> bytes:
    return part("file", content, '; filename="a.jsonl"')


@asynccontextmanager
async def through(
    state: Path | None, *, has_files: bool = True, **sections: Any
) -> AsyncIterator[tuple[House, AsyncOpenAI, Keeper]]:
    """A gateway in front of an upstream that keeps files, with state in this directory."""
    kept = State(path=None if state is None else str(state))
    async with keeping("up", has_files=has_files) as keeper:
        said = settings(at(keeper.base_url, limits=QUIET), state=kept, **sections)
        async with serving(said) as house, house.sdk() as client:
            yield house, client, keeper


async def send(house: House, body: bytes, **headers: str) -> Answer:
    return await house.ask(body, FILES, headers=FORM | headers)


async def listed(client: AsyncOpenAI, **said: Any) -> list[str]:
    return [file.id async for file in client.files.list(**said)]


# ── where a file goes ──


@pytest.mark.parametrize("size", [0, KEPT, 3 * KEPT])
@pytest.mark.parametrize("first", ["file", "purpose"])
async def test_a_file_of_another_purpose_goes_to_the_upstream_as_it_came(first: str, size: int) -> None:
    parts = [a_file(b"{}\n" + b"x" * size), part("purpose", b"fine-tune")]
    body = form(*(parts if first == "file" else reversed(parts)), part("expires_after[anchor]", b"created_at"))
    async with echoing() as echo, serving(settings(at(echo.base_url, limits=QUIET))) as house:
        answer = await send(house, body)
        metrics = await house.metrics()
        await house.until_idle()
    (came,) = echo.came
    assert (answer.status, came.path, came.size) == (200, FILES, len(body))
    assert came.body == body[: len(came.body)]
    assert came.headers["content-type"] == FORM["content-type"]
    assert metrics("requests_total", operation="files", outcome="ok") == 1
    assert metrics("request_bytes_total", operation="files", direction="in") == len(body)


@pytest.mark.parametrize("size", [0, KEPT, 3 * KEPT])
@pytest.mark.parametrize("first", ["file", "purpose"])
async def test_the_input_of_a_batch_stays_here(tmp_path: Path, first: str, size: int) -> None:
    content = b"\r\n--\r\n--x" + b"y" * size
    parts = [a_file(content), part("purpose", b"batch")]
    async with through(tmp_path) as (house, client, keeper):
        answer = await send(house, form(*(parts if first == "file" else reversed(parts))))
        assert (answer.json["bytes"], answer.json["filename"]) == (len(content), "a.jsonl")
        assert (await client.files.content(answer.json["id"])).content == content
        assert [entry.name for entry in (tmp_path / "files").iterdir()] == [answer.json["id"]]
    assert keeper.asked == []


async def test_a_large_file_of_another_purpose_is_not_held() -> None:
    """Once its purpose is known it is taken from the client as the upstream takes it."""
    hold = asyncio.Event()
    head = part("purpose", b"vision") + a_file(b"x" * KEPT).removesuffix(b"\r\n")
    async with echoing(hold=hold) as echo, serving(settings(at(echo.base_url))) as house, wire(house.port) as line:
        line.send(request(head, FILES, headers=FORM | {"content-length": str(len(head) + 9 + KEPT)}))
        await echo.begun.wait()
        line.send(b"x" * KEPT + b"\r\n--b--\r\n")
        hold.set()
        assert await line.head() == 200
    assert echo.came[0].size == len(head) + 9 + KEPT


async def test_without_an_upstream_for_it_a_file_has_to_be_a_batchs(tmp_path: Path) -> None:
    async with through(tmp_path, passthrough=Passthrough(enabled=False)) as (house, _, keeper):
        answer = await send(house, form(part("purpose", b"vision"), a_file(b"x")))
    assert (answer.status, answer.error["param"], keeper.asked) == (400, "purpose", [])
    assert "must be batch" in answer.error["message"]


async def test_a_gateway_without_state_passes_files_on_and_keeps_none() -> None:
    async with through(None) as (_, client, keeper):
        file = await client.files.create(file=b"x", purpose="vision")
        assert await listed(client) == [file.id]
        assert (await client.files.retrieve(file.id)).purpose == "assistants"
        with pytest.raises(openai.InternalServerError, match="keeps no state"):
            await client.files.create(file=b"x", purpose="batch")
    assert len(keeper.asked) == 3


async def test_where_neither_keeps_files_it_is_said_why_the_gateway_does_not() -> None:
    async with through(None, has_files=False) as (house, _, keeper):
        answer = await house.ask(b"", FILES, method="GET")
    assert (answer.status, answer.error["code"], len(keeper.asked)) == (503, "state_off", 1)


# ── whose it is ──


async def test_a_file_that_is_not_here_is_asked_for_upstream(tmp_path: Path) -> None:
    async with through(tmp_path) as (_, client, keeper):
        own = await client.files.create(file=b"own", purpose="batch")
        file = await client.files.create(file=b"theirs", purpose="vision")
        assert (await client.files.retrieve(file.id)).id == file.id
        assert b"theirs" in (await client.files.content(file.id)).content
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError, match="nothing at"):
            await client.files.retrieve(file.id)
        assert (await client.files.content(own.id)).content == b"own"
        assert (await client.files.delete(own.id)).deleted
    assert [asked.partition(" ")[0] for asked in keeper.asked] == ["POST", "GET", "GET", "DELETE", "GET"]


async def test_a_file_of_another_caller_is_not_found_wherever_it_is(tmp_path: Path) -> None:
    keys = {"a": "sk-caller-a-0123456789", "b": "sk-caller-b-0123456789"}
    callers = {alias: Secret(key) for alias, key in keys.items()}
    async with (
        through(tmp_path, callers=callers) as (house, _, keeper),
        house.sdk(api_key=keys["a"]) as one,
        house.sdk(api_key=keys["b"]) as other,
    ):
        own = await one.files.create(file=b"own", purpose="batch")
        file = await one.files.create(file=b"theirs", purpose="vision")
        for thing in (own.id, file.id, "file-none"):
            with pytest.raises(openai.NotFoundError, match=f"there is no `{thing}` here"):
                await other.files.retrieve(thing)
            with pytest.raises(openai.NotFoundError, match=f"there is no `{thing}` here"):
                await other.files.content(thing)
            with pytest.raises(openai.NotFoundError, match=f"there is no `{thing}` here"):
                await other.files.delete(thing)
        assert await listed(other) == []
        assert await listed(one) == [own.id, file.id]
    assert file.id in keeper.kept


# ── all of them ──


async def test_the_gateways_own_files_come_first_and_then_the_upstreams(tmp_path: Path) -> None:
    async with through(tmp_path) as (_, client, _):
        own = [(await client.files.create(file=b"x", purpose="batch")).id for _ in range(3)][::-1]
        theirs = [(await client.files.create(file=b"x", purpose="vision")).id for _ in range(4)]
        for limit in range(1, 9):
            assert await listed(client, limit=limit) == own + theirs
        assert await listed(client) == own + theirs
        assert await listed(client, purpose="batch") == own
        assert await listed(client, after=own[-1]) == theirs
        assert await listed(client, after=theirs[1], limit=1) == theirs[2:]
        page = (await client.files.list(limit=3)).model_dump()
        assert (page["has_more"], page["last_id"]) == (True, own[-1])


async def test_a_list_of_batches_files_asks_no_upstream(tmp_path: Path) -> None:
    async with through(tmp_path) as (_, client, keeper):
        await listed(client, purpose="batch")
        await listed(client, purpose="batch_output")
    assert keeper.asked == []


async def test_of_an_upstream_without_files_there_are_only_the_gateways_own(tmp_path: Path) -> None:
    async with through(tmp_path, has_files=False) as (house, client, _):
        assert await listed(client) == []
        own = await client.files.create(file=b"x", purpose="batch")
        assert await listed(client) == [own.id]
        metrics = await house.metrics()
    assert metrics("requests_total", operation="files", outcome="ok") == 3


async def test_a_list_that_would_not_be_whole_is_not_given(tmp_path: Path) -> None:
    async with through(tmp_path) as (house, client, keeper):
        await client.files.create(file=b"x", purpose="batch")
        keeper.status = 403
        answer = await house.ask(b"", FILES, method="GET")
    assert (answer.status, answer.error["message"]) == (403, "out of order")


@pytest.mark.parametrize("says", [b"nonsense", b"{}", b"[1]", b'{"data": 7}', b'{"data": [7]}', b"\xff"])
async def test_what_is_no_list_passes_as_it_came(says: bytes) -> None:
    async with echoing(says=says) as echo, serving(settings(at(echo.base_url))) as house:
        answer = await house.ask(b"", FILES, method="GET")
    assert (answer.status, answer.body) == (200, says)
