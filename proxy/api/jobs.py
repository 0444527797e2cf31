"""The service of small jobs: prompts in, results out, with nothing of the provider's API to learn.

    POST /complete          {prompt, model?, system?, max_tokens?} -> {result}
    POST /batch             {prompts, model?, system?, max_tokens?} -> {job_id}, once it is durable
    GET /batch/{job_id}     -> {job_id, status, completed, total, results}
    DELETE /batch/{job_id}  -> the same, cancelled

A prompt is an ordinary call. A job is a batch whose input the gateway writes itself, so all that is said of batches
holds for it; its id is the batch's with another beginning, and it is listed among them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from proxy.api import calling
from proxy.api.dialects import OPENAI
from proxy.api.edge import Endpoint, Handler, Visit
from proxy.api.files import give
from proxy.batches import Batches, Wanted
from proxy.collected import Collected
from proxy.core import cost
from proxy.core.asked import Asked
from proxy.core.batch import LINES_MAX, Batch, Status
from proxy.errors import InvalidRequest, NotFound, StreamTruncated, UpstreamGarbage
from proxy.plan import Plan
from proxy.relay import Runs
from proxy.telemetry import Telemetry

CHAT = "/v1/chat/completions"
PROMPTS = "penstock_prompts"  # in the metadata of a batch that is a job: how many it has
_JOB, _BATCH = "job_", "batch_"
_JSON = {"content-type": "application/json"}
_STATES = {
    Status.VALIDATING: "queued",
    Status.IN_PROGRESS: "running",
    Status.FINALIZING: "running",
}  # all others keep their word
_Asked = TypeVar("_Asked", bound="Said")
_encode = msgspec.json.encode


class Said(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str = ""
    system: str = ""
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def body(self, prompt: str, model: str, before: Sequence[object] = (), **more: object) -> bytes:
        """The chat completion that answers a prompt, after these messages; "" stands for no prompt."""
        asked = [*before, {"role": "user", "content": prompt}] if prompt else [*before]
        if self.system:
            asked.insert(0, {"role": "system", "content": self.system})
        said: dict[str, object] = {"model": model, "messages": asked, **more}
        if self.max_tokens is not None:
            said["max_tokens"] = self.max_tokens
        return _encode(said)


class _Prompt(Said, kw_only=True):
    prompt: Annotated[str, msgspec.Meta(min_length=1)]


class _Prompts(Said, kw_only=True):
    prompts: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1, max_length=LINES_MAX)
    ]


def endpoints(relay: Runs, batches: Batches, telemetry: Telemetry) -> dict[str, Endpoint]:
    """By path, for the edge."""
    return {
        "/complete": Endpoint("complete", "/complete", {"POST": _complete(relay)}),
        "/batch": Endpoint("jobs", "/batch", {"POST": _submit(batches, telemetry)}),
        "/batch/": Endpoint("jobs", "/batch/{job_id}", {"GET": _show(batches), "DELETE": _cancel(batches)}),
    }


# ── one prompt ──


def _complete(relay: Runs) -> Handler:
    async def complete(visit: Visit) -> None:
        said = read(await visit.body(), _Prompt)
        record = visit.record
        wanted = calling.read(said.body(said.prompt, model_of(said.model, visit.plan)))
        record.asked_model, record.max_tokens = wanted.model, wanted.max_tokens
        sink = await _answered(visit, relay, wanted)
        if sink.status >= 400:  # the upstream's own word
            await visit.answer.give(sink.status, sink.body, _JSON | {"x-should-retry": "false"})
        else:
            await visit.answer.give(200, _encode({"result": result_of(sink.body)}), _JSON)

    return complete


async def _answered(visit: Visit, relay: Runs, wanted: Asked) -> Collected:
    """
    Raises:
        GatewayError: there is no answer, or none that is whole.
    """
    route = calling.routed(visit.plan, wanted.model, OPENAI)
    visit.record.model = route.name
    sink = Collected()
    await relay.run(calling.call(visit, route, wanted, path=CHAT.removeprefix("/v1")), sink, visit.record)
    if sink.broke is not None:
        raise StreamTruncated(str(sink.broke))
    return sink


def result_of(body: bytes) -> str | None:
    """The text of an answer; None where the model gave none."""
    try:
        said = msgspec.json.decode(body, type=_Completion)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise UpstreamGarbage("the upstream's answer is no chat completion") from None
    return said.choices[0].message.content


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]


# ── jobs ──


def _submit(batches: Batches, telemetry: Telemetry) -> Handler:
    async def submit(visit: Visit) -> None:
        said = read(await visit.body(), _Prompts)
        model = model_of(said.model, visit.plan)
        visit.record.model = calling.routed(visit.plan, model, OPENAI).name
        caller = visit.record.caller
        async with batches.arriving() as arrival:
            for number, prompt in enumerate(said.prompts):
                await arrival.write(_line(number, said.body(prompt, model)))
            file = await batches.add_file(caller, arrival, "job.jsonl", None)
        told = {PROMPTS: str(len(said.prompts))}
        trace = telemetry.traceparent(visit.record)
        batch = await batches.submit(caller, Wanted(CHAT, file.id, metadata=told, traceparent=trace))
        await give(visit, {"job_id": _job_id(batch)})

    return submit


def _line(number: int, body: bytes) -> bytes:
    head = {"custom_id": str(number), "method": "POST", "url": CHAT, "body": msgspec.Raw(body)}
    return _encode(head) + b"\n"


def _show(batches: Batches) -> Handler:
    async def show(visit: Visit) -> None:
        await give(visit, await _described(await _job(visit, batches), batches, visit.plan))

    return show


def _cancel(batches: Batches) -> Handler:
    async def cancel(visit: Visit) -> None:
        job = await _job(visit, batches)
        batch = await batches.cancel(visit.record.caller, job.id)
        await give(visit, await _described(batch, batches, visit.plan))

    return cancel


async def _job(visit: Visit, batches: Batches) -> Batch:
    """Raises NotFound: there is none of that id, or it is another caller's."""
    job_id = visit.path.partition("?")[0].removeprefix("/batch/")
    unknown = NotFound(f"there is no job `{job_id[:100]}`; POST /batch makes one", param="job_id")
    if not job_id.startswith(_JOB):
        raise unknown
    try:
        batch = await batches.batch(visit.record.caller, _BATCH + job_id.removeprefix(_JOB))
    except NotFound:
        raise unknown from None
    if not (batch.metadata or {}).get(PROMPTS, "").isdecimal():
        raise unknown
    return batch


def _job_id(batch: Batch) -> str:
    return _JOB + batch.id.removeprefix(_BATCH)


async def _described(batch: Batch, batches: Batches, plan: Plan) -> dict[str, object]:
    """The job as it is now.

    `results` has a place for each prompt: null until it has ended, its text, or `{"error": …}`. What stands there is
    at least what `completed` counts.
    """
    assert batch.metadata is not None
    results: list[object] = [None] * min(LINES_MAX, int(batch.metadata[PROMPTS]))
    for done in (True, False):
        async for part in batches.results(batch, done=done):
            for number, result in await asyncio.to_thread(_parsed, part):
                if number < len(results):  # anybody may call a batch of theirs a job
                    results[number] = result
    described: dict[str, object] = {
        "job_id": _job_id(batch),
        "status": _STATES.get(batch.status, batch.status.value),
        "completed": batch.completed + batch.failed,
        "failed": batch.failed,
        "total": len(results),
        "results": results,
    }
    if batch.mistakes:
        described["error"] = {"code": batch.mistakes[0].code, "message": batch.mistakes[0].message}
    if (pause := batches.pause(batch)) is not None:
        described["paused"] = {"reason": pause.reason, "message": pause.message}
    if (price := plan.price(batch.model)) is not None:
        described["cost_usd"] = cost.of(batch.used, price) / cost.MICRO
    return described


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class _Line(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: dict[str, Any] | None = None


def _parsed(part: bytes) -> list[tuple[int, object]]:
    """Number and result of each line."""
    lines = msgspec.json.Decoder(_Line).decode_lines(part)
    return [(int(line.custom_id), _told(line)) for line in lines if line.custom_id.isdecimal()]


def _told(line: _Line) -> object:
    if line.response is None:
        return {"error": line.error}
    if line.response.status_code < 300:
        return result_of(bytes(line.response.body))
    return {"error": error_of(line.response.status_code, bytes(line.response.body))}


# ── what all of them read ──


def error_of(status: int, body: bytes) -> object:
    """What an upstream's refusal says, in its own words."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = body.decode("utf-8", "replace")
    error = said.get("error") if isinstance(said, Mapping) else None
    return error if isinstance(error, Mapping) else {"code": status, "message": str(said)}


def read(body: bytes, form: type[_Asked]) -> _Asked:
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def model_of(asked: str, plan: Plan) -> str:
    """The one that is asked for, or that stands in for none."""
    usual = plan.settings.jobs.model
    listed = plan.listed(OPENAI.name)
    model = asked or usual or (listed[0] if len(listed) == 1 else "")
    if not model:
        message = "name the model; the operator can set one for those who do not, as jobs.model"
        raise InvalidRequest(message, code="missing_model", param="model")
    return model
