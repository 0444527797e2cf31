"""Whatever stands in a file or in the environment: settings, or a ConfigError that tells no secret."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.config import ConfigError, Settings, describe, load
from proxy.config.document import read

CANARY = "Canary7Canary7Canary7"
DIGITS = 4711081547110815

KEYS = [
    *["server", "upstreams", "pools", "models", "gate", "callers", "retry", "telemetry", "host", "port", "base_url"],
    *["api_key", "dialect", "limits", "pool", "concurrency", "learn", "upstream_model", "base_seconds", "cap_seconds"],
    *["allow_anonymous", "admin_host", "admin_port", "a", "b", "*", "gpt-*", "", "x y", "é", "a.b", "null", "0"],
]
secrets = st.sampled_from([CANARY, f"{CANARY} ", f"x{CANARY}", "${SECRET}", "http://${SECRET}@h", "${DIGITS}", DIGITS])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "passthrough", "openai", "anthropic", "http://h/v1", "0.0.0.0", "a", "b", "gpu", 10**400]),
    st.sampled_from(["${NONE}", "${", "$${SECRET}", "file:none", "file:", "file:\0", "k" * 16, "${BYTES}", "${YAML}"]),
)
keys = st.sampled_from(KEYS) | st.text(max_size=5)


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda below: st.lists(below, max_size=4) | st.dictionaries(keys, below, max_size=6),
        max_leaves=25,
    )


def configurations(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nearly right ones: the sections are there, with now and then anything in the place of a value."""
    anything = trees(leaves)

    def part(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.fixed_dictionaries({}, optional=fields) | anything

    count = st.integers(0, 5) | leaves
    limits = st.just("auto") | part(concurrency=count, requests_per_minute=count, learn=st.booleans() | leaves)
    name = st.sampled_from(["a", "b", "zzz"]) | leaves
    url = st.just("http://h/v1") | leaves
    upstream = part(base_url=url, api_key=leaves, limits=limits, pool=name, dialect=st.just("anthropic") | leaves)
    model = part(upstreams=st.lists(name, max_size=3), limits=limits, pool=name, upstream_model=leaves)

    def names(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.dictionaries(st.sampled_from(["a", "b", "a.b", "*", "x y"]), below, max_size=3) | anything

    return part(
        server=part(host=leaves, admin_host=leaves, port=count, admin_port=count, allow_anonymous=leaves),
        upstreams=names(upstream),
        pools=names(limits),
        models=names(model),
        gate=part(concurrency=count, queue_limit=count, max_wait_seconds=leaves),
        callers=names(leaves),
        retry=part(attempts=count, base_seconds=leaves, cap_seconds=leaves),
        telemetry=part(trace_ratio=leaves, log=leaves, service_name=leaves),
    )


ENVIRON = {
    "SECRET": CANARY,
    "DIGITS": str(DIGITS),
    "BYTES": "\udcff",
    "YAML": f"{{a: [{CANARY}, {DIGITS}], concurrency: {DIGITS}}}",
}


def outcome(write: Callable[[Path], object], environ: dict[str, str]) -> Settings | str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "p.yaml"
        write(path)
        try:
            return load(path, environ)
        except ConfigError as error:
            refused = error
    assert refused.problems
    for problem in refused.problems:
        assert problem.message
        assert str(problem).isprintable()
    return str(refused)


@settings(max_examples=150, deadline=None)
@given(trees(scalars | secrets) | configurations(scalars | secrets))
def test_any_tree_gives_settings_or_mistakes_and_tells_no_secret(tree: Any) -> None:
    told = outcome(lambda path: path.write_text(yaml.dump(tree, allow_unicode=True)), ENVIRON)
    if isinstance(told, Settings):
        assert CANARY not in f"{told.callers} {[upstream.api_key for upstream in told.upstreams.values()]}"
        assert CANARY not in f"{describe(told)['callers']}"
    else:
        assert CANARY not in told
        assert f"{DIGITS}" not in told


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet=string.printable, max_size=300).map(lambda text: text.encode()))
def test_any_bytes_give_settings_or_mistakes(content: bytes) -> None:
    outcome(lambda path: path.write_bytes(content), ENVIRON)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:-[]{},&*!|>%@`'\"#?\n \t<=~.0123_xeE+\\/", max_size=60))
def test_any_yaml_is_read_or_refused(text: str) -> None:
    document = read(text)
    assert document.whole or document.mistakes


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *["SERVER", "SERVER__PORT", "UPSTREAMS", "UPSTREAMS__A__API_KEY", "UPSTREAMS__A__LIMITS", "MODELS"],
                *["MODELS__ANY__UPSTREAMS", "CALLERS", "CALLERS__A", "TELEMETRY__SERVICE_NAME", "GATE", "NOTHING"],
            ]
        ).map("PENSTOCK_{}".format),
        st.text(max_size=20)
        | trees(scalars | secrets).map(lambda tree: yaml.dump(tree, default_flow_style=True))
        | st.just(CANARY),
        max_size=4,
    )
)
def test_any_environment_gives_settings_or_mistakes_and_tells_no_secret(variables: dict[str, str]) -> None:
    good = "{upstreams: {a: {base_url: 'http://h'}}, models: {'*': {upstreams: [a]}}, callers: {a: kkkkkkkkkkkkkkkkkk}}"
    told = outcome(lambda path: path.write_text(good), ENVIRON | variables)
    if isinstance(told, str):
        assert CANARY not in told
