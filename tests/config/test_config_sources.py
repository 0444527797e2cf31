"""Where values come from, and which wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config import ConfigError, Limits, Secret, Settings, load

TEXT = """\
server: {port: 9000}
upstreams:
  openai: {base_url: "https://api.openai.com/v1/", api_key: "${KEY}"}
  my-local.1: {base_url: "http://${HOST}:8000/v1", limits: {concurrency: 64}}
models:
  gpt-4o-mini: {upstreams: [openai], limits: {concurrency: 20, requests_per_minute: 500}}
  claude-*: {upstreams: [openai]}
  "*": {upstreams: [my-local.1, openai]}
callers: {team-a: aaaaaaaaaaaaaaaaaaaaaaaa}
"""
ENVIRON = {"KEY": "sk-of-openai", "HOST": "10.0.0.7"}


def loaded(directory: Path, text: str = TEXT, **variables: str) -> Settings:
    path = directory / "penstock.yaml"
    path.write_text(text)
    return load(path, ENVIRON | variables)


def mistakes(directory: Path, text: str = TEXT, **variables: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(directory, text, **variables)
    return [str(problem).removeprefix(f"{directory}/") for problem in caught.value.problems]


def key_of(settings: Settings, upstream: str) -> str:
    key = settings.upstreams[upstream].api_key
    assert isinstance(key, Secret)
    return key.reveal()


class TestFile:
    def test_what_it_does_not_say_has_its_default(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path)
        assert (settings.server.port, settings.server.admin_port) == (9000, 8081)
        assert settings.upstreams["openai"].base_url == "https://api.openai.com/v1"
        assert settings.upstreams["openai"].limits == Limits()
        assert settings.models["*"].upstreams == ("my-local.1", "openai")

    def test_variables_stand_anywhere_in_a_text(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path)
        assert settings.upstreams["my-local.1"].base_url == "http://10.0.0.7:8000/v1"
        assert key_of(settings, "openai") == "sk-of-openai"

    def test_a_variable_where_a_number_is_wanted_is_read_as_one(self, tmp_path: Path) -> None:
        text = TEXT.replace("{port: 9000}", "\n  port: ${PORT}").replace(
            "limits: {concurrency: 64}", 'limits: "${LIMITS}"'
        )
        settings = loaded(tmp_path, text, PORT="7070", LIMITS="{concurrency: 3}")
        assert settings.server.port == 7070
        assert settings.upstreams["my-local.1"].limits == Limits(concurrency=3)

    def test_a_key_of_digits_stays_text(self, tmp_path: Path) -> None:
        assert key_of(loaded(tmp_path, KEY="0123456789"), "openai") == "0123456789"

    def test_an_escaped_variable_stays_as_it_is(self, tmp_path: Path) -> None:
        text = TEXT + "telemetry: {service_name: 'a$${KEY}b$${$c$$'}"
        assert loaded(tmp_path, text).telemetry.service_name == "a${KEY}b${$c$$"

    def test_a_key_may_stand_in_a_file_beside_the_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "keys").mkdir()
        (tmp_path / "keys" / "openai").write_text("\n sk-from-a-file\r\n")
        assert key_of(loaded(tmp_path, KEY="file:keys/openai"), "openai") == "sk-from-a-file"
        assert key_of(loaded(tmp_path, KEY=f"file:{tmp_path}/keys/openai"), "openai") == "sk-from-a-file"

    def test_a_key_file_that_cannot_be_used_is_a_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "large").write_bytes(b"k" * 70_000)
        (tmp_path / "latin").write_bytes(b"caf\xe9")
        (tmp_path / "blank").write_bytes(b"\n")
        for name, message in [
            ("none", f"its file does not exist; the path of file: starts at {tmp_path}"),
            ("large", f"its file is larger than 64 KiB; the path of file: starts at {tmp_path}"),
            ("latin", f"its file is not UTF-8 text; the path of file: starts at {tmp_path}"),
            ("", f"its file is a directory; the path of file: starts at {tmp_path}"),
            ("\0", f"its file has a name that no file can have; the path of file: starts at {tmp_path}"),
            ("blank", "must not be empty; give the key, or take the line out"),
        ]:
            assert mistakes(tmp_path, KEY=f"file:{name}") == [f"penstock.yaml:3: upstreams.openai.api_key: {message}"]

    def test_passthrough_is_a_word_and_not_a_key(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path, TEXT.replace("${KEY}", "passthrough").replace("callers:", "pools: {} #"))
        assert settings.upstreams["openai"].api_key == "passthrough"
        assert settings.upstreams["my-local.1"].api_key is None

    def test_auto_sets_no_ceiling(self, tmp_path: Path) -> None:
        text = TEXT.replace("{concurrency: 64}", "auto") + "pools: {gpu: auto, cpu: {learn: false}}"
        settings = loaded(tmp_path, text)
        assert settings.upstreams["my-local.1"].limits == settings.pools["gpu"] == Limits()
        assert not settings.pools["cpu"].learn

    def test_anchors_and_merges_work(self, tmp_path: Path) -> None:
        text = """
upstreams:
  a: &a {base_url: "http://a", limits: &few {concurrency: 2}}
  b: {<<: *a, base_url: "http://b"}
  c: {<<: [*a, {idle_seconds: 9, base_url: "http://c"}]}
models: {"*": {upstreams: [a, b, c], limits: *few}}
"""
        upstreams = loaded(tmp_path, text).upstreams
        assert [one.base_url for one in upstreams.values()] == ["http://a", "http://b", "http://a"]
        assert [one.limits.concurrency for one in upstreams.values()] == [2, 2, 2]
        assert upstreams["c"].idle_seconds == 9

    def test_a_byte_order_mark_is_no_matter(self, tmp_path: Path) -> None:
        assert loaded(tmp_path, "\ufeff" + TEXT) == loaded(tmp_path)

    def test_keys_are_names_as_they_stand(self, tmp_path: Path) -> None:
        text = "upstreams: {on: {base_url: 'http://h'}, 5: {base_url: 'http://h'}}\n"
        text += "models: {2024-05-13: {upstreams: [on, '5'], upstream_model: 2024-05-13}}"
        settings = loaded(tmp_path, text.replace("[on,", "['on',"))
        assert list(settings.upstreams) == ["on", "5"]
        assert settings.models["2024-05-13"].upstream_model == "2024-05-13"

    def test_listening_beyond_loopback_needs_callers_or_a_word(self, tmp_path: Path) -> None:
        public = TEXT.replace("port: 9000", "host: 0.0.0.0, admin_host: '::', admin_key: 0123456789abcdef")
        assert loaded(tmp_path, public).server.host == "0.0.0.0"
        alone = public.replace("callers:", "pools: {} #").replace(", admin_key: 0123456789abcdef", "")
        assert [one.split(": ")[1] for one in mistakes(tmp_path, alone)] == ["server.host", "server.admin_host"]
        said = alone.replace("host: 0.0.0.0", "host: 0.0.0.0, allow_anonymous: true")
        assert loaded(tmp_path, said).server.allow_anonymous

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
    def test_loopback_needs_no_callers(self, host: str, tmp_path: Path) -> None:
        text = TEXT.replace("port: 9000", f"host: '{host}'").replace("callers:", "pools: {} #")
        assert loaded(tmp_path, text).server.host == host


class TestEnvironment:
    def test_it_overrides_the_file_value_by_value(self, tmp_path: Path) -> None:
        settings = loaded(
            tmp_path,
            PENSTOCK_SERVER__PORT="1234",
            PENSTOCK_MODELS__GPT_4O_MINI__LIMITS__CONCURRENCY="10",
            PENSTOCK_UPSTREAMS__MY_LOCAL_1__IDLE_SECONDS="7.5",
            PENSTOCK_TELEMETRY__LOG="false",
            PENSTOCK_CONFIG="/etc/penstock.yaml",
            UNRELATED="1",
        )
        assert settings.server.port == 1234
        assert settings.models["gpt-4o-mini"].limits == Limits(concurrency=10, requests_per_minute=500)
        assert settings.upstreams["my-local.1"].idle_seconds == 7.5
        assert settings.upstreams["my-local.1"].limits.concurrency == 64
        assert not settings.telemetry.log

    def test_names_match_whatever_their_case(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path, penstock_models__gpt_4o_mini__limits__concurrency="11")
        assert settings.models["gpt-4o-mini"].limits.concurrency == 11

    def test_a_star_is_spelled_any(self, tmp_path: Path) -> None:
        settings = loaded(
            tmp_path, PENSTOCK_MODELS__ANY__UPSTREAMS="[openai]", PENSTOCK_MODELS__CLAUDE_ANY__UPSTREAM_MODEL="5"
        )
        assert settings.models["*"].upstreams == ("openai",)
        assert settings.models["claude-*"].upstream_model == "5"

    def test_a_mapping_adds_to_the_file_and_a_word_replaces(self, tmp_path: Path) -> None:
        settings = loaded(
            tmp_path,
            PENSTOCK_POOLS="{gpu: {concurrency: 4}}",
            PENSTOCK_CALLERS="{team-b: bbbbbbbbbbbbbbbbbbbbbbbb}",
            PENSTOCK_MODELS__GPT_4O_MINI__LIMITS="auto",
            PENSTOCK_UPSTREAMS__MY_LOCAL_1__LIMITS="{requests_per_minute: 5}",
        )
        assert settings.pools["gpu"].concurrency == 4
        assert list(settings.callers) == ["team-a", "team-b"]
        assert settings.models["gpt-4o-mini"].limits == Limits()
        assert settings.upstreams["my-local.1"].limits == Limits(concurrency=64, requests_per_minute=5)

    def test_a_part_wins_over_the_whole(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path, PENSTOCK_GATE__QUEUE_LIMIT="5", PENSTOCK_GATE="{queue_limit: 1, concurrency: 2}")
        assert (settings.gate.queue_limit, settings.gate.concurrency) == (5, 2)

    def test_a_text_is_taken_as_it_stands(self, tmp_path: Path) -> None:
        settings = loaded(
            tmp_path,
            PENSTOCK_TELEMETRY__SERVICE_NAME="on: [",
            PENSTOCK_UPSTREAMS__OPENAI__API_KEY="123${KEY}:#",
            PENSTOCK_CALLERS__TEAM_A="1" * 20,
        )
        assert settings.telemetry.service_name == "on: ["
        assert key_of(settings, "openai") == "123${KEY}:#"
        assert settings.callers["team-a"].reveal() == "1" * 20

    def test_a_key_may_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("sk-from-a-file\n")
        assert key_of(loaded(tmp_path, PENSTOCK_UPSTREAMS__OPENAI__API_KEY="file:key"), "openai") == "sk-from-a-file"

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("PENSTOCK_SERVER__PORT", "x", "server.port: must be a whole number, is text"),
            ("PENSTOCK_SERVER__PORT", "", "server.port: must be a whole number, is empty"),
            ("PENSTOCK_SERVER__PORT", "99999", "server.port: must be <= 65535, is 99999"),
            ("PENSTOCK_SERVER__PORT", "\udcff", "server.port: is not UTF-8 text; set it anew"),
            (
                "PENSTOCK_GATE",
                "{concurrency: 1",
                "gate: is not YAML: expected ',' or '}', but got '<stream end>', in column 16",
            ),
            ("PENSTOCK_GATE", "{concurency: 1}", "gate.concurency: unknown key; did you mean concurrency?"),
            (
                "PENSTOCK_MODELS__ANY__UPSTREAMS",
                "[opnai]",
                "models.*.upstreams[0]: no such upstream; did you mean openai?",
            ),
            (
                "PENSTOCK_UPSTREAMS__OPENAI__API_KEY",
                "two words",
                "upstreams.openai.api_key: "
                "holds a space, a line end or a character beyond ASCII; give the key alone",
            ),
            (
                "PENSTOCK_UPSTREAMS",
                "{more: {}}",
                "upstreams.more.base_url: is missing; give it: Address of the provider",
            ),
            ("PENSTOCK_SERVER_PORT", "1", "no setting is called so; did you mean PENSTOCK_SERVER__PORT?"),
            ("PENSTOCK_GATE_CONCURENCY", "1", "no setting is called so; did you mean PENSTOCK_GATE__CONCURRENCY?"),
            (
                "PENSTOCK_QQQ",
                "1",
                "no setting is called so; take it away, "
                "or write it as PENSTOCK_SECTION__KEY with names that stand in the file",
            ),
        ],
    )  # fmt: skip
    def test_a_mistake_is_told_with_the_variable(self, variable: str, value: str, message: str, tmp_path: Path) -> None:
        assert mistakes(tmp_path, **{variable: value}) == [f"{variable}: {message}"]

    def test_what_a_variable_leaves_wrong_is_told_with_the_file(self, tmp_path: Path) -> None:
        text = TEXT.replace("concurrency: 20", "concurrency: 0")
        assert mistakes(tmp_path, text, PENSTOCK_MODELS__GPT_4O_MINI__LIMITS__TOKENS_PER_MINUTE="5") == [
            "penstock.yaml:6: models.gpt-4o-mini.limits.concurrency: must be >= 1, is 0"
        ]
        assert loaded(tmp_path, text, PENSTOCK_MODELS__GPT_4O_MINI__LIMITS__CONCURRENCY="1")

    def test_two_names_that_are_spelled_alike_are_told(self, tmp_path: Path) -> None:
        text = TEXT + "pools: {a-b: auto, a.b: auto}"
        assert loaded(tmp_path, text)
        assert mistakes(tmp_path, text, PENSTOCK_POOLS__A_B="auto") == [
            "PENSTOCK_POOLS__A_B: stands for pools.a-b and pools.a.b; rename one of them"
        ]

    def test_what_a_container_runtime_sets_for_a_service_is_no_setting(self, tmp_path: Path) -> None:
        links = {
            "PENSTOCK_PORT": "tcp://10.0.0.1:8080",
            "PENSTOCK_PORT_8080_TCP": "tcp://10.0.0.1:8080",
            "PENSTOCK_PORT_8080_TCP_ADDR": "10.0.0.1",
            "PENSTOCK_SERVICE_HOST": "10.0.0.1",
            "PENSTOCK_SERVICE_PORT": "8080",
            "PENSTOCK_SERVICE_PORT_HTTP": "8080",
            "PENSTOCK_REDIS_SERVICE_HOST": "10.0.0.2",
        }
        assert loaded(tmp_path, **links) == loaded(tmp_path)


class TestWithoutFile:
    def test_a_key_of_openai_is_enough(self) -> None:
        settings = load(None, {"OPENAI_API_KEY": "sk-1\n"})
        assert key_of(settings, "openai") == "sk-1"
        assert settings.upstreams["openai"].base_url == "https://api.openai.com/v1"
        assert settings.models["*"].upstreams == ("openai",)

    def test_a_key_of_anthropic_is_enough(self) -> None:
        settings = load(None, {"ANTHROPIC_API_KEY": "sk-2", "OPENAI_API_KEY": ""})
        assert settings.upstreams["anthropic"].base_url == "https://api.anthropic.com/v1"
        assert settings.upstreams["anthropic"].dialect == "anthropic"
        assert settings.models["*"].upstreams == ("anthropic",)

    def test_with_both_claude_goes_to_anthropic_and_the_rest_to_openai(self) -> None:
        settings = load(None, {"OPENAI_API_KEY": "sk-1", "ANTHROPIC_API_KEY": "sk-2"})
        assert {name: model.upstreams for name, model in settings.models.items()} == {
            "*": ("openai",),
            "claude-*": ("anthropic",),
        }

    def test_the_environment_overrides_here_too(self) -> None:
        settings = load(
            None,
            {"OPENAI_API_KEY": "sk-1", "PENSTOCK_MODELS__ANY__LIMITS__CONCURRENCY": "4", "PENSTOCK_SERVER__PORT": "0"},
        )
        assert settings.models["*"].limits.concurrency == 4
        assert settings.server.port == 0

    def test_the_environment_can_say_it_all(self) -> None:
        settings = load(
            None,
            {
                "OPENAI_API_KEY": "sk-1",
                "PENSTOCK_UPSTREAMS": "{local: {base_url: 'http://127.0.0.1:8000/v1'}}",
                "PENSTOCK_MODELS": "{'*': {upstreams: [local]}}",
            },
        )
        assert list(settings.upstreams) == ["local"]

    def test_a_key_that_is_none_is_told_with_its_variable(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load(None, {"OPENAI_API_KEY": "not a key", "PENSTOCK_GATES": "1"})
        assert str(caught.value).splitlines() == [
            "PENSTOCK_GATES: no setting is called so; did you mean PENSTOCK_GATE?",
            "OPENAI_API_KEY: upstreams.openai.api_key: "
            "holds a space, a line end or a character beyond ASCII; give the key alone",
        ]

    def test_a_file_without_upstreams_uses_the_keys_too(self, tmp_path: Path) -> None:
        settings = loaded(tmp_path, "server: {port: 9000}", OPENAI_API_KEY="sk-1")
        assert settings.server.port == 9000
        assert list(settings.upstreams) == ["openai"]

    def test_a_file_with_upstreams_of_its_own_has_no_others(self, tmp_path: Path) -> None:
        assert list(loaded(tmp_path, OPENAI_API_KEY="sk-1").upstreams) == ["openai", "my-local.1"]


class TestMatch:
    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("gpt-4o-mini", "gpt-4o-mini"),
            ("gpt-4o-mini-2024-07-18", "gpt-4o-*"),
            ("gpt-4o", "gpt-*"),
            ("gpt-", "gpt-*"),
            ("claude", "*"),
            ("", "*"),
        ],
    )
    def test_the_longest_match_wins(self, model: str, name: str) -> None:
        names = ["*", "gpt-*", "gpt-4o-*", "gpt-4o-mini"]
        settings = Settings.model_validate(
            {"upstreams": {"a": {"base_url": "http://a"}}, "models": {one: {"upstreams": ["a"]} for one in names}}
        )
        assert settings.match(model) == name

    def test_none_where_nothing_fits(self) -> None:
        settings = Settings.model_validate(
            {"upstreams": {"a": {"base_url": "http://a"}}, "models": {"gpt-*": {"upstreams": ["a"]}}}
        )
        assert settings.match("claude") is None
