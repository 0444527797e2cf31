"""What the gateway tells about itself. The only package that knows Prometheus and OpenTelemetry.

    record.py      all that is known about one call, written by whoever learns it
    telemetry.py   opens and closes records; decides which traces are kept            <- begin here
    catalogue.py   every metric family: name, labels, buckets, meaning
    recorder.py    the numbers, written once per call from its finished record
    exposition.py  the numbers as Prometheus reads them, made at the scrape
    spans.py       a kept record as a tree of spans, sent by OTLP
    log.py         a record as one line of JSON
    trace.py       which traces are kept; the traceparent header

Nothing here awaits, and nothing here may fail a call: what cannot be written is dropped, and the drop is counted.
"""

from proxy.telemetry.record import Attempt, Pause, Record
from proxy.telemetry.recorder import Labels
from proxy.telemetry.telemetry import GateLevel, OpenAttempt, OpenRequest, Telemetry, server_timing
from proxy.telemetry.trace import Tracing

__all__ = [
    "Attempt",
    "GateLevel",
    "Labels",
    "OpenAttempt",
    "OpenRequest",
    "Pause",
    "Record",
    "Telemetry",
    "Tracing",
    "server_timing",
]
