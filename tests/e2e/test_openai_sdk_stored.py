"""What a provider keeps, with the official SDK: uploads in parts, and responses that are stored."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from proxy.config import State
from proxy.simulator import Simulator
from tests.e2e.simulated import SAID, straight, through

LARGE = random.Random(2).randbytes(3 << 20)
PART = 1 << 20
LINE = b'{"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}}'


def paths(simulator: Simulator) -> list[str]:
    return [f"{seen.method} {seen.path}" for seen in simulator.seen]


async def test_a_file_is_kept_by_the_provider_as_it_was_sent(tmp_path: Path) -> None:
    async with (
        through(state=State(path=str(tmp_path))) as (house, client, simulator),
        straight(simulator) as direct,
    ):
        made = await client.files.create(file=("large.bin", LARGE), purpose="user_data")
        own = await direct.files.retrieve(made.id)
        shown = await client.files.retrieve(made.id)
        content = await client.files.content(made.id)
        async with client.files.with_streaming_response.content(made.id) as streamed:
            parts = [part async for part in streamed.iter_bytes()]
        batch = await client.files.create(file=("in.jsonl", LINE), purpose="batch")
        listed = [file.id async for file in client.files.list()]
        paged = [file.id async for file in client.files.list(limit=1)]
        only = [file.id async for file in client.files.list(purpose="user_data")]
        raw = await client.files.with_raw_response.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(made.id)
        left = [file.id async for file in client.files.list()]
        theirs = [file.id async for file in direct.files.list()]
        metrics = await house.metrics()
    assert made == own == shown
    assert (made.filename, made.bytes, made.purpose) == ("large.bin", len(LARGE), "user_data")
    assert content.content == b"".join(parts) == LARGE
    assert content.response.headers["content-disposition"] == "attachment; filename*=UTF-8''large.bin"
    assert listed == paged == [batch.id, made.id]
    assert (only, left, theirs) == ([made.id], [batch.id], [])
    assert raw.parse().deleted
    assert metrics("requests_total", operation="files", outcome="rejected", code="404") == 1


async def test_the_synchronous_client_sends_files_as_paths_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "of water.txt"
    file.write_bytes(LARGE)

    def talk(base_url: str) -> None:
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            for sent, name in ((file, "of water.txt"), (LARGE, "upload")):
                made = client.files.create(file=sent, purpose="assistants")
                assert (made.filename, made.bytes) == (name, len(LARGE))
                assert client.files.content(made.id).read() == LARGE
                with client.files.with_streaming_response.content(made.id) as streamed:
                    streamed.stream_to_file(tmp_path / "back")
                assert (tmp_path / "back").read_bytes() == LARGE
                assert client.files.delete(made.id).deleted

    async with through() as (house, _, _):
        await asyncio.to_thread(talk, house.base_url)


async def test_a_large_file_is_uploaded_in_parts() -> None:
    async with through() as (house, client, simulator), straight(simulator) as direct:
        upload = await client.uploads.upload_file_chunked(
            file=LARGE,
            filename="large.jsonl",
            bytes=len(LARGE),
            mime_type="text/plain",
            purpose="fine-tune",
            part_size=PART,
        )
        assert upload.status == "completed"
        assert upload.file is not None
        kept = await direct.files.content(upload.file.id)
        asked = paths(simulator)
        metrics = await house.metrics()
    assert (upload.file.filename, upload.file.bytes, upload.file.purpose) == ("large.jsonl", len(LARGE), "fine-tune")
    assert kept.content == LARGE
    assert len([path for path in asked if path.endswith("/parts")]) == 3
    assert metrics("requests_total", operation="uploads", outcome="ok") == 5


async def test_an_upload_can_be_given_up_and_a_wrong_one_is_told_of() -> None:
    async with through() as (_, client, _):
        said: Any = {"filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
        upload = await client.uploads.create(bytes=3, **said)
        part = await client.uploads.parts.create(upload.id, data=b"four")
        with pytest.raises(openai.BadRequestError, match="4 bytes, the upload was to have 3"):
            await client.uploads.complete(upload.id, part_ids=[part.id])
        with pytest.raises(openai.BadRequestError, match="no part 'part_lost'"):
            await client.uploads.complete(upload.id, part_ids=["part_lost"])
        assert (await client.uploads.cancel(upload.id)).status == "cancelled"
        with pytest.raises(openai.NotFoundError, match=upload.id):
            await client.uploads.parts.create(upload.id, data=b"x")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stored_response_is_shown_gone_on_from_and_deleted(stream: bool) -> None:
    async with through() as (house, client, simulator):
        if stream:
            async with client.responses.stream(model="m", input="hello") as events:
                made: Any = await events.get_final_response()
        else:
            made = await client.responses.create(model="m", input="hello", metadata={"of": "🏔"})
        shown = await client.responses.retrieve(made.id)
        items = [item async for item in client.responses.input_items.list(made.id)]
        more = await client.responses.create(model="m", input="again", previous_response_id=made.id)
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError, match=made.id):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.BadRequestError) as lost:
            await client.responses.create(model="m", input="again", previous_response_id="resp_lost")
        metrics = await house.metrics()
    assert shown.output_text == made.output_text == SAID
    assert (shown.id, shown.metadata, shown.usage.to_dict()) == (made.id, made.metadata, made.usage.to_dict())
    assert [(item.role, item.content[0].text) for item in items] == [("user", "hello")]
    assert more.previous_response_id == made.id
    assert more.usage is not None
    assert more.usage.input_tokens > made.usage.input_tokens
    assert lost.value.code == "previous_response_not_found"
    assert metrics("requests_total", operation="responses", outcome="ok") == 5
    assert len(simulator.seen) == 7


async def test_what_is_not_to_be_stored_is_not() -> None:
    async with through() as (_, client, _):
        made = await client.responses.create(model="m", input="hello", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


async def test_a_response_in_the_background_is_looked_at_or_cancelled() -> None:
    async with through() as (_, client, _):
        queued = await client.responses.create(model="m", input="hello", background=True)
        ended = await client.responses.retrieve(queued.id)
        other = await client.responses.create(model="m", input="hello", background=True)
        cancelled = await client.responses.cancel(other.id)
        shown = await client.responses.retrieve(other.id)
        plain = await client.responses.create(model="m", input="hello")
        with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
            await client.responses.cancel(plain.id)
    assert (queued.status, queued.output) == ("queued", [])
    assert (ended.status, ended.output_text) == ("completed", SAID)
    assert cancelled.status == shown.status == "cancelled"


async def test_the_synchronous_client_uploads_and_goes_on_from_responses() -> None:
    def talk(base_url: str) -> bytes:
        with OpenAI(base_url=base_url, api_key="sk-client", max_retries=0) as client:
            upload = client.uploads.upload_file_chunked(
                file=LARGE, filename="a", bytes=len(LARGE), mime_type="text/plain", purpose="evals", part_size=PART
            )
            assert upload.status == "completed"
            with client.responses.stream(model="m", input="hello") as events:
                made = events.get_final_response()
            more = client.responses.create(model="m", input="again", previous_response_id=made.id)
            raw = client.responses.with_raw_response.retrieve(more.id)
            assert raw.parse().output_text == more.output_text
            return raw.content

    async with through() as (house, _, simulator):
        told = await asyncio.to_thread(talk, house.base_url)
        async with straight(simulator) as direct:
            identity = told.split(b'"id":"', 1)[1].split(b'"', 1)[0].decode()
            own = await direct.responses.with_raw_response.retrieve(identity)
    assert told == own.content
