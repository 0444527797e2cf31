"""Every mistake in a pipeline is told at load, with its line and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config import ConfigError, Settings, load

HEAD = """\
upstreams: {up: {base_url: "http://up.test/v1"}, claude: {base_url: "http://cl.test/v1", dialect: anthropic}}
models: {m: {upstreams: [up]}, c: {upstreams: [claude]}, gpt-*: {upstreams: [up]}}
pipelines:
  digest:
    steps:
      extract: {model: m, prompt: "Facts in: {input}"}
"""


def read(folder: Path, *steps: str) -> Settings:
    file = folder / "penstock.yaml"
    file.write_text(HEAD + "".join(f"      {step}\n" for step in steps))
    return load(file, {})


@pytest.mark.parametrize(
    ("step", "key", "what"),
    [
        ('x: {model: m, prompt: "{steps.extrct}"}', "prompt", "{steps.extrct}: no such step; did you mean extract?"),
        ('x: {model: m, prompt: "{inptu}"}', "prompt", "no such variable; did you mean {input}?"),
        ('x: {model: m, prompt: "{item}"}', "prompt", "{item} is what `map` gives"),
        ('x: {model: m, map: "{item}", prompt: "x"}', "map.over", "{item} is what `map` gives"),
        ('x: {model: m, messages: [{role: user, content: "{steps.y}"}]}', "messages[0].content", "no such step"),
        ('x: {model: m, prompt: x, when: {value: "{step.extract}", equals: a}}', "when.value", "no such variable"),
        ('x: {model: m, prompt: x, when: {value: "{input}"}}', "when", "asks for nothing"),
        ("x: {model: m}", "prompt", "is missing; give the step a prompt, or messages"),
        ("x: {model: m, prompt: x, messages: [{role: user, content: x}]}", "messages", "stand beside a prompt"),
        ("x: {model: mm, prompt: x}", "model", "no such model; did you mean m?"),
        ('x: {model: "gpt-*", prompt: x}', "model", "no such model"),
        ("x: {model: pipeline/digest, prompt: x}", "model", "no such model"),
        ("x: {model: c, prompt: x}", "model", "goes to claude, which speaks anthropic's API"),
        ("x: {model: m, prompt: x, on_error: {fallback: nope}}", "on_error.fallback", "no such model"),
        ("x: {model: m, prompt: x, on_error: retry}", "on_error", "must be fail, skip or {fallback: MODEL}"),
        ("x: {model: m, prompt: x, map: {steps.extract}}", "map", "put it in quotes"),
        ("x: {model: m, prompt: x, parallel: true}", "parallel", "is the last step's"),
        ("x: {model: m, prompt: x, output: {type: text}}", "output.type", "must be one of object"),
        ("x: {model: m, prompt: x, output: {oneOf: []}}", "output.oneOf", "is not checked here"),
        ("x: {model: m, prompt: x, parameters: {stream: true}}", "parameters.stream", "is what the step itself says"),
        ("x: {model: m, prompt: x, concurrency: 0}", "concurrency", "must be >= 1, is 0"),
        ("x: {model: m, prompt: x, timeout_seconds: -1}", "timeout_seconds", "must be > 0, is -1"),
        ("x: {model: m, prompt: x, retries: 3}", "retries", "unknown key"),
        ('x: {model: m, prompt: "{steps.x}"}', "", "waits for itself: x for x"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, step: str, key: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, step)
    (problem,) = caught.value.problems
    assert problem.line == 7
    assert problem.key == f"pipelines.digest.steps.x{'.' if key else ''}{key}"
    assert what in problem.message


def test_steps_that_wait_for_each_other_are_told_in_their_circle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(
            tmp_path,
            'a: {model: m, prompt: "{steps.b}", parallel: true}',
            'b: {model: m, prompt: "{steps.a}"}',
            "c: {model: m, prompt: x}",
        )
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (7, "pipelines.digest.steps.a")
    assert problem.message.startswith("waits for itself: a for b for a")


def test_a_model_may_not_take_the_name_of_a_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text(HEAD.replace("gpt-*", "pipeline/x"))
    with pytest.raises(ConfigError, match=r"models\.pipeline/x: is the name of a pipeline; rename the model"):
        load(file, {})


def test_all_that_a_step_can_say_is_read_and_its_short_forms_are_the_long_ones(tmp_path: Path) -> None:
    said = read(
        tmp_path,
        'list: {model: gpt-4o, prompt: "{steps.extract}", output: {type: array}, parameters: {temperature: 0}}',
        'each: {model: m, prompt: "{item} {", map: "{steps.list}", on_error: skip, concurrency: 3, max_tokens: 9}',
        'last: {model: m, prompt: "{}", when: {value: "{input}", equals: a}, on_error: {fallback: gpt-x}}',
    )
    steps = said.pipelines["digest"].steps
    assert list(steps) == ["extract", "list", "each", "last"]
    assert steps["each"].map is not None
    assert (steps["each"].map.over, steps["each"].map.concurrency) == ("{steps.list}", 100)
    assert (steps["each"].on_error.skip, steps["extract"].on_error.skip) == (True, False)
    assert steps["last"].when is not None
    assert steps["last"].when.equals == ("a",)
    assert steps["last"].on_error.fallback == "gpt-x"
    assert said.pipelines["digest"].waits()["last"] == ("extract", "list", "each")


def test_a_variable_overrides_a_step(tmp_path: Path) -> None:
    file = tmp_path / "penstock.yaml"
    file.write_text(HEAD)
    said = load(file, {"PENSTOCK_PIPELINES__DIGEST__STEPS__EXTRACT__CONCURRENCY": "7"})
    assert said.pipelines["digest"].steps["extract"].concurrency == 7
