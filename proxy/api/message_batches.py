"""Anthropic's Message Batches, kept and run by the gateway itself: the same store and runner as OpenAI's batches.

    {requests: [{custom_id, params}]} -> an input of the gateway's own -> a batch -> {custom_id, result} a line

Where a provider is to run them (`batch_mode: upstream`), or nothing is kept here, all of it is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from proxy.api import calling
from proxy.api.dialects import ANTHROPIC
from proxy.api.edge import Endpoint, Handler, Visit
from proxy.api.files import give, query
from proxy.batches import Batches, Page, Wanted
from proxy.core.batch import LINES_MAX, MESSAGES, Batch, Input, Status
from proxy.core.outcome import Outcome
from proxy.errors import InvalidRequest, MethodNotAllowed, NotFound, UnknownPath, WrongState
from proxy.plan import Plan
from proxy.telemetry import Telemetry

PATH = "/v1/messages/batches"
LISTED = (1000, 20)  # at most, and where nobody says
REQUESTS = "penstock_requests"  # in the metadata of such a batch: how many it has
_OURS, _THEIRS = "batch_", "msgbatch_"
_UNRUN = {"batch_cancelled": "canceled", "batch_expired": "expired"}
_ENCODE = msgspec.json.encode


def endpoints(batches: Batches, telemetry: Telemetry, passed: dict[str, Handler]) -> dict[str, Endpoint]:
    """By path, for the edge; `passed` pass a request on, by method."""

    def either(method: str, ours: Handler) -> Handler:
        async def handle(visit: Visit) -> None:
            await (ours if _keeps(batches, visit.plan) else passed[method])(visit)

        return handle

    every = {"GET": _list(batches), "POST": _create(batches, telemetry)}
    one = {"GET": _show(batches), "POST": _cancel(batches), "DELETE": _delete(batches)}
    return {
        path: Endpoint(
            "message_batches", route, {method: either(method, ours.get(method, _refuse(ours))) for method in passed}
        )
        for path, route, ours in ((PATH, PATH, every), (f"{PATH}/", f"{PATH}/{{path}}", one))
    }


def _keeps(batches: Batches, plan: Plan) -> bool:
    """Whether all models of this dialect can be run by the gateway, and are to be."""
    models, upstreams = plan.settings.models.values(), plan.upstreams
    theirs = [model for model in models if upstreams[model.upstreams[0]].dialect == ANTHROPIC.name]
    hand_on = any(model.batch_mode == "upstream" for model in theirs)
    lends_no_key = any(upstreams[name].passthrough for model in theirs for name in model.upstreams)
    return batches.are_kept and bool(theirs) and not hand_on and not lends_no_key


def _refuse(ours: dict[str, Handler]) -> Handler:
    allowed = ", ".join(ours)

    async def refuse(visit: Visit) -> None:
        raise MethodNotAllowed(f"{visit.request.method} is not possible here; use {allowed}", allowed=allowed)

    return refuse


class _Request(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    params: msgspec.Raw


class _Creation(msgspec.Struct):
    requests: Annotated[list[_Request], msgspec.Meta(min_length=1, max_length=LINES_MAX)]


def _create(batches: Batches, telemetry: Telemetry) -> Handler:
    async def create(visit: Visit) -> None:
        requests = _read(await visit.body())
        most = visit.plan.settings.server.max_body_bytes
        lines, model = await asyncio.to_thread(_lines, requests, most)
        visit.record.model = calling.routed(visit.plan, model, ANTHROPIC).name
        caller = visit.record.caller
        async with batches.arriving() as arrival:
            for line in lines:
                await arrival.write(line)
            file = await batches.add_file(caller, arrival, "messages.jsonl", None)
        told = {REQUESTS: str(len(requests))}
        trace = telemetry.traceparent(visit.record)
        batch = await batches.submit(caller, Wanted(MESSAGES, file.id, metadata=told, traceparent=trace))
        await give(visit, _described(batch))

    return create


def _read(body: bytes) -> list[_Request]:
    try:
        return msgspec.json.decode(body, type=_Creation).requests
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error), param="requests") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def _lines(requests: Sequence[_Request], most: int) -> tuple[list[bytes], str]:
    """The lines of the input, and the model that all of them ask. Raises InvalidRequest: one of them is wrong."""
    found, lines = Input(MESSAGES, most), []
    for number, request in enumerate(requests):
        said = {"custom_id": request.custom_id, "method": "POST", "url": MESSAGES, "body": request.params}
        lines.append(_ENCODE(said) + b"\n")
        found.take(lines[-1].rstrip(b"\n"), number + 1, 0)
        if found.mistakes:
            where = found.mistakes[0].param or ""
            param = f"requests.{number}.{where.replace('body', 'params', 1)}".rstrip(".")
            raise InvalidRequest(f"{param}: {found.mistakes[0].message}", param=param)
    return lines, found.model


def _list(batches: Batches) -> Handler:
    async def list_batches(visit: Visit) -> None:
        asked = query(visit)
        most, usual = LISTED
        said = asked.get("limit", str(usual))
        if not said.isdecimal() or not 1 <= int(said[:9]) <= most:
            raise InvalidRequest(f"limit must be a number from 1 to {most}", param="limit")
        limit, before = int(said), asked.get("before_id", "")
        newest_first = not before
        after = _id(before or asked.get("after_id", ""))
        found = await _found(visit.record.caller, batches, Page(after, limit + 1, newest_first))
        page = found[:limit] if newest_first else found[:limit][::-1]
        data = [_described(batch) for batch in page]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        await give(visit, {"data": data, "has_more": len(found) > limit, "first_id": first, "last_id": last})

    return list_batches


async def _found(caller: str, batches: Batches, page: Page) -> list[Batch]:
    """Of this caller's batches those that are Anthropic's."""
    found: list[Batch] = []
    after = page.after
    while len(found) < page.limit:
        some = await batches.batches(caller, Page(after, LISTED[0], page.newest_first))
        found += [batch for batch in some if batch.endpoint == MESSAGES]
        if len(some) < LISTED[0]:
            break
        after = some[-1].id
    return found[: page.limit]


def _show(batches: Batches) -> Handler:
    async def show(visit: Visit) -> None:
        batch, rest = await _named(visit, batches)
        if not rest:
            await give(visit, _described(batch))
        elif rest != "results":
            raise UnknownPath(f"of a message batch there is GET {PATH}/{{id}} and {PATH}/{{id}}/results")
        elif not batch.status.is_final:
            raise InvalidRequest("the batch has not ended, so there are no results yet; retrieve it until it has")
        else:
            await _pass_on(visit, batches, batch)

    return show


def _cancel(batches: Batches) -> Handler:
    async def cancel(visit: Visit) -> None:
        batch, verb = await _named(visit, batches)
        if verb != "cancel":
            raise UnknownPath(f"of a message batch there is POST {PATH}/{{id}}/cancel")
        await give(visit, _described(await batches.cancel(visit.record.caller, batch.id)))

    return cancel


def _delete(batches: Batches) -> Handler:
    async def delete(visit: Visit) -> None:
        batch, rest = await _named(visit, batches)
        if rest:
            raise UnknownPath(f"of a message batch there is DELETE {PATH}/{{id}}")
        if not batch.status.is_final:
            raise WrongState("the batch has not ended; cancel it first, or wait for its end")
        await batches.remove(batch)
        await give(visit, {"id": _told_id(batch), "type": "message_batch_deleted"})

    return delete


async def _named(visit: Visit, batches: Batches) -> tuple[Batch, str]:
    """The batch that the path names, and what follows its id. Raises NotFound: it is none of this caller's."""
    name, _, rest = visit.path.partition("?")[0].removeprefix("/messages/batches/").partition("/")
    unknown = NotFound(f"there is no message batch `{name[:100]}`; GET {PATH} lists yours", param="message_batch_id")
    try:
        batch = await batches.batch(visit.record.caller, _id(name))
    except NotFound:
        raise unknown from None
    if batch.endpoint != MESSAGES:
        raise unknown
    return batch, rest


def _id(told: str) -> str:
    return _OURS + told.removeprefix(_THEIRS) if told.startswith(_THEIRS) else told


def _told_id(batch: Batch) -> str:
    return _THEIRS + batch.id.removeprefix(_OURS)


def _described(batch: Batch) -> dict[str, object]:
    is_over = batch.status.is_final
    counts = {"succeeded": batch.completed, "errored": batch.failed - batch.unrun, "canceled": 0, "expired": 0}
    counts["expired" if batch.status is Status.EXPIRED else "canceled"] = batch.unrun
    requests = int((batch.metadata or {}).get(REQUESTS, "0"))
    if is_over and not batch.total:  # its model was taken away before it could begin
        counts["errored"] = requests
    return {
        "id": _told_id(batch),
        "type": "message_batch",
        "processing_status": "ended" if is_over else _running(batch),
        "request_counts": {**counts, "processing": 0 if is_over else requests - batch.completed - batch.failed},
        "created_at": _date(batch.created_at),
        "expires_at": _date(batch.expires_at),
        "ended_at": _date(batch.ended_at) if is_over else None,
        "cancel_initiated_at": _date(batch.entered.get(Status.CANCELLING.value)),
        "archived_at": None,
        "results_url": f"{PATH}/{_told_id(batch)}/results" if is_over else None,
    }


def _running(batch: Batch) -> str:
    return "canceling" if batch.status is Status.CANCELLING else "in_progress"


def _date(when: int | None) -> str | None:
    return None if when is None else datetime.fromtimestamp(when, UTC).isoformat().replace("+00:00", "Z")


# ── results ──


async def _pass_on(visit: Visit, batches: Batches, batch: Batch) -> None:
    record, answer = visit.record, visit.answer
    record.status = 200
    await answer.start(200, {"content-type": "application/x-jsonl"})
    record.first_byte = visit.now()
    for done in (True, False):
        async for part in batches.results(batch, done=done):
            lines = await asyncio.to_thread(_results, part)
            await answer.write(lines)
            record.bytes_out += len(lines)
    await answer.finish()
    record.last_byte, record.outcome = visit.now(), Outcome.OK


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


def _results(part: bytes) -> bytes:
    return b"".join(_told(msgspec.json.Decoder(_Line).decode_lines(part)))


def _told(lines: Sequence[_Line]) -> Iterator[bytes]:
    for line in lines:
        yield _ENCODE({"custom_id": line.custom_id, "result": _result(line)}) + b"\n"


def _result(line: _Line) -> dict[str, object]:
    response, error = line.response, line.error
    if response is None:
        assert error is not None
        if (unrun := _UNRUN.get(error.code)) is not None:
            return {"type": unrun}
        return {"type": "errored", "error": _wrong(error.message)}
    if response.status_code < 300:
        return {"type": "succeeded", "message": response.body}
    is_theirs = bytes(response.body).startswith(b"{")
    return {"type": "errored", "error": response.body if is_theirs else _wrong(bytes(response.body).decode())}


def _wrong(message: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": "api_error", "message": message}}
