"""What docker-compose.yml mounts into Grafana, the collector and Tempo fits together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from grafana import build
from tests.docs.test_container import COMPOSE, ROOT, SERVICES

GRAFANA = ROOT / "grafana"
TRACING = {name: service for name, service in SERVICES.items() if service.get("profiles") == ["tracing"]}


def read(file: Path) -> dict[str, Any]:
    said: dict[str, Any] = yaml.safe_load(file.read_text())
    return said


SOURCES = {
    source["uid"]: source
    for file in sorted((GRAFANA / "provisioning" / "datasources").glob("*.yml"))
    for source in read(file)["datasources"]
}


def mounted(service: str) -> list[Path]:
    return [ROOT / volume.split(":")[0] for volume in SERVICES[service]["volumes"] if volume.startswith("./")]


def test_a_rate_is_over_some_scrapes() -> None:
    """Grafana reckons its $__rate_interval from what the data source says of the scrapes."""
    every = read(GRAFANA / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert SOURCES["prometheus"]["jsonData"]["timeInterval"] == every


def test_exemplars_lead_to_tempo() -> None:
    (leads,) = SOURCES["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert leads["name"] == "trace_id"
    assert SOURCES[leads["datasourceUid"]]["type"] == "tempo"
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]


def test_every_data_source_is_a_service_at_its_port() -> None:
    tempo = read(GRAFANA / "tracing" / "tempo.yaml")
    assert SOURCES["tempo"]["url"] == f"http://tempo:{tempo['server']['http_listen_port']}"
    assert {source["url"].split("/")[2].split(":")[0] for source in SOURCES.values()} <= SERVICES.keys()


def test_spans_go_from_the_gateway_by_the_collector_to_tempo() -> None:
    assert TRACING.keys() == {"collector", "tempo"}
    assert mounted("collector") == [GRAFANA / "tracing" / "collector.yaml"]
    assert mounted("tempo") == [GRAFANA / "tracing" / "tempo.yaml"]
    collector, tempo = (read(GRAFANA / "tracing" / f"{name}.yaml") for name in ("collector", "tempo"))
    traces = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(traces[kind]) == collector[kind].keys()
    (port,) = {said["endpoint"].rpartition(":")[2] for said in collector["receivers"]["otlp"]["protocols"].values()}
    assert (
        f"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:{port} docker compose"
        in (ROOT / "docker-compose.yml").read_text()
    )
    taken = tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    assert collector["exporters"]["otlp_grpc"]["endpoint"] == f"tempo:{taken}"


def test_without_the_profile_there_are_no_spans() -> None:
    assert SERVICES["gateway"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "${OTEL_EXPORTER_OTLP_ENDPOINT:-}"


def test_every_image_of_others_is_pinned() -> None:
    ours = COMPOSE["x-penstock"]["image"]
    for service in SERVICES.values():
        tag = service["image"].rpartition(":")[2]
        assert service["image"] == ours or (tag[0].isdigit() or tag[0] == "v"), service["image"]


def test_what_is_kept_has_a_volume() -> None:
    named = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
        if not volume.startswith("./")
    }
    assert named == COMPOSE["volumes"].keys()


def test_the_first_page_is_one_that_is_built() -> None:
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).stem in {page.name for page in build.PAGES}
