"""The JSON Schema, and the examples that go with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from pydantic import BaseModel

from proxy.config import (
    Batches,
    Gate,
    Limits,
    Model,
    Passthrough,
    Retry,
    Server,
    Settings,
    State,
    Telemetry,
    Upstream,
    json_schema,
    load,
)

CONFIG = Path(__file__).parents[2] / "config"
EXAMPLES = sorted(CONFIG.glob("*.yaml"))
VARIABLES = {  # what the examples say they need
    "OPENAI_API_KEY": "sk-openai",
    "ANTHROPIC_API_KEY": "sk-anthropic",
    "TEAM_A_KEY": "a" * 48,
    "TEAM_B_KEY": "b" * 48,
    "NIGHTLY_KEY": "n" * 48,
    "BATCH_KEY": "c" * 48,
}
SECTIONS: list[type[BaseModel]] = [
    *(Settings, Server, Upstream, Limits, Model, Gate, Passthrough, Retry, State, Batches, Telemetry)
]


def test_the_schema_is_valid_and_is_the_one_that_is_kept() -> None:
    Draft202012Validator.check_schema(json_schema())
    kept = json.loads((CONFIG / "penstock.schema.json").read_text())
    assert kept == json_schema(), "run `make schema`"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads_and_fits_the_schema(path: Path) -> None:
    Draft202012Validator(json_schema()).validate(yaml.safe_load(path.read_text()))
    settings = load(path, VARIABLES)
    needed = {name for name in VARIABLES if f"${{{name}}}" in path.read_text()}
    assert load(path, {name: VARIABLES[name] for name in needed}) == settings


def test_the_full_example_shows_every_setting_with_its_default() -> None:
    text = (CONFIG / "penstock.example.yaml").read_text()
    shown = yaml.safe_load(text)
    parts = {"server": Server, "gate": Gate, "retry": Retry, "state": State, "batches": Batches, "telemetry": Telemetry}
    for section, model in (parts | {"passthrough": Passthrough}).items():
        optional = {name for name, field in model.model_fields.items() if field.default is None}
        assert shown[section] == json.loads(model().model_dump_json(exclude=optional)), section
        assert all(f"# {name}: " in text for name in optional), section
    assert shown.keys() == Settings.model_fields.keys()
    for part in (Upstream, Limits, Model):
        for name, field in part.model_fields.items():
            assert f" {name}: " in text or f"{{{name}: " in text, name
            if isinstance(field.default, bool | int | float):
                assert f" {name}: {json.dumps(field.default).removesuffix('.0')}" in text, name


def test_every_setting_has_a_description() -> None:
    for section in SECTIONS:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}"


def test_no_default_of_the_schema_is_a_secret() -> None:
    assert not [text for text in texts(json_schema()) if "Secret(" in text or text == "***"]


@pytest.mark.parametrize(
    "tree",
    [
        {"gates": {}},
        {"gate": {"concurrency": 0}},
        {"gate": {"concurrency": "5"}},
        {"pools": {"gpu 0": "auto"}},
        {"pools": {"gpu": "none"}},
        {"models": {"a*b": {"upstreams": ["a"]}}},
        {"models": {"a": {"upstreams": []}}},
        {"upstreams": {"a": {}}},
        {"upstreams": {"a": {"base_url": "http://a", "dialect": "other"}}},
        {"callers": {"a": ""}},
    ],
)
def test_an_editor_shows_a_mistake(tree: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Draft202012Validator(json_schema()).validate(tree)


def texts(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for key, below in value.items():
                yield key
                yield from texts(below)
        case list():
            for below in value:
                yield from texts(below)
        case str():
            yield value
