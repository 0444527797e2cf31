"""Every mistake, as it is told: file, line, key, what is wrong, then what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config import ConfigError, Problem, Server, load

SERVER_KEYS = ", ".join([*sorted(Server.model_fields)[:12], "…"])  # so many are told

ENVIRON = {"LONG_KEY": "k" * 24, "NUMBER": "7071", "SPACED": "two words"}
UPSTREAMS = "upstreams: {openai: {base_url: 'http://o'}, claude: {base_url: 'http://c', dialect: anthropic}}"
MODELS = "models: {'*': {upstreams: [openai]}}"
GOOD = f"{UPSTREAMS}\n{MODELS}\n"  # the cases go on at line 3


def told(directory: Path, text: str | bytes, **variables: str) -> list[str]:
    path = directory / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, ENVIRON | variables)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem).removeprefix(f"{directory}/") for problem in caught.value.problems]


ONE_VALUE = [
    # numbers
    ("gate: {concurrency: 0}", "gate.concurrency: must be >= 1, is 0"),
    ("gate: {concurrency: -3}", "gate.concurrency: must be >= 1, is -3"),
    ("gate: {concurrency: true}", "gate.concurrency: must be a whole number, is true"),
    ("gate: {concurrency: 2.5}", "gate.concurrency: must be a whole number, is 2.5"),
    ("gate: {concurrency: 8.0}", "gate.concurrency: must be a whole number, is 8.0"),
    ("gate: {concurrency: '8'}", "gate.concurrency: must be a whole number, is text; take the quotes away"),
    ("gate: {concurrency: many}", "gate.concurrency: must be a whole number, is text"),
    ("gate: {concurrency: }", "gate.concurrency: must be a whole number, is empty"),
    ("gate: {concurrency: [1]}", "gate.concurrency: must be a whole number, is a list"),
    ("gate: {concurrency: 10000000000000}", "gate.concurrency: must be <= 1000000000000, is 10000000000000"),
    (f"gate: {{concurrency: {'9' * 400}}}", "gate.concurrency: must be <= 1000000000000, is far too large"),
    (
        f"gate: {{concurrency: {'9' * 5000}}}",
        "gate.concurrency: is not a number that can be read; write it in plain digits",
    ),
    (f"gate: {{concurrency: 0x{'f' * 5000}}}", "gate.concurrency: must be <= 1000000000000, is far too large"),
    ("gate: {queue_limit: -1}", "gate.queue_limit: must be >= 0, is -1"),
    ("gate: {max_wait_seconds: .inf}", "gate.max_wait_seconds: must be a finite number"),
    ("gate: {max_wait_seconds: soon}", "gate.max_wait_seconds: must be a number, is text"),
    ("gate: {max_wait_seconds: 600000}", "gate.max_wait_seconds: must be <= 86400, is 600000"),
    (f"gate: {{max_wait_seconds: {'9' * 400}}}", "gate.max_wait_seconds: must be a number, is far too large"),
    ("server: {port: 65536}", "server.port: must be <= 65535, is 65536"),
    ("server: {drain_seconds: -0.5}", "server.drain_seconds: must be >= 0, is -0.5"),
    ("retry: {attempts: 0}", "retry.attempts: must be >= 1, is 0"),
    ("retry: {attempts: 11}", "retry.attempts: must be <= 10, is 11"),
    ("retry: {base_seconds: 0}", "retry.base_seconds: must be > 0, is 0"),
    ("telemetry: {trace_ratio: 1.5}", "telemetry.trace_ratio: must be <= 1, is 1.5"),
    ("telemetry: {trace_ratio: .nan}", "telemetry.trace_ratio: must be a finite number"),
    # other kinds
    ("telemetry: {log: 1}", "telemetry.log: must be true or false, is 1"),
    ("telemetry: {log: maybe}", "telemetry.log: must be true or false, is text"),
    ("telemetry: {service_name: 5}", "telemetry.service_name: must be text, is 5; put it in quotes"),
    ("telemetry: {service_name: }", "telemetry.service_name: must be text, is empty; or take the line out"),
    ("telemetry: {service_name: ''}", "telemetry.service_name: must not be empty"),
    (f"telemetry: {{service_name: {'x' * 201}}}", "telemetry.service_name: must be at most 200 characters"),
    (
        "gate: 5",
        "gate: must be a mapping, is 5; known: concurrency, queue_limit, max_wait_seconds, weights, overload",
    ),
    (
        "gate: ",
        "gate: must be a mapping, is empty; "
        "known: concurrency, queue_limit, max_wait_seconds, weights, overload; or take the line out",
    ),
    ("callers: [a]", "callers: must be a mapping from names, is a list; write `NAME: …` below it"),
    (
        "pools: {gpu: none}",
        "pools.gpu: must be a mapping or the word auto, is text; "
        "known: concurrency, requests_per_minute, tokens_per_minute, learn",
    ),
    ("pools: {gpu: {requests_per_minute: 0}}", "pools.gpu.requests_per_minute: must be >= 1, is 0"),
    ("pools: {gpu: {learn: 0}}", "pools.gpu.learn: must be true or false, is 0"),
    # unknown keys
    ("gates: {}", "gates: unknown key; did you mean gate?"),
    ("Gate: {}", "Gate: unknown key; did you mean gate?"),
    (
        "zzz: 1",
        "zzz: unknown key; known: batches, callers, gate, jobs, models, passthrough, pipelines, pools, retry, server, "
        "state, telemetry, …",
    ),
    ("pools: {gpu: {rpm: 1}}", "pools.gpu.rpm: unknown key; did you mean requests_per_minute?"),
    ("pools: {gpu: {request_per_minute: 1}}", "pools.gpu.request_per_minute: unknown key; did you mean requests_per_minute?"),  # noqa: E501  # as it is told
    ("server: {prt: 1}", "server.prt: unknown key; did you mean port?"),
    ("server: {'a b': 1}", f'server."a b": unknown key; known: {SERVER_KEYS}'),
    ("server: {'[key]': {}}", f"server.[key]: unknown key; known: {SERVER_KEYS}"),
    # names and hosts
    (
        "pools: {'gpu 0': auto}",
        'pools."gpu 0": a name is 1 to 64 letters, digits, `_`, `.` or `-`; rename it',
    ),
    ("server: {host: 'http://0.0.0.0'}", "server.host: must be an address or a host name, without scheme, port or brackets"),  # noqa: E501  # as it is told
    ("server: {host: ''}", "server.host: must be an address or a host name, without scheme, port or brackets"),
    # callers
    ("callers: {a: short}", "callers.a: must be at least 16 characters; a shorter key can be guessed"),
    ("callers: {a: ''}", "callers.a: must not be empty; give the key, or take the line out"),
    ("callers: {a: 12345678901234567890}", "callers.a: must be text; write it in quotes, as ${NAME} or as file:PATH"),
    (
        "callers: {a: two words that are long}",
        "callers.a: holds a space, a line end or a character beyond ASCII; give the key alone",
    ),
    (
        "callers: {'': kkkkkkkkkkkkkkkkkkkk}",
        'callers."": a name is 1 to 64 letters, digits, `_`, `.` or `-`; rename it',
    ),
    (
        "callers: {a: kkkkkkkkkkkkkkkkkkkk, b: kkkkkkkkkkkkkkkkkkkk}",
        "callers.b: has the same key as callers.a; give each caller a key of its own",
    ),
    (
        "callers: {a: '${LONG_KEY}', b: '${LONG_KEY}'}",
        "callers.b: has the same key as callers.a; give each caller a key of its own",
    ),
    # parts that contradict each other
    (
        "retry: {base_seconds: 30}",
        "retry: base_seconds must be <= cap_seconds; lower the one or raise the other",
    ),
    (
        "retry: {cap_seconds: 0.1}",
        "retry: base_seconds must be <= cap_seconds; lower the one or raise the other",
    ),
    (
        "server: {admin_port: 8080}",
        "server.admin_port: is the same as server.port; give it one of its own, or 0 for any free one",
    ),
    (
        "server: {host: 0.0.0.0}",
        "server.host: is not loopback, and without callers anyone who reaches it could use your keys; "
        "add callers, listen on 127.0.0.1, or say server.allow_anonymous: true",
    ),
    (
        "server: {admin_host: '::'}",
        "server.admin_host: is not loopback, and without server.admin_key anyone who reaches it could administer the "
        "gateway; add admin_key, listen on 127.0.0.1, or say server.allow_anonymous: true",
    ),
    # variables and files of the file
    (
        "callers: {a: '${NOBODY}'}",
        "callers.a: the environment variable NOBODY is not set; set it, or write $${ for a plain ${",
    ),
    (
        "server: {port: '${NOBODY}'}",
        "server.port: the environment variable NOBODY is not set; set it, or write $${ for a plain ${",
    ),
    (
        "callers: {a: '${LONG_KEY'}",
        "callers.a: holds a ${ without a variable's name and a }; write ${NAME}, or $${ for a plain ${",
    ),
    (
        "callers: {a: '${LONG-KEY:-none}'}",
        "callers.a: holds a ${ without a variable's name and a }; write ${NAME}, or $${ for a plain ${",
    ),
    ("retry: {attempts: '${NUMBER}'}", "retry.attempts: must be <= 10, is a number"),
    ("server: {port: '${SPACED}'}", "server.port: must be a whole number, is text"),
    # YAML
    ("gate: !limits {concurrency: 5}", "gate: has a YAML tag (!); take the tag out"),
    ("gate: {concurrency: !!python/object/new:int [5]}", "gate.concurrency: has a YAML tag (!); take the tag out"),
    ("gate: {concurrency: !!int many}", "gate.concurrency: is not a number that can be read; write it in plain digits"),
    ("gate: {concurrency: !!binary aGVsbG8=}", "gate.concurrency: has a YAML tag (!); take the tag out"),
    ("gate: {<<: 5}", "gate: `<<` takes a mapping or a list of mappings; give it one"),
    ("gate: {? [a] : 1}", "gate: holds a key that is not text; write it as plain text"),
    ('telemetry: {service_name: "\\ud800"}', "telemetry.service_name: holds half a character"),
]  # fmt: skip


def test_a_weight_is_a_callers(tmp_path: Path) -> None:
    text = GOOD + "callers: {team-a: 0123456789abcdef}\ngate: {weights: {team_a: 2}}"
    assert told(tmp_path, text) == ["p.yaml:4: gate.weights.team_a: no such caller; did you mean team-a?"]


def test_a_key_that_is_passed_through_cannot_be_a_callers_key(tmp_path: Path) -> None:
    text = GOOD.replace("'http://o'", "'http://o', api_key: passthrough") + "callers: {a: 0123456789abcdef}"
    assert told(tmp_path, text) == [
        "p.yaml:1: upstreams.openai.api_key: is passthrough, but with callers the key a client sends is the gateway's; "
        "give the upstream a key of its own, or take callers out"
    ]


@pytest.mark.parametrize(("text", "message"), ONE_VALUE, ids=[case[1][:70] for case in ONE_VALUE])
def test_a_mistake_is_told_with_its_line_and_its_key(text: str, message: str, tmp_path: Path) -> None:
    assert told(tmp_path, GOOD + text) == [f"p.yaml:3: {message}"]


def test_a_key_that_stands_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    text = "server:\n  port: 1\n  host: localhost\n  port: 2\ngate: {}\nserver: {}"
    assert told(tmp_path, GOOD + text) == [
        "p.yaml:6: server.port: stands twice, first on line 4; keep one of them",
        "p.yaml:8: server: stands twice, first on line 3; keep one of them",
    ]


UPSTREAM = [
    ("{}", "base_url: is missing; give it: Address of the provider"),
    ("{base_url: 5}", "base_url: must be text, is 5; put it in quotes"),
    *(
        (f"{{base_url: '{url}'}}", f"base_url: {message}")
        for url, message in [
            ("api.openai.com/v1", "must be an http or https URL with a host; write it like https://api.openai.com/v1"),
            ("ftp://h", "must be an http or https URL with a host; write it like https://api.openai.com/v1"),
            ("http://", "must be an http or https URL with a host; write it like https://api.openai.com/v1"),
            ("http://h:0", "must be an http or https URL with a host; write it like https://api.openai.com/v1"),
            ("http://h:99999", "is not a URL; write it like https://api.openai.com/v1"),
            ("http://[::1", "is not a URL; write it like https://api.openai.com/v1"),
            ("http://u:p@h", "must hold no user and no password; give the key as api_key"),
            ("http://h/v1?x=1", "must end with its path; take the `?` or `#` and what follows out"),
            ("http://h/v1#x", "must end with its path; take the `?` or `#` and what follows out"),
            ("http://h/a b", "holds a character that no URL may hold; percent-encode it"),
            ("http://h/é", "holds a character that no URL may hold; percent-encode it"),
        ]
    ),
    ("{base_url: 'http://h', dialect: openia}", "dialect: must be openai or anthropic; did you mean openai?"),
    ("{base_url: 'http://h', dialect: 3}", "dialect: must be openai or anthropic"),
    ("{base_url: 'http://h', api_key: [k]}", "api_key: must be text; write it in quotes, as ${NAME} or as file:PATH"),
    ("{base_url: 'http://h', api_key: ''}", "api_key: must not be empty; give the key, or take the line out"),
    ("{base_url: 'http://h', pool: gpu}", "pool: no such pool; none is configured"),
    ("{base_url: 'http://h', connect_seconds: 0}", "connect_seconds: must be > 0, is 0"),
    ("{base_url: 'http://h', connections: -1}", "connections: must be >= 0, is -1"),
    ("{base_url: 'http://h', first_byte: 5}", "first_byte: unknown key; did you mean first_byte_seconds?"),
    ("{base_url: 'http://h', limits: {concurrency: 0}}", "limits.concurrency: must be >= 1, is 0"),
    ("{base_url: 'http://h', limits: {concurrency: x}}", "limits.concurrency: must be a whole number, is text"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), UPSTREAM, ids=[case[0][:60] for case in UPSTREAM])
def test_a_mistake_in_an_upstream(body: str, message: str, tmp_path: Path) -> None:
    text = f"upstreams:\n  local: {body}\nmodels: {{'*': {{upstreams: [local]}}}}"
    assert told(tmp_path, text) == [f"p.yaml:2: upstreams.local.{message}"]


SECRETS = ("short", "whsec_", "whsec_c2hvcnQ=", "whsec_!!!!", "YSBzZWNyZXQgb2YgdGhlIG9wZXJhdG9y")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_that_signs_nothing_well_is_refused_and_not_shown(secret: str, tmp_path: Path) -> None:
    text = (
        "upstreams: {up: {base_url: 'http://h'}}\n"
        "models: {'*': {upstreams: [up]}}\n"
        f"batches: {{webhook: {{url: 'https://h/?a=b', secret: '{secret}'}}}}"
    )
    (problem,) = told(tmp_path, text)
    assert problem.startswith("p.yaml:3: batches.webhook.secret: must be whsec_ and base64 of at least 24 bytes")
    assert secret == "whsec_" or secret not in problem


MODEL = [
    ("m: {}", "m.upstreams: is missing; give it: Names of the upstreams, in the order they are tried"),
    ("m: {upstreams: []}", "m.upstreams: must not be empty; give at least one"),
    ("m: {upstreams: openai}", "m.upstreams: must be a list, is text; write [NAME, …]"),
    ("m: {upstreams: [opnai]}", "m.upstreams[0]: no such upstream; did you mean openai?"),
    ("m: {upstreams: [openai, zzz]}", "m.upstreams[1]: no such upstream; known: claude, openai"),
    ("m: {upstreams: [openai, 5]}", "m.upstreams[1]: must be text, is 5; put it in quotes"),
    ("m: {upstreams: [openai, openai]}", "m.upstreams: names an upstream twice; name each once, in the order they are to be tried"),  # noqa: E501  # as it is told
    (
        "m: {upstreams: [openai, claude]}",
        "m.upstreams: mixes the dialects openai (openai) and anthropic (claude); "
        "make it two models, one for each dialect",
    ),
    ("m: {upstreams: [openai], pool: gpu}", "m.pool: no such pool; none is configured"),
    ("m: {upstreams: [openai], upstream_model: ''}", "m.upstream_model: must not be empty"),
    (
        "'gpt-*-mini': {upstreams: [openai]}",
        "gpt-*-mini: a model is an exact name, a beginning that ends in `*`, or `*` alone, without spaces; rename it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), MODEL, ids=[case[0][:60] for case in MODEL])
def test_a_mistake_in_a_model(body: str, message: str, tmp_path: Path) -> None:
    assert told(tmp_path, f"{UPSTREAMS}\nmodels:\n  {body}") == [f"p.yaml:3: models.{message}"]


WHOLE_FILES: list[tuple[str | bytes, str]] = [
    ("", "p.yaml: is empty; give it upstreams and models, or start without a file"),
    ("# nothing yet\n", "p.yaml: is empty; give it upstreams and models, or start without a file"),
    ("- a", "p.yaml:1: must be a mapping; write `upstreams:` and `models:` at its left edge"),
    ("hello", "p.yaml:1: must be a mapping; write `upstreams:` and `models:` at its left edge"),
    ("!x {}", "p.yaml:1: has a YAML tag (!); take the tag out"),
    (
        "gate: {}\nserver: [1\n",
        "p.yaml:3: is not YAML: expected ',' or ']', but got '<stream end>', in column 1",
    ),
    (
        "gate: {}\n\tserver: 1",
        "p.yaml:2: is not YAML: found character '\\t' that cannot start any token, in column 1",
    ),
    (
        "callers: {a: ${KEY}}",
        "p.yaml:1: is not YAML: expected ',' or '}', but got '{', in column 15; put ${NAME} in quotes",
    ),
    ("a: 1\n b: 2", "p.yaml:2: is not YAML: mapping values are not allowed here, in column 3"),
    ("callers: {a: *sk-secret}", "p.yaml:1: is not YAML: found undefined alias …, in column 14"),
    ("a: 1\n---\nb: 2", "p.yaml:2: is not YAML: but found another document, in column 1"),
    ("gate: {}\nx: \x00", "p.yaml:2: holds a character that YAML does not allow; take it out"),
    (b"gate: {}\n# caf\xe9\n", "p.yaml:2: is not UTF-8 text; give the path of a configuration in YAML"),
    (b"\xff\xfeg\x00", "p.yaml:1: is not UTF-8 text; give the path of a configuration in YAML"),
    (b"#" * (1 << 20) + b"\n", "p.yaml: is larger than 1024 KiB; give the path of a configuration in YAML"),
    ("x: " + "[" * 5000, "p.yaml:1: is not YAML: nested too deeply, in column 34"),
    ("? " * 5000, "p.yaml:1: is not YAML: nested too deeply, in column 63"),
    ("a: &a [*a]", "p.yaml:1: is not YAML: too many values or levels, in column 4"),
]


@pytest.mark.parametrize(("text", "message"), WHOLE_FILES, ids=[case[1][8:60] for case in WHOLE_FILES])
def test_a_file_that_cannot_be_read(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert told(tmp_path, text) == [message]


def test_a_bomb_of_aliases_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    (message,) = told(tmp_path, bomb)
    assert "too many values or levels" in message


def test_a_file_that_is_none(tmp_path: Path) -> None:
    missing, closed = tmp_path / "none.yaml", Path("\0")
    for path, message in [
        (missing, "does not exist"),
        (tmp_path, "is a directory"),
        (closed, "has a name that no file can have"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        assert caught.value.problems == (
            Problem(str(path), None, "", f"{message}; give the path of a configuration in YAML"),
        )


def test_without_upstreams_and_models_it_says_what_to_write(tmp_path: Path) -> None:
    assert told(tmp_path, "gate: {concurrency: 5}") == [
        "p.yaml: upstreams: names no upstream; give at least one, with its base_url",
        'p.yaml: models: names no model; give at least one, such as "*": {upstreams: [NAME]}',
    ]


def test_without_file_and_keys_it_says_the_two_ways_to_go_on() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {"HOME": "/root"})
    assert str(caught.value) == (
        "environment: nothing to serve; give a configuration (--config FILE or PENSTOCK_CONFIG), "
        "or set OPENAI_API_KEY or ANTHROPIC_API_KEY"
    )


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
server: {host: 0.0.0.0, prot: 9000}
upstreams:
  openai:
    base_url: api.openai.com
    limits:
      concurrency: 0
      requests_per_minutes: 5
  openai:
    base_url: http://h
    api_key: ${NOBODY}
    pool: gpu1
pools: {gpu0: {concurrency: 4}}
models:
  fast: {upstreams: [opnai]}
gate: {queue_limit: "10"}
"""
    assert told(tmp_path, text, PENSTOCK_GATE__CONCURENCY="5", PENSTOCK_RETRY__ATTEMPTS="none") == [
        "p.yaml:1: server.prot: unknown key; did you mean port?",
        "p.yaml:1: server.host: is not loopback, and without callers anyone who reaches it could use your keys; "
        "add callers, listen on 127.0.0.1, or say server.allow_anonymous: true",
        "p.yaml:8: upstreams.openai: stands twice, first on line 3; keep one of them",
        "p.yaml:10: upstreams.openai.api_key: the environment variable NOBODY is not set; "
        "set it, or write $${ for a plain ${",
        "p.yaml:11: upstreams.openai.pool: no such pool; did you mean gpu0?",
        "p.yaml:14: models.fast.upstreams[0]: no such upstream; did you mean openai?",
        "p.yaml:15: gate.queue_limit: must be a whole number, is text; take the quotes away",
        "PENSTOCK_GATE__CONCURENCY: no setting is called so; did you mean PENSTOCK_GATE__CONCURRENCY?",
        "PENSTOCK_RETRY__ATTEMPTS: retry.attempts: must be a whole number, is text",
    ]
