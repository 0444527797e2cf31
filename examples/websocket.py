"""Words over a WebSocket, for a page in a browser: a prompt goes in, and the words of its answer come out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from openai import APIError

from examples.asking import MODEL, Answers, client, prompts, words

COUNT = 12


@asynccontextmanager
async def served(base_url: str) -> AsyncIterator[str]:
    """The service that is copied: it asks the provider, and passes the words on. Yields its address."""

    async def answer(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            try:
                async for word in words(openai, message.json()["prompt"]):
                    await socket.send_json({"token": word})
                await socket.send_json({"done": True})
            except APIError as error:
                await socket.send_json({"error": {"message": str(error)}})
        return socket

    app = web.Application()
    app.router.add_get("/stream", answer)
    async with client(base_url) as openai:
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()


async def talk(http: aiohttp.ClientSession, service: str, prompt: str) -> str:
    """What the page does."""
    async with http.ws_connect(f"{service}/stream") as socket:
        await socket.send_json({"prompt": prompt, "model": MODEL})
        answer = ""
        while "done" not in (said := await socket.receive_json()):
            if "error" in said:
                raise ConnectionError(said["error"]["message"])
            answer += said["token"]
        return answer


async def _all(service: str) -> Answers:
    async with aiohttp.ClientSession() as http:
        return await asyncio.gather(*(talk(http, service, prompt) for prompt in prompts(COUNT)), return_exceptions=True)


async def copied(base_url: str) -> Answers:
    async with served(base_url) as service:
        return await _all(service)


async def through(base_url: str) -> Answers:
    """No service of one's own: the gateway is one."""
    return await _all(base_url.removesuffix("/v1"))
