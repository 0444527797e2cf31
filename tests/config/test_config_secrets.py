"""No key leaves the settings but by `reveal`."""

from __future__ import annotations

import copy
import logging
import pickle
import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError

from proxy.config import ConfigError, Secret, Settings, describe, load

CANARY = "sk-canary-0123456789abcdef"


def settings() -> Settings:
    return Settings.model_validate(
        {
            "upstreams": {
                "a": {"base_url": "http://a", "api_key": CANARY},
                "b": {"base_url": "http://b"},
            },
            "models": {"*": {"upstreams": ["a"]}},
            "callers": {"team-a": CANARY},
        }
    )


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret(CANARY)
    assert secret.reveal() == CANARY
    assert (repr(secret), str(secret), f"{secret}", f"{secret!r:>20}") == (
        "Secret('***')",
        "***",
        "***",
        "       Secret('***')",
    )  # side by side
    assert CANARY not in f"{settings()!r} {settings()} {settings().model_dump()}"
    assert CANARY not in settings().model_dump_json()


def test_the_description_is_json_and_masks_every_secret() -> None:
    told = describe(settings())
    assert told["upstreams"]["a"]["api_key"] == "***"
    assert told["upstreams"]["b"]["api_key"] is None
    assert told["callers"] == {"team-a": "***"}
    assert told["retry"] == {"attempts": 3, "base_seconds": 0.5, "cap_seconds": 20.0}


def test_a_secret_equals_only_the_same_secret() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("é") != Secret("e")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2


def test_a_secret_is_not_pickled_but_can_be_copied() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(settings(), protocol)
    assert copy.deepcopy(settings()) == copy.copy(settings()) == settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings().server.port = 1  # type: ignore[misc]  # what is tested


def test_settings_made_in_code_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SERVER__PORT", "1")
    monkeypatch.setenv("PENSTOCK_SERVER", '{"port": 2}')
    monkeypatch.setenv("SERVER", '{"port": 3}')
    assert settings().server.port == 8080


def test_settings_made_in_code_are_checked_as_those_of_a_file() -> None:
    with pytest.raises(ValidationError, match="no such upstream"):
        Settings.model_validate({"upstreams": {"a": {"base_url": "http://a"}}, "models": {"*": {"upstreams": ["b"]}}})


@pytest.mark.parametrize(
    "text",
    [
        f"callers: {CANARY}",
        f"callers: [{CANARY}]",
        f"callers: {{a: [{CANARY}]}}",
        f"callers: {{a: {{b: {CANARY}}}}}",
        f"callers: {{a: '{CANARY} x'}}",
        f"callers: {{a: *{CANARY}}}",
        f"callers: {{a: !{CANARY} x}}",
        f"callers: {{a: &{CANARY} }}",
        f"callers: {{a: '{CANARY}",
        f"callers: {{a: %{CANARY}}}",
        f'callers: {{a: "\\{CANARY}"}}',
        f"callers: {{a: '${{{CANARY}}}'}}",
        f"callers: {{a: {CANARY}, b: {CANARY}}}",
        f"upstreams: {CANARY}",
        f"upstreams: {{a: {CANARY}}}",
        f"upstreams: {{a: {{base_url: '{CANARY}'}}}}",
        f"upstreams: {{a: {{base_url: 'http://{CANARY}@h'}}}}",
        f"upstreams: {{a: {{base_url: 'http://h?key={CANARY}'}}}}",
        f"upstreams: {{a: {{base_url: 'http://h:{CANARY}'}}}}",
        f"upstreams: {{a: {{api_kye: {CANARY}}}}}",
        f"upstreams: {{a: {{base_url: 'http://h', dialect: {CANARY}, pool: {CANARY}, limits: {CANARY}}}}}",
        f"models: {{a: {{upstreams: [{CANARY}, {CANARY}]}}}}",
        f"server: {{port: {CANARY}, host: '{CANARY}/'}}",
        "server: {port: '${CANARY}', host: '${CANARY}/'}",
        "retry: {attempts: '${DIGITS}'}",
        "gate: '${PART}'",
        f"{CANARY[:10]}\n{CANARY}: [",
    ],
)
def test_no_mistake_quotes_a_value(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    digits = "4711081547110815"
    environ = {
        "CANARY": CANARY,
        "DIGITS": digits,
        "PART": f"{{concurrency: {digits}, {'x'}: 5}}",
        "PENSTOCK_GATE__QUEUE_LIMIT": CANARY,
        "PENSTOCK_TELEMETRY": f"{{log: {CANARY}",
        "PENSTOCK_MODELS": CANARY,
        "PENSTOCK_NOTHING": CANARY,
    }
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError) as caught:
        load(path, environ)
    said = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert CANARY not in said
    assert digits not in said
