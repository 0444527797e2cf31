"""A pipeline is a model: asked for by the official client, its steps are calls of their own through the same gate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest

from proxy import simulator
from proxy.config import Gate, Limits, Model, Price
from proxy.simulator import Profile, Simulator, profiles
from tests.e2e.running import House, at, serving, settings, until
from tests.e2e.scripted import (
    DONE,
    EVENT_STREAM,
    Act,
    Scripted,
    answer,
    chunk,
    event,
    refusal,
    stream,
    words,
)

ECHO = replace(profiles.INSTANT, output_tokens=1)  # the answer is `echo: ` and the prompt
LEARN_NOTHING = Limits(learn=False)

Steps = Mapping[str, Mapping[str, Any]]

DIGEST: Steps = {
    "extract": {"model": "m", "prompt": "Facts in: {input}"},
    "analyse": {"model": "m", "prompt": "Analyse {steps.extract}"},
    "summarise": {"model": "m", "prompt": "Sum up: {steps.analyse}"},
}


def asked(text: str = "hello", **more: object) -> dict[str, object]:
    return {"model": "pipeline/digest", "messages": [{"role": "user", "content": text}], **more}


@asynccontextmanager
async def piped(steps: Steps, base_url: str, **sections: Any) -> AsyncIterator[House]:
    """A gateway with one pipeline, `digest`."""
    progress = sections.pop("progress", False)
    said: dict[str, Any] = {"pipelines": {"digest": {"steps": steps, "progress": progress}}} | sections
    async with serving(settings(at(base_url, limits=LEARN_NOTHING), **said)) as house:
        yield house


@asynccontextmanager
async def echoed(steps: Steps, profile: Profile = ECHO, **sections: Any) -> AsyncIterator[tuple[House, Simulator]]:
    async with (
        simulator.serving(profile, remember=1000) as provider,
        piped(steps, provider.base_url, **sections) as house,
    ):
        yield house, provider


def prompts(provider: Simulator) -> list[str]:
    return [json.loads(seen.body)["messages"][-1]["content"] for seen in provider.seen]


def text(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


def says(words: str, **more: object) -> list[Any]:
    """An upstream's answer with this text."""
    message = {"role": "assistant", "content": words}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage} | more)


# ── what is put into what ──


async def test_each_step_is_given_what_the_ones_it_names_gave() -> None:
    async with echoed(DIGEST) as (house, provider):
        said = (await house.ask(asked())).json
        assert text(said) == "echo: Sum up: echo: Analyse echo: Facts in: hello"
        assert said["model"] == "pipeline/digest"
        assert len(provider.seen) == 3


async def test_text_with_braces_stays_as_it_is_all_the_way() -> None:
    hostile = 'a {input} {steps.extract} {item} {0} {{x}} %s $HOME {"a": {"b": 1}}'
    async with echoed(DIGEST) as (house, _):
        assert text((await house.ask(asked(hostile))).json) == f"echo: Sum up: echo: Analyse echo: Facts in: {hostile}"


async def test_the_input_is_the_last_text_of_the_user() -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": parts},
    ]
    async with echoed({"only": {"model": "m", "prompt": "<{input}>"}}) as (house, _):
        assert text((await house.ask(asked() | {"messages": messages})).json) == "echo: <hello>"


async def test_messages_are_templates_and_the_last_step_takes_what_else_the_client_asks_for() -> None:
    steps: Steps = {
        "first": {"model": "m", "prompt": "{input}", "parameters": {"temperature": 0}},
        "last": {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be {steps.first}"},
                {"role": "user", "content": "{input}"},
            ],
            "max_tokens": 7,
        },
    }
    async with echoed(steps) as (house, provider):
        await house.ask(asked("x", temperature=0.7, max_tokens=3, user="u"))
        first, last = (json.loads(seen.body) for seen in provider.seen)
    assert first == {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    assert last["messages"] == [
        {"role": "system", "content": "Be echo: x"},
        {"role": "user", "content": "x"},
    ]
    assert (last["temperature"], last["user"], last["max_tokens"]) == (0.7, "u", 7)  # its own word holds


async def test_a_step_that_is_mapped_is_run_for_each_item_and_gives_their_list_in_order() -> None:
    steps: Steps = {
        "each": {"model": "m", "prompt": "<{item}>", "map": {"over": "{input}", "concurrency": 2}},
        "all": {"model": "m", "prompt": "{steps.each}"},
    }
    items = [f"item {number}" for number in range(9)]
    slow = replace(ECHO, first_token_seconds=0.01, first_token_sigma=1.0)
    async with echoed(steps, slow) as (house, provider):
        said = text((await house.ask(asked(json.dumps(items)))).json)
        assert json.loads(said.removeprefix("echo: ")) == [f"echo: <{item}>" for item in items]
        assert provider.provider.stats.peak_in_flight <= 2


async def test_the_answer_of_a_map_that_comes_last_is_the_list() -> None:
    steps: Steps = {"each": {"model": "m", "prompt": "{item}", "map": "{input}"}}
    async with echoed(steps) as (house, _):
        assert json.loads(text((await house.ask(asked('["a", {"b": 1}]'))).json)) == ["echo: a", 'echo: {"b": 1}']
        streamed = await house.ask(asked("[]", stream=True))
        assert b'"content":"[]"' in streamed.body
        assert streamed.body.endswith(DONE)


async def test_a_list_that_is_none_is_told_with_the_step(upstream: Scripted) -> None:
    steps: Steps = {
        "list": {"model": "m", "prompt": "{input}"},
        "each": {"model": "m", "prompt": "{item}", "map": "{steps.list}"},
    }
    upstream.plays(says("one, two"))
    async with piped(steps, upstream.base_url) as house:
        told = await house.ask(asked())
        assert told.status == 502
        assert told.error["code"] == "step_unfit"
        assert told.error["step"] == "each"
        assert told.error["completed_steps"] == {"list": "one, two"}
        assert "is not JSON; it must be a list" in told.error["message"]


async def test_a_step_whose_condition_does_not_hold_is_left_out() -> None:
    steps: Steps = {
        "kind": {"model": "m", "prompt": "{input}"},
        "urgent": {"model": "m", "prompt": "hurry", "when": {"value": "{steps.kind}", "contains": "fire"}},
        "last": {"model": "m", "prompt": "[{steps.urgent}]"},
    }
    async with echoed(steps) as (house, _):
        assert text((await house.ask(asked("fire"))).json) == "echo: [echo: hurry]"
        assert text((await house.ask(asked("rain"))).json) == "echo: []"
        told = await house.metrics()
        assert told("pipeline_steps_total", step="digest/urgent", result="omitted") == 1
        assert told("pipeline_steps_total", step="digest/urgent", result="ok") == 1


async def test_where_the_last_step_is_left_out_the_one_before_it_gives_the_answer() -> None:
    steps: Steps = {
        "draft": {"model": "m", "prompt": "{input}"},
        "mend": {"model": "m", "prompt": "mend", "when": {"value": "{steps.draft}", "contains": ["wrong"]}},
    }
    async with echoed(steps) as (house, _):
        assert text((await house.ask(asked("right"))).json) == "echo: right"
        streamed = await house.ask(asked("right", stream=True))
        assert b'"content":"echo: right"' in streamed.body


# ── at once ──


async def test_parallel_steps_run_at_the_same_time_and_the_last_waits_for_all(upstream: Scripted) -> None:
    pros, cons = asyncio.Event(), asyncio.Event()
    steps: Steps = {
        "pros": {"model": "m", "prompt": "pros", "parallel": True},
        "cons": {"model": "m", "prompt": "cons", "parallel": True},
        "judge": {"model": "m", "prompt": "{steps.pros} {steps.cons}"},
    }
    upstream.plays([pros, *says("+")], [cons, *says("-")], says("="))
    async with piped(steps, upstream.base_url) as house:
        call = asyncio.ensure_future(house.ask(asked()))
        await upstream.exchange(1)  # both are there, neither has been answered
        cons.set()
        pros.set()
        assert text((await call).json) == "="
        said = {exchange.json["messages"][0]["content"] for exchange in upstream.exchanges}
        assert "+ -" in said or "- +" in said  # the plays are given in the order of arrival


async def test_a_steps_concurrency_bounds_it_over_all_runs_and_stages_overlap() -> None:
    steps: Steps = {
        "one": {"model": "m", "prompt": "1 {input}", "concurrency": 2},
        "two": {"model": "m", "prompt": "2 {steps.one}", "concurrency": 1},
    }
    slow = replace(ECHO, first_token_seconds=0.02)
    async with echoed(steps, slow) as (house, provider):
        answers = await asyncio.gather(*(house.ask(asked(f"item {number}")) for number in range(8)))
        assert [text(said.json) for said in answers] == [f"echo: 2 echo: 1 item {number}" for number in range(8)]
        stages = "".join(prompt[0] for prompt in prompts(provider))
        assert stages.index("2") < stages.rindex("1")  # a later item begins while an earlier one is further on
        assert provider.provider.stats.peak_in_flight == 3
        told = await house.metrics()
        assert told("gate_limit", gate="step/digest/one") == 2
        assert told("gate_limit", gate="step/digest/two") == 1


async def test_a_gate_of_one_place_is_enough_for_many_pipelines() -> None:
    async with echoed(DIGEST, gate=Gate(concurrency=1)) as (house, provider):
        answers = await asyncio.gather(*(house.ask(asked()) for _ in range(10)))
        assert {said.status for said in answers} == {200}
        assert provider.provider.stats.peak_in_flight == 1
        assert (house.in_flight, house.waiting) == (0, 0)


async def test_a_client_that_leaves_ends_the_steps_under_way_and_begins_no_others(upstream: Scripted) -> None:
    upstream.plays([Act.SILENCE])
    async with piped(DIGEST, upstream.base_url) as house:
        call = asyncio.ensure_future(house.ask(asked()))
        exchange = await upstream.exchange()
        call.cancel()
        await exchange.gone.wait()
        await house.until_idle()
        await until(lambda: not house.gateway.telemetry._open, "all accounted for")
        assert len(upstream.exchanges) == 1
        told = await house.metrics()
        assert told("requests_total", model="pipeline/digest", code="499", outcome="cancelled") == 1
        assert told("pipeline_steps_total", step="digest/extract", result="cancelled") == 1


# ── streams ──


async def test_the_last_step_streams_and_its_usage_is_the_sum() -> None:
    async with echoed(DIGEST, replace(profiles.INSTANT, output_tokens=4)) as (house, _), house.sdk() as client:
        said: Any = asked(stream=True, stream_options={"include_usage": True})
        chunks = [each async for each in await client.chat.completions.create(**said)]
        whole = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
        assert whole.startswith("echo: Sum up: echo: Analyse echo: Facts in: hello")
        used = chunks[-1].usage
        assert used is not None
        assert used.completion_tokens == 12
        once = await client.chat.completions.create(**asked())  # type: ignore[call-overload]
        assert once.usage is not None
        assert once.usage.prompt_tokens == used.prompt_tokens
        assert [each.usage for each in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_usage_that_was_not_asked_for_is_not_told_and_the_stream_ends_once() -> None:
    async with echoed(DIGEST) as (house, _):
        body = (await house.ask(asked(stream=True))).body
        assert body.count(DONE) == 1
        assert body.endswith(DONE)
        assert b"prompt_tokens" not in body


async def test_a_text_that_holds_the_end_mark_does_not_end_the_stream() -> None:
    async with echoed({"only": {"model": "m", "prompt": "{input}"}}) as (house, _):
        body = (await house.ask(asked("\ndata: [DONE]\n\n", stream=True))).body
        assert rb'"content":"echo: \ndata: [DONE]\n\n"' in body
        assert body.count(DONE) == 1


async def test_progress_is_told_in_comments_that_clients_do_not_see(upstream: Scripted) -> None:
    held = asyncio.Event()
    upstream.plays(says("facts"), [held, *says("analysis")], stream(words("so "), words("it is", "stop"), DONE))
    async with piped(DIGEST, upstream.base_url, progress=True) as house, house.sdk() as client:
        stream_of = await client.chat.completions.create(**asked(stream=True))  # type: ignore[call-overload]
        await upstream.exchange(1)  # headers have come, though the second step is still at work
        held.set()
        chunks = [each async for each in stream_of]
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == "so it is"
        upstream.plays(says("facts"), says("analysis"), stream(words("x", "stop"), DONE))
        body = (await house.ask(asked(stream=True))).body.decode()
        comments = [line.split(",")[0] for line in body.splitlines() if line.startswith(":")]
        assert comments == [": pipeline/digest", ": step extract ok", ": step analyse ok"]


async def test_with_progress_a_step_that_fails_is_told_in_band_with_what_the_others_gave(upstream: Scripted) -> None:
    upstream.plays(says("facts"), refusal(400, "content_policy", "invalid_request_error", "not this"))
    async with piped(DIGEST, upstream.base_url, progress=True) as house:
        told = await house.ask(asked(stream=True))
        assert (told.status, DONE in told.body) == (200, False)
        assert b": step extract ok, " in told.body
        error = json.loads(told.body.split(b"event: error\ndata: ", 1)[1])["error"]
        assert (error["code"], error["step"]) == ("content_policy", "analyse")
        assert error["completed_steps"] == {"extract": "facts"}
        metrics = await house.metrics()
        assert metrics("requests_total", model="pipeline/digest", outcome="rejected") == 1


async def test_a_last_step_that_takes_too_long_within_its_stream_is_told_in_band(upstream: Scripted) -> None:
    steps: Steps = {"only": {"model": "m", "prompt": "{input}", "timeout_seconds": 0.2}}
    upstream.plays([EVENT_STREAM, chunk(words("so ")), Act.SILENCE])
    async with piped(steps, upstream.base_url) as house:
        told = await house.ask(asked(stream=True))
        assert b'"so "' in told.body
        assert DONE not in told.body
        error = json.loads(told.body.split(b"event: error\ndata: ", 1)[1])["error"]
        assert (error["code"], error["step"]) == ("step_timeout", "only")
        await house.until_idle()


async def test_a_last_step_that_breaks_off_is_told_in_band_with_its_name(upstream: Scripted) -> None:
    upstream.plays(says("facts"), says("analysis"), [EVENT_STREAM, chunk(words("so ")), Act.RST])
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask(asked(stream=True))
        assert told.status == 200
        assert DONE not in told.body
        last = json.loads(told.body.split(b"event: error\ndata: ", 1)[1])["error"]
        assert (last["code"], last["step"]) == ("stream_truncated", "summarise")
        assert last["completed_steps"] == {"extract": "facts", "analyse": "analysis"}
        metrics = await house.metrics()
        assert metrics("requests_total", model="pipeline/digest", outcome="truncated") == 1
        assert metrics("pipeline_steps_total", step="digest/summarise", result="failed") == 1


async def test_an_error_event_of_the_last_step_is_passed_on_and_counts_as_failed(upstream: Scripted) -> None:
    broken = event({"error": {"message": "out of luck", "type": "server_error", "code": None}})
    upstream.plays(says("facts"), says("analysis"), stream(words("so "), broken))
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask(asked(stream=True))
        assert b"out of luck" in told.body
        assert DONE not in told.body
        metrics = await house.metrics()
        assert metrics("requests_total", model="pipeline/digest", outcome="failed", code="200") == 1


async def test_a_step_before_the_last_that_fails_is_a_plain_error_though_a_stream_was_asked_for(
    upstream: Scripted,
) -> None:
    upstream.plays(says("facts"), refusal(400, "context_length_exceeded", "invalid_request_error", "too long"))
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask(asked(stream=True))
        assert (told.status, told.error["code"], told.error["step"]) == (400, "context_length_exceeded", "analyse")


# ── errors ──


async def test_an_error_names_the_step_and_keeps_what_the_earlier_ones_gave(upstream: Scripted) -> None:
    upstream.plays(says("facts"), refusal(400, "content_policy", "invalid_request_error", "not this"))
    async with piped(DIGEST, upstream.base_url) as house, house.sdk() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**asked())  # type: ignore[call-overload]
        body: Any = caught.value.body
        assert body["step"] == "analyse"
        assert body["completed_steps"] == {"extract": "facts"}
        assert body["code"] == "content_policy"
        assert body["message"] == "step analyse: its upstream answered 400: not this"
        told = await house.metrics()
        assert told("requests_total", model="pipeline/digest", outcome="rejected", code="400") == 1
        assert told("request_errors_total", model="pipeline/digest", error_type="invalid_request") + told(
            "request_errors_total", model="pipeline/digest", error_type="upstream_4xx"
        )


async def test_of_several_items_one_that_fails_in_the_second_stage_keeps_its_error_and_the_others_go_on() -> None:
    steps = {name: dict(said) for name, said in DIGEST.items()}
    steps["analyse"] |= {"map": "{steps.extract}", "when": {"value": "{input}", "contains": "bad"}}  # which is no list
    async with echoed(steps) as (house, _):
        texts = [f"item {number}" if number != 4 else "bad item" for number in range(9)]
        answers = await asyncio.gather(*(house.ask(asked(said)) for said in texts))
        assert [said.status for said in answers] == [200] * 4 + [502] + [200] * 4
        assert answers[4].error["step"] == "analyse"
        assert answers[4].error["completed_steps"] == {"extract": "echo: Facts in: bad item"}
        for number in (0, 3, 5, 8):
            assert text(answers[number].json) == "echo: Sum up: "


async def test_a_step_that_was_to_give_json_and_does_not_says_so(upstream: Scripted) -> None:
    schema = {"type": "object", "properties": {"topics": {"type": "array"}}, "required": ["topics"]}
    steps: Steps = {
        "list": {"model": "m", "prompt": "{input}", "output": schema},
        "last": {"model": "m", "prompt": "{steps.list}"},
    }
    upstream.plays(says("Sure! Here is it"), says('{"topics": 1}'), says('{"topics": ["a"]}'), says("done"))
    async with piped(steps, upstream.base_url) as house:
        for why in ("its answer is not JSON", "$.topics must be of type array, is number"):
            told = await house.ask(asked())
            assert (told.status, told.error["code"], told.error["step"]) == (502, "step_unfit", "list")
            assert why in told.error["message"]
        assert text((await house.ask(asked())).json) == "done"
        sent = upstream.exchanges[0].json["response_format"]
        assert sent == {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
        assert upstream.exchanges[-1].json["messages"][0]["content"] == '{"topics": ["a"]}'
        metrics = await house.metrics()
        assert metrics("request_errors_total", error_type="unfit", source="upstream") == 2


@pytest.mark.parametrize(
    "body",
    [b"not json", b'{"choices": []}', b'{"choices": [1]}', b'{"choices": [{"message": {"content": null}}]}', b"[]"],
)
async def test_a_step_that_is_answered_with_no_chat_completion_says_so(upstream: Scripted, body: bytes) -> None:
    upstream.plays(answer(body))
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask(asked())
        assert (told.status, told.error["code"], told.error["step"]) == (502, "step_unfit", "extract")


async def test_a_step_may_be_skipped_or_answered_by_another_model(upstream: Scripted) -> None:
    steps: Steps = {
        "maybe": {"model": "m", "prompt": "{input}", "on_error": "skip"},
        "surely": {"model": "m", "prompt": "{steps.maybe}!", "on_error": {"fallback": "spare"}},
        "last": {"model": "m", "prompt": "{steps.surely}"},
    }
    no = refusal(400, "no")
    upstream.plays(no, no, says("spared"), says("end"))
    models = {"m": Model(upstreams=("up",)), "spare": Model(upstreams=("up",))}
    async with piped(steps, upstream.base_url, models=models) as house:
        said = (await house.ask(asked())).json
        assert text(said) == "end"
        assert [exchange.json["model"] for exchange in upstream.exchanges] == ["m", "m", "spare", "m"]
        assert upstream.exchanges[1].json["messages"][0]["content"] == "!"
        assert [step["result"] for step in said["penstock"]["steps"]] == ["skipped", "fallback", "ok"]
        told = await house.metrics()
        assert told("pipeline_steps_total", step="digest/maybe", result="skipped") == 1
        assert told("pipeline_steps_total", step="digest/surely", result="fallback") == 1
        assert told("requests_total", model="pipeline/digest", outcome="ok") == 1


async def test_an_item_of_a_map_that_may_be_skipped_leaves_its_place_empty(upstream: Scripted) -> None:
    steps: Steps = {
        "each": {
            "model": "m",
            "prompt": "{item}",
            "map": {"over": "{input}", "concurrency": 1},
            "on_error": "skip",
        }
    }
    upstream.plays(says("a"), refusal(400, "no"), says("c"))
    async with piped(steps, upstream.base_url) as house:
        assert json.loads(text((await house.ask(asked("[1, 2, 3]"))).json)) == ["a", None, "c"]


async def test_a_last_step_that_has_not_begun_to_stream_may_fall_back(upstream: Scripted) -> None:
    steps: Steps = {"last": {"model": "m", "prompt": "{input}", "on_error": {"fallback": "spare"}}}
    upstream.plays(refusal(400, "no"), stream(words("spared", "stop"), DONE))
    async with piped(steps, upstream.base_url) as house:
        told = await house.ask(asked(stream=True))
        assert b"spared" in told.body
        assert told.body.endswith(DONE)


async def test_a_step_that_takes_too_long_is_ended(upstream: Scripted) -> None:
    steps: Steps = {"slow": {"model": "m", "prompt": "{input}", "timeout_seconds": 0.05}}
    upstream.plays([Act.SILENCE])
    async with piped(steps, upstream.base_url) as house:
        told = await house.ask(asked())
        assert (told.status, told.error["code"], told.error["step"]) == (504, "step_timeout", "slow")
        await upstream.exchanges[0].gone.wait()
        await house.until_idle()


async def test_a_refusal_at_the_gate_keeps_its_word_and_names_the_step(upstream: Scripted) -> None:
    held = asyncio.Event()
    upstream.plays([held, *says("x")])
    async with piped(DIGEST, upstream.base_url, gate=Gate(concurrency=1, queue_limit=0)) as house:
        other = asyncio.ensure_future(house.ask())
        await upstream.exchange()
        told = await house.ask(asked())
        assert (told.status, told.error["code"], told.error["step"]) == (429, "queue_full", "extract")
        assert int(told.headers["retry-after"]) >= 1
        held.set()
        assert (await other).status == 200


# ── bad input ──


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"messages": []}, "holds no message of the user"),
        ({"messages": "hello"}, "holds no message of the user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "holds no message of the user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "takes text only"),
        ({"messages": [{"role": "user", "content": None}]}, "takes text only"),
    ],
)
async def test_a_call_without_text_is_refused(house_of_digest: House, body: Any, what: str) -> None:
    told = await house_of_digest.ask(asked() | body)
    assert (told.status, told.error["param"]) == (400, "messages")
    assert what in told.error["message"]


async def test_a_pipeline_is_asked_for_as_a_chat_and_known_by_name(house_of_digest: House) -> None:
    told = await house_of_digest.ask({"model": "pipeline/digest", "input": "x"}, "/v1/embeddings")
    assert (told.status, told.error["param"]) == (400, "model")
    assert "/v1/chat/completions" in told.error["message"]
    told = await house_of_digest.ask(asked() | {"model": "pipeline/digset"})
    assert (told.status, told.error["code"]) == (404, "model_not_found")
    assert "did you mean `pipeline/digest`?" in told.error["message"]
    listed = (await house_of_digest.ask(b"", "/v1/models/pipeline/digest", method="GET")).json
    assert (listed["id"], listed["owned_by"]) == ("pipeline/digest", "penstock")


@pytest.fixture
async def house_of_digest(upstream: Scripted) -> AsyncIterator[House]:
    async with piped(DIGEST, upstream.base_url) as house:
        yield house


async def test_the_service_of_small_jobs_takes_a_pipeline_for_a_model(upstream: Scripted) -> None:
    upstream.plays(says("facts"), says("analysis"), says("sum"))
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask({"prompt": "hello", "model": "pipeline/digest"}, "/complete")
        assert (told.status, told.json) == (200, {"result": "sum"})


async def test_a_socket_for_prompts_takes_a_pipeline_for_a_model(upstream: Scripted) -> None:
    upstream.plays(says("facts"), says("analysis"), stream(words("so "), words("it is", "stop"), DONE))
    async with piped(DIGEST, upstream.base_url) as house, house.http.ws_connect(f"{house.origin}/stream") as socket:
        await socket.send_json({"prompt": "hello", "model": "pipeline/digest"})
        said = []
        async with asyncio.timeout(5):
            while "done" not in (message := await socket.receive_json()):
                said.append(message["token"])
        assert "".join(said) == "so it is"
        assert message["finish_reason"] == "stop"


async def test_a_step_whose_model_is_gone_at_its_upstream_says_which(upstream: Scripted) -> None:
    upstream.plays(says("facts"), refusal(404, "model_not_found", "invalid_request_error", "The model `m` is gone"))
    async with piped(DIGEST, upstream.base_url) as house:
        told = await house.ask(asked())
        assert (told.status, told.error["code"], told.error["step"]) == (404, "model_not_found", "analyse")
        assert told.error["completed_steps"] == {"extract": "facts"}


# ── what is counted ──


async def test_usage_and_cost_are_the_sum_and_are_counted_once() -> None:
    models = {"m": Model(upstreams=("up",), price=Price(input=1, output=2))}
    async with echoed(DIGEST, models=models) as (house, _):
        said = (await house.ask(asked())).json
        told = await house.metrics()
        used = said["usage"]
        assert used["completion_tokens"] == 3
        assert told("tokens_total", type="input") == used["prompt_tokens"]
        assert told("tokens_total", type="output") == 3
        assert told("cost_usd_total") == pytest.approx(said["penstock"]["cost_usd"])
        assert said["penstock"]["cost_usd"] == pytest.approx((used["prompt_tokens"] + 2 * 3) / 1e6)
        assert told("requests_total") == 1
        assert told("requests_total", model="pipeline/digest", operation="chat", code="200") == 1
        assert told("upstream_attempts_total", model="m", result="ok") == 3
        assert told("pipeline_steps_total", result="ok") == 3
        assert told("requests_in_flight") == 0
        assert told("label_overflow_total") == 0


async def test_a_step_of_a_model_without_price_makes_the_sum_unknown() -> None:
    async with echoed(DIGEST) as (house, _):
        assert (await house.ask(asked())).json["penstock"]["cost_usd"] is None


async def test_an_idempotency_key_is_another_one_for_each_step() -> None:
    async with echoed(DIGEST) as (house, provider):
        await house.ask(asked(), headers={"idempotency-key": "k"})
        assert [seen.headers["idempotency-key"] for seen in provider.seen] == ["k-extract", "k-analyse", "k-summarise"]


async def test_the_live_page_shows_a_pipelines_call_with_its_steps() -> None:
    async with echoed(DIGEST) as (house, _):
        await house.ask(asked())
        async with house.http.get(f"{house.admin}/ui/live") as feed:
            async for line in feed.content:
                if line.startswith(b"data: "):
                    break
        said = json.loads(line[6:])
        (call,) = said["calls"]
        assert call["model"] == "pipeline/digest"
        assert [(phase["kind"], phase["step"], phase["result"]) for phase in call["phases"]] == [
            ("step", "extract", "ok"),
            ("step", "analyse", "ok"),
            ("step", "summarise", "ok"),
        ]
        assert said["totals"]["calls"] == 1
        (shown,) = said["pipelines"]
        assert shown["pipeline"] == "digest"
        assert [[step["step"] for step in stage] for stage in shown["stages"]] == [
            ["extract"],
            ["analyse"],
            ["summarise"],
        ]
        assert shown["stages"][0][0]["results"] == {"ok": 1}
