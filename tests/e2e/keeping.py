"""An upstream that keeps what is made at it, as OpenAI does: responses, files, vector stores, ..."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Keeper:
    """
    Attributes:
        name: a part of the ids it gives.
        kept: what was made, by id: what it is told as.
        content: the bodies of files.
        asked: method and path of all requests, in order.
        status: of every answer, where it is not 0.
        has_files: whether it knows the endpoints of files.
    """

    name: str
    port: int = 0
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    content: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    status: int = 0
    has_files: bool = True

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path_qs.removeprefix('/v1')}")
        body = await request.read()
        if self.status:
            return _error(self.status, "out of order")
        if request.path == "/v1/responses":
            return await self._respond(request, json.loads(body))
        if request.path.startswith("/v1/files"):
            return self._file(request, body)
        if request.method == "POST" and request.path.count("/") == 2:
            return web.json_response(self._keep({"object": request.path[4:]}))
        if request.path == "/v1/chat/completions":
            return web.json_response(self._keep({"object": "chat.completion", "choices": []}))
        return self._thing(request)

    def _keep(self, told: dict[str, Any]) -> dict[str, Any]:
        told = {"id": f"thing_{self.name}_{len(self.kept)}"} | told
        self.kept[told["id"]] = told
        return told

    async def _respond(self, request: web.BaseRequest, asked: dict[str, Any]) -> web.StreamResponse:
        before = asked.get("previous_response_id")
        if before is not None and before not in self.kept:
            return _error(400, f"Previous response with id '{before}' not found.", "previous_response_not_found")
        told = self._keep({"object": "response", "status": "completed", "model": asked["model"], "output": []})
        if not asked.get("stream"):
            return web.json_response(told)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for kind in ("response.created", "response.completed"):
            event = json.dumps({"type": kind, "response": told})
            await answer.write(f"event: {kind}\ndata: {event}\n\n".encode())
        return answer

    def _file(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        if not self.has_files:
            return _error(404, "Not Found")
        if request.path != "/v1/files":
            return self._thing(request)
        if request.method == "POST":
            told = self._keep({"object": "file", "purpose": "assistants"})
            self.content[told["id"]] = body
            return web.json_response(told)
        files = [told for told in self.kept.values() if told["object"] == "file"]
        if after := request.query.get("after"):
            at = next((at for at, told in enumerate(files) if told["id"] == after), None)
            if at is None:
                return _error(400, f"no file {after}")
            files = files[at + 1 :]
        most = int(request.query.get("limit", "10000"))
        return web.json_response({"object": "list", "data": files[:most], "has_more": len(files) > most})

    def _thing(self, request: web.BaseRequest) -> web.StreamResponse:
        thing = next((part for part in request.path.split("/") if part in self.kept), None)
        if thing is None:
            return _error(404, f"nothing at {request.path}")
        if request.method == "DELETE":
            del self.kept[thing]
            return web.json_response({"id": thing, "deleted": True})
        if request.path.endswith("/content"):
            return web.Response(body=self.content[thing])
        return web.json_response(self.kept.get(thing))


def _error(status: int, message: str, code: str | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status)


@asynccontextmanager
async def keeping(name: str, **said: Any) -> AsyncIterator[Keeper]:
    """A keeper on a free port, for the length of the block."""
    keeper = Keeper(name, **said)
    runner = web.ServerRunner(web.Server(keeper.answer, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        keeper.port = runner.addresses[0][1]
        yield keeper
    finally:
        await runner.cleanup()
