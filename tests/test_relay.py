"""The life of a request without sockets and without waiting: a scripted upstream, a sink that collects, virtual time.

Limits, gate, learner, telemetry and watch are the real ones. Time moves only where somebody waits, so every second of a
call must be found in its record as a wait: `World.live` checks that for every story told here.
"""

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import asked, breaker
from proxy.core.asked import Asked
from proxy.core.concurrency import Gradient
from proxy.core.gate import Gate, Priority
from proxy.core.learner import Learner
from proxy.core.outcome import CANCELLED, Outcome, Reason
from proxy.core.pool import Pool
from proxy.core.route import PACED_LIMIT
from proxy.core.usage import Usage
from proxy.errors import (
    ClientGone,
    Draining,
    NotFound,
    QueueFull,
    QueueTimeout,
    StreamTruncated,
    UpstreamBroke,
    UpstreamError,
    UpstreamGarbage,
    UpstreamShut,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.limits.local import LocalLimits
from proxy.plan import Route, Target
from proxy.relay import Call, Policy, Relay
from proxy.telemetry import Labels, Telemetry
from proxy.upstreams import AttemptFailed, Streamed, Upstream
from proxy.watch import Late, Watch
from tests.virtual_time import START, everybody_waits, in_virtual_time, loop, run

# ── what upstreams say ──


@dataclass
class Says:
    """An answer: after so many seconds its headers, then its body: bytes, pauses in seconds, and how it breaks."""

    status: int = 200
    body: tuple = ()
    headers: dict = field(default_factory=dict)
    after: float = 0.0


@dataclass
class Breaks:
    """No answer."""

    reason: Reason
    after: float = 0.0


def event(said):
    return b"data: " + (said if isinstance(said, bytes) else json.dumps(said).encode()) + b"\n\n"


def chunk(text=None, finish=None, **more):
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return event({"id": "c-1", "model": "m-1", "choices": [choice]} | more)


USAGE = {"prompt_tokens": 7, "completion_tokens": 9}
USAGE_EVENT = event({"id": "c-1", "choices": [], "usage": USAGE})
DONE = event(b"[DONE]")
EVENTS = (chunk("Hel"), chunk("lo"), chunk(finish="stop"))
WHOLE = (
    b'{"id":"c-1","model":"m-1","choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":9}}'
)


def streams(*body, after=0.0, **headers):
    return Says(200, body, {"content-type": "text/event-stream; charset=utf-8"} | headers, after)


def answers(body=WHOLE, *, status=200, after=0.0, **headers):
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    base = {"content-type": "application/json", "content-length": str(len(body))}
    return Says(status, (body,), base | told, after)


def refuses(status, code="", *, kind="", message="no", **headers):
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}}).encode()
    return answers(body, status=status, **headers)


STREAM = streams(*EVENTS, USAGE_EVENT, DONE)
MONEY = refuses(429, "insufficient_quota")
THROTTLED = refuses(429, "rate_limit_exceeded", kind="requests", retry_after="7")


class Transport:
    """Answers each upstream's requests from its script, one after the other; the last one again and again.

    Attributes:
        sent: what was asked: upstream, method, path, headers, body.
        open: exchanges that have not been left.
        read: chunks that were taken from answers.
    """

    def __init__(self, scripts):
        self.scripts = {name: list(script) for name, script in scripts.items()}
        self.sent, self.open, self.read = [], 0, 0

    @property
    def asked(self):
        return "".join(name for name, *_ in self.sent)

    @asynccontextmanager
    async def send(self, upstream, method, path, headers, body):
        if isinstance(body, Streamed):
            body = await self._taken(upstream, body)
        script = self.scripts[upstream.name]
        answer = script.pop(0) if len(script) > 1 else script[0]
        self.sent.append((upstream.name, method, path, headers, body))
        self.open += 1
        try:
            async with Watch() as watch:
                watch.expect(Reason.FIRST_BYTE, upstream.first_byte_seconds)
                await asyncio.sleep(answer.after)
                watch.rest()
                if isinstance(answer, Breaks):
                    raise AttemptFailed(answer.reason)
                yield Reply(self, answer, watch, upstream.idle_seconds)
        except Late as late:
            raise AttemptFailed(late.what) from late
        finally:
            self.open -= 1

    async def _taken(self, upstream, body):
        """What an upstream takes of a body that streams: all of it, or nothing where it cannot be reached."""
        if self.scripts[upstream.name][0] == Breaks(Reason.CONNECT):
            return b""
        return b"".join([part async for part in body.parts])


class Reply:
    def __init__(self, transport, answer, watch, idle_seconds):
        self.status, self.headers = answer.status, answer.headers
        self._transport, self._rest, self._watch, self._idle = transport, list(answer.body), watch, idle_seconds

    async def read(self):
        self._watch.expect(Reason.IDLE, self._idle)
        while self._rest:
            part = self._rest.pop(0)
            if isinstance(part, bytes):
                self._watch.rest()
                self._transport.read += 1
                return part
            if isinstance(part, Reason):
                raise AttemptFailed(part)
            await asyncio.sleep(part)
        self._watch.rest()
        return b""

    async def drain(self, seconds):
        """Pauses last, bytes are thrown away."""
        try:
            async with asyncio.timeout(seconds):
                while await self.read():
                    pass
        except (TimeoutError, AttemptFailed):
            pass

    async def body(self, limit):
        whole = b""
        while len(whole) < limit and (part := await self.read()):
            whole += part
        return whole[:limit]


class Sink:
    """Collects an answer as any sink may get it, and insists on the order of the calls.

    Args:
        slow: seconds that each call takes.
        gone_at: which call finds that the client has gone, counted from 1.
    """

    def __init__(self, *, slow=0.0, gone_at=0):
        self.slow, self.gone_at, self.calls = slow, gone_at, []
        self.status, self.headers, self.body, self.error = None, {}, b"", None

    @property
    def is_over(self):
        return bool({"finish", "fail"} & set(self.calls))

    async def _call(self, name):
        assert not self.is_over
        assert (self.status is None) == (name == "start")
        self.calls.append(name)
        await asyncio.sleep(self.slow)
        if len(self.calls) == self.gone_at:
            raise ClientGone

    async def start(self, status, headers):
        await self._call("start")
        self.status, self.headers = status, headers

    async def write(self, part):
        await self._call("write")
        self.body += part

    async def finish(self):
        await self._call("finish")

    async def fail(self, error):
        await self._call("fail")
        self.error = error


# ── the gateway around them ──


def upstream(name, **more):
    return Upstream(
        name, f"http://{name}.test/v1", f"{name}.test", 80, first_byte_seconds=30.0, idle_seconds=10.0, **more
    )


class World:
    """A gateway with one route, whose targets are named by the scripts; each has 5 places and learns its limits."""

    def __init__(self, *, places=10, queue_limit=100, draw=0.5, learn=True, upstreams=(), model=None, **scripts):
        self.now, self.learn = loop().time, learn
        known = {each.name: each for each in upstreams}
        self.targets = tuple(self._target(known.get(name) or upstream(name), model) for name in scripts)
        self.process = Pool("process", "process", places)
        self.limits = LocalLimits(Gate(self.process, queue_limit), self.now, self.wall, lambda: 0.5)
        self.transport = Transport(scripts)
        self.telemetry = Telemetry(
            Labels(models=("m",), upstreams=tuple(scripts)),
            now=self.now,
            wall=self.wall,
            draw_bits=lambda bits: (1 << bits) - 1,
        )
        self.relay = Relay(self.limits, self.transport, self.telemetry, self.now, self.wall, lambda: draw)

    def _target(self, known, model):
        account = Pool(f"{known.name}/m", f"{known.name}/m", rates=Learner(learn=self.learn, now=START))
        return Target(known, model, (Pool(f"upstream/{known.name}", f"upstream/{known.name}", 5), account), account)

    @staticmethod
    def wall():
        return 1.7e9

    @property
    def passed(self):
        """Seconds since the start."""
        return round(self.now() - START, 4)

    def call(self, *, stream=False, within=600.0, attempts=3, reports_usage=True, fields=(), **more):
        """Seconds of `within` until the deadline; a pause is half of 1, 2, 4 s and so on."""
        body = json.dumps({"model": "m", "stream": stream} | dict(fields)).encode()
        return Call(
            method="POST",
            path="/chat/completions",
            route=Route("m", "openai", self.targets),
            asked=asked.read(body),
            headers={"content-type": "application/json"},
            credential={"authorization": "Bearer client"},
            priority=Priority.DEFAULT,
            caller="",
            deadline=self.now() + within,
            policy=Policy(attempts, base_seconds=1.0, cap_seconds=20.0),
            reports_usage=reports_usage,
            **more,
        )

    async def live(self, call, sink):
        """One call's whole life; its record, and the gateway's own error if that was the end."""
        record = self.telemetry.begin("chat", "POST", "/v1/chat/completions", request_id="r", traceparent=None)
        error = None
        try:
            with self.telemetry.request(record):
                await self.relay.run(call, sink, record)
        except (QueueFull, QueueTimeout, Draining, UpstreamError) as caught:
            error = caught
        finally:
            check_the_account_of(record)
        if error is not None:
            assert sink.calls == []  # nothing was written, so the edge can answer
        return record, error

    async def ask(self, sink=None, **how):
        """As `live`, for those to whom only one call matters."""
        sink = sink or Sink()
        record, error = await self.live(self.call(**how), sink)
        self.is_at_rest()
        return record, sink, error

    def is_at_rest(self):
        """Nobody is inside, nobody waits, nothing is open, and what was reserved is settled."""
        pools = [self.process, *(pool for target in self.targets for pool in target.pools)]
        assert [pool.in_use for pool in pools] == [0] * len(pools)
        assert (self.limits.waiting, self.transport.open) == (0, 0)
        for target in self.targets:
            known = target.account.rates.snapshot(self.now())
            assert (known.unanswered, known.reserved) == (0, pytest.approx(0.0, abs=1e-6))


def check_the_account_of(record):
    """Every second is accounted for, once, and what happened is told in order."""
    assert record.queue_seconds + record.backoff_seconds + record.upstream_seconds + record.client_seconds == (
        pytest.approx(record.seconds, abs=1e-6)
    )
    assert all(attempt.ended is not None for attempt in record.attempts)
    spans = [(attempt.started, attempt.ended) for attempt in record.attempts]
    spans = sorted([*spans, *((pause.started, pause.ended) for pause in record.pauses)])
    assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(spans))
    assert (record.outcome is Outcome.OK) == (record.error_type == "") or record.outcome is Outcome.CANCELLED
    if record.attempts:
        assert record.upstream == record.attempts[-1].upstream


def reasons(record):
    return [attempt.meaning.reason.value for attempt in record.attempts]


# ── an answer is passed on ──


@in_virtual_time
async def test_an_answer_passes_as_it_is_and_its_record_tells_all_of_it():
    world = World(a=[answers(after=2.0, x_request_id="up-1", set_cookie="no", server="no")])
    record, sink, _ = await world.ask()
    assert (sink.status, sink.body, sink.calls) == (200, WHOLE, ["start", "write", "finish"])
    assert sink.headers == {"content-type": "application/json", "content-length": str(len(WHOLE))}
    assert (record.outcome, record.status, record.error_type) == (Outcome.OK, 200, "")
    assert (record.upstream, record.admitted, record.end_reason) == ("a", "immediate", "done")
    assert (record.usage, record.finish_reason) == (Usage(7, 9), "stop")
    assert (record.response_id, record.response_model, record.bytes_out) == ("c-1", "m-1", len(WHOLE))
    assert (record.first_byte, record.last_byte, record.upstream_seconds) == (START + 2.0, START + 2.0, 2.0)
    (attempt,) = record.attempts
    assert (attempt.status, attempt.request_id, attempt.model) == (200, "up-1", "m")
    assert (attempt.host, attempt.port, attempt.first_byte) == ("a.test", 80, START + 2.0)


@in_virtual_time
async def test_what_is_asked_goes_upstream_as_it_came():
    world = World(a=[answers()])
    call = world.call(fields={"temperature": 0.5})
    await world.live(call, Sink())
    assert world.transport.sent == [("a", "POST", "/chat/completions", call.headers, call.asked.body)]


@in_virtual_time
async def test_the_model_goes_upstream_under_its_name_there():
    world = World(a=[answers()], model="qwen3")
    record, *_ = await world.ask()
    assert json.loads(world.transport.sent[0][4])["model"] == "qwen3"
    assert record.attempts[0].model == "qwen3"


@in_virtual_time
async def test_a_request_without_a_body_goes_upstream_without_one():
    world = World(a=[answers(b'{"data":[]}')], model="qwen3")
    call = world.call()
    call.asked = Asked(body=b"", model="*", stream=False, max_tokens=None, wants_usage=False)
    record, _ = await world.live(call, Sink())
    assert record.outcome is Outcome.OK
    assert world.transport.sent[0][4] == b""


# ── a body that streams through ──


class Uploading:
    """A body of which what comes first is kept, and the rest can be taken once; as `proxy.api.uploads` makes it."""

    model, stream, max_tokens, wants_usage, input_tokens = "m", False, 0, False, 0.0

    def __init__(self, *rest, seconds=0.0, record=None):
        self.rest, self.seconds, self.record, self.is_spent = list(rest), seconds, record, False

    def rewritten(self, model, *, ask_usage):
        return Streamed(self.parts(), None)

    async def parts(self):
        yield b"head"
        self.is_spent = True
        while self.rest:
            part = self.rest.pop(0)
            if isinstance(part, Exception):
                raise part
            yield part


async def upload(world, *rest):
    call, sink = world.call(), Sink()
    call.asked = Uploading(*rest)
    record, error = await world.live(call, sink)
    world.is_at_rest()
    return record, sink, error


@in_virtual_time
async def test_a_body_streams_to_the_upstream():
    world = World(a=[answers()])
    record, sink, _ = await upload(world, b"-and-", b"rest")
    assert world.transport.sent[0][4] == b"head-and-rest"
    assert (record.outcome, sink.body) == (Outcome.OK, WHOLE)


@in_virtual_time
async def test_a_body_that_was_taken_in_part_is_not_sent_again():
    """Rule 6: whatever the refusal, the upstream's answer is the last word."""
    for refusal in (refuses(503), THROTTLED, MONEY, refuses(500)):
        world = World(a=[refusal], b=[answers()])
        _, sink, error = await upload(world, b"rest")
        assert error is None
        assert world.transport.asked == "a"
        assert sink.status == refusal.status
        assert "x-should-retry" not in sink.headers


@in_virtual_time
async def test_a_body_that_was_taken_in_part_and_got_no_answer_is_left_to_its_client():
    world = World(a=[Breaks(Reason.RESET)])
    record, _, error = await upload(world, b"rest")
    assert isinstance(error, UpstreamBroke)
    assert (error.should_retry, UpstreamBroke("").should_retry) == (None, False)
    assert reasons(record) == ["reset"]


@in_virtual_time
async def test_a_body_of_which_nothing_was_taken_goes_to_the_next_upstream():
    world = World(a=[Breaks(Reason.CONNECT)], b=[answers()])
    record, sink, _ = await upload(world, b"-rest")
    assert world.transport.asked == "ab"
    assert world.transport.sent[1][4] == b"head-rest"
    assert (record.outcome, sink.status) == (Outcome.OK, 200)


@in_virtual_time
async def test_what_breaks_the_body_is_not_blamed_on_the_upstream():
    world = World(a=[answers()])
    call, sink = world.call(), Sink()
    call.asked = Uploading(b"rest", ClientGone())
    with pytest.raises(ClientGone):
        await world.live(call, sink)
    world.is_at_rest()
    assert sink.calls == []
    assert world.relay.breakers["a"].state(world.now()).value == "closed"


# ── where a thing may be in several places ──


async def sought(**scripts):
    world = World(**scripts)
    call, sink = world.call(seeks="resp_1"), Sink()
    record, _ = await world.live(call, sink)
    return world.transport.asked, sink.status, record


@in_virtual_time
async def test_where_one_upstream_does_not_have_it_the_next_is_asked():
    asked_of, status, record = await sought(a=[refuses(404)], b=[answers()])
    assert (asked_of, status, record.upstream) == ("ab", 200, "b")


@in_virtual_time
async def test_where_none_has_it_that_is_said():
    with pytest.raises(NotFound, match="there is no `resp_1` here"):
        await sought(a=[refuses(404)], b=[refuses(400, "previous_response_not_found")])
    world = World(a=[refuses(404)], b=[answers()])
    await world.ask()
    assert world.transport.asked == "a"  # nobody sought


@pytest.mark.parametrize(("a", "b", "status"), [(500, 404, 500), (404, 500, 500), (401, 404, 401), (404, 400, 400)])
@in_virtual_time
async def test_that_one_has_it_not_is_no_last_word_while_another_did_not_say_so(a, b, status):
    asked_of, told, _ = await sought(a=[refuses(a)], b=[refuses(b)])
    assert (asked_of[:2], told) == ("ab", status)


@in_virtual_time
async def test_a_model_that_one_does_not_know_is_no_thing_that_is_absent():
    asked_of, status, _ = await sought(a=[refuses(404, "model_not_found")], b=[answers()])
    assert (asked_of, status) == ("a", 404)


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("traces", [True, False])
@in_virtual_time
async def test_the_clients_credential_and_its_trace_go_only_where_they_may(passes, traces):
    world = World(a=[answers()], upstreams=[upstream("a", passthrough=passes, propagate_trace=traces)])
    await world.ask()
    headers = world.transport.sent[0][3]
    assert (headers.get("authorization") == "Bearer client") == passes
    assert ("traceparent" in headers) == traces


@in_virtual_time
async def test_an_answer_without_a_body_is_begun_and_ended():
    world = World(a=[Says(204, (), {})])
    record, sink, _ = await world.ask()
    assert (sink.status, sink.body, sink.calls) == (204, b"", ["start", "finish"])
    assert (record.outcome, record.chunks) == (Outcome.OK, 0)


# ── a stream is passed on ──


@in_virtual_time
async def test_a_stream_passes_chunk_by_chunk():
    world = World(a=[streams(EVENTS[0], 1.0, EVENTS[1], 3.0, EVENTS[2], 0.5, DONE, after=2.0)])
    record, sink, _ = await world.ask(stream=True)
    assert sink.body == b"".join(EVENTS) + DONE
    assert sink.calls == ["start", *["write"] * 4, "finish"]
    assert "content-length" not in sink.headers
    assert (record.outcome, record.finish_reason, record.end_reason) == (Outcome.OK, "stop", "done")
    assert (record.first_byte, record.first_token, record.last_byte) == (START + 2, START + 2, START + 6.5)
    assert (record.chunks, record.max_gap_seconds, record.upstream_seconds) == (4, 3.0, 6.5)


@in_virtual_time
async def test_usage_is_asked_for_and_taken_out_again_where_the_client_did_not_ask():
    world = World(a=[STREAM])
    record, sink, _ = await world.ask(stream=True)
    assert json.loads(world.transport.sent[0][4])["stream_options"] == {"include_usage": True}
    assert sink.body == b"".join(EVENTS) + DONE
    assert record.usage == Usage(7, 9)


@pytest.mark.parametrize(
    "how",
    [
        {"stream": True, "fields": {"stream_options": {"include_usage": True}}},
        {"stream": True, "reports_usage": False},
        {"stream": False},
    ],
    ids=str,
)
@in_virtual_time
async def test_nothing_is_asked_for_or_taken_out_otherwise(how):
    world = World(a=[STREAM])
    call, sink = world.call(**how), Sink()
    record, _ = await world.live(call, sink)
    assert world.transport.sent[0][4] == call.asked.body
    assert sink.body == b"".join(EVENTS) + USAGE_EVENT + DONE
    assert record.usage == Usage(7, 9)


@in_virtual_time
async def test_headers_leave_with_the_first_byte_and_not_before():
    """Rule 2."""
    world = World(a=[streams(5.0, EVENTS[0][:10], 3.0, EVENTS[0][10:], EVENTS[2], after=1.0)])
    record, sink, _ = await world.ask(stream=True)
    assert record.first_byte == START + 9.0  # with the first whole event
    assert record.max_gap_seconds == 0.0  # what comes before it is no gap
    assert sink.body == EVENTS[0] + EVENTS[2]


@in_virtual_time
async def test_a_slow_client_stops_the_reading_of_the_upstream():
    world, sink = World(a=[streams(*[chunk("x")] * 50, EVENTS[2], DONE)]), Sink(slow=1.0)
    task = asyncio.create_task(world.ask(sink, stream=True))
    while not task.done():
        await asyncio.sleep(0.5)
        assert world.transport.read <= sink.calls.count("write") + 1
    record, *_ = await task
    assert record.client_seconds == 54.0
    assert record.upstream_seconds == 0.0


@in_virtual_time
async def test_a_place_ends_with_the_last_byte_and_not_with_the_headers():
    """Rule 1."""
    world = World(a=[streams(EVENTS[0], 5.0, EVENTS[2])])
    task = asyncio.create_task(world.ask(stream=True))
    await asyncio.sleep(4.0)
    assert [pool.in_use for pool in (world.process, *world.targets[0].pools)] == [1, 1, 1]
    await task


@in_virtual_time
async def test_a_compressed_stream_passes_unread():
    """It was asked not to be; the bytes are the client's to make sense of."""
    world = World(a=[streams(b"\x1f\x8b\x08", 1.0, b"\x00\n\nrest", **{"content-encoding": "gzip"})])
    record, sink, _ = await world.ask(stream=True)
    assert (sink.body, sink.headers["content-encoding"]) == (b"\x1f\x8b\x08\x00\n\nrest", "gzip")
    assert (record.outcome, record.usage) == (Outcome.OK, None)


# ── before the first byte, a failure is tried again ──

BROKEN = {
    "no connection": (Breaks(Reason.CONNECT, after=5.0), Reason.CONNECT, UpstreamUnreachable),
    "a reset": (Breaks(Reason.RESET), Reason.RESET, UpstreamBroke),
    "no HTTP": (Breaks(Reason.GARBAGE), Reason.GARBAGE, UpstreamGarbage),
    "no first byte": (answers(after=31.0), Reason.FIRST_BYTE, UpstreamTimeout),
    "headers and silence": (answers(b""), Reason.IDLE, UpstreamTimeout),
    "headers and a reset": (streams(Reason.RESET), Reason.RESET, UpstreamBroke),
    "an empty stream": (streams(), Reason.EOF, UpstreamBroke),
    "half an event": (streams(EVENTS[0][:-3], Reason.RESET), Reason.RESET, UpstreamBroke),
    "half a refusal": (Says(500, (b'{"err', Reason.RESET)), Reason.RESET, UpstreamBroke),
}
BROKEN["headers and silence"][0].body = (11.0,)


@pytest.mark.parametrize(("broken", "reason", "error"), BROKEN.values(), ids=BROKEN)
@in_virtual_time
async def test_whatever_breaks_before_the_first_byte_is_tried_at_the_next_upstream_at_once(broken, reason, error):
    world = World(a=[broken], b=[STREAM])
    record, sink, _ = await world.ask(stream=True)
    assert (sink.status, sink.body) == (200, b"".join(EVENTS) + DONE)
    assert (reasons(record), record.backoff_seconds) == ([reason.value, "none"], 0.0)
    assert (record.outcome, record.upstream, record.error_type) == (Outcome.OK, "b", "")


@pytest.mark.parametrize(("broken", "reason", "error"), BROKEN.values(), ids=BROKEN)
@in_virtual_time
async def test_where_nothing_else_is_left_the_gateway_says_itself_what_broke(broken, reason, error):
    """Rule 4."""
    world = World(a=[broken])
    record, _, caught = await world.ask(stream=True, attempts=2)
    assert type(caught) is error
    assert caught.should_retry is False
    assert "a" in str(caught)
    assert reasons(record) == [reason.value] * 2
    assert (record.outcome, record.error_type, record.error_source) == (Outcome.FAILED, reason.word, "upstream")
    assert record.first_byte is None


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 524, 529])
@in_virtual_time
async def test_an_answer_that_says_it_could_not_is_tried_elsewhere(status):
    world = World(a=[refuses(status)], b=[answers()])
    record, sink, _ = await world.ask()
    assert (sink.status, sink.body) == (200, WHOLE)
    assert [attempt.status for attempt in record.attempts] == [status, 200]


@in_virtual_time
async def test_the_pauses_grow_once_all_upstreams_have_failed():
    world = World(a=[refuses(500)], b=[refuses(500)])
    record, *_ = await world.ask(attempts=6)
    assert world.transport.asked == "ababab"
    waits = [(pause.kind, pause.ended - pause.started, pause.source, pause.reason) for pause in record.pauses]
    assert waits == [("backoff", seconds, "computed", "server") for seconds in (1.0, 2.0, 4.0, 8.0)]
    assert record.backoff_seconds == world.passed == 15.0


@in_virtual_time
async def test_a_pause_is_no_shorter_than_the_upstream_asked():
    world = World(a=[refuses(503, retry_after="9"), answers()])
    record, *_ = await world.ask()
    (pause,) = record.pauses
    assert (pause.ended - pause.started, pause.source, pause.reason) == (9.0, "retry_after", "full")
    assert record.attempts[0].retry_after == 9.0


@in_virtual_time
async def test_no_more_attempts_are_made_than_the_policy_allows():
    world = World(a=[refuses(500)])
    for attempts in (1, 2, 3):
        record, *_ = await world.ask(attempts=attempts)
        assert len(record.attempts) == attempts


@in_virtual_time
async def test_the_last_answer_is_passed_on_and_the_client_is_told_not_to_try_itself():
    """Rule 4."""
    world = World(a=[refuses(500, message="first"), refuses(503, message="last", retry_after="1")])
    record, sink, _ = await world.ask(attempts=2)
    assert (sink.status, json.loads(sink.body)["error"]["message"]) == (503, "last")
    assert sink.headers["x-should-retry"] == "false"
    assert sink.headers["retry-after"] == "1"
    assert int(sink.headers["content-length"]) == len(sink.body)
    assert (record.status, record.outcome, record.error_type) == (503, Outcome.OVERLOADED, "overloaded")
    assert record.bytes_out == len(sink.body)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
@in_virtual_time
async def test_the_askers_own_mistake_is_passed_on_at_once(status):
    world = World(a=[refuses(status, "bad", set_cookie="no")], b=[answers()])
    record, sink, _ = await world.ask()
    assert (sink.status, json.loads(sink.body)["error"]["code"]) == (status, "bad")
    assert not {"x-should-retry", "set-cookie"} & set(sink.headers)
    assert (world.transport.asked, world.passed) == ("a", 0.0)
    assert (record.outcome, record.error_type, record.error_source) == (Outcome.REJECTED, "upstream_4xx", "client")


@in_virtual_time
async def test_a_refusal_longer_than_any_real_one_is_cut_and_says_its_true_length():
    long = Says(400, (b"x" * 600_000,) * 3, {"content-type": "text/plain", "content-length": "1800000"})
    _, sink, _ = await World(a=[long]).ask()
    assert len(sink.body) == 1 << 20 == int(sink.headers["content-length"])


# ── money and credentials ──


@pytest.mark.parametrize("refusal", [MONEY, refuses(401), refuses(403)], ids=["money", "401", "403"])
@in_virtual_time
async def test_money_and_credentials_are_never_tried_again_where_they_were_refused(refusal):
    world = World(a=[refusal])
    record, sink, _ = await world.ask()
    assert (world.transport.asked, world.passed) == ("a", 0.0)
    assert sink.status == refusal.status
    assert sink.headers["x-should-retry"] == "false"
    assert record.outcome is Outcome.REJECTED


@pytest.mark.parametrize("refusal", [MONEY, refuses(401)], ids=["money", "401"])
@in_virtual_time
async def test_another_upstreams_money_may_still_be_good(refusal):
    world = World(a=[refusal], b=[answers()])
    _, sink, _ = await world.ask()
    assert (world.transport.asked, sink.status, world.passed) == ("ab", 200, 0.0)


@in_virtual_time
async def test_an_upstream_without_money_is_not_asked_again_for_a_minute():
    world = World(a=[MONEY, answers()])
    await world.ask()
    used = world.targets[0].account.rates.snapshot(world.now()).used
    for _ in range(10):
        record, sink, error = await world.ask()
        assert world.targets[0].account.rates.snapshot(world.now()).used == used  # what is not sent costs nothing
        assert isinstance(error, UpstreamShut)
        assert 0.0 < error.retry_after <= 60.0
        assert (record.attempts, record.outcome, record.error_type) == ([], Outcome.REJECTED, "overloaded")
        await asyncio.sleep(5.0)
    assert world.transport.asked == "a"
    await asyncio.sleep(10.0)
    _, sink, _ = await world.ask()
    assert sink.status == 200


@in_virtual_time
async def test_a_request_too_large_for_the_limit_is_not_tried_again():
    world = World(a=[refuses(429, kind="tokens", message="Request too large for m: limit 10, requested 20")])
    record, sink, _ = await world.ask()
    assert (world.transport.asked, sink.headers["x-should-retry"]) == ("a", "false")
    assert record.error_source == "client"


@in_virtual_time
async def test_what_an_upstream_said_is_the_last_word_though_another_is_shut():
    world = World(a=[MONEY], b=[refuses(500, message="b broke")])
    await world.ask(attempts=1)
    record, sink, _ = await world.ask(attempts=2)
    assert world.transport.asked == "ab"
    assert (sink.status, json.loads(sink.body)["error"]["message"]) == (500, "b broke")
    assert (record.upstream, record.outcome) == ("b", Outcome.FAILED)


# ── limits that are used up ──


@in_virtual_time
async def test_a_refusal_by_a_limit_is_waited_out_and_counts_as_no_failure():
    world = World(a=[THROTTLED, THROTTLED, answers()])
    record, sink, _ = await world.ask(attempts=1)
    assert sink.status == 200
    assert world.passed == pytest.approx(14.0, abs=0.2)
    assert reasons(record) == ["requests", "requests", "none"]
    assert {(pause.kind, pause.source, pause.reason, pause.gate) for pause in record.pauses} == {
        ("backoff", "limit", "requests", "a/m")
    }
    assert record.admitted == "immediate"


@in_virtual_time
async def test_while_a_limit_holds_the_call_keeps_the_processs_place_and_gives_back_the_targets():
    """Rule 3."""
    world = World(a=[THROTTLED, answers()])
    task = asyncio.create_task(world.ask())
    await asyncio.sleep(3.0)
    assert (world.process.in_use, [pool.in_use for pool in world.targets[0].pools]) == (1, [0, 0])
    assert world.transport.open == 0
    await task


@in_virtual_time
async def test_one_refusal_holds_back_everybody():
    world = World(a=[THROTTLED, answers()])
    calls = [asyncio.create_task(world.live(world.call(), Sink())) for _ in range(1)]
    await everybody_waits()
    calls += [asyncio.create_task(world.live(world.call(), Sink())) for _ in range(4)]
    await asyncio.sleep(6.9)
    assert world.transport.asked == "a"
    records = [record for record, _ in await asyncio.gather(*calls)]
    assert all(record.outcome is Outcome.OK for record in records)
    assert len(world.transport.sent) == 6
    world.is_at_rest()


@in_virtual_time
async def test_a_refusal_may_say_in_its_body_alone_when_to_come_back():
    said = "Rate limit reached on requests per min (RPM): Limit 3, Used 3. Please try again in 12s."
    world = World(a=[refuses(429, "rate_limit_exceeded", kind="requests", message=said), answers()])
    record, *_ = await world.ask()
    assert record.attempts[0].retry_after == 12.0
    assert world.passed == pytest.approx(12.0, abs=0.2)


@in_virtual_time
async def test_what_an_answer_tells_of_a_limit_is_kept_by_those_that_follow():
    told = {
        f"x_ratelimit_{part}_requests": said for part, said in (("limit", "60"), ("remaining", "0"), ("reset", "1m0s"))
    }
    world = World(a=[answers(**told), answers()])
    await world.ask()
    assert world.passed == 0.0
    record, *_ = await world.ask()
    assert world.passed == pytest.approx(1.2, abs=0.3)  # a call and a margin, at one a second
    assert (record.admitted, record.gate) == ("queued", "a/m")


@in_virtual_time
async def test_a_server_of_ones_own_gets_fewer_at_once_when_it_is_full_and_more_when_it_is_fast():
    world = World(learn=False, a=[refuses(503), streams(0.5, *EVENTS, after=0.5)])
    pool = world.targets[0].pools[0]
    pool.gradient, pool.concurrency = Gradient(), 20
    await world.ask(attempts=1)
    assert pool.concurrency == 18
    for _ in range(3):
        await asyncio.gather(*(world.live(world.call(stream=True), Sink()) for _ in range(10)))
    assert pool.concurrency > 18


@in_virtual_time
async def test_a_limit_that_is_used_up_at_one_upstream_need_not_be_waited_for_at_another():
    world = World(a=[THROTTLED], b=[answers()])
    record, sink, _ = await world.ask()
    assert (world.transport.asked, sink.status, world.passed) == ("ab", 200, 0.0)
    assert record.pauses == []


@in_virtual_time
async def test_a_limit_that_holds_beyond_the_deadline_makes_the_refusal_the_last_word():
    world = World(a=[THROTTLED])
    record, sink, error = await world.ask(within=5.0)
    assert error is None
    assert (sink.status, sink.headers["x-should-retry"]) == (429, "false")
    assert world.passed <= 5.1
    assert (record.outcome, record.error_type, record.status) == (Outcome.THROTTLED, "rate_limited", 429)


@in_virtual_time
async def test_an_upstream_that_refuses_for_ever_is_not_asked_for_ever():
    world = World(a=[refuses(429, kind="requests", retry_after="1")])
    record, sink, _ = await world.ask()
    assert len(record.attempts) == PACED_LIMIT + 1
    assert sink.status == 429


# ── what ends the trying ──


@in_virtual_time
async def test_a_pause_that_would_end_beyond_the_deadline_is_not_begun():
    world = World(a=[refuses(500, after=1.0)])
    record, sink, _ = await world.ask(within=3.2, attempts=10)
    assert (sink.status, record.backoff_seconds) == (500, 0.5)  # 1 s of attempt, 0.5 s of pause, 1 s, and not 1 s more
    assert len(record.attempts) == 2
    assert world.passed == 2.5


@pytest.mark.parametrize(("successes", "retries"), [(0, 30), (100, 40)])
@in_virtual_time
async def test_retries_are_few_beside_what_goes_well(successes, retries):
    """In one instant: three a second for ten seconds, and a tenth of the successes. The calls themselves all go."""
    world = World(draw=0.999, learn=False, a=[*[answers()] * successes, refuses(500)], b=[refuses(500)])
    for _ in range(successes + 50):
        await world.ask(attempts=2)
    assert (world.transport.asked.count("a"), world.transport.asked.count("b")) == (successes + 50, retries)
    assert world.passed == 0.0


# ── after the first byte, nothing is tried again ──


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ((EVENTS[0], 1.0, Reason.RESET), Reason.RESET),
        ((EVENTS[0], EVENTS[1][:9], Reason.RESET), Reason.RESET),
        ((EVENTS[0], Reason.GARBAGE), Reason.GARBAGE),
        ((EVENTS[0], 11.0, EVENTS[2]), Reason.IDLE),
        ((EVENTS[0], EVENTS[1]), Reason.EOF),
        ((EVENTS[0], EVENTS[1][:9]), Reason.EOF),
    ],
    ids=["a reset", "a reset within an event", "garbage", "silence", "an early end", "an end within an event"],
)
@in_virtual_time
async def test_a_stream_that_breaks_is_told_in_band_and_not_tried_again(body, reason):
    """Rule 2."""
    world = World(a=[streams(*body)], b=[STREAM])
    record, sink, _ = await world.ask(stream=True)
    assert world.transport.asked == "a"
    assert sink.calls[-1] == "fail"
    assert isinstance(sink.error, StreamTruncated)
    assert sink.body == b"".join(part for part in body if part in EVENTS[:2])  # whole events only
    assert (record.outcome, record.status, record.end_reason) == (Outcome.TRUNCATED, 200, reason.value)
    assert (record.error_type, record.error_source) == (reason.word, "upstream")
    assert record.attempts[0].meaning.outcome is Outcome.TRUNCATED


@in_virtual_time
async def test_a_body_that_breaks_off_is_not_ended_as_if_it_were_whole():
    world = World(a=[Says(200, (WHOLE[:20], Reason.RESET), {"content-type": "application/json"})])
    record, sink, _ = await world.ask()
    assert (sink.body, sink.calls[-1]) == (WHOLE[:20], "fail")
    assert (record.outcome, record.usage) == (Outcome.TRUNCATED, None)


@in_virtual_time
async def test_what_a_broken_stream_had_told_is_kept():
    world = World(a=[streams(*EVENTS, USAGE_EVENT, Reason.RESET)])
    record, *_ = await world.ask(stream=True)
    assert (record.usage, record.finish_reason, record.response_id) == (Usage(7, 9), "stop", "c-1")
    assert record.outcome is Outcome.TRUNCATED


@in_virtual_time
async def test_a_stream_that_told_an_error_buys_no_retry():
    broken = streams(EVENTS[0], event({"error": {"message": "out of memory", "code": 500}}), DONE)
    world = World(draw=0.999, learn=False, a=[*[broken] * 100, refuses(500)], b=[refuses(500)])
    for _ in range(150):
        await world.ask(stream=True, attempts=2)
    assert world.transport.asked.count("b") == 30  # as after no success at all


@pytest.mark.parametrize("ending", [(DONE,), (), (1.0,)], ids=["with a mark", "without a mark", "silent first"])
@in_virtual_time
async def test_an_error_told_in_the_stream_is_passed_on_unchanged_and_recorded(ending):
    error = event({"error": {"message": "out of memory", "code": 500}})
    world = World(a=[streams(EVENTS[0], error, *ending)], b=[STREAM])
    record, sink, _ = await world.ask(stream=True)
    assert sink.body == EVENTS[0] + error + b"".join(part for part in ending if isinstance(part, bytes))
    assert (sink.calls[-1], world.transport.asked) == ("finish", "a")
    assert (record.outcome, record.error_type, record.end_reason) == (Outcome.FAILED, "stream_broken", "error_event")
    assert record.attempts[0].meaning.reason is Reason.ERROR_EVENT


@in_virtual_time
async def test_a_stream_without_an_end_mark_is_whole_by_its_finish_reason():
    world = World(a=[streams(*EVENTS)])
    record, sink, _ = await world.ask(stream=True)
    assert (sink.calls[-1], record.outcome) == ("finish", Outcome.OK)


@in_virtual_time
async def test_the_last_event_may_lack_its_blank_line():
    world = World(a=[streams(*EVENTS, DONE.rstrip(b"\n"))])
    record, sink, _ = await world.ask(stream=True)
    assert (sink.body, record.outcome) == ((b"".join(EVENTS) + DONE).rstrip(b"\n"), Outcome.OK)


# ── the door ──


@in_virtual_time
async def test_a_call_that_finds_the_house_full_waits_and_its_record_says_for_what():
    world = World(places=1, a=[answers(after=5.0)])
    first = asyncio.create_task(world.live(world.call(), Sink()))
    await everybody_waits()
    record, _ = await world.live(world.call(), Sink())
    await first
    assert (record.admitted, record.gate) == ("queued", "process")
    assert record.queue_seconds == pytest.approx(5.0)
    (pause,) = record.pauses
    assert (pause.kind, pause.gate, pause.result) == ("queue", "process", "admitted")
    world.is_at_rest()


@pytest.mark.parametrize(
    ("how", "error", "admitted"),
    [
        ({"queue_limit": 0}, QueueFull, "rejected_full"),
        ({"within": 3.0}, QueueTimeout, "rejected_timeout"),
        ({"closes": True}, Draining, "shutdown"),
    ],
    ids=["full", "late", "closing"],
)
@in_virtual_time
async def test_a_call_that_is_not_let_in_is_sent_nowhere(how, error, admitted):
    within, closes = how.pop("within", 600.0), how.pop("closes", False)
    world = World(places=1, a=[answers(after=5.0)], **how)
    first = asyncio.create_task(world.live(world.call(), Sink()))
    await everybody_waits()
    if closes:
        loop().call_later(1.0, world.limits.close)
    record, caught = await world.live(world.call(within=within), Sink())
    assert isinstance(caught, error)
    assert (record.admitted, record.gate, record.attempts) == (admitted, "process", [])
    await first
    assert len(world.transport.sent) == 1
    world.is_at_rest()


# ── clients that leave ──

BUSY = {"a": [answers(after=100.0)]}
LEAVINGS = {
    # where the call stands after 50 s of virtual time, by what its upstream says; and what its record then tells
    "connecting or waiting for headers": ({"a": [answers(after=25.0)]}, {}, "waiting"),
    "waiting for the body": ({"a": [streams(9.0, EVENTS[0])]}, {}, "waiting"),
    "between two chunks": ({"a": [streams(EVENTS[0], 9.0, EVENTS[2])]}, {}, "streaming"),
    "reading a refusal": ({"a": [Says(500, (b"{", 9.0, b"}"))]}, {}, "waiting"),
    "writing": ({"a": [STREAM]}, {"slow": 9.0}, "streaming"),
    "pausing": ({"a": [refuses(503, retry_after="30")]}, {}, "waiting"),
    "held by a limit": ({"a": [refuses(429, kind="requests", retry_after="30")]}, {}, "waiting"),
    "giving up": ({"a": [refuses(400)]}, {"slow": 9.0}, "answering"),
    "telling that it broke": ({"a": [streams(EVENTS[0], Reason.RESET)]}, {"slow": 9.0}, "answering"),
}


@pytest.mark.parametrize(("scripts", "how", "phase"), LEAVINGS.values(), ids=LEAVINGS)
@pytest.mark.parametrize("after", [0.0, 4.0])
@in_virtual_time
async def test_a_client_that_leaves_frees_its_places_and_the_upstream_at_once(scripts, how, phase, after):
    world, sink = World(**scripts), Sink(**how)
    task = asyncio.create_task(world.ask(sink, stream=True))
    await asyncio.sleep(after)
    await everybody_waits()
    assert not task.done()
    at = loop().time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert loop().time() == at
    world.is_at_rest()
    assert not sink.is_over or sink.calls[-1] == "fail"


@in_virtual_time
async def test_a_client_that_leaves_while_it_queues_is_gone_at_once():
    world = World(places=1, a=[answers(after=20.0)])
    first = asyncio.create_task(world.live(world.call(), Sink()))
    await everybody_waits()
    record = world.telemetry.begin("chat", "POST", "/", request_id="r", traceparent=None)
    second = asyncio.create_task(world.relay.run(world.call(), Sink(), record))
    await asyncio.sleep(3.0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert world.limits.waiting == 0
    assert (record.outcome, record.admitted, record.attempts) == (Outcome.CANCELLED, "cancelled", [])
    assert record.queue_seconds == pytest.approx(3.0)
    await first
    world.is_at_rest()


@in_virtual_time
async def test_what_a_client_left_behind_is_not_blamed_on_the_upstream():
    """Rule 5."""
    world = World(a=[streams(EVENTS[0], 9.0, EVENTS[2])])
    record = world.telemetry.begin("chat", "POST", "/", request_id="r", traceparent=None)
    with world.telemetry.request(record):
        task = asyncio.create_task(world.relay.run(world.call(stream=True), Sink(), record))
        await asyncio.sleep(2.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (record.outcome, record.error_type, record.attempts[0].meaning) == (Outcome.CANCELLED, "", CANCELLED)
    assert (record.upstream_seconds, record.chunks, record.first_token) == (2.0, 1, START)
    check_the_account_of(record)


@in_virtual_time
async def test_an_upstream_whose_answer_has_begun_is_well_whether_or_not_its_client_stays():
    world = World(a=[MONEY, streams(EVENTS[0], 9.0, EVENTS[2]), answers()])
    await world.ask(Sink())
    assert world.relay.breakers["a"].state(world.now()).value == "shut"
    await asyncio.sleep(breaker.SHUT_SECONDS)
    probe = asyncio.create_task(world.ask(Sink(), stream=True))
    await asyncio.sleep(2.0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert world.relay.breakers["a"].state(world.now()).value == "closed"


@pytest.mark.parametrize("gone_at", range(1, 6))
@in_virtual_time
async def test_a_client_that_cannot_be_written_to_is_no_failure_of_the_upstream(gone_at):
    world, sink = World(a=[streams(*EVENTS)], b=[STREAM]), Sink(gone_at=gone_at)
    record = world.telemetry.begin("chat", "POST", "/", request_id="r", traceparent=None)
    with pytest.raises(ClientGone), world.telemetry.request(record):
        await world.relay.run(world.call(stream=True), sink, record)
    assert (record.outcome, record.attempts[0].meaning) == (Outcome.CANCELLED, CANCELLED)
    assert world.transport.asked == "a"
    world.is_at_rest()


STORY = {  # with a stranger in the only place at first: queue, failure, pause, hold, refusal, stream
    "a": [
        answers(after=2.0),
        Breaks(Reason.CONNECT, after=1.0),
        refuses(500, after=1.0),
        refuses(429, kind="requests", retry_after="2"),
        streams(EVENTS[0][:7], 1.0, EVENTS[0][7:], 1.0, EVENTS[1], EVENTS[2], USAGE_EVENT, DONE, after=1.0),
    ]
}


async def storied():
    """The whole story; returns the world, the two calls' tasks and the second one's sink."""
    world, sink = World(places=1, **STORY), Sink(slow=0.5)
    stranger = asyncio.create_task(world.live(world.call(), Sink()))
    await everybody_waits()
    return world, stranger, asyncio.create_task(world.live(world.call(stream=True), sink)), sink


def test_wherever_tasks_change_over_a_client_may_leave_and_nothing_is_left_behind():
    """The story is told once for every round of the event loop in which the client could leave."""

    async def rounds():
        _, stranger, task, sink = await storied()
        began = loop().iterations
        record, _ = await task
        assert reasons(record) == ["connect", "server", "requests", "none"]
        assert sink.body == b"".join(EVENTS) + DONE
        await stranger
        return began, loop().iterations

    async def left_in(number):
        world, stranger, task, sink = await storied()
        loop().at_iteration = lambda now: task.cancel() if now == number else None
        await asyncio.wait([task])
        await stranger
        world.is_at_rest()
        assert task.cancelled() or sink.calls[-1] == "finish"
        assert not loop().pending

    began, ended = run(rounds())
    assert ended - began > 30
    for number in range(began + 1, ended):
        run(left_in(number))


# ── all of it at once ──

parts = st.sampled_from([*EVENTS, EVENTS[0][:9], EVENTS[0][9:], USAGE_EVENT, DONE, b"", 0.5, 11.0, Reason.RESET])
scripts = st.lists(
    st.one_of(
        st.builds(streams, parts, parts, parts, after=st.sampled_from([0.0, 1.0, 31.0])),
        st.sampled_from(
            [STREAM, answers(), THROTTLED, MONEY, refuses(500), refuses(503, retry_after="3"), refuses(400)]
        ),
        st.builds(Breaks, st.sampled_from([Reason.CONNECT, Reason.RESET, Reason.GARBAGE])),
    ),
    min_size=1,
    max_size=4,
)


@given(
    st.dictionaries(st.sampled_from("ab"), scripts, min_size=1),
    st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.sampled_from([2.0, 30.0, 600.0])), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.7]),
    st.none() | st.integers(0, 200),
)
@settings(max_examples=100, deadline=None)
def test_whatever_upstreams_do_every_call_ends_once_and_is_accounted_for(scripts, calls, slow, leaves_in):
    async def story():
        world = World(places=2, **scripts)
        sinks = [Sink(slow=slow) for _ in calls]
        tasks = [
            asyncio.create_task(world.live(world.call(stream=stream, attempts=attempts, within=within), sink))
            for (stream, attempts, within), sink in zip(calls, sinks, strict=True)
        ]
        if leaves_in is not None:
            loop().at_iteration = lambda now: tasks[0].cancel() if now == leaves_in else None
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end, sink, (_, attempts, within) in zip(ends, sinks, calls, strict=True):
            if isinstance(end, asyncio.CancelledError):
                continue
            assert not isinstance(end, BaseException), end
            record, error = end
            assert (error is None) == sink.is_over
            assert (sink.calls[-1:] == ["fail"]) == (record.outcome is Outcome.TRUNCATED)
            assert (record.outcome is Outcome.OK) <= (error is None)
            assert len([reason for reason in reasons(record) if reason not in ("requests", "none")]) <= attempts
            assert all(attempt.started <= START + within for attempt in record.attempts)
            begun = [
                attempt for attempt in record.attempts if record.first_byte and attempt.started > record.first_byte
            ]
            assert begun == []
        world.is_at_rest()

    run(story())
