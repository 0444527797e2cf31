"""The rules of the catalogue."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from proxy.core.cost import price
from proxy.core.headers import Kind as Counted
from proxy.core.learner import Limit, Snapshot, Source
from proxy.core.outcome import Outcome
from proxy.core.usage import Usage
from proxy.telemetry import AccountLevel, ConnectionLevel, GateLevel, Labels, Levels
from proxy.telemetry.catalogue import FAMILIES, LATENCY, Configured, Kind

_KNOWN = Snapshot(
    limits=tuple(
        Limit(kind.value, kind, Source.HEADERS, 600.0, 600.0, 10.0, 0.0, None, 0)
        for kind in (Counted.REQUESTS, Counted.TOKENS)
    ),
    hold_seconds=0.0,
    cold_calls=None,
    unanswered=0,
    tokens_per_second_max=None,
    reserved=0.0,
    used=0.0,
)
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"


def test_every_family_has_a_name_of_its_own_and_says_what_it_means():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(family.help.endswith(".") for family in FAMILIES)
    assert not [family.name for family in FAMILIES if family.name.endswith(("_total", "_created"))]


def test_only_histograms_have_buckets_and_their_bounds_rise():
    for family in FAMILIES:
        assert bool(family.buckets) is (family.kind is Kind.HISTOGRAM), family.name
        assert list(family.buckets) == sorted(set(family.buckets)), family.name


def test_latency_buckets_reach_the_quarter_hour_a_reasoning_model_may_take():
    assert LATENCY[-1] == 900


def test_no_family_has_more_than_two_configured_labels_but_headroom_names_the_credential():
    for family in FAMILIES:
        most = 3 if family.name.startswith("ratelimit_") else 2
        assert sum(isinstance(values, Configured) for values in family.labels.values()) <= most, family.name


def test_a_key_is_no_label_of_a_histogram():
    assert {family.kind for family in FAMILIES if "key" in family.labels} == {Kind.COUNTER}


def test_label_overflow_knows_every_label_there_is():
    (overflow,) = (family for family in FAMILIES if family.name == "label_overflow")
    said_by_the_process = {"version", "revision", "python", "label"}
    assert (
        set(overflow.labels["label"]) == {name for family in FAMILIES for name in family.labels} - said_by_the_process
    )


def test_every_family_appears_in_both_formats_before_the_first_call(telemetry):
    for parse, accept in ((parse_plain, ""), (parse_openmetrics, OPENMETRICS)):
        body, _ = telemetry.exposition(accept)
        found = {family.name: family for family in parse(body.decode())}
        for family in FAMILIES:
            assert found[family.full_name].type == family.kind.value
            assert found[family.full_name].documentation == family.help
        assert "process_cpu_seconds" in found
        assert "python_info" in found


def test_children_of_bounded_enumerations_exist_from_the_start(telemetry, scrape):
    told = scrape(telemetry)
    for phase in ("queued", "waiting", "streaming"):
        assert told.has("client_disconnects_total", operation="chat", phase=phase)
    assert told.has("gate_admissions_total", gate="upstream/openai", priority="batch", result="rejected_full")
    assert told.has("telemetry_dropped_total", signal="span", reason="queue_full")
    assert told.has("label_overflow_total", label="model")
    assert told.has("overhead_seconds_count", stream="true")


def test_there_are_no_created_series(gateway, telemetry):
    gateway.plain()
    for accept in ("", OPENMETRICS):
        assert b"_created" not in telemetry.exposition(accept)[0]


def test_a_busy_gateway_of_50_models_5_upstreams_and_200_keys_stays_within_its_budget_of_series(make, gateway_of):
    """Every other model on two upstreams, calls lived in every way, all limits known, all keys seen."""
    models = tuple(f"model-{number}" for number in range(50))
    upstreams = tuple(f"upstream-{number}" for number in range(5))
    callers = tuple(f"caller-{number}" for number in range(200))
    routes = [(upstreams[number % 5], model) for number, model in enumerate(models)]
    routes += [(upstreams[(number + 1) % 5], model) for number, model in enumerate(models) if number % 2]
    gates = ("process", *(f"upstream/{name}" for name in upstreams), *(f"{name}/{model}" for name, model in routes))
    telemetry = make(
        Labels(models, upstreams, callers, gates), prices={model: price(input=1, output=1) for model in models[1:]}
    )
    telemetry.levels(
        lambda: Levels(
            [GateLevel(name, 20.0, 1, {}, 100) for name in gates],
            [ConnectionLevel(name, 1, 1, 0, 1, 1) for name in upstreams],
            [AccountLevel(upstream, model, _KNOWN) for upstream, model in routes],
        )
    )
    for upstream, model in routes:
        second = next((name for name, other in routes if other == model and name != upstream), upstream)
        gateway = gateway_of(telemetry, model=model, upstream=upstream, second=second)
        for call in (gateway.plain, gateway.streamed, gateway.retried, gateway.left, gateway.refused):
            call()
        for direction in ("up", "down"):
            telemetry.limit_changed(f"{upstream}/{model}", direction, "upstream_429")
    for caller in callers:
        for outcome in (Outcome.OK, Outcome.REJECTED, Outcome.FAILED, Outcome.CANCELLED):
            record = gateway.begin()
            record.caller, record.outcome, record.status = caller, outcome, 429
            with telemetry.request(record), telemetry.attempt(record, upstreams[0], models[1]):
                record.usage, record.upstream = Usage(1, 1), upstreams[0]
    body, _ = telemetry.exposition("")
    series = sum(not line.startswith(b"#") for line in body.splitlines())
    assert 15_000 < series <= 25_000


def test_every_outcome_is_a_label_value():
    (requests,) = (family for family in FAMILIES if family.name == "requests")
    assert set(requests.labels["outcome"]) == {outcome.value for outcome in Outcome}
