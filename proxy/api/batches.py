"""OpenAI's Batch API, for batches that the gateway runs itself."""

from __future__ import annotations

from typing import Annotated

import msgspec

from proxy.api.edge import Endpoint, Handler, Visit
from proxy.api.files import expiry, give, listed, one_more, page_of, query
from proxy.batches import Batches, Wanted
from proxy.core import cost
from proxy.core.batch import ENDPOINTS, WINDOWS, Batch, Status
from proxy.errors import InvalidRequest, UnknownPath
from proxy.plan import Plan
from proxy.telemetry import Telemetry

BATCHES_LISTED = (100, 20)  # at most, and where nobody says
_Key = Annotated[str, msgspec.Meta(max_length=64)]
_Value = Annotated[str, msgspec.Meta(max_length=512)]
_Metadata = Annotated[dict[_Key, _Value], msgspec.Meta(max_length=16)]

_DATED = tuple(status for status in Status if status is not Status.VALIDATING)


def endpoints(batches: Batches, telemetry: Telemetry) -> dict[str, Endpoint]:
    """By path, for the edge."""
    all_batches = Endpoint("batches", "/v1/batches", {"GET": _list(batches), "POST": _create(batches, telemetry)})
    one_batch = Endpoint("batches", "/v1/batches/{batch_id}", {"GET": _show(batches), "POST": _cancel(batches)})
    return {"/v1/batches": all_batches, "/v1/batches/": one_batch}


def _create(batches: Batches, telemetry: Telemetry) -> Handler:
    async def create(visit: Visit) -> None:
        wanted = _wanted(await visit.body(), telemetry.traceparent(visit.record))
        batch = await batches.submit(visit.record.caller, wanted)
        await give(visit, _described(batch, batches, visit.plan))

    return create


def _wanted(body: bytes, traceparent: str) -> Wanted:
    try:
        said = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("the body must be a JSON object", code="invalid_json") from None
    file_id, window = said.get("input_file_id"), said.get("completion_window")
    if not isinstance(file_id, str) or not file_id:
        raise InvalidRequest("`input_file_id` is missing; upload the input with POST /v1/files", param="input_file_id")
    endpoint = said.get("endpoint")
    if not isinstance(endpoint, str) or endpoint not in ENDPOINTS:
        raise InvalidRequest(f"`endpoint` must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if not isinstance(window, str) or window not in WINDOWS:
        raise InvalidRequest(f"`completion_window` must be {' or '.join(WINDOWS)}", param="completion_window")
    kept = said.get("output_expires_after")
    return Wanted(
        endpoint,
        file_id,
        window,
        metadata=_metadata(said.get("metadata")),
        output_seconds=None if kept is None else expiry(kept, "output_expires_after"),
        traceparent=traceparent,
    )


def _metadata(said: object) -> dict[str, str] | None:
    if said is None:
        return None
    try:
        return msgspec.convert(said, _Metadata)
    except msgspec.ValidationError:
        message = "`metadata` must be an object of at most 16 texts, of 512 characters, with keys of 64 characters"
        raise InvalidRequest(message, param="metadata") from None


def _list(batches: Batches) -> Handler:
    async def list_batches(visit: Visit) -> None:
        most, usual = BATCHES_LISTED
        page = page_of(query(visit), most=most, usual=usual)
        found = await batches.batches(visit.record.caller, one_more(page))
        await give(visit, listed([_described(batch, batches, visit.plan) for batch in found], page))

    return list_batches


def _show(batches: Batches) -> Handler:
    async def show(visit: Visit) -> None:
        batch_id = visit.path.partition("?")[0].removeprefix("/batches/")
        await give(visit, _described(await batches.batch(visit.record.caller, batch_id), batches, visit.plan))

    return show


def _cancel(batches: Batches) -> Handler:
    async def cancel(visit: Visit) -> None:
        batch_id, _, verb = visit.path.partition("?")[0].removeprefix("/batches/").partition("/")
        if verb != "cancel":
            raise UnknownPath("of a batch there is GET /v1/batches/{batch_id} and POST /v1/batches/{batch_id}/cancel")
        await give(visit, _described(await batches.cancel(visit.record.caller, batch_id), batches, visit.plan))

    return cancel


def _counts(batch: Batch) -> dict[str, int]:
    """Of a batch that its provider runs, and whose results are not here yet, what the provider counts."""
    known = batch if batch.handed is None or batch.completed + batch.failed else batch.handed
    return {"total": batch.total, "completed": known.completed, "failed": known.failed}


def _described(batch: Batch, batches: Batches, plan: Plan) -> dict[str, object]:
    """As OpenAI's object has it, and under `penstock` what only this gateway knows: its cost, and why it rests."""
    used = batch.used
    described: dict[str, object] = {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model or None,
        "errors": {"object": "list", "data": batch.mistakes} if batch.mistakes else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id if batch.completed else None,
        "error_file_id": batch.error_file_id if batch.failed else None,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status.value}_at": batch.entered.get(status.value) for status in _DATED},
        "request_counts": _counts(batch),
        "usage": {
            "input_tokens": used.input,
            "input_tokens_details": {"cached_tokens": used.cached},
            "output_tokens": used.output,
            "output_tokens_details": {"reasoning_tokens": used.reasoning},
            "total_tokens": used.input + used.output,
        },
        "metadata": batch.metadata,
    }
    ours: dict[str, object] = {}
    if batch.handed is not None:
        ours["upstream"], ours["upstream_batch_id"] = batch.handed.upstream, batch.handed.batch_id or None
    elif (price := plan.price(batch.model)) is not None:
        ours["cost_usd"] = cost.of(batch.used, price) / cost.MICRO
    if (pause := batches.pause(batch)) is not None:
        ours["paused"] = {"reason": pause.reason, "message": pause.message, "since": int(pause.since)}
    return described | {"penstock": ours} if ours else described
