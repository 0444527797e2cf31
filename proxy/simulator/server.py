"""The provider over HTTP: OpenAI's endpoints and Anthropic's in real time, on the decisions of `Provider`.

    request -> seen? -> key? -> Ask -> Provider.arrive -> paced answer -> Provider.leave

A call is in flight from its arrival to its last byte, or to its client's leaving. What is due is written at once: a
token rate below infinity makes a chunk a write, an infinite one makes the whole stream one write.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from aiohttp import web

from proxy.simulator import answers, asks, audio, forms, images, messages, realtime, wording
from proxy.simulator.answers import Form, StreamedForm, WholeForm
from proxy.simulator.asks import Ask, BadAsk
from proxy.simulator.files import Files
from proxy.simulator.message_batches import MessageBatches
from proxy.simulator.profile import Profile, Style
from proxy.simulator.provider import Admitted, Fault, Provider, Refused
from proxy.simulator.responses import Responses
from proxy.simulator.rooms import Content, Deed, Sent

_BODY_LIMIT = 256 << 20  # bytes; larger than any real provider takes, so that the limit under test is the gateway's
_BACKLOG = 4096  # connections not yet accepted; a burst of thousands must not wait for SYN retries
_STOP_SECONDS = 0.1  # what an answer has left once the server is to stop
_WRITE_AT = 1 << 16  # bytes of due events that are gathered at most before they are written
_MODELS = ("gpt-4o-mini", "gpt-4o", "text-embedding-3-small")  # listed where the profile names none
_READ_AND_WRITTEN: dict[str, tuple[Callable[[bytes], Ask], Callable[..., Form]]] = {
    "/v1/chat/completions": (asks.chat, answers.Chat),
    "/v1/completions": (asks.completion, answers.Completion),
    "/v1/embeddings": (asks.embedding, answers.Embedding),
    "/v1/moderations": (asks.moderation, answers.Moderation),
    "/v1/images/generations": (images.generation, images.Picture),
    "/v1/audio/speech": (audio.speech, audio.Speech),
    "/v1/messages": (messages.creation, messages.Message),
}
_FROM_FORMS: dict[str, tuple[Callable[[forms.Form], Ask], Callable[..., Form]]] = {
    "/v1/images/edits": (images.edit, images.Picture),
    "/v1/images/variations": (images.variation, images.Picture),
    "/v1/audio/transcriptions": (audio.transcription, audio.Transcript),
    "/v1/audio/translations": (audio.translation, audio.Transcript),
}


@dataclass(slots=True, frozen=True)
class Seen:
    """A request as it came in. `headers` is case-insensitive."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float  # the event loop's clock


class Simulator:
    """A running simulated provider. `provider.stats` is live; its switches may be set at any time."""

    def __init__(self, provider: Provider, *, seed: int, remember: int) -> None:
        self.provider = provider
        self.seen: deque[Seen] = deque(maxlen=remember)  # the latest requests
        self.host = ""
        self.port = 0
        self._seed = seed
        self._serial = 0
        self._batches = MessageBatches()
        self._files = Files()
        self._responses = Responses()
        self._endpoints = _READ_AND_WRITTEN | {"/v1/responses": (self._responses.read, self._responses.form)}

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_BODY_LIMIT)
        for path in (*self._endpoints, *_FROM_FORMS):
            app.router.add_post(path, self._guarded(self._call))
        for method, path, deed in (*self._files.deeds(), *self._responses.deeds()):
            app.router.add_route(method, path, self._guarded(self._room(deed)))
        app.router.add_post("/v1/messages/count_tokens", self._guarded(self._count_tokens))
        app.router.add_post("/v1/messages/batches", self._guarded(self._create_batch))
        app.router.add_get("/v1/messages/batches", self._guarded(self._list_batches))
        app.router.add_get("/v1/messages/batches/{batch}", self._guarded(self._batch(self._batches.show)))
        app.router.add_post("/v1/messages/batches/{batch}/cancel", self._guarded(self._batch(self._batches.cancel)))
        app.router.add_delete("/v1/messages/batches/{batch}", self._guarded(self._batch(self._batches.delete)))
        app.router.add_get("/v1/messages/batches/{batch}/results", self._guarded(self._batch_results))
        app.router.add_get("/v1/realtime", self._guarded(self._talk))
        app.router.add_get("/v1/models", self._guarded(self._list_models))
        app.router.add_get("/v1/models/{model:.+}", self._guarded(self._show_model))
        app.router.add_route("*", "/{path:.*}", self._unknown)
        return app

    def _guarded(
        self, handler: Callable[[web.Request, str], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """With a number of its own, remembered, and only for who brings a key."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            serial = self._next_serial()
            if self.seen.maxlen:
                await self._remember(request)
            try:
                return self._denied(request, serial) or await handler(request, serial)
            except BadAsk as error:
                return self._wrong(request, error.status, str(error), serial, code=error.code)
            except ConnectionError:  # the client left while it was written to; nobody reads what is returned
                return web.Response()

        return guarded

    async def _remember(self, request: web.Request) -> None:
        at = asyncio.get_running_loop().time()
        self.seen.append(Seen(request.method, request.path_qs, request.headers, await request.read(), at))

    def _next_serial(self) -> str:
        self._serial += 1
        return f"{self._seed & 0xFFFFFFFF:08x}{self._serial:024x}"

    def _denied(self, request: web.Request, serial: str) -> web.Response | None:
        keys = self.provider.profile.keys
        if keys is None:
            return None
        said = request.headers.get("Authorization", "")
        key = said[7:] if said[:7].lower() == "bearer " else ""
        key = key or request.headers.get("api-key", "") or request.headers.get("x-api-key", "")
        if key and (not keys or key in keys):
            return None
        if key:
            return self._wrong(request, 401, "Incorrect API key provided.", serial, code="invalid_api_key")
        message = "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`."
        return self._wrong(request, 401, message, serial)

    async def _call(self, request: web.Request, serial: str) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        provider = self.provider
        body = await request.read()
        if (from_form := _FROM_FORMS.get(request.path)) is not None:
            read_form, form_of = from_form
            ask = read_form(forms.read(body, request.headers.get("Content-Type", "")))
        else:
            read, form_of = self._endpoints[request.path]
            ask = read(body)
        if not self._has(ask.model):
            return self._no_model(request, ask.model, serial)
        began = loop.time()
        decision = provider.arrive(began, ask.size, ask.model)
        if isinstance(decision, Refused):
            return self._error(request, decision.status, decision.body, serial, decision.headers)
        try:
            form = form_of(ask, decision, provider.profile, serial=serial, created=int(time.time()))
            if decision.fault is Fault.RESET:
                await asyncio.sleep(decision.first_token)
                return _reset(request)
            if ask.stream and isinstance(form, StreamedForm):
                return await self._stream(request, form, decision, serial, began)
            assert isinstance(form, WholeForm)  # what cannot be given whole is always asked for as a stream
            return await self._whole(request, form, decision, serial, began)
        finally:
            provider.leave(decision, loop.time())

    async def _whole(
        self, request: web.Request, form: WholeForm, admitted: Admitted, serial: str, began: float
    ) -> web.StreamResponse:
        profile = self.provider.profile
        await _until(began + form.seconds)
        if admitted.fault is Fault.STALL:
            await asyncio.sleep(profile.stall_seconds)
        if admitted.fault is Fault.ERROR_EVENT:
            return self._error(request, 500, wording.broken(profile.style), serial, admitted.headers)
        headers = self._headers(serial, admitted.headers, asyncio.get_running_loop().time() - began)
        body = form.body()
        if admitted.fault in (Fault.CUT, Fault.ABORT):
            response = web.StreamResponse(headers={**headers, "Content-Type": form.media_type})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            return await _broken_off(request, response, clean=admitted.fault is Fault.CUT)
        return web.Response(body=body, headers=headers, content_type=form.media_type)

    async def _stream(
        self, request: web.Request, form: StreamedForm, admitted: Admitted, serial: str, began: float
    ) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        profile, fault = self.provider.profile, admitted.fault
        first_due = began + admitted.first_token
        await _until(first_due)
        headers = self._headers(serial, admitted.headers, loop.time() - began)
        headers |= {"Content-Type": form.stream_type, "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        due = bytearray(form.opening())
        passed = 0
        for index, prompt in enumerate(form.ask.prompts):
            for tokens, words in answers.pieces(prompt, admitted.output_tokens, profile.chunk_tokens):
                at = first_due + passed / admitted.tokens_per_second
                if passed and (at > loop.time() or len(due) >= _WRITE_AT):
                    await response.write(bytes(due))
                    due.clear()
                    await _until(at)
                due += form.piece(index, words)
                passed += tokens
                if fault is None or passed < admitted.fault_after:
                    continue
                told = form.failure() if fault is Fault.ERROR_EVENT else b""
                await response.write(bytes(due + told))
                due.clear()
                if fault is not Fault.STALL:
                    return await _broken_off(request, response, clean=fault is Fault.CUT or bool(told))
                fault = None
                await asyncio.sleep(profile.stall_seconds)
        due += form.closing()
        await response.write(bytes(due))
        await response.write_eof()
        return response

    async def _count_tokens(self, request: web.Request, serial: str) -> web.StreamResponse:
        """Has limits of its own at the real one, so none here."""
        ask = messages.count(await request.read())
        return self._json(200, {"input_tokens": ask.size.input_tokens}, serial)

    def _room(self, deed: Deed) -> Callable[[web.Request, str], Awaitable[web.StreamResponse]]:
        """What is kept has limits of its own at the real one, too, so none here."""

        async def done(request: web.Request, serial: str) -> web.StreamResponse:
            identity, kind = request.match_info.get("id", ""), request.headers.get("Content-Type", "")
            body, is_anthropics = await request.read(), _is_anthropics(request)
            told = deed(Sent(identity, request.query, body, kind, serial, is_anthropics))
            headers = self._headers(serial, {}, 0.0)
            if isinstance(told, Content):
                headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(told.filename)}"
                return web.Response(body=told.content, headers=headers, content_type="application/octet-stream")
            return web.Response(body=told, headers=headers, content_type="application/json")

        return done

    async def _create_batch(self, request: web.Request, serial: str) -> web.StreamResponse:
        return self._json(200, self._batches.create(await request.read(), serial, self.base_url), serial)

    async def _list_batches(self, request: web.Request, serial: str) -> web.StreamResponse:
        return self._json(200, self._batches.listed(self.base_url), serial)

    def _batch(
        self, do: Callable[[str, str], dict[str, object] | None]
    ) -> Callable[[web.Request, str], Awaitable[web.StreamResponse]]:
        async def done(request: web.Request, serial: str) -> web.StreamResponse:
            said = do(request.match_info["batch"], self.base_url)
            return self._no_batch(request, serial) if said is None else self._json(200, said, serial)

        return done

    async def _batch_results(self, request: web.Request, serial: str) -> web.StreamResponse:
        lines = self._batches.results(request.match_info["batch"])
        if lines is None:
            return self._no_batch(request, serial)
        return web.Response(body=lines, headers=self._headers(serial, {}, 0.0), content_type="application/x-jsonl")

    def _no_batch(self, request: web.Request, serial: str) -> web.Response:
        return self._wrong(request, 404, "There is no such batch, or it has no results.", serial)

    async def _talk(self, request: web.Request, serial: str) -> web.StreamResponse:
        model = request.query.get("model", "")
        if not model or not self._has(model):
            return self._no_model(request, model, serial)
        socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=realtime.MESSAGE_LIMIT, compress=False)
        socket.headers.update(self._headers(serial, {}, 0.0))
        await socket.prepare(request)
        await realtime.Session(self.provider, socket, model, serial).run()
        return socket

    async def _list_models(self, request: web.Request, serial: str) -> web.Response:
        names = self.provider.profile.models
        if _is_anthropics(request):
            return self._json(200, messages.models(names), serial)
        return self._json(200, {"object": "list", "data": [_model(name) for name in names or _MODELS]}, serial)

    async def _show_model(self, request: web.Request, serial: str) -> web.Response:
        name = request.match_info["model"]
        if not self._has(name):
            return self._no_model(request, name, serial)
        return self._json(200, messages.model(name) if _is_anthropics(request) else _model(name), serial)

    async def _unknown(self, request: web.Request) -> web.Response:
        serial = self._next_serial()
        if self.seen.maxlen:
            await self._remember(request)
        if request.path in self._endpoints or request.path in (*_FROM_FORMS, "/v1/models", "/v1/files"):
            message = f"Not allowed to {request.method} on {request.path}."
            return self._wrong(request, 405, message, serial, code="method_not_supported")
        return self._wrong(request, 404, f"Invalid URL ({request.method} {request.path})", serial)

    def _has(self, model: str) -> bool:
        models = self.provider.profile.models
        return not models or model in models

    def _no_model(self, request: web.Request, model: str, serial: str) -> web.Response:
        message = f"The model `{model}` does not exist or you do not have access to it."
        return self._wrong(request, 404, message, serial, code="model_not_found")

    def _wrong(
        self, request: web.Request, status: int, message: str, serial: str, code: str | None = None
    ) -> web.Response:
        return self._error(request, status, wording.error(message, "invalid_request_error", code=code), serial)

    def _error(
        self,
        request: web.Request,
        status: int,
        said: dict[str, object],
        serial: str,
        limits: Mapping[str, str] | None = None,
    ) -> web.Response:
        told = wording.for_anthropics_clients(status, said) if _is_anthropics(request) else said
        return self._json(status, told, serial, limits)

    def _json(
        self, status: int, said: Mapping[str, object], serial: str, limits: Mapping[str, str] | None = None
    ) -> web.Response:
        headers = self._headers(serial, limits or {}, 0.0)
        return web.Response(
            status=status, body=msgspec.json.encode(said), headers=headers, content_type="application/json"
        )

    def _headers(self, serial: str, limits: Mapping[str, str], seconds: float) -> dict[str, str]:
        headers = {"request-id" if self.provider.style is Style.ANTHROPIC else "x-request-id": f"req_{serial}"}
        if self.provider.style in (Style.OPENAI, Style.AZURE):
            headers["openai-processing-ms"] = str(round(seconds * 1000))
            headers["openai-version"] = "2020-10-01"
            headers["openai-organization"] = wording.ORGANIZATION
        return headers | dict(limits)


@asynccontextmanager
async def serving(
    profile: Profile, *, host: str = "127.0.0.1", port: int = 0, seed: int = 0, remember: int = 0
) -> AsyncIterator[Simulator]:
    """A simulated provider that listens as long as the block lasts; answers still under way at its end are cut off.

    Args:
        port: 0 takes a free one.
        remember: so many of the latest requests stand in `seen`.
    """
    now = asyncio.get_running_loop().time()
    provider = Provider(profile, seed, started=now, epoch=time.time() - now)
    simulator = Simulator(provider, seed=seed, remember=remember)
    runner = web.AppRunner(
        simulator.application(), handler_cancellation=True, access_log=None, shutdown_timeout=_STOP_SECONDS
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=_BACKLOG)
        await site.start()
        simulator.host, simulator.port = host, runner.addresses[0][1]
        yield simulator
    finally:
        await runner.cleanup()


async def _until(at: float) -> None:
    """Sleep until the event loop's clock shows `at`; not at all if it does already."""
    left = at - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)


def _reset(request: web.Request) -> web.Response:
    """Break the connection with a TCP reset; what is returned never leaves."""
    transport = request.transport
    if transport is not None:
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() then sends RST, not FIN
        transport.abort()
    return web.Response(status=500)


async def _broken_off(request: web.Request, response: web.StreamResponse, *, clean: bool) -> web.StreamResponse:
    """End an answer in its middle: as if it were over, or by closing the connection without the last chunk.

    Closed, not aborted: what was written before must arrive, and uvloop writes at the end of the loop's turn.
    """
    if clean:
        await response.write_eof()
    elif request.transport is not None:
        request.transport.close()
    return response


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 1_721_172_741, "owned_by": "simulator"}


def _is_anthropics(request: web.Request) -> bool:
    """Whether a client of Anthropic's API asks."""
    return "anthropic-version" in request.headers or request.path.startswith("/v1/messages")
