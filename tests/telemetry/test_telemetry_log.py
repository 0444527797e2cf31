"""The access log: one line for each call, nothing foreign at length, and never in the way."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.cost import price
from proxy.telemetry import Record
from proxy.telemetry.log import line_of, slow_line_of, story, text
from proxy.telemetry.writer import Writer


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        with suppress(OSError):  # a test closed it, to break the pipe
            os.close(end)


def _lines(reader):
    return [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]


def test_a_call_is_one_line_of_allowed_fields(make, gateway_of, pipe):
    reader, writer = pipe
    telemetry = make(log_fd=writer, prices={"gpt-4o-mini": price(input=0.15, output=0.6, cached_input=0.075)})
    record = gateway_of(telemetry).streamed()
    assert telemetry.flush(5.0)
    (line,) = _lines(reader)
    assert line == {
        "ts": "2023-11-14T22:30:03.300000Z",
        "level": "info",
        "event": "request",
        "request_id": "req-1",
        "trace_id": f"{record.trace_id:032x}",
        "span_id": f"{record.span_id:016x}",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "outcome": "ok",
        "model": "gpt-4o-mini",
        "provider": "openai",
        "key": "team-a",
        "stream": True,
        "attempts": 1,
        "queue_ms": 300.0,
        "backoff_ms": 0.0,
        "upstream_ms": 3000.0,
        "duration_ms": 3300.0,
        "overhead_ms": 0.0,
        "ttft_ms": 1300.0,
        "bytes_in": 500,
        "bytes_out": 900,
        "tokens_in": 100,
        "tokens_out": 11,
        "tokens_cached": 40,
        "tokens_reasoning": 3,
        "cost_usd": 1.9e-05,
        "finish_reason": "stop",
    }


def test_every_way_to_end_leaves_one_line(make, gateway_of, pipe):
    reader, writer = pipe
    telemetry = make(log_fd=writer)
    gateway = gateway_of(telemetry)
    for call in (gateway.plain, gateway.streamed, gateway.retried, gateway.left, gateway.refused, gateway.invalid):
        call()
    assert telemetry.flush(5.0)
    lines = _lines(reader)
    assert [line["outcome"] for line in lines] == ["ok", "ok", "ok", "cancelled", "rejected", "rejected"]
    assert lines[2]["retry_reasons"] == ["requests"]
    assert lines[2]["upstream_request_id"] == "up-2"
    assert lines[4]["error_type"] == "queue_full"
    assert lines[4]["error_source"] == "gateway"


@given(said=st.text())
def test_words_from_outside_cannot_leave_their_line_or_move_the_terminal(said):
    record = Record(said, "chat", said, "/v1/chat/completions", arrived=0.0, began=0.0, finish_reason=said)
    line = line_of(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in line[:-1])
    assert json.loads(line)["request_id"] == text(said)


def test_a_word_from_outside_is_cut():
    assert len(text("x" * 10_000)) == 128


def test_a_broken_stdout_costs_lines_and_no_call(make, gateway_of, pipe, scrape):
    reader, writer = pipe
    os.close(reader)
    telemetry = make(log_fd=writer)
    gateway = gateway_of(telemetry)
    for _ in range(3):
        gateway.plain()
    assert telemetry.flush(5.0)
    told = scrape(telemetry)
    assert told("telemetry_dropped_total", signal="log", reason="write_failed") == 3
    assert told.total("requests_total") == 3


@contextmanager
def _full(reader, writer):
    """The pipe takes nothing until the block ends; then all that was in it is read."""
    os.set_blocking(writer, False)
    stuffed = 0
    with suppress(BlockingIOError):
        while True:
            stuffed += os.write(writer, b" " * 4096)
    os.set_blocking(writer, True)
    yield
    while stuffed:
        stuffed -= len(os.read(reader, stuffed))


def test_a_stuck_stdout_costs_lines_and_no_call(gateway, pipe):
    reader, writer = pipe
    lost = []
    log = Writer(writer, lambda *drop: lost.append(drop), lines_max=5)
    line = line_of(gateway.plain())
    with _full(reader, writer):
        for _ in range(100):
            log.take(line)
        assert not log.flush(0.01)
        assert len(lost) >= 90  # at most five lines were with the writer and five waited
        assert set(lost) == {("queue_full", 1)}
    assert log.flush(5.0)
    log.close()
    assert len(_lines(reader)) + len(lost) == 100


def test_a_descriptor_made_non_blocking_by_others_still_gets_every_line(gateway, pipe):
    reader, writer = pipe
    log = Writer(writer, lambda *drop: pytest.fail(f"lost {drop}"))
    line = line_of(gateway.plain())
    for _ in range(300):  # more than a pipe holds
        log.take(line)
    os.set_blocking(writer, False)
    lines = 0
    while lines < 300:
        lines += os.read(reader, 4096).count(b"\n")
    assert log.flush(5.0)
    log.close()


def test_after_the_end_a_line_is_dropped_and_counted(make, gateway_of, pipe, scrape):
    reader, writer = pipe
    telemetry = make(log_fd=writer)
    gateway = gateway_of(telemetry)
    gateway.plain()
    assert telemetry.close(5.0)
    gateway.plain()
    assert len(_lines(reader)) == 1
    assert scrape(telemetry)("telemetry_dropped_total", signal="log", reason="shutdown") == 1


def test_the_log_can_be_off(gateway, telemetry, capfd):
    gateway.plain()
    assert telemetry.flush(1.0)
    assert capfd.readouterr().out == ""


def test_a_call_that_still_runs_is_told_of_each_time_so_much_more_has_passed(make, gateway_of, pipe, clock):
    reader, writer = pipe
    telemetry = make(log_fd=writer, slow_log_seconds=60.0)
    record = gateway_of(telemetry).begin(stream=True)
    with telemetry.request(record), telemetry.attempt(record, "openai", "gpt-4o-mini"):
        for _ in range(14):
            clock.wait(10)
            telemetry.beat(0.0)
        record.first_byte = record.first_token = clock()
        clock.wait(45)
        telemetry.beat(0.0)
        gateway_of(telemetry).begin()
    telemetry.beat(0.0)
    assert telemetry.flush(5.0)
    *slow, ended = _lines(reader)
    assert [(line["event"], line["duration_ms"], line["phase"]) for line in slow] == [
        ("slow_request", 60_000.0, "waiting"),
        ("slow_request", 120_000.0, "waiting"),
        ("slow_request", 185_000.0, "streaming"),
    ]
    assert slow[0]["level"] == "warning"
    assert slow[2]["ttft_ms"] == 140_000.0
    assert {line["trace_id"] for line in slow} == {ended["trace_id"]}


def test_young_calls_and_a_switched_off_log_are_not_told_of(make, gateway_of, pipe, clock):
    reader, writer = pipe
    for seconds, age in ((60.0, 59.0), (0.0, 1e6)):
        telemetry = make(log_fd=writer, slow_log_seconds=seconds)
        with telemetry.request(gateway_of(telemetry).begin()):
            clock.wait(age)
            telemetry.beat(0.0)
        assert telemetry.flush(5.0)
    assert [line["event"] for line in _lines(reader)] == ["request", "request"]


@given(said=st.text(), now=st.floats(min_value=0, max_value=1e6))
def test_words_from_outside_cannot_leave_a_slow_line_either(said, now):
    line = slow_line_of(Record(said, "chat", said, "other", arrived=0.0, began=0.0), now)
    assert line.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in line[:-1])


def test_the_story_of_an_error_tells_where_and_what_kind_and_nothing_it_says():
    def fall(word):
        raise KeyError(word)

    try:
        fall("the prompt")
    except KeyError as error:
        told = story(error)
    assert told.startswith("builtins.KeyError\n")
    assert "in fall" in told
    assert "the prompt" not in told.replace('fall("the prompt")', "")
