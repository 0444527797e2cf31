"""The cases: a fault, where it strikes, and what makes a call survive it.

Each yields trials without end, drawn from a chance that the seed decides; a case that has a number of places takes them
all before it begins anew, in an order of which any beginning is spread over all of them.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.faults.world import STREAM, Trial, World
from tests.e2e.running import ASK, CHAT, until
from tests.e2e.scripted import (
    DONE,
    ECHO,
    EVENT_STREAM,
    LAST,
    TELLING,
    Act,
    Play,
    Step,
    answer,
    chunk,
    event,
    refusal,
    stream,
    words,
)
from tests.e2e.wire import request

MESSAGES = "/v1/messages"
CLAUDE = STREAM | {"model": "claude", "max_tokens": 10}
TEXT = "Zürich \u2028 🏔 of many words, which are told one by one; "
LONG = b"".join(
    (
        b"\xef\xbb\xbf: keep-alive\n\n",
        *(words(f"{number} {TEXT}") for number in range(24)),
        b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n',
        b"data: " + json.dumps({"choices": [], "pad": "x" * 1500}).encode() + b"\n\n",
        words("", "stop"),
        DONE,
    )
)  # 5 kB
ANTHROPIC = b"".join(
    b"event: %b\n" % said["type"].encode() + event(said)  # type: ignore[attr-defined]
    for said in (
        {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 3, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": f"{number} {TEXT}"}}
            for number in range(8)
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    )
)
JSON = json.dumps(ECHO).encode()
HEAD_CLOSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
HEAD_1_0 = HEAD_CLOSE.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"connection: close\r\n", b"")


def sized(body: bytes, kind: bytes = b"text/event-stream") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


def chunked(body: bytes, head: bytes = EVENT_STREAM) -> bytes:
    """In chunks of an event each."""
    events = body.split(b"\n\n")[:-1]
    return head + b"".join(chunk(each + b"\n\n") for each in events) + LAST


def everywhere(count: int, draw: random.Random) -> Iterator[int]:
    """All numbers below `count`, again and again."""
    step = next(step for step in itertools.count(round(count * 0.618)) if math.gcd(step, count) == 1)
    at = draw.randrange(count)
    while True:
        yield at
        at = (at + step) % count


# ── streams that break ──


def cut(
    raw: bytes, events: bytes, end: Act, said: object = STREAM, path: str = CHAT
) -> Callable[[random.Random], Iterator[Trial]]:
    """At every byte."""

    def trials(draw: random.Random) -> Iterator[Trial]:
        for at in everywhere(len(raw) + 1, draw):
            yield lambda world, at=at: told_truly(world, [raw[:at], end], events, said, path)

    return trials


def split(
    raw: bytes, events: bytes, said: object = STREAM, path: str = CHAT
) -> Callable[[random.Random], Iterator[Trial]]:
    """Between any two bytes."""

    def trials(draw: random.Random) -> Iterator[Trial]:
        for at in everywhere(len(raw) - 1, draw):
            pause = asyncio.Event()
            play = (raw[: at + 1], pause, raw[at + 1 :])
            yield lambda world, play=play, pause=pause: passed_on(world, play, events, pause, said, path)

    return trials


def cut_unframed(draw: random.Random) -> Iterator[Trial]:
    """Behind its finish reason nothing tells a cut from an end."""
    raw = HEAD_CLOSE + LONG
    for at in everywhere(len(raw) + 1, draw):

        async def trial(world: World, at: int = at) -> bool:
            heard = await world.call([raw[:at], Act.FIN])
            finished = b'"finish_reason":"stop"' in heard.told and LONG.startswith(heard.told) and heard.is_whole
            return finished or heard.is_true_to(LONG)

        yield trial


async def told_truly(world: World, play: Play, events: bytes, said: object = STREAM, path: str = CHAT) -> bool:
    return (await world.call(play, said, path)).is_true_to(events)


async def passed_on(
    world: World, play: Play, events: bytes, pause: asyncio.Event, said: object = STREAM, path: str = CHAT
) -> bool:
    asyncio.get_running_loop().call_soon(pause.set)
    heard = await world.call(play, said, path)
    return heard.is_whole and heard.told == events


def corrupt(draw: random.Random) -> Iterator[Trial]:
    """One byte is another one. What of it is no fault of HTTP's passes; nothing may hang, nor end without an end."""
    raw = chunked(LONG)
    while True:
        at, byte = draw.randrange(len(raw)), bytes([draw.randrange(256)])
        spoilt = raw[:at] + byte + raw[at + 1 :]
        yield lambda world, spoilt=spoilt: ended(world, [spoilt, Act.FIN])


async def ended(world: World, play: Play, said: object = STREAM) -> bool:
    heard = await world.call(play, said)
    if heard.status != 200:
        return heard.is_whole and heard.status >= 400
    if not heard.headers.get("content-type", "").startswith("text/event-stream"):
        return True
    return heard.is_whole and (heard.says_so or b"[DONE]" in heard.body or b'"stop"' in heard.body)


def silent(draw: random.Random) -> Iterator[Trial]:
    raw = chunked(LONG)
    while True:
        at = draw.randrange(len(raw) - len(LAST))
        yield lambda world, at=at: told_truly(world, [raw[:at], Act.SILENCE], LONG, STREAM | {"model": "hasty"})


def junk_after(draw: random.Random) -> Iterator[Trial]:
    while True:
        junk = draw.randbytes(draw.randrange(1, 4000)) if draw.random() < 0.5 else words("late") * draw.randrange(1, 50)
        together = draw.random() < 0.5
        body = chunk(LONG + junk) if together else chunk(LONG) + chunk(junk)
        end = draw.choice([LAST, Act.FIN, Act.RST, Act.SILENCE])
        yield lambda world, body=body, end=end: told_truly(world, [EVENT_STREAM + body, end], LONG)


def error_events(draw: random.Random) -> Iterator[Trial]:
    """Told by the upstream itself, and passed on as they are."""
    kinds = (
        event({"error": {"message": "overheated", "type": "server_error", "code": None}}),
        event({"error": {"message": "overheated", "code": 503}}),
        event({"error": "overheated"}),
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n',
    )
    while True:
        told = words("one") * draw.randrange(4) + draw.choice(kinds)
        end = draw.choice(([LAST], [chunk(DONE), LAST], [Act.FIN]))
        done = DONE if len(end) == 2 else b""

        async def trial(world: World, told: bytes = told, end: list[Step] = end, done: bytes = done) -> bool:
            heard = await world.call([EVENT_STREAM + chunk(told), *end])
            return heard.is_whole and heard.told == told + done

        yield trial


# ── answers that are no streams ──


def cut_json(raw: bytes, end: Act) -> Callable[..., Iterator[Trial]]:
    def trials(draw: random.Random) -> Iterator[Trial]:
        for at in everywhere(len(raw) + 1, draw):
            yield lambda world, at=at: never_short(world, [raw[:at], end], JSON)

    return trials


async def never_short(world: World, play: Play, body: bytes, said: object = ASK) -> bool:
    """All of it, or what HTTP itself says is not whole, or an error; as an event, where a comment had left."""
    heard = await world.call(play, said)
    if heard.status != 200:
        return heard.is_whole and heard.status in (502, 504)
    return heard.body == body or heard.says_so if heard.is_whole else body.startswith(heard.body)


def compressed(draw: random.Random) -> Iterator[Trial]:
    body = gzip.compress(LONG)
    head = EVENT_STREAM.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    raw = head + b"".join(chunk(body[at : at + 99]) for at in range(0, len(body), 99)) + LAST
    for at in everywhere(len(raw) + 1, draw):
        end = draw.choice([Act.FIN, Act.RST])
        yield lambda world, at=at, end=end: never_short(world, [raw[:at], end], body, STREAM)


# ── upstreams as they are ──


def varied(draw: random.Random) -> Iterator[Trial]:
    """What servers that people run do differently; each passes as it came."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    finish = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage})
    streams = (
        (chunked(words("one") + finish), words("one") + finish),  # transformers: no [DONE], usage with the finish
        (chunked(words("one") + words("", "stop") + DONE), words("one") + words("", "stop") + DONE),  # no usage at all
        (HEAD_1_0 + LONG, LONG),
        (HEAD_CLOSE + LONG, LONG),
        (sized(LONG), LONG),
        (sized(LONG.replace(b"\n", b"\r\n")), LONG.replace(b"\n", b"\r\n")),
        (sized(LONG.replace(b"\n", b"\r")), LONG.replace(b"\n", b"\r")),
    )
    refusals: tuple[list[Step], ...] = (
        refusal(400, message="no"),
        answer({"error": {"message": "no", "code": 40012}}, 400),
        answer({"code": 40012, "message": "no"}, 422),
        answer(b"Internal Server Error", 500, {"content-type": "text/plain"}),
        answer(b"<html>Bad Gateway</html>", 502, {"content-type": "text/html"}),
        answer(b"", 404),
    )
    while True:
        if draw.random() < 0.6:
            raw, events = draw.choice(streams)
            end: list[Step] = [Act.FIN] if raw.startswith((HEAD_1_0, HEAD_CLOSE)) or draw.random() < 0.5 else []

            async def passes(world: World, play: Play = (raw, *end), events: bytes = events) -> bool:
                heard = await world.call(play)
                return heard.is_whole and heard.told == events

            yield passes
        else:
            play = draw.choice(refusals)

            async def refused(world: World, play: list[Step] = play) -> bool:
                heard = await world.call(play, ASK)
                assert isinstance(play[0], bytes)
                return heard.is_whole and play[0].endswith(heard.body) and b" %d " % heard.status in play[0][:13]

            yield refused


def closing(draw: random.Random) -> Iterator[Trial]:
    """As llama.cpp's server: closes after every stream, at once or when the next request has come."""
    streamed: set[object] = set()
    while True:
        is_streamed, at_once = draw.random() < 0.7, draw.random() < 0.5

        async def trial(world: World, is_streamed: bool = is_streamed, at_once: bool = at_once) -> bool:
            def steps() -> Iterator[Step]:
                if world.upstream.serving in streamed:
                    yield Act.FIN
                elif is_streamed:
                    streamed.add(world.upstream.serving)
                    yield from stream(*TELLING)
                    if at_once:
                        yield Act.FIN
                else:
                    yield from answer(ECHO)

            heard = await world.call(_Anew(steps), STREAM if is_streamed else ASK)
            return heard.status == 200 and heard.is_whole

        yield trial


class _Anew:
    """A play that is made up each time it is played."""

    def __init__(self, steps: Callable[[], Iterator[Step]]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Step]:
        return self._steps()


# ── clients ──


def leaving(model: str) -> Callable[..., Iterator[Trial]]:
    """At a random moment, by FIN or by RST, from a stream or from an answer in one piece."""

    def trials(draw: random.Random) -> Iterator[Trial]:
        while True:
            said = (STREAM if draw.random() < 0.7 else ASK) | {"model": model}
            play: list[Step] = [EVENT_STREAM, *map(chunk, TELLING[:2]), Act.SILENCE]
            if draw.random() < 0.3:
                play = [Act.SILENCE]
            patience, rude = draw.expovariate(100.0), draw.random() < 0.5

            async def trial(
                world: World,
                play: list[Step] = play,
                said: object = said,
                patience: float = patience,
                rude: bool = rude,
            ) -> bool:
                line, _ = await world.begin(play, said)
                await until(lambda: world.house.in_flight or world.house.waiting, "taken in")
                await asyncio.sleep(patience)  # the moment is the fault
                (line.vanish if rude else line.leave)()
                return True  # what it leaves behind is looked at when all have gone

            yield trial

    return trials


def deaf(draw: random.Random) -> Iterator[Trial]:
    """A reader that stops for ever: its call is ended, and its place free."""
    flood = [EVENT_STREAM, *[chunk(words("x" * 65_000))] * 12]
    while True:

        async def trial(world: World) -> bool:
            line, key = await world.begin(flood, STREAM)
            line.writer.transport.pause_reading()  # type: ignore[attr-defined]
            exchange = await world.exchange(key)
            await exchange.gone.wait()
            line.writer.transport.abort()
            return True

        yield trial


def pinged(draw: random.Random) -> Iterator[Trial]:
    while True:
        before, between = draw.random() < 0.5, draw.random() < 0.5

        async def trial(world: World, before: bool = before, between: bool = between) -> bool:
            first, second = asyncio.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.call_later(0.5 * before, first.set)
            loop.call_later(0.5 * (before + between), second.set)
            half = len(LONG) // 2
            play = [first, EVENT_STREAM + chunk(LONG[:half]), second, chunk(LONG[half:]), LAST]
            heard = await world.call(play, STREAM)
            pings = heard.body.count(b": ping\n\n")
            return heard.is_whole and heard.told == LONG and (pings > 0 or not (before or between))

        yield trial


def malformed(draw: random.Random) -> Iterator[Trial]:
    """What is no request, or one that has two readings, gets an error of its own, and its connection an end."""
    good = request(STREAM)
    heads = (
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n"
        b"0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
        b"GET http://evil/v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /v1/../admin/limits HTTP/1.1\r\nhost: a\r\n\r\n",
        b"TRACE /v1/models HTTP/1.1\r\nhost: a\r\n\r\n",
        good.replace(b'"messages"', b'"messages'),
        good.replace(b'"model": "m"', b'"model": 5   '[:12]),
    )
    while True:
        raw = draw.choice(heads)
        yield lambda world, raw=raw: refused_raw(world, raw)


def unfinished(draw: random.Random) -> Iterator[Trial]:
    """A request of which no more comes: it is told so, and its connection ends."""
    whole = request(STREAM)
    for at in everywhere(len(whole) - 1, draw):

        async def trial(world: World, at: int = at) -> bool:
            heard = await world.raw(whole[: at + 1], ends=True)
            return heard.is_whole and heard.status == 408

        yield trial


async def refused_raw(world: World, raw: bytes) -> bool:
    heard = await world.raw(raw)
    return heard.is_whole and 400 <= heard.status < 502 and b'"error"' in heard.body


# ── all of them ──


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    meaning: str
    trials: Callable[[random.Random], Iterator[Trial]]
    number: int  # in a full run


LONG_RAW, ANTHROPIC_RAW = chunked(LONG), chunked(ANTHROPIC)
CASES = (
    Case(
        "stream cut, FIN",
        "a chunked stream of 5 kB is cut at every byte; the connection ends in order",
        cut(LONG_RAW, LONG, Act.FIN),
        len(LONG_RAW) + 1,
    ),
    Case("stream cut, RST", "the same, and the connection is reset", cut(LONG_RAW, LONG, Act.RST), len(LONG_RAW) + 1),
    Case("stream with a length cut", "short of its content-length, FIN", cut(sized(LONG), LONG, Act.FIN), 1200),
    Case("stream without a length cut", "that lasts until its connection closes, FIN", cut_unframed, 1200),
    Case(
        "Anthropic's stream cut, FIN",
        "2 kB, at every byte",
        cut(ANTHROPIC_RAW, ANTHROPIC, Act.FIN, CLAUDE, MESSAGES),
        len(ANTHROPIC_RAW) + 1,
    ),
    Case(
        "Anthropic's stream cut, RST",
        "the same",
        cut(ANTHROPIC_RAW, ANTHROPIC, Act.RST, CLAUDE, MESSAGES),
        len(ANTHROPIC_RAW) + 1,
    ),
    Case("stream split", "the 5 kB, between any two bytes, in two pieces", split(LONG_RAW, LONG), len(LONG_RAW) - 1),
    Case(
        "Anthropic's stream split",
        "the 2 kB, likewise",
        split(ANTHROPIC_RAW, ANTHROPIC, CLAUDE, MESSAGES),
        len(ANTHROPIC_RAW) - 1,
    ),
    Case("stream corrupted", "any one byte of head, framing or events is another one", corrupt, 1440),
    Case("stream silent", "from any byte on, until the idle deadline", silent, 720),
    Case("bytes after [DONE]", "more events, or anything, then an end, a reset, silence", junk_after, 960),
    Case("error events", "of either dialect, under status 200", error_events, 960),
    Case(
        "answer cut, chunked",
        "JSON in chunks, RST at every byte",
        cut_json(EVENT_STREAM.replace(b"text/event-stream", b"application/json") + chunk(JSON) + LAST, Act.RST),
        720,
    ),
    Case("answer cut, with a length", "FIN at every byte", cut_json(sized(JSON, b"application/json"), Act.FIN), 720),
    Case(
        "answer cut, without a length",
        "HTTP/1.0, FIN at every byte",
        cut_json(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n" + JSON, Act.FIN),
        720,
    ),
    Case("compressed stream cut", "gzip, FIN or RST at every byte", compressed, 720),
    Case("servers as they are", "no [DONE], no usage, HTTP/1.0, CR, CRLF, odd error bodies and codes", varied, 960),
    Case("connections that go stale", "closed after each stream, at once or under the next request", closing, 2040),
    Case("clients that leave", "waiting or streaming, FIN or RST, at any moment", leaving("up"), 960),
    Case("clients that leave, read on", "the same where the upstream has drain_seconds", leaving("draining"), 240),
    Case("readers that stop", "and never read again", deaf, 1000),
    Case("silence told over", "comments before the first event and between two", pinged, 120),
    Case("malformed requests", "TLS, two lengths, bad chunks, paths with dots, broken JSON", malformed, 480),
    Case("unfinished requests", "of which nothing comes behind any byte of head or body", unfinished, 480),
)
