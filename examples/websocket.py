"""Words over a WebSocket: a realtime session for each question, and the words as they come."""

from __future__ import annotations

import asyncio
import json

import aiohttp

from examples.asking import Answers, prompts

COUNT = 12
MODEL = "gpt-realtime"


async def _session(http: aiohttp.ClientSession, base_url: str, prompt: str) -> str:
    said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": prompt}]}
    words = ""
    async with http.ws_connect(f"{base_url}/realtime?model={MODEL}") as socket:
        await socket.send_json({"type": "conversation.item.create", "item": said})
        await socket.send_json({"type": "response.create"})
        async for message in socket:
            event = json.loads(message.data)
            if event["type"] == "error":
                raise ConnectionError(event["error"]["message"])
            if event["type"] == "response.output_text.delta":
                words += event["delta"]
            if event["type"] == "response.done":
                return words
    raise ConnectionError("the session ended before its answer")


async def copied(base_url: str) -> Answers:
    async with aiohttp.ClientSession(headers={"authorization": "Bearer any"}) as http:
        sessions = (_session(http, base_url, prompt) for prompt in prompts(COUNT))
        return await asyncio.gather(*sessions, return_exceptions=True)


async def through(base_url: str) -> Answers:
    """The same: a session passes through the gateway, which gives it a place for as long as it lasts."""
    return await copied(base_url)
