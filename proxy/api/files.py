"""OpenAI's Files API: the gateway keeps the inputs and results of batches; all other files are an upstream's.

    POST           purpose batch: kept here; any other: passed on as it came
    GET, DELETE    one of its own; else passed on
    GET all        its own, then the upstream's

Where no upstream takes what is passed on, there are only its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, urlencode

import msgspec

from proxy.api import passthrough, uploads
from proxy.api.answering import Held
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Visit
from proxy.api.stored import Stored
from proxy.api.uploads import Form
from proxy.batches import Arrival, Batches, Page
from proxy.core.batch import INPUT_BYTES_MAX, File
from proxy.core.multipart import Field
from proxy.core.outcome import Outcome
from proxy.errors import BodyTooLarge, InvalidRequest, NotFound, StateOff, UnknownPath
from proxy.plan import Route
from proxy.relay import Runs

FILES_LISTED = 10_000
EXPIRY_SECONDS = (3600, 2_592_000)
OWN_PURPOSES = ("batch", "batch_output")
WITHOUT_FILES = (404, 405, 501)  # of an upstream that knows no such endpoint
PURPOSE, FILE = "purpose", "file"  # fields of the form
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


def endpoints(batches: Batches, relay: Runs, stored: Stored) -> dict[str, Endpoint]:
    """By path, for the edge."""
    files = _Files(batches, relay, stored)
    return {
        "/v1/files": Endpoint("files", "/v1/files", {"GET": files.list_all, "POST": files.create}),
        "/v1/files/": Endpoint("files", "/v1/files/{path}", {"GET": files.show, "DELETE": files.delete}),
    }


class _Files:
    def __init__(self, batches: Batches, relay: Runs, stored: Stored) -> None:
        self._batches, self._relay, self._stored = batches, relay, stored
        self._pass_through = passthrough.handler(relay, stored, OPENAI)

    async def create(self, visit: Visit) -> None:
        """The form's fields come in any order, so what comes is kept until it is known what the file is for."""
        async with uploads.form(visit, PURPOSE, ANCHOR, SECONDS) as form:
            purpose = form.text(PURPOSE)
            if not purpose:
                raise InvalidRequest("the form has no `purpose`; send batch, or another one", param=PURPOSE)
            if purpose == "batch":
                await self._keep(visit, form)
            elif (route := _upstream(visit)) is not None:
                await passthrough.pass_on(self._relay, self._stored, visit, form.upload(), route, visit.answer)
            else:
                raise InvalidRequest(
                    "`purpose` must be batch; files for other purposes are not kept here, and no upstream takes them",
                    param=PURPOSE,
                )

    async def list_all(self, visit: Visit) -> None:
        asked = query(visit)
        page, purpose = page_of(asked, most=FILES_LISTED, usual=FILES_LISTED), asked.get(PURPOSE, "")
        route = None if purpose in OWN_PURPOSES else _upstream(visit)
        if route is None:
            await give(visit, listed(await self._own(visit, page, purpose), page))
            return
        begins_here = not page.after or await self._found(visit, page.after) is not None
        own: list[dict[str, object]] = []
        off: StateOff | None = None
        try:
            own = await self._own(visit, page, purpose) if begins_here else []
        except StateOff as error:
            off = error
        if len(own) > page.limit:
            await give(visit, listed(own, page))
            return
        path = visit.path
        if own or (begins_here and page.after):  # what the upstream lists begins behind it
            asked = {name: said for name, said in asked.items() if name != "after"}
            path = "/files?" + urlencode(asked | {"limit": str(max(1, page.limit - len(own)))})
        joined = _Joined(visit, own, page.limit, self._stored, off)
        await passthrough.pass_on(self._relay, self._stored, visit, await uploads.read(visit), route, joined, path)

    async def show(self, visit: Visit) -> None:
        file_id, _, rest = visit.path.partition("?")[0].removeprefix("/files/").partition("/")
        file = await self._found(visit, file_id)
        if file is None:
            await self._pass_through(visit)
        elif not rest:
            await give(visit, _described(file))
        elif rest == "content":
            await _give_content(visit, self._batches, file)
        else:
            raise InvalidRequest("of a file there is /v1/files/{file_id} and /v1/files/{file_id}/content")

    async def delete(self, visit: Visit) -> None:
        file_id = visit.path.partition("?")[0].removeprefix("/files/")
        if await self._found(visit, file_id) is None:
            await self._pass_through(visit)
        else:
            await self._batches.remove_file(visit.record.caller, file_id)
            await give(visit, {"id": file_id, "object": "file", "deleted": True})

    async def _keep(self, visit: Visit, form: Form) -> None:
        async with self._batches.arriving() as arrival:
            filename, expires = await _arrived(visit, form, arrival)
            file = await self._batches.add_file(visit.record.caller, arrival, filename, expires)
        await give(visit, _described(file))

    async def _found(self, visit: Visit, file_id: str) -> File | None:
        """One of the gateway's own; None: it may be the upstream's. Raises NotFound, StateOff: there is none."""
        try:
            return await self._batches.file(visit.record.caller, file_id)
        except (NotFound, StateOff):
            if _upstream(visit) is None:
                raise
            return None

    async def _own(self, visit: Visit, page: Page, purpose: str) -> list[dict[str, object]]:
        """The gateway's own files on that page, and one more where there is one."""
        found = await self._batches.files(visit.record.caller, one_more(page), purpose)
        return [_described(file) for file in found]


def _upstream(visit: Visit) -> Route | None:
    """Where files go that are not kept here; None: nowhere."""
    try:
        return passthrough.routed(visit, OPENAI)
    except UnknownPath:
        return None


class _Page(msgspec.Struct):
    data: list[msgspec.Raw]
    has_more: bool = False


class _Id(msgspec.Struct):
    id: str = ""


class _Joined(Held):
    """The relay's sink for a list of files: what the upstream lists comes behind our own, without what is known to be
    another caller's. What is no list passes as it came; an upstream that knows no such endpoint has no files.

    Args:
        own: what the list begins with.
        limit: most files in it.
        off: why there are none of our own; told where there are no others either.
    """

    def __init__(
        self, visit: Visit, own: list[dict[str, object]], limit: int, stored: Stored, off: StateOff | None
    ) -> None:
        super().__init__(visit.answer)
        self._record = visit.record
        self._own, self._limit, self._stored, self._off = own, limit, stored, off

    def holds(self, status: int, headers: Mapping[str, str]) -> bool:
        return status == 200 or status in WITHOUT_FILES

    async def give(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status == 200:
            await self.answer.give(200, self._joined(body), dict(headers))
        elif self._off is not None:
            raise self._off
        else:
            record = self._record
            record.outcome, record.error_type, record.error_source = Outcome.OK, "", ""
            await self.answer.give(200, self._told([], [], has_more=False), {"content-type": "application/json"})

    def _joined(self, told: bytes) -> bytes:
        try:
            page = msgspec.json.decode(told, type=_Page)
            ids = [msgspec.json.decode(file, type=_Id).id for file in page.data]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return told
        is_foreign, caller = self._stored.is_foreign, self._record.caller
        theirs = [file for file, name in zip(page.data, ids, strict=True) if not is_foreign(name, caller)]
        if not self._own and len(theirs) == len(ids):
            return told
        room = self._limit - len(self._own)
        return self._told(theirs[:room], ids[:room], has_more=page.has_more or len(ids) > room)

    def _told(self, theirs: list[msgspec.Raw], ids: list[str], *, has_more: bool) -> bytes:
        """`ids` tell where the next page begins, so those that were left out are among them."""
        named = [*(file["id"] for file in self._own), *ids]
        ends = {"first_id": named[0], "last_id": named[-1]} if named else {"first_id": None, "last_id": None}
        return msgspec.json.encode({"object": "list", "data": [*self._own, *theirs], **ends, "has_more": has_more})


async def _arrived(visit: Visit, form: Form, arrival: Arrival) -> tuple[str, int | None]:
    """The form's file, which goes into `arrival`: its name, and the seconds that it is to be kept."""
    scanner = uploads.scanner_of(visit, ANCHOR, SECONDS, file=FILE)
    async for part in form.parts():
        scanner.feed(part)
        if piece := scanner.taken():
            if arrival.size + len(piece) > INPUT_BYTES_MAX:
                raise BodyTooLarge(f"the file is larger than {INPUT_BYTES_MAX >> 20} MB; split it into several batches")
            await arrival.write(piece)
    if scanner.filename is None:
        raise InvalidRequest("the form has no `file`", param=FILE)
    return (scanner.filename or FILE)[:255], _expiry(scanner.fields)


def _expiry(fields: Mapping[str, Field]) -> int | None:
    anchor, seconds = uploads.text_of(fields, ANCHOR), uploads.text_of(fields, SECONDS)
    if not anchor and not seconds:
        return None
    return expiry({"anchor": anchor, "seconds": int(seconds) if seconds.isdecimal() else seconds}, "expires_after")


def expiry(said: object, param: str) -> int:
    """The seconds of `{anchor: created_at, seconds: N}`."""
    least, most = EXPIRY_SECONDS
    match said:
        case {"anchor": "created_at", "seconds": int(seconds)} if least <= seconds <= most:
            return seconds
    raise InvalidRequest(
        f"`{param}` must be an object with `anchor`: created_at and `seconds`: from {least} to {most}", param=param
    )


async def _give_content(visit: Visit, batches: Batches, file: File) -> None:
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
