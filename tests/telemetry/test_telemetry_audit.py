"""The audit log: one line for whatever changes the gateway or is kept out of it, and names only."""

from __future__ import annotations

import json
import os

import pytest

from proxy.config import Model, Secret, Settings, Upstream
from proxy.core.outcome import Outcome
from proxy.telemetry.audit import Names, difference

KEY = "sk-canary-0123456789"


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def _lines(reader):
    return [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]


def test_a_start_a_reload_and_a_stop(make, pipe):
    reader, writer = pipe
    telemetry = make(audit_fd=writer, version="1.2.3")
    old = Settings(
        upstreams={"a": Upstream(base_url="http://a", api_key=Secret(KEY)), "b": Upstream(base_url="http://b")},
        models={"m": Model(upstreams=("a",)), "n": Model(upstreams=("b",))},
        callers={"team": Secret(KEY)},
    )
    new = Settings(
        upstreams={"a": Upstream(base_url="http://a", api_key=Secret(KEY + "9")), "c": Upstream(base_url="http://c")},
        models={"m": Model(upstreams=("a",))},
        callers={"team": Secret(KEY)},
        retry={"attempts": 5},
    )
    audit = telemetry.audit
    audit.started("1.2.3", ("127.0.0.1:8080", "127.0.0.1:8081"))
    audit.reloaded(dict(old), dict(new))
    audit.refused(3)
    audit.administered("POST", "/admin/reload", 401)
    audit.stopped(drained=False)
    assert telemetry.flush(5.0)
    told = os.read(reader, 1 << 20)
    assert KEY.encode() not in told
    assert b"http://" not in told
    lines = [json.loads(line) for line in told.splitlines()]
    assert {line.pop("ts") for line in lines} == {"2023-11-14T22:30:00Z"}
    assert lines == [
        {
            "level": "info",
            "event": "start",
            "ok": True,
            "version": "1.2.3",
            "listeners": ["127.0.0.1:8080", "127.0.0.1:8081"],
        },
        {
            "level": "info",
            "event": "reload",
            "ok": True,
            "names": {"upstreams": {"added": ["c"], "removed": ["b"], "changed": ["a"]}, "models": {"removed": ["n"]}},
            "sections": ["retry"],
        },
        {"level": "warning", "event": "reload", "ok": False, "problems": 3},
        {
            "level": "warning",
            "event": "admin",
            "ok": False,
            "method": "POST",
            "route": "/admin/reload",
            "status": 401,
        },
        {"level": "warning", "event": "stop", "ok": False, "drained": False},
    ]


def test_a_key_that_is_denied_leaves_a_line_and_a_refused_call_does_not(make, gateway_of, pipe):
    reader, writer = pipe
    telemetry = make(audit_fd=writer)
    gateway = gateway_of(telemetry)
    record = gateway.begin()
    with telemetry.request(record):
        record.status, record.outcome = 401, Outcome.REJECTED
        record.error_type, record.error_source = "auth", "client"
    gateway.invalid()
    gateway.refused()
    gateway.plain()
    assert telemetry.flush(5.0)
    (line,) = _lines(reader)
    assert line["event"] == "key_denied"
    assert line["request_id"] == "req-1"
    assert line["trace_id"] == f"{record.trace_id:032x}"
    assert line["status"] == 401


def test_without_a_descriptor_nothing_is_written(telemetry, capfd):
    telemetry.audit.started("1", ())
    assert telemetry.flush(1.0)
    assert capfd.readouterr() == ("", "")


def test_an_audit_log_that_nobody_reads_costs_lines_and_they_are_counted(make, pipe, scrape):
    telemetry = make(audit_fd=pipe[1])
    telemetry.close(5.0)
    telemetry.audit.stopped(drained=True)
    assert scrape(telemetry)("telemetry_dropped_total", signal="audit", reason="shutdown") == 1


def test_names_that_stay_as_they_are_are_not_told():
    assert difference({"a": 1, "b": 2}, {"b": 2, "a": 1}) == Names()
    assert difference({"a": 1}, {"a": 2, "b": 3}) == Names(added=("b",), changed=("a",))
