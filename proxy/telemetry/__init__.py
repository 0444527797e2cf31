"""What the gateway tells about itself. The only package that knows Prometheus and OpenTelemetry.

    record.py      all that is known about one call, written by whoever learns it
    telemetry.py   opens and closes records; decides which traces are kept            <- begin here
    catalogue.py   every metric family: name, labels, buckets, meaning
    recorder.py    the numbers, written once per call from its finished record
    connections.py the numbers of connections, told by the transport
    levels.py      what is read at a scrape: gates, connections, headroom
    exposition.py  the numbers as Prometheus reads them, made at the scrape
    document.py    the catalogue as a page of the documentation
    spans.py       a kept record as a tree of spans, sent by OTLP
    log.py         a record as one line of JSON
    audit.py       who started, stopped, changed or was kept out, as lines of JSON
    writer.py      lines to a descriptor, from a thread
    trace.py       which traces are kept; the headers of W3C Trace Context

Nothing here awaits, and nothing here may fail a call: what cannot be written is dropped, and the drop is counted.
"""

from proxy.telemetry.content import Content
from proxy.telemetry.levels import AccountLevel, BatchLevel, ConnectionLevel, GateLevel, Levels
from proxy.telemetry.log import story
from proxy.telemetry.record import Attempt, Pause, Record, Run, StepTaken
from proxy.telemetry.recorder import Labels
from proxy.telemetry.telemetry import OpenAttempt, OpenRequest, Telemetry, server_timing
from proxy.telemetry.trace import Tracing

__all__ = [
    "AccountLevel",
    "Attempt",
    "BatchLevel",
    "ConnectionLevel",
    "Content",
    "GateLevel",
    "Labels",
    "Levels",
    "OpenAttempt",
    "OpenRequest",
    "Pause",
    "Record",
    "Run",
    "StepTaken",
    "Telemetry",
    "Tracing",
    "server_timing",
    "story",
]
