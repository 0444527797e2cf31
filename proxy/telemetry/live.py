"""The figures of this moment, for whoever looks: the live page and `penstock top`.

    record -> take -> seconds (five minutes) and spans (their latencies, attempts, errors) -> snapshot

1. A finished call costs a few additions, whether anybody looks or not: who opens the page because of trouble wants to
   see how it began. All else is done in `snapshot`, so only for those who look.
2. Memory is bounded by constants and by the configuration, never by the number of calls: so many slots of time, so many
   buckets of latency, upstreams by their configured names, errors by words of the code, and the last few records.
3. A total counts what /metrics counts, from the same records at the same moment.
4. Of a call only what `_call` names is told: no body, no key; words from outside are cut and made harmless.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Generic, TypeVar

from proxy.core.outcome import Outcome
from proxy.telemetry.log import text
from proxy.telemetry.record import Attempt, Pause, Record, Run, StepTaken
from proxy.telemetry.recorder import is_answered, result_of

HISTORY_SECONDS = 300
SPAN_SECONDS = 5  # latencies, attempts and errors are kept for so many seconds together
WINDOW_SPANS = 12  # "the last minute": the span that is being filled, and those before it
RATE_SECONDS = 10  # a rate is the mean of so many whole seconds
CALLS_KEPT = 50
TROUBLES_KEPT = 25  # of calls that went wrong or were tried again, besides: a busy gateway's 50 last are all of now
MICRO = 1_000_000  # micro-dollars in a dollar

_PER_E = 50  # buckets of latency in a factor of e: each is 2 % wide, so a percentile is right within 1 %
_LEAST = 1e-4  # seconds; all that is shorter counts as this
_PERCENTS = (50, 95, 99)

Percentiles = list[float | None]


@dataclass(slots=True)
class _Second:
    """The calls that ended within one second."""

    at: int  # whole seconds on the monotonic clock
    calls: int = 0
    failed: int = 0  # whose error is the gateway's or an upstream's
    input: int = 0  # tokens
    output: int = 0


@dataclass(slots=True)
class _Span:
    """What is kept of the calls that ended within `SPAN_SECONDS`."""

    at: int  # in units of SPAN_SECONDS
    durations: Counter[int] = field(default_factory=Counter)  # bucket -> calls
    first_tokens: Counter[int] = field(default_factory=Counter)
    attempts: Counter[tuple[str, str]] = field(default_factory=Counter)  # upstream, outcome
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)  # source, type
    ranked: tuple[Percentiles, Percentiles] | None = None  # of durations and first tokens, once it is over and was told


@dataclass(slots=True)
class _Steps:
    """What became of one step of a pipeline, over all its runs."""

    results: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def mean_seconds(self) -> float | None:
        ran = self.results.total() - self.results["omitted"]
        return _rounded(self.seconds / ran) if ran else None


_Slot = TypeVar("_Slot", _Second, _Span)


class _Ring(Generic[_Slot]):
    """The last `size` slots of time; a slot nothing fell into is a fresh one."""

    def __init__(self, born: Callable[[int], _Slot], size: int) -> None:
        self._born: Callable[[int], _Slot] = born
        self._fresh: _Slot = born(-1)  # for the slots nothing fell into; nobody writes to it
        self._slots: list[_Slot] = [self._fresh] * size

    def at(self, time: int) -> _Slot:
        """The slot to write to. What is older than the ring is long never sees a slot again: clocks do not go back."""
        place = time % len(self._slots)
        slot = self._slots[place]
        if slot.at != time:
            slot = self._slots[place] = self._born(time)
        return slot

    def last(self, count: int, end: int) -> list[_Slot]:
        """The `count` slots up to and with `end`, oldest first."""
        slots, size, fresh = self._slots, len(self._slots), self._fresh
        times = range(end - count + 1, end + 1)
        return [slot if (slot := slots[time % size]).at == time else fresh for time in times]


class Live:
    """Made by the telemetry, and told of every finished call.

    Args:
        now: the monotonic clock that all times of a record are of, in seconds.
        wall: seconds since the epoch.
        open_calls: the records of the calls that have not ended.
    """

    def __init__(
        self, now: Callable[[], float], wall: Callable[[], float], open_calls: Callable[[], Iterable[Record]]
    ) -> None:
        self._now, self._wall, self._open_calls = now, wall, open_calls
        self._started = now()
        self._seconds = _Ring(_Second, HISTORY_SECONDS + 1)  # and the one that is being filled
        self._spans = _Ring(_Span, HISTORY_SECONDS // SPAN_SECONDS)
        self._calls = self._failed = self._input = self._output = self._cost = 0
        self._latest: deque[tuple[int, Record]] = deque(maxlen=CALLS_KEPT)
        self._troubled: deque[tuple[int, Record]] = deque(maxlen=TROUBLES_KEPT)
        self._steps: dict[str, _Steps] = defaultdict(_Steps)  # by pipeline/step

    def take(self, ended: Sequence[Record]) -> None:
        """Count calls that have ended, in that order."""
        for at, records in groupby(ended, _second):
            self._take(at, list(records))

    def _take(self, at: int, records: list[Record]) -> None:
        """Those that ended within one second. Attempts, tokens and cost are those of a pipeline's steps; all else is
        its own."""
        second, span = self._seconds.at(at), self._spans.at(at // SPAN_SECONDS)
        span.attempts.update(
            [(attempt.upstream, attempt.meaning.outcome._value_) for record in records for attempt in record.attempts]
        )
        for record in records:
            if record.run is not None:
                self._ran(record.run)
                continue
            if (usage := record.usage) is not None:
                second.input += usage.input
                second.output += usage.output
                self._input += usage.input
                self._output += usage.output
            if record.cost is not None:
                self._cost += record.cost
        records = [record for record in records if not record.step]
        second.calls += len(records)
        span.durations.update([_bucket(record.ended - record.arrived) for record in records])
        span.first_tokens.update(
            [_bucket(record.first_token - record.arrived) for record in records if record.first_token is not None]
        )
        errors = [(record.error_source, record.error_type) for record in records if record.error_type]
        failed = sum(source != "client" for source, _ in errors)
        span.errors.update(errors)
        second.failed += failed
        self._failed += failed
        calls = list(enumerate(records, self._calls + 1))
        self._calls += len(records)
        self._latest.extend(calls)
        self._troubled.extend(
            [call for call in calls if len(call[1].attempts) > 1 or call[1].outcome is not Outcome.OK]
        )

    def _ran(self, run: Run) -> None:
        for step in run.steps:
            count = self._steps[step.step]
            count.results[step.result] += 1
            count.seconds += step.ended - step.started

    def steps(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """By step (pipeline/step): its calls in flight, what became of it so far, and its mean duration in seconds."""
        flight = Counter(record.step for record in self._open_calls())
        return {
            name: {
                "in_flight": flight[name],
                "results": dict(self._steps[name].results),
                "mean_seconds": self._steps[name].mean_seconds,
            }
            for name in names
        }

    def snapshot(self, upstreams: Iterable[str] = ()) -> dict[str, Any]:
        """The figures now, as JSON values; `upstreams` are listed even if they were not asked of late.

        Times are seconds; `at` and `ended` are since the epoch. Rates are per second, over the last `RATE_SECONDS`
        whole seconds; `minute` is the last `minute.seconds`, which are up to 60. Percentiles are p50, p95 and p99, null
        where there is nothing to rank. A history's last entry is its newest.
        """
        now = self._now()
        second, span = int(now), int(now) // SPAN_SECONDS
        minute = self._spans.last(WINDOW_SPANS, span)
        seconds = max(1.0, min(now - (span - WINDOW_SPANS + 1) * SPAN_SECONDS, now - self._started))
        return {
            "at": round(self._wall(), 3),
            "uptime_seconds": round(now - self._started, 3),
            "totals": {
                "calls": self._calls,
                "failed": self._failed,
                "input_tokens": self._input,
                "output_tokens": self._output,
                "cost_usd": self._cost / MICRO,
            },
            "rates": self._rates(second),
            "minute": {
                "seconds": round(seconds, 3),
                "calls": sum(sum(each.durations.values()) for each in minute),
                "duration": _percentiles([each.durations for each in minute]),
                "first_token": _percentiles([each.first_tokens for each in minute]),
            },
            "history": self._history(second, span),
            "in_flight": self._in_flight(now),
            "upstreams": self._upstreams(upstreams, minute, seconds),
            "errors": self._errors(minute, span),
            "calls": self._listed(),
        }

    def _rates(self, second: int) -> dict[str, float]:
        known = min(RATE_SECONDS, max(1, second - int(self._started)))
        last = self._seconds.last(known, second - 1)
        return {
            "calls": round(sum(each.calls for each in last) / known, 3),
            "failed": round(sum(each.failed for each in last) / known, 3),
            "input_tokens": round(sum(each.input for each in last) / known, 3),
            "output_tokens": round(sum(each.output for each in last) / known, 3),
        }

    def _history(self, second: int, span: int) -> dict[str, Any]:
        known = min(HISTORY_SECONDS, second - int(self._started))
        seconds = self._seconds.last(known, second - 1)
        begun = span - int(self._started) // SPAN_SECONDS + 1
        spans = self._spans.last(min(HISTORY_SECONDS // SPAN_SECONDS, begun), span)
        return {
            "seconds": 1,
            "calls": [each.calls for each in seconds],
            "failed": [each.failed for each in seconds],
            "input_tokens": [each.input for each in seconds],
            "output_tokens": [each.output for each in seconds],
            "span_seconds": SPAN_SECONDS,
            "duration": [_ranked(each, span)[0] for each in spans],
            "first_token": [_ranked(each, span)[1] for each in spans],
        }

    def _in_flight(self, now: float) -> dict[str, Any]:
        """Open calls by what they are doing, and how old the oldest is."""
        phases = {"queued": 0, "backoff": 0, "waiting": 0, "streaming": 0}
        oldest = now
        for record in self._open_calls():
            if record.step:
                continue
            phases[_doing(record)] += 1
            oldest = min(oldest, record.arrived)
        return {"calls": sum(phases.values()), **phases, "oldest_seconds": round(now - oldest, 3)}

    def _upstreams(self, names: Iterable[str], minute: Iterable[_Span], seconds: float) -> dict[str, dict[str, Any]]:
        """Attempts that ended within the minute, by upstream and outcome, and those under way."""
        found = {name: _idle() for name in names}
        for span in minute:
            for (upstream, outcome), count in span.attempts.items():
                told = found.setdefault(upstream, _idle())
                told["attempts"] += count
                told[outcome] += count
        for record in self._open_calls():
            if record.attempts and record.attempts[-1].ended is None:
                found.setdefault(record.attempts[-1].upstream, _idle())["in_flight"] += 1
        for told in found.values():
            told["per_second"] = round(told["attempts"] / seconds, 3)
        return found

    def _errors(self, minute: Iterable[_Span], span: int) -> list[dict[str, Any]]:
        """By source and type: those of the last minute, and of all the history."""
        lately: dict[tuple[str, str], int] = defaultdict(int)
        for each in minute:
            for key, count in each.errors.items():
                lately[key] += count
        whole: dict[tuple[str, str], int] = defaultdict(int)
        for each in self._spans.last(HISTORY_SECONDS // SPAN_SECONDS, span):
            for key, count in each.errors.items():
                whole[key] += count
        return [
            {"source": source, "type": kind, "minute": lately.get((source, kind), 0), "five_minutes": count}
            for (source, kind), count in sorted(whole.items(), key=lambda pair: -pair[1])
        ]

    def _listed(self) -> list[dict[str, Any]]:
        """The last calls, newest first, and behind them the last troubled ones that are not among them."""
        first = self._latest[0][0] if self._latest else 0
        older = [call for call in self._troubled if call[0] < first]
        return [_call(number, record) for number, record in (*reversed(self._latest), *reversed(older))]


def _second(record: Record) -> int:
    return int(record.ended)


def _bucket(seconds: float) -> int:
    return int(math.log(seconds / _LEAST) * _PER_E) if seconds > _LEAST else 0


def _ranked(span: _Span, current: int) -> tuple[Percentiles, Percentiles]:
    """The percentiles of a span's durations and first tokens."""
    if span.ranked is not None:
        return span.ranked
    ranked = _percentiles([span.durations]), _percentiles([span.first_tokens])
    if span.at < current:
        span.ranked = ranked
    return ranked


def _percentiles(counts: Iterable[Mapping[int, int]]) -> Percentiles:
    """p50, p95 and p99 in seconds, by nearest rank; the middle of the bucket that the rank falls into."""
    merged: dict[int, int] = defaultdict(int)
    for each in counts:
        for bucket, count in each.items():
            merged[bucket] += count
    total = sum(merged.values())
    if not total:
        return [None] * len(_PERCENTS)
    ranks = iter([math.ceil(total * percent / 100) for percent in _PERCENTS])
    found: Percentiles = []
    rank, passed = next(ranks), 0
    for bucket in sorted(merged):
        passed += merged[bucket]
        while passed >= rank:
            found.append(float(f"{_LEAST * math.exp((bucket + 0.5) / _PER_E):.4g}"))
            if (following := next(ranks, None)) is None:
                return found
            rank = following
    return found


def _idle() -> dict[str, Any]:
    return {"in_flight": 0, "attempts": 0, "per_second": 0.0, **{outcome.value: 0 for outcome in Outcome}}


def _doing(record: Record) -> str:
    """What an open call is doing: `queued` until its first attempt, `backoff` between two."""
    if record.first_byte is not None:
        return "streaming"
    if record.run is not None:
        return "waiting"
    if not record.attempts:
        return "queued"
    return "waiting" if record.attempts[-1].ended is None else "backoff"


def _call(number: int, record: Record) -> dict[str, Any]:
    """One ended call. `number` counts the calls of this process, so it is the call's own.

    `phases` are in the order in which they began, `from` and `to` in seconds after the call's arrival.
    """
    usage = record.usage
    return {
        "number": number,
        "id": text(record.request_id),
        "ended": round(record.began + record.seconds, 3),
        "operation": record.operation,
        "model": text(record.asked_model) or record.model,
        "upstream": record.upstream,
        "caller": record.caller,
        "priority": record.priority,
        "stream": record.stream,
        "status": record.status,
        "outcome": record.outcome._value_,
        "error": record.error_type,
        "source": record.error_source,
        "end_reason": record.end_reason,
        "finish_reason": text(record.finish_reason),
        "seconds": _rounded(record.seconds),
        "first_token": None if record.first_token is None else _rounded(record.first_token - record.arrived),
        "queue_seconds": _rounded(record.queue_seconds),
        "backoff_seconds": _rounded(record.backoff_seconds),
        "overhead_seconds": _rounded(record.overhead_seconds),
        "max_gap_seconds": _rounded(record.max_gap_seconds),
        "input_tokens": None if usage is None else usage.input,
        "output_tokens": None if usage is None else usage.output,
        "cost_usd": None if record.cost is None else record.cost / MICRO,
        "bytes_out": record.bytes_out,
        "phases": _phases(record),
    }


def _phases(record: Record) -> list[dict[str, Any]]:
    phases = [_pause(record, pause) for pause in record.pauses]
    for number, attempt in enumerate(record.attempts, 1):
        passed_on = number == len(record.attempts) and record.first_byte is not None and is_answered(record)
        phases += _attempt(record, attempt, passed_on=passed_on)
    if record.run is not None:
        phases += [_step(record, step) for step in record.run.steps]
    return sorted(phases, key=lambda phase: float(phase["from"]))


def _pause(record: Record, pause: Pause) -> dict[str, Any]:
    told = {"gate": pause.gate, "result": pause.result, "reason": pause.reason, "source": pause.source}
    return _phase(record, pause.kind, pause.started, pause.ended) | {name: said for name, said in told.items() if said}


def _attempt(record: Record, attempt: Attempt, *, passed_on: bool) -> Iterable[dict[str, Any]]:
    """One whose answer was passed on is shown in its parts: until its headers, its first token, its last byte. If it
    broke off, the last of them says so."""
    ended = record.ended if attempt.ended is None else attempt.ended
    headers = attempt.first_byte if passed_on and attempt.first_byte is not None else ended
    yield _phase(record, "attempt", attempt.started, headers) | {
        "upstream": attempt.upstream,
        "model": text(attempt.model),
        "status": attempt.status,
        "result": "ok" if passed_on else result_of(attempt),
        "retry_after": attempt.retry_after,
        "upstream_id": text(attempt.request_id),
    }
    if not passed_on:
        return
    begun = headers
    if record.first_token is not None:
        begun = max(headers, record.first_token)
        yield _phase(record, "first_token", headers, begun)
    last = record.ended if record.last_byte is None else record.last_byte
    told = {"result": result_of(attempt), "bytes": record.bytes_out, "chunks": record.chunks}
    yield _phase(record, "stream", begun, last) | told


def _step(record: Record, step: StepTaken) -> dict[str, Any]:
    told = {"step": step.name, "result": step.result, "calls": step.calls}
    return _phase(record, "step", step.started, step.ended) | told


def _phase(record: Record, kind: str, started: float, ended: float) -> dict[str, Any]:
    return {"kind": kind, "from": _rounded(started - record.arrived), "to": _rounded(ended - record.arrived)}


def _rounded(seconds: float) -> float:
    return round(seconds, 4)
