"""What is told of prompts and answers: nothing, but to the spans of a model whose configuration asks for it."""

from __future__ import annotations

import json

import pytest

from proxy.config import Model, Price
from proxy.simulator import profiles
from proxy.telemetry.content import MOST, Content, masks
from tests.telemetry.house import CALLER_KEY, CHAT, MODEL, fronting

ASKED, ANSWERED = "penstock.content.request", "penstock.content.response"
OPERATION = f"chat {MODEL}"
SECRETS = ("ada@example.org", CALLER_KEY, "sk-of-a-friend-12345")


@pytest.fixture(autouse=True)
def _traces_go_to_the_collector(collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def without_secrets(said: str) -> str:
    for secret in SECRETS:
        said = said.replace(secret, "***")
    return said


def capturing(how: str) -> dict[str, Model]:
    return {MODEL: Model(upstreams=("up",), price=Price(input=0.15, output=0.6), capture_content=how)}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_asks_for_it_has_both_sides_in_its_span_and_in_nothing_else(
    stream, collector, attributes_of, tmp_path
):
    telemetry = {"trace_ratio": 1.0, "redact": [r"[\w.]+@[\w.]+"]}
    async with fronting(profiles.INSTANT, tmp_path, models=capturing("full"), telemetry=telemetry) as (_, gateway):
        said = gateway.said(prompt=f"ask {' or '.join(SECRETS)}", stream=stream)
        async with gateway.http.post(gateway.origin + CHAT, json=said, headers=gateway.headers()) as answer:
            body = await answer.read()
        await gateway.ended()
        log = gateway.log.read_text()
        metrics = await gateway.metrics()
    told = attributes_of(collector.one(OPERATION))
    assert told[ASKED] == without_secrets(json.dumps(said))
    assert told[ANSWERED] == without_secrets(body.decode())
    assert not any(attributes_of(span).keys() & {ASKED, ANSWERED} for span in collector.spans if span.name != OPERATION)
    assert "ask " not in log + metrics.text


async def test_what_was_refused_is_told_as_well(collector, attributes_of, tmp_path):
    async with fronting(profiles.INSTANT, tmp_path, models=capturing("truncated"), up={"api_key": None}) as (
        _,
        gateway,
    ):
        status, body = await gateway.ask(prompt="x" * 5000, n=-1)
        await gateway.ended()
    told = attributes_of(collector.one(OPERATION))
    assert len(told[ASKED]) == MOST["truncated"]
    assert status == 401
    assert told[ANSWERED] == body.decode().replace("Bearer YOUR_KEY`.", "***")


async def test_without_being_asked_for_it_is_not_kept(collector, attributes_of, tmp_path):
    async with fronting(profiles.INSTANT, tmp_path) as (_, gateway):
        await gateway.ask()
        await gateway.ended()
    assert not attributes_of(collector.one(OPERATION)).keys() & {ASKED, ANSWERED}


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_no_half_of_a_secret_stands_at_the_cut(at):
    secret = b"sk-0123456789abcdef0123456789"
    content = Content(100, b"a" * (100 - at) + b" " + secret)
    content.answered(b"b" * (90 - at))
    for byte in b" " + secret:
        content.answered(bytes((byte,)))
    for told in content.told(masks(())):
        assert "sk-0" not in told
        assert len(told) <= 100


def test_what_is_no_text_is_left_out_and_a_cut_letter_with_it():
    content = Content(4, "abcü".encode())
    content.answered(b"RIFF\0\1")
    assert content.told(masks(())) == ("abc", "")


def test_the_patterns_stand_in_the_order_in_which_they_are_given():
    content = Content(100, b"card 4111111111111111, Bearer abcdefghijk")
    assert content.told(masks((r"\d{16}",)))[0] == "card ***, ***"
