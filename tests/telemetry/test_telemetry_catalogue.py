"""The rules of the catalogue."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from proxy.core.outcome import Outcome
from proxy.telemetry import Labels
from proxy.telemetry.catalogue import FAMILIES, LATENCY, Configured, Kind

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


def test_no_family_has_more_than_two_configured_labels():
    for family in FAMILIES:
        assert sum(isinstance(values, Configured) for values in family.labels.values()) <= 2, family.name


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


def test_a_busy_gateway_of_50_models_and_5_upstreams_stays_within_its_budget_of_series(make, gateway_of):
    models = tuple(f"model-{number}" for number in range(50))
    upstreams = tuple(f"upstream-{number}" for number in range(5))
    gates = ("process", *(f"upstream/{name}" for name in upstreams), *(f"model/{name}" for name in models))
    telemetry = make(Labels(models, upstreams, (), gates))
    for number, model in enumerate(models):
        first, second = upstreams[number % 5], upstreams[(number + 1) % 5]
        for gateway in (
            gateway_of(telemetry, model=model, upstream=first, second=second),
            gateway_of(telemetry, model=model, upstream=second, second=first),
        ):
            for call in (gateway.plain, gateway.streamed, gateway.retried, gateway.left, gateway.refused):
                call()
    body, _ = telemetry.exposition("")
    assert sum(not line.startswith(b"#") for line in body.splitlines()) <= 25_000


def test_every_outcome_is_a_label_value():
    (requests,) = (family for family in FAMILIES if family.name == "requests")
    assert set(requests.labels["outcome"]) == {outcome.value for outcome in Outcome}
