"""A realtime session with the simulated provider."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import aiohttp

from proxy.core.realtime import Reader
from proxy.core.usage import Usage
from proxy.simulator import ALWAYS, profiles, serving

FOUR_TOKENS = replace(profiles.INSTANT, output_tokens=4)
HELLO: Any = {
    "type": "conversation.item.create",
    "item": {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
}


async def test_a_session_echoes_counts_and_sends_back_what_is_binary() -> None:
    async with serving(FOUR_TOKENS) as simulator, aiohttp.ClientSession() as http:
        url = f"{simulator.base_url}/realtime?model=gpt-realtime"
        async with http.ws_connect(url, headers={"authorization": "Bearer sk"}, protocols=("realtime",)) as socket:
            assert socket.protocol == "realtime"
            heard, reader = [], Reader()
            await socket.send_json(HELLO)
            await socket.send_json({"type": "response.create"})
            while not heard or heard[-1]["type"] != "response.done":
                raw = await socket.receive_str()
                reader.hear(raw.encode())
                heard.append(json.loads(raw))
            await socket.send_bytes(b"\x00\xff")
            assert await socket.receive_bytes() == b"\x00\xff"
    assert heard[0]["type"] == "session.created"
    assert "".join(event["delta"] for event in heard if event["type"].endswith(".delta")) == "echo: hello runs down the"
    assert reader.usage == Usage(1, 4)
    assert reader.finish_reason == "completed"


async def test_what_is_wrong_is_told_as_an_event_or_before_the_session() -> None:
    async with serving(replace(FOUR_TOKENS, models=("gpt-realtime",))) as simulator, aiohttp.ClientSession() as http:
        key = {"authorization": "Bearer sk"}
        for query, headers, status in (("model=other", key, 404), ("", key, 404), ("model=gpt-realtime", {}, 401)):
            async with http.get(f"{simulator.base_url}/realtime?{query}", headers=headers) as answer:
                assert answer.status == status
        async with http.ws_connect(f"{simulator.base_url}/realtime?model=gpt-realtime", headers=key) as socket:
            simulator.provider.slow_down = ALWAYS
            for said in ("no JSON", '{"type": "dance"}', '{"type": "response.create"}'):
                await socket.send_str(said)
            codes = [event["error"]["code"] for event in [await socket.receive_json() for _ in range(4)][1:]]
    assert codes == ["invalid_json", "invalid_value", "rate_limit_exceeded"]
