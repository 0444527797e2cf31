"""The numbers: counters and histograms, written once per call from its finished record.

    records -> Recorder.finish -> children (one number, or one row of numbers, per label tuple) -> exposition

1. Calls that ended together and are alike, which most are, are counted together: one look for their children, and one
   pass over them for each figure. What is rare (a failure, a second attempt, a wait) is counted call by call.
2. One thread writes, the event loop's; drops are counted under a lock. Any thread may read: a family is copied in steps
   that the interpreter does not interrupt, so a reader sees each number whole, if not all at the same instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from threading import Lock
from typing import NamedTuple

from proxy.core.outcome import Outcome, Reason, Retry
from proxy.telemetry import catalogue
from proxy.telemetry.catalogue import CODE_OF, NONE, OTHER, TOKENLESS, Kind
from proxy.telemetry.children import Bundles, Children, Count, Exemplar, Histogram, Key
from proxy.telemetry.record import Attempt, Record, Run

FOLD_AT = 1024  # calls; their observations are 300 KiB, and take a millisecond to sort
PROCESS_GATE = "process"  # the gate of a call that waited for none


@dataclass(frozen=True, slots=True)
class Labels:
    """The names that the configuration gives to things, in the order in which it gives them."""

    models: tuple[str, ...] = ()
    upstreams: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()  # the aliases of the keys, if calls are to be counted by them
    steps: tuple[str, ...] = ()  # pipeline/step
    gates: tuple[str, ...] = ()  # process, pool/<name>, upstream/<name>, model/<name>, <upstream>/<model>


class _Alike(NamedTuple):
    """What calls that are counted together have in common."""

    operation: str
    model: str
    is_stream: bool
    status: int
    outcome: str
    admitted: str
    gate: str
    priority: str
    upstream: str
    caller: str
    attempts: int
    is_step: bool


@dataclass(slots=True)
class _Call:
    requests: Count
    duration: Histogram
    overhead: Histogram
    bytes_in: Count
    bytes_out: Count
    attempts: Histogram


@dataclass(slots=True)
class _Door:
    admissions: Count
    wait: Histogram


@dataclass(slots=True)
class _Try:
    attempts: Count
    duration: Histogram


@dataclass(slots=True)
class _Use:
    input: Count
    output: Count
    cached: Count
    cache_write: Count
    reasoning: Count
    inputs: Histogram
    outputs: Histogram


@dataclass(slots=True)
class _Caller:
    requests: Count
    input: Count
    output: Count
    cost: Count


class Recorder:
    """Every counter and histogram of the catalogue."""

    def __init__(self, labels: Labels) -> None:
        self.counters: dict[str, Children[Count]] = {}
        self.histograms: dict[str, Children[Histogram]] = {}
        for family in catalogue.FAMILIES:
            if family.kind is Kind.COUNTER and not family.live:
                self.counters[family.name] = Children(family, Count, self._overflowed)
            elif family.kind is Kind.HISTOGRAM:
                born = partial(Histogram, family.buckets)
                self.histograms[family.name] = Children(family, born, self._overflowed)
        counters, histograms = self.counters, self.histograms
        self._errors = counters["request_errors"]
        self._duration = histograms["request_duration_seconds"]
        self._disconnects = counters["client_disconnects"]
        self._aborts = counters["stream_aborts"]
        self._pings = counters["stream_pings"]
        self._drained = counters["drained_answers"]
        self._wait = histograms["gate_queue_wait_seconds"]
        self._admissions = counters["gate_admissions"]
        self._retries = counters["upstream_retries"]
        self._retries_exhausted = counters["upstream_retries_exhausted"]
        self._fallbacks = counters["fallbacks"]
        self._cooldowns = counters["cooldowns"]
        self._rate_limited = counters["rate_limited"]
        self._backoff = histograms["backoff_seconds"]
        self._first_token = histograms["time_to_first_token_seconds"]
        self._upstream_first_token = histograms["upstream_time_to_first_token_seconds"]
        self._token_pace = histograms["time_per_output_token_seconds"]
        self._gap = histograms["stream_max_gap_seconds"]
        self._usage_missing = counters["usage_missing"]
        self._cost = counters["cost_usd"]
        self._unpriced = counters["unpriced_requests"]
        self._key_rate_limited = counters["key_rate_limited"]
        self._steps = counters["pipeline_steps"]
        self._step_duration = histograms["pipeline_step_duration_seconds"]
        self._needed = histograms["request_attempts"]
        self._reloads = counters["config_reloads"]
        self._dropped = counters["telemetry_dropped"]
        self._overflow = counters["label_overflow"]
        self._unfolded = 0  # calls counted since the last `fold`
        self._dropping = Lock()
        self._calls = Bundles(self._gather_call, counters["requests"].is_within)
        self._doors = Bundles(self._gather_door, counters["gate_admissions"].is_within)
        self._tries = Bundles(self._gather_try, lambda key: counters["upstream_attempts"].is_within(key[:3]))
        self._uses = Bundles(self._gather_use, counters["input_tokens_cached"].is_within)
        self._callers = Bundles(self._gather_caller, counters["key_requests"].is_within)
        self.names: dict[str, frozenset[str]] = {}  # the bounds in force, for levels read at the scrape
        self.answered: dict[Key, float] = {}  # when (upstream, model) last answered
        self.relabel(labels)
        # Children of constant labels alone live as long as we do.
        self._stages = {stage: histograms["stage_duration_seconds"][stage,] for stage in catalogue.STAGES}
        self._lag = histograms["event_loop_lag_seconds"][()]

    def relabel(self, labels: Labels) -> None:
        """Take the names of a new configuration: what it no longer names vanishes, what it still names counts on."""
        bounds: dict[str, tuple[str, ...]] = {}
        for source in (catalogue.MODELS, catalogue.UPSTREAMS, catalogue.GATES, catalogue.KEYS, catalogue.STEPS):
            names: tuple[str, ...] = getattr(labels, source.field)
            bounds[source.field] = names[: source.cap]
        self.names = {field: frozenset(names) for field, names in bounds.items()}
        for counter in self.counters.values():
            counter.bound(bounds)
        for histogram in self.histograms.values():
            histogram.bound(bounds)
        for bundles in (self._calls, self._doors, self._tries, self._uses, self._callers):
            bundles.clear()
        models, upstreams = self.names[catalogue.MODELS.field], self.names[catalogue.UPSTREAMS.field]
        self.answered = {pair: at for pair, at in self.answered.items() if pair[0] in upstreams and pair[1] in models}
        self._counts_keys = bool(labels.callers)

    def finish(self, ended: Sequence[Record]) -> None:
        """Count calls that have ended. Nothing in them is looked at again."""
        self._unfolded += len(ended)
        if self._unfolded >= FOLD_AT:
            self.fold()
        groups: dict[tuple[str | bool | int, ...], list[Record]] = {}
        for record in ended:
            key = (
                record.operation,
                record.model,
                record.stream,
                record.status,
                record.outcome._value_,  # what `value` reads through a descriptor, at four times the price on 3.11
                record.admitted,
                record.gate,
                record.priority,
                record.upstream,
                record.caller,
                len(record.attempts),
                record.step != "",
            )
            if (group := groups.get(key)) is None:
                groups[key] = [record]
            else:
                group.append(record)
        for common, records in groups.items():
            self._finish(_Alike._make(common), records)

    def _finish(self, alike: _Alike, records: list[Record]) -> None:
        """A step is no client's request, but all else that a call is."""
        needed = self._needed[alike.model,] if alike.is_step else self._requested(alike, records)
        if alike.admitted:
            self._admitted(alike, len(records))
        for record in records:
            if record.pauses:
                self._paused(record)
        if alike.attempts:
            needed.observe_all([alike.attempts] * len(records))
            self._attempted(alike, records)
            self._used(alike, records)
        if alike.is_stream:
            self._streamed([record for record in records if record.first_byte is not None])
            if pings := sum([record.pings for record in records]):
                self._pings[alike.operation,].value += pings
        if alike.outcome != Outcome.OK._value_:
            for record in records:
                if alike.is_step:
                    self._broken(record)
                else:
                    self._failed(record)
        if self._counts_keys:
            self._keyed(alike, records)

    def _requested(self, alike: _Alike, records: list[Record]) -> Histogram:
        """What is counted of clients' requests alone. Returns where the attempts they needed are counted."""
        stream = catalogue.STREAM[alike.is_stream]
        code = CODE_OF.get(alike.status, "5xx_other")
        call = self._calls[alike.operation, alike.model, stream, code, alike.outcome]
        call.requests.value += len(records)
        call.duration.observe_all([record.ended - record.arrived for record in records])
        call.overhead.observe_all([record.overhead_seconds for record in records])
        call.bytes_in.value += sum(map(_bytes_in, records))
        call.bytes_out.value += sum(map(_bytes_out, records))
        self._staged(records)
        for record in records:
            if record.run is not None:
                self._ran(record.run)
        return call.attempts

    def _ran(self, run: Run) -> None:
        for step in run.steps:
            self._steps[step.step, step.result].value += 1
            if step.result != "omitted":
                self._step_duration[step.step,].observe(step.ended - step.started)

    def _staged(self, records: list[Record]) -> None:
        stages = self._stages
        stages["auth"].observe_all([record.auth_seconds for record in records])
        stages["parse"].observe_all(
            [
                record.routed - record.body_read
                for record in records
                if record.routed is not None and record.body_read is not None
            ]
        )
        sent = [(record, record.attempts[-1]) for record in records if record.routed is not None and record.attempts]
        stages["route"].observe_all(
            [max(0.0, record.attempts[0].started - record.routed - record.queue_seconds) for record, _ in sent]  # type: ignore[operator]
        )
        stages["send"].observe_all([last.sent - last.started for _, last in sent if last.sent is not None])
        stages["relay"].observe_all([record.relay_seconds for record, _ in sent if record.relay_seconds is not None])
        stages["usage"].observe_all(
            [
                last.ended - record.last_byte
                for record, last in sent
                if record.relay_seconds is not None and record.last_byte is not None and last.ended is not None
            ]
        )

    def _keyed(self, alike: _Alike, records: list[Record]) -> None:
        key = alike.caller or NONE
        caller = self._callers[key, alike.outcome]
        if not alike.is_step:
            caller.requests.value += len(records)
        if alike.status == 429 and not alike.is_step:
            self._key_rate_limited[key,].value += len(records)
        for record in records:
            if record.run is not None:  # its steps have told what they spent
                continue
            if (usage := record.usage) is not None:
                caller.input.value += usage.input
                caller.output.value += usage.output
            if record.cost is not None:
                caller.cost.value += record.cost

    def _admitted(self, alike: _Alike, count: int) -> None:
        door = self._doors[alike.gate or PROCESS_GATE, alike.priority, alike.admitted]
        door.admissions.value += count
        if alike.admitted == "immediate":
            door.wait.observe_all([0.0] * count)

    def _paused(self, record: Record) -> None:
        priority = record.priority
        for pause in record.pauses:
            seconds = pause.ended - pause.started
            if pause.kind == "queue":
                self._wait[pause.gate or PROCESS_GATE, priority, pause.result].observe(seconds)
            else:
                self._backoff[_blamed(record, pause.started), pause.source].observe(seconds)

    def _attempted(self, alike: _Alike, records: list[Record]) -> None:
        if alike.attempts == 1 and alike.outcome == Outcome.OK._value_:
            tried = self._tries[alike.upstream, alike.model, "ok", alike.outcome]
            tried.attempts.value += len(records)
            tried.duration.observe_all([_attempt_seconds(record, record.attempts[0]) for record in records])
            self.answered[alike.upstream, alike.model] = records[-1].ended
            return
        for record in records:
            self._tried(record)

    def _tried(self, record: Record) -> None:
        """Count its attempts, and what one says of the one before it."""
        model = record.model
        before: Attempt | None = None
        for attempt in record.attempts:
            upstream = attempt.upstream
            meaning = attempt.meaning
            tried = self._tries[upstream, model, result_of(attempt), meaning.outcome._value_]
            tried.attempts.value += 1
            tried.duration.observe(_attempt_seconds(record, attempt))
            if attempt.status == 429 or meaning.outcome is Outcome.THROTTLED:
                self._rate_limited[
                    "upstream", upstream, model, _SCOPES.get(meaning.reason._value_, "unknown")
                ].value += 1
            if attempt.cooled:
                self._cooldowns[upstream, meaning.reason._value_].value += 1
            if attempt.status is not None:
                self.answered[upstream, model] = record.ended
            if before is not None:
                reason = before.meaning.reason._value_
                self._retries[before.upstream, model, reason].value += 1
                if before.upstream != upstream:
                    self._fallbacks[before.upstream, upstream, reason].value += 1
            before = attempt

    def _used(self, alike: _Alike, records: list[Record]) -> None:
        """Tokens and cost; and where they are not known, that they are not."""
        pair = alike.upstream, alike.model
        usages = [record.usage for record in records if record.usage is not None]
        if usages:
            use = self._uses[pair]
            inputs, outputs = [usage.input for usage in usages], [usage.output for usage in usages]
            use.inputs.observe_all(inputs)
            use.outputs.observe_all(outputs)
            use.input.value += sum(inputs)
            use.output.value += sum(outputs)
            use.cached.value += sum([usage.cached for usage in usages])
            use.cache_write.value += sum([usage.cache_write for usage in usages])
            use.reasoning.value += sum([usage.reasoning for usage in usages])
            costs = [record.cost for record in records if record.cost is not None]
            if costs:
                self._cost[pair].value += sum(costs)
            if len(costs) < len(usages):
                self._unpriced[pair].value += len(usages) - len(costs)
        if len(usages) < len(records) and alike.operation not in TOKENLESS:
            for record in records:
                if record.usage is None and is_answered(record):
                    self._usage_missing[*pair, _why_blind(record)].value += 1

    def _streamed(self, records: list[Record]) -> None:
        for record in records:
            pair = record.upstream or NONE, record.model
            first = record.first_token
            if first is not None:
                self._first_token[pair].observe(first - record.arrived)
            if record.run is not None:  # the rest is the last step's, and told with it
                continue
            if first is not None:
                if record.attempts:
                    self._upstream_first_token[pair].observe(first - record.attempts[-1].started)
                usage = record.usage
                if usage is not None and usage.output > 1 and record.outcome is Outcome.OK:
                    last = record.ended if record.last_byte is None else record.last_byte
                    self._token_pace[pair].observe((last - first) / (usage.output - 1))
            if record.chunks > 1:
                self._gap[pair].observe(record.max_gap_seconds)

    def _failed(self, record: Record) -> None:
        if record.drained:
            self._drained[record.upstream, record.drained].value += 1
        if record.outcome is Outcome.CANCELLED and record.end_reason != "shutdown":
            phase = "stalled" if record.end_reason == "client_stalled" else record.phase
            self._disconnects[record.operation, phase].value += 1
        elif record.error_type:
            self._errors[record.operation, record.model, record.error_source, record.error_type].value += 1
        self._broken(record)
        if record.status == 429 and record.error_source == "gateway":
            self._rate_limited[
                "gateway", record.upstream or NONE, record.model, _OWN_SCOPES.get(record.error_type, "unknown")
            ].value += 1

    def _broken(self, record: Record) -> None:
        if record.stream and record.first_byte is not None and is_answered(record):
            self._aborts[record.upstream or NONE, record.model, abort_of(record)].value += 1
        if record.attempts:
            last = record.attempts[-1].meaning
            if last.retry is not Retry.NEVER and last.outcome is record.outcome:
                pair = record.attempts[-1].upstream, record.model
                self._retries_exhausted[*pair, last.reason._value_].value += 1

    # ── children found together ──

    def _gather_call(self, operation: str, model: str, stream: str, code: str, outcome: str) -> _Call:
        counters, histograms = self.counters, self.histograms
        return _Call(
            counters["requests"][operation, model, stream, code, outcome],
            histograms["request_duration_seconds"][model, stream, outcome],
            histograms["overhead_seconds"][stream,],
            counters["request_bytes"][operation, "in"],
            counters["request_bytes"][operation, "out"],
            histograms["request_attempts"][model,],
        )

    def _gather_door(self, gate: str, priority: str, result: str) -> _Door:
        return _Door(self._admissions[gate, priority, result], self._wait[gate, priority, "admitted"])

    def _gather_try(self, upstream: str, model: str, result: str, outcome: str) -> _Try:
        return _Try(
            self.counters["upstream_attempts"][upstream, model, result],
            self.histograms["upstream_attempt_duration_seconds"][upstream, model, outcome],
        )

    def _gather_use(self, upstream: str, model: str) -> _Use:
        counters, tokens = self.counters, self.histograms["tokens_per_request"]
        return _Use(
            counters["tokens"][upstream, model, "input"],
            counters["tokens"][upstream, model, "output"],
            counters["input_tokens_cached"][upstream, model],
            counters["input_tokens_cache_write"][upstream, model],
            counters["output_tokens_reasoning"][upstream, model],
            tokens[model, "input"],
            tokens[model, "output"],
        )

    def _gather_caller(self, key: str, outcome: str) -> _Caller:
        counters = self.counters
        return _Caller(
            counters["key_requests"][key, outcome],
            counters["key_tokens"][key, "input"],
            counters["key_tokens"][key, "output"],
            counters["key_cost_usd"][key,],
        )

    # ── what is told apart from the calls ──

    def exemplify(self, record: Record) -> None:
        """Leave the call's trace as an example of its durations; only for a trace that is kept."""
        trace_id = f"{record.trace_id:032x}"
        ended = record.began + record.seconds
        duration = self._duration[record.model, "true" if record.stream else "false", record.outcome.value]
        duration.exemplify(Exemplar(trace_id, record.seconds, ended))
        if record.stream and record.first_byte is not None and record.first_token is not None:
            first = record.first_token - record.arrived
            self._first_token[record.upstream or NONE, record.model].exemplify(Exemplar(trace_id, first, ended))

    def staged(self, stage: str, seconds: float, times: int) -> None:
        """A stage that is measured apart from its calls, of which there were so many."""
        self._stages[stage].observe_all([seconds] * times)

    def fold(self) -> None:
        """Sort what the histograms have noted into their buckets; before they are read."""
        self._unfolded = 0
        for children in self.histograms.values():
            for histogram in children.values():
                histogram.fold()

    def lagged(self, seconds: float) -> None:
        """The event loop woke a sleeper so much too late."""
        self._lag.observe(seconds)

    def reloaded(self, ok: bool) -> None:
        self._reloads["success" if ok else "failure",].value += 1

    def dropped(self, signal: str, reason: str, count: int = 1) -> None:
        """Spans or log lines were lost. From any thread."""
        with self._dropping:
            self._dropped[signal, reason].value += count

    def _overflowed(self, label: str) -> None:
        self._overflow[label,].value += 1


_bytes_in, _bytes_out = attrgetter("bytes_in"), attrgetter("bytes_out")


def _attempt_seconds(record: Record, attempt: Attempt) -> float:
    return (record.ended if attempt.ended is None else attempt.ended) - attempt.started


def is_answered(record: Record) -> bool:
    """Whether an upstream began a good answer, however it ended."""
    status = record.attempts[-1].status if record.attempts else None
    return status is not None and status < 400


def _why_blind(record: Record) -> str:
    if record.outcome is not Outcome.OK:
        return "aborted"
    return "parse_error" if record.usage_unread else "no_usage"


def result_of(attempt: Attempt) -> str:
    """What became of an attempt, as `upstream_attempts` says it: how it broke, else the status, else who ended it."""
    outcome = attempt.meaning.outcome
    if outcome is Outcome.OK:
        return "ok"
    broke = _BROKEN.get(attempt.meaning.reason._value_)
    if broke is not None:
        return broke
    if outcome is Outcome.CANCELLED or attempt.status is None:
        return "cancelled"
    return CODE_OF.get(attempt.status, "5xx_other")


def abort_of(record: Record) -> str:
    """Why a stream that had begun did not end well."""
    if record.end_reason in _ABORTS:
        return _ABORTS[record.end_reason]
    if record.outcome is Outcome.CANCELLED:
        return "client_disconnect"
    reason = record.attempts[-1].meaning.reason.value if record.attempts else ""
    return _ABORTS.get(reason, OTHER)


def _blamed(record: Record, time: float) -> str:
    """The upstream of the last attempt that began before `time`: the one whose refusal a backoff waits out."""
    for attempt in reversed(record.attempts):
        if attempt.started <= time:
            return attempt.upstream
    return record.upstream or NONE


_BROKEN = {
    Reason.CONNECT.value: "connect",
    Reason.FIRST_BYTE.value: "timeout",
    Reason.IDLE.value: "timeout",
    Reason.RESET.value: "reset",
    Reason.EOF.value: "eof",
    Reason.GARBAGE.value: "garbage",
    Reason.ERROR_EVENT.value: "error_event",
}
_ABORTS = {
    **{word: word for word in catalogue.ABORTS},
    Reason.EOF.value: "upstream_eof",
    Reason.RESET.value: "upstream_reset",
    Reason.IDLE.value: "idle_timeout",
    Reason.GARBAGE.value: "malformed_sse",
}
_SCOPES = {
    Reason.REQUESTS.value: "requests",
    Reason.TOKENS.value: "tokens",
    Reason.TOO_LARGE.value: "tokens",
    Reason.MONEY.value: "quota",
    Reason.FULL.value: "concurrency",
}
_OWN_SCOPES = {
    "queue_full": "concurrency",
    "queue_timeout": "concurrency",
    "overloaded": "concurrency",
    "rate_limited": "requests",
}
