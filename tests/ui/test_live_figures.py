"""What is told of calls that ended and of those under way, from records with known times."""

from __future__ import annotations

import gc
import json
import math
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.outcome import CANCELLED, OK, Meaning, Outcome, Reason, Retry
from proxy.core.usage import Usage
from proxy.telemetry.live import CALLS_KEPT, HISTORY_SECONDS, TROUBLES_KEPT, Live
from proxy.telemetry.record import Attempt, Record

THROTTLED = Meaning(Outcome.THROTTLED, Reason.REQUESTS, Retry.PACED)
BROKEN = Meaning(Outcome.TRUNCATED, Reason.EOF, Retry.NEVER)
EPOCH = 1_700_000_000.0


@dataclass
class Desk:
    """The live figures on a clock that stands until told; calls are lived through it."""

    time: float = 1000.0
    open: dict[int, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.live = Live(lambda: self.time, lambda: EPOCH + self.time, lambda: self.open.values())

    def begin(self, *, stream: bool = False, upstream: str = "openai") -> Record:
        record = Record("req-1", "chat", "POST", "/v1/chat/completions", self.time, EPOCH + self.time)
        record.model = record.asked_model = "gpt-4o-mini"
        record.stream, record.upstream = stream, upstream
        self.open[id(record)] = record
        return record

    def end(self, record: Record, outcome: Outcome = Outcome.OK, status: int = 200) -> Record:
        del self.open[id(record)]
        record.ended, record.outcome, record.status = self.time, outcome, status
        self.live.take([record])
        return record

    def attempt(self, record: Record, seconds: float, meaning: Meaning = OK, status: int = 200) -> Attempt:
        """One attempt that takes so long; its headers come after half of it."""
        attempt = Attempt(record.upstream, "gpt-4o-mini", self.time, meaning, status)
        record.attempts.append(attempt)
        self.time += seconds / 2
        attempt.first_byte = self.time
        if status < 400:
            record.first_byte = self.time
        self.time += seconds / 2
        attempt.ended = self.time
        return attempt

    def call(self, seconds: float = 1.0, *, tokens: tuple[int, int] | None = (10, 20)) -> Record:
        record = self.begin()
        self.attempt(record, seconds)
        record.usage = None if tokens is None else Usage(*tokens)
        record.last_byte = self.time
        return self.end(record)

    def failed(self, error: str = "upstream_5xx", source: str = "upstream", status: int = 502) -> Record:
        record = self.begin()
        record.error_type, record.error_source = error, source
        return self.end(record, Outcome.FAILED, status)

    def wait(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def desk() -> Desk:
    return Desk()


# ── rates and latencies ──


def test_totals_count_every_call_and_every_token(desk: Desk) -> None:
    for _ in range(7):
        desk.call()
    desk.call(tokens=None)
    desk.failed()
    desk.failed("invalid_request", "client", 400)
    priced = desk.begin()
    priced.cost = 1_500_000
    desk.end(priced)
    assert desk.live.snapshot()["totals"] == {
        "calls": 11,
        "failed": 1,
        "input_tokens": 70,
        "output_tokens": 140,
        "cost_usd": 1.5,
    }


def test_rates_are_means_of_the_last_ten_whole_seconds(desk: Desk) -> None:
    desk.wait(59.75)
    for _ in range(20):  # two a second
        desk.call(0.5)
    desk.wait(0.25)
    rates = desk.live.snapshot()["rates"]
    assert rates == {"calls": 2.0, "failed": 0.0, "input_tokens": 20.0, "output_tokens": 40.0}
    desk.wait(11)
    assert desk.live.snapshot()["rates"]["calls"] == 0.0


def test_a_history_has_an_entry_for_each_second_and_forgets_after_five_minutes(desk: Desk) -> None:
    desk.call(1.0)
    desk.failed()
    desk.wait(3)
    history = desk.live.snapshot()["history"]
    assert history["calls"] == [0, 2, 0, 0]
    assert history["failed"] == [0, 1, 0, 0]
    assert history["output_tokens"] == [0, 20, 0, 0]
    desk.wait(HISTORY_SECONDS - 3)
    history = desk.live.snapshot()["history"]
    assert (len(history["calls"]), history["calls"][0]) == (HISTORY_SECONDS, 2)
    desk.wait(1)
    history = desk.live.snapshot()["history"]
    assert (len(history["calls"]), sum(history["calls"])) == (HISTORY_SECONDS, 0)


def test_latencies_are_of_the_last_minute(desk: Desk) -> None:
    for seconds in (0.1, 0.2, 0.3, 0.4, 4.0):
        desk.call(seconds)
    minute = desk.live.snapshot()["minute"]
    assert minute["calls"] == 5
    assert minute["duration"] == pytest.approx([0.3, 4.0, 4.0], rel=0.011)
    assert minute["first_token"] == [None, None, None]
    desk.wait(61)
    assert desk.live.snapshot()["minute"]["calls"] == 0
    assert desk.live.snapshot()["minute"]["duration"] == [None, None, None]


def test_first_tokens_are_those_of_streams(desk: Desk) -> None:
    record = desk.begin(stream=True)
    desk.wait(0.25)
    record.first_token = desk.time
    desk.wait(2)
    desk.end(record)
    snapshot = desk.live.snapshot()
    assert snapshot["minute"]["first_token"] == pytest.approx([0.25] * 3, rel=0.011)
    assert snapshot["calls"][0]["first_token"] == 0.25
    assert snapshot["history"]["first_token"][-1] == pytest.approx([0.25] * 3, rel=0.011)


@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=200))
def test_percentiles_are_right_within_one_percent(durations: list[float]) -> None:
    desk = Desk()
    for seconds in durations:
        record = desk.begin()
        record.arrived = desk.time - seconds
        desk.end(record)
    ranked = sorted(durations)
    exact = [ranked[math.ceil(len(ranked) * percent / 100) - 1] for percent in (50, 95, 99)]
    assert desk.live.snapshot()["minute"]["duration"] == pytest.approx(exact, rel=0.0105)


# ── what is under way ──


def test_calls_in_flight_are_told_by_what_they_are_doing(desk: Desk) -> None:
    desk.begin()
    waiting = desk.begin()
    waiting.attempts.append(Attempt("openai", "m", desk.time))
    pausing = desk.begin()
    pausing.attempts.append(Attempt("openai", "m", desk.time, ended=desk.time))
    streaming = desk.begin()
    streaming.attempts.append(Attempt("local", "m", desk.time))
    streaming.first_byte = desk.time
    desk.wait(4)
    snapshot = desk.live.snapshot(["openai", "idle"])
    assert snapshot["in_flight"] == {
        "calls": 4,
        "queued": 1,
        "backoff": 1,
        "waiting": 1,
        "streaming": 1,
        "oldest_seconds": 4.0,
    }
    assert {name: told["in_flight"] for name, told in snapshot["upstreams"].items()} == {
        "openai": 1,
        "idle": 0,
        "local": 1,
    }


def test_an_upstreams_attempts_are_told_by_their_outcome(desk: Desk) -> None:
    desk.wait(100)
    record = desk.begin()
    desk.attempt(record, 0.1, THROTTLED, 429)
    desk.attempt(record, 0.9)
    desk.end(record)
    for _ in range(58):
        desk.call(0.01)
    told = desk.live.snapshot()["upstreams"]["openai"]
    assert (told["attempts"], told["ok"], told["throttled"]) == (60, 59, 1)
    assert told["per_second"] == pytest.approx(60 / desk.live.snapshot()["minute"]["seconds"], rel=0.001)


def test_errors_are_counted_by_type_and_by_whose_they_are(desk: Desk) -> None:
    desk.failed()
    desk.wait(90)
    desk.failed()
    desk.failed("queue_full", "gateway", 429)
    assert desk.live.snapshot()["errors"] == [
        {"source": "upstream", "type": "upstream_5xx", "minute": 1, "five_minutes": 2},
        {"source": "gateway", "type": "queue_full", "minute": 1, "five_minutes": 1},
    ]


# ── the last calls ──


def phases(record: Iterable[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(phase["kind"], phase["from"], phase["to"]) for phase in record]


def test_the_last_calls_come_newest_first_and_older_trouble_behind_them(desk: Desk) -> None:
    for _ in range(40):
        desk.failed()
    for _ in range(CALLS_KEPT):
        desk.call(0.01)
    calls = desk.live.snapshot()["calls"]
    assert [call["number"] for call in calls[:CALLS_KEPT]] == list(range(90, 40, -1))
    assert [call["number"] for call in calls[CALLS_KEPT:]] == list(range(40, 40 - TROUBLES_KEPT, -1))


def test_a_streams_time_is_told_in_its_phases(desk: Desk) -> None:
    record = desk.begin(stream=True)
    desk.wait(0.3)
    record.waited("queue", desk.time - 0.3, desk.time, gate="model/m", result="admitted")
    attempt = desk.attempt(record, 1.0)
    record.first_token = attempt.first_byte + 0.2 if attempt.first_byte is not None else None
    attempt.ended = record.last_byte = desk.time
    desk.end(record)
    (call,) = desk.live.snapshot()["calls"]
    assert phases(call["phases"]) == [
        ("queue", 0.0, 0.3),
        ("attempt", 0.3, 0.8),
        ("first_token", 0.8, 1.0),
        ("stream", 1.0, 1.3),
    ]
    assert call["phases"][0]["gate"] == "model/m"
    assert (call["seconds"], call["ended"]) == (1.3, EPOCH + 1001.3)


def test_an_attempt_that_failed_is_one_phase_and_says_why(desk: Desk) -> None:
    record = desk.begin()
    desk.attempt(record, 0.2, THROTTLED, 429).retry_after = 2.0
    desk.wait(2)
    record.waited("backoff", desk.time - 2, desk.time, source="retry_after", reason="requests")
    desk.attempt(record, 1.0)
    desk.end(record)
    (call,) = desk.live.snapshot()["calls"]
    assert phases(call["phases"]) == [
        ("attempt", 0.0, 0.2),
        ("backoff", 0.2, 2.2),
        ("attempt", 2.2, 2.7),
        ("stream", 2.7, 3.2),
    ]
    first = call["phases"][0]
    assert (first["status"], first["result"], first["retry_after"]) == (429, "429", 2.0)
    assert call["phases"][1]["reason"] == "requests"


def test_an_answer_that_broke_off_says_so_in_its_last_phase(desk: Desk) -> None:
    record = desk.begin(stream=True)
    desk.attempt(record, 1.0, BROKEN)
    desk.end(record, Outcome.TRUNCATED)
    (call,) = desk.live.snapshot()["calls"]
    assert [phase["result"] for phase in call["phases"]] == ["ok", "eof"]


def test_a_call_whose_client_left_before_anything_was_sent_has_only_its_wait(desk: Desk) -> None:
    record = desk.begin()
    desk.wait(3)
    record.waited("queue", desk.time - 3, desk.time, gate="process", result="cancelled")
    record.error_type, record.error_source = "client_disconnect", "client"
    desk.end(record, CANCELLED.outcome, 499)
    (call,) = desk.live.snapshot()["calls"]
    assert phases(call["phases"]) == [("queue", 0.0, 3.0)]
    assert (call["outcome"], call["status"]) == ("cancelled", 499)


def test_what_a_client_wrote_is_cut_and_made_harmless(desk: Desk) -> None:
    record = desk.begin()
    record.asked_model = "\x1b[2J" + "x" * 10_000
    desk.end(record)
    (call,) = desk.live.snapshot()["calls"]
    assert "\x1b" not in call["model"]
    assert len(call["model"]) < 200


def test_a_snapshot_is_json(desk: Desk) -> None:
    desk.call()
    desk.failed()
    snapshot = desk.live.snapshot(["openai"])
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot


# ── memory ──


def test_a_hundred_thousand_calls_take_no_more_memory_than_the_first_thousands(desk: Desk) -> None:
    def calls(count: int) -> int:
        """So many more; the bytes that are kept of them, because all slots of time are made anew meanwhile."""
        tracemalloc.start()
        for number in range(count):
            record = desk.begin(stream=True, upstream=("a", "b", "c")[number % 3])
            record.asked_model = record.request_id = f"name-{number}"
            record.arrived = desk.time - 0.01 * (1 + number % 500)
            record.attempts.append(Attempt(record.upstream, "m", record.arrived, OK, 200, ended=desk.time))
            desk.wait(0.02)
            desk.end(record)
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return kept

    first, all_others = calls(16_000), calls(84_000)  # 320 s of fifty a second are more than are remembered
    assert all_others < 1.2 * first < 2_000_000
    assert desk.live.snapshot()["totals"]["calls"] == 100_000


def test_an_hour_of_snapshots_leaves_nothing_behind(desk: Desk) -> None:
    def minutes(count: int) -> int:
        """One call and one snapshot a second; how many blocks of memory are in use then."""
        for _ in range(60 * count):
            desk.call(0.5)
            desk.wait(0.5)
            encode(desk.live.snapshot(["openai"]))
        gc.collect()
        return sys.getallocatedblocks()

    encode = msgspec.json.Encoder().encode
    after_six, after_sixty = minutes(6), minutes(54)
    assert after_sixty - after_six < 500  # a snapshot is thousands
