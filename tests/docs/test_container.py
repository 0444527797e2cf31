"""The image and the composition fit the gateway: their locks, ports, files and commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from proxy import config
from proxy.cli import cli

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == COMPOSE["x-penstock"]["image"]}
GATEWAYS = [name for name, service in OURS.items() if service.get("command") == ["serve"]]


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([a-z0-9-]+)==([^ ;]+)", (ROOT / lock).read_text()))


def test_the_lock_of_the_image_is_a_part_of_the_whole_lock() -> None:
    assert pins("requirements.run.lock").items() < pins("requirements.lock").items()


def test_the_lock_of_the_image_has_every_dependency_and_no_tool_of_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[><=!~;\[ ]", requirement)[0].lower() for requirement in requirements}

    locked = pins("requirements.run.lock").keys()
    assert names(project["dependencies"]) <= locked
    assert not names(project["optional-dependencies"]["dev"]) & locked


def test_the_lock_has_what_builds_the_image() -> None:
    """By the very expression that the Dockerfile takes it out with."""
    assert "sed -n '/^setuptools==/,/[^\\\\]$/p'" in (ROOT / "Dockerfile").read_text()
    lock = (ROOT / "requirements.lock").read_text()
    taken = re.search(r"(?m)^setuptools==(?:.*\\\n)+.*[^\\]$", lock)
    assert taken is not None
    assert all("--hash=sha256:" in line for line in taken[0].splitlines()[1:])


def test_the_image_copies_only_what_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text())
    assert {name for line in copied for name in line.split()} == kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_gateway_listens_where_the_composition_looks() -> None:
    settings = config.load(ROOT / "config" / "compose.yaml", {})
    server = settings.server
    published = [port.split(":") for port in SERVICES["gateway"]["ports"]]
    assert {int(inside) for _, _, inside in published} == {server.port, server.admin_port}
    exposed = re.search(r"(?m)^EXPOSE (.*)$", (ROOT / "Dockerfile").read_text())
    assert exposed is not None
    assert {int(port) for port in exposed[1].split()} == {server.port, server.admin_port}
    for name in GATEWAYS:
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > server.drain_seconds


def test_every_gateway_is_scraped_and_called_and_published_on_ports_of_its_own() -> None:
    server = config.load(ROOT / "config" / "compose.yaml", {}).server
    scrape = yaml.safe_load((ROOT / "grafana" / "prometheus" / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert (found["names"], found["port"]) == (GATEWAYS, server.admin_port)
    assert job["relabel_configs"] == [{"source_labels": ["__meta_dns_name"], "target_label": "instance"}]
    called = [service["entrypoint"][-1] for service in OURS.values() if "entrypoint" in service]
    assert called == [f"http://{name}:{server.port}/v1" for name in GATEWAYS]
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len({port.rpartition(":")[0] for port in published}) == len(published)


def test_the_second_gateway_is_the_first_ones_like_and_comes_with_its_profile() -> None:
    first, second = (SERVICES[name] for name in GATEWAYS)
    own = ("profiles", "ports", "volumes")  # a state belongs to one gateway
    assert {name: said for name, said in second.items() if name not in own} == {
        name: said for name, said in first.items() if name not in own
    }
    (configured, kept), (same, other) = first["volumes"], second["volumes"]
    assert (configured, kept.partition(":")[2]) == (same, other.partition(":")[2])
    assert kept != other
    cluster = {name for name, service in SERVICES.items() if service.get("profiles") == ["cluster"]}
    assert cluster == {"second", "second-clients"}


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_every_file_that_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", ()):
        source = volume.split(":")[0]
        assert (ROOT / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], volume


@pytest.mark.parametrize("name", OURS)
def test_our_containers_run_commands_that_exist_and_may_do_little(name: str) -> None:
    service = OURS[name]
    group = typer.main.get_command(cli)
    assert isinstance(group, typer.core.TyperGroup)
    if "entrypoint" not in service:
        command, *rest = service["command"]
        known = {option for parameter in group.commands[command].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]


def test_grafana_finds_prometheus_and_the_pages() -> None:
    provisioning = ROOT / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert [source["url"] for source in sources] == ["http://prometheus:9090"]
    providers = yaml.safe_load((provisioning / "dashboards" / "penstock.yml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert all(provider["options"]["path"] in mounted for provider in providers)
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "grafana" / "dashboards" / Path(home).name).exists()
