"""OpenAI's Files API, for the files that the gateway keeps itself: the inputs of batches, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

import aiohttp
import msgspec

from proxy.api.edge import Endpoint, Handler, Visit
from proxy.batches import Arrival, Batches, Page
from proxy.core.batch import INPUT_BYTES_MAX, File
from proxy.core.outcome import Outcome
from proxy.errors import BodyTooLarge, InvalidRequest

PIECE_BYTES = 1 << 16
FIELD_BYTES_MAX = 10_000
FILES_LISTED = 10_000
EXPIRY_SECONDS = (3600, 2_592_000)


def endpoints(batches: Batches) -> dict[str, Endpoint]:
    """By path, for the edge."""
    all_files = Endpoint("files", "/v1/files", {"GET": _list(batches), "POST": _create(batches)})
    one_file = Endpoint("files", "/v1/files/{file_id}", {"GET": _show(batches), "DELETE": _delete(batches)})
    return {"/v1/files": all_files, "/v1/files/": one_file}


def _create(batches: Batches) -> Handler:
    async def create(visit: Visit) -> None:
        """The form's fields come in any order, so the file is spooled before it is known what it is for."""
        async with batches.arriving() as arrival:
            form = await _form(visit, arrival)
            if form.purpose != "batch":
                raise InvalidRequest(
                    "`purpose` must be batch; files for other purposes are not kept here", param="purpose"
                )
            file = await batches.add_file(visit.record.caller, arrival, form.filename, form.expires)
        await give(visit, _described(file))

    return create


class _Form(msgspec.Struct):
    purpose: str = ""
    filename: str = ""
    expires: int | None = None


async def _form(visit: Visit, arrival: Arrival) -> _Form:
    """The form's fields; its file goes into `arrival`."""
    fields: dict[str, str] = {}
    filename = None
    await visit.ask_for_body()
    try:
        parts = aiohttp.MultipartReader(visit.request.headers, visit.request.content)
        while (part := await parts.next()) is not None:
            if not isinstance(part, aiohttp.BodyPartReader):
                raise InvalidRequest("the form holds another form; send `file` and `purpose` as plain fields")
            if part.name == "file":
                filename = part.filename or "file"
                while piece := await part.read_chunk(PIECE_BYTES):
                    if arrival.size + len(piece) > INPUT_BYTES_MAX:
                        raise BodyTooLarge(
                            f"the file is larger than {INPUT_BYTES_MAX >> 20} MB; split it into several batches"
                        )
                    await arrival.write(bytes(piece))
            elif part.name is not None:
                fields[part.name] = await _field(part)
    except (ValueError, AssertionError, aiohttp.ClientPayloadError) as error:
        raise InvalidRequest(
            "the body is not a form; send `file` and `purpose` as multipart/form-data", code="invalid_form"
        ) from error
    visit.record.bytes_in, visit.record.body_read = arrival.size, visit.now()
    if filename is None:
        raise InvalidRequest("the form has no `file`", param="file")
    if not fields.get("purpose"):
        raise InvalidRequest("the form has no `purpose`; send batch", param="purpose")
    return _Form(fields["purpose"], filename[:255], _expiry(fields))


async def _field(part: aiohttp.BodyPartReader) -> str:
    value = bytearray()
    while piece := await part.read_chunk(FIELD_BYTES_MAX):
        value += piece
        if len(value) > FIELD_BYTES_MAX:
            raise InvalidRequest(f"the field `{str(part.name)[:100]}` is longer than {FIELD_BYTES_MAX} bytes")
    return value.decode("utf-8", "replace")


def _expiry(fields: Mapping[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    return expiry(
        {"anchor": anchor, "seconds": int(seconds) if seconds and seconds.isdecimal() else seconds}, "expires_after"
    )


def expiry(said: object, param: str) -> int:
    """The seconds of `{anchor: created_at, seconds: N}`."""
    least, most = EXPIRY_SECONDS
    match said:
        case {"anchor": "created_at", "seconds": int(seconds)} if least <= seconds <= most:
            return seconds
    raise InvalidRequest(
        f"`{param}` must be an object with `anchor`: created_at and `seconds`: from {least} to {most}", param=param
    )


def _list(batches: Batches) -> Handler:
    async def list_files(visit: Visit) -> None:
        asked = query(visit)
        page = page_of(asked, most=FILES_LISTED, usual=FILES_LISTED)
        found = await batches.files(visit.record.caller, one_more(page), asked.get("purpose", ""))
        await give(visit, listed([_described(file) for file in found], page))

    return list_files


def _show(batches: Batches) -> Handler:
    async def show(visit: Visit) -> None:
        file_id, _, rest = visit.path.partition("?")[0].removeprefix("/files/").partition("/")
        file = await batches.file(visit.record.caller, file_id)
        if not rest:
            await give(visit, _described(file))
        elif rest == "content":
            await _pass_on(visit, batches, file)
        else:
            raise InvalidRequest("of a file there is /v1/files/{file_id} and /v1/files/{file_id}/content")

    return show


async def _pass_on(visit: Visit, batches: Batches, file: File) -> None:
    """The content, as it is read from the disk; of a batch that runs, what there is by now."""
    record, answer = visit.record, visit.answer
    record.status = 200
    await answer.start(200, {"content-type": "application/octet-stream"})
    record.first_byte = visit.now()
    async for part in batches.content(file):
        await answer.write(part)
        record.bytes_out += len(part)
    await answer.finish()
    record.last_byte, record.outcome = visit.now(), Outcome.OK


def _delete(batches: Batches) -> Handler:
    async def delete(visit: Visit) -> None:
        file_id = visit.path.partition("?")[0].removeprefix("/files/")
        await batches.remove_file(visit.record.caller, file_id)
        await give(visit, {"id": file_id, "object": "file", "deleted": True})

    return delete


def _described(file: File) -> dict[str, object]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


# ── what lists have in common ──


def query(visit: Visit) -> dict[str, str]:
    return dict(parse_qsl(visit.path.partition("?")[2], keep_blank_values=True))


def page_of(asked: Mapping[str, str], *, most: int, usual: int) -> Page:
    limit, order = asked.get("limit", str(usual)), asked.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise InvalidRequest(f"`limit` must be a number from 1 to {most}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` must be asc or desc", param="order")
    return Page(asked.get("after", ""), int(limit), newest_first=order == "desc")


def one_more(page: Page) -> Page:
    """So that it is known whether there are more."""
    return Page(page.after, page.limit + 1, page.newest_first)


def listed(found: list[dict[str, object]], page: Page) -> dict[str, object]:
    data = found[: page.limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > page.limit,
    }


async def give(visit: Visit, said: object) -> None:
    visit.record.outcome = Outcome.OK
    await visit.answer.give(200, msgspec.json.encode(said), {"content-type": "application/json"})
