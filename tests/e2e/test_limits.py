"""What the naive client need not know: limits are kept, refusals are waited out, queues are fair and bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import formatdate
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from proxy.config import Gate, Limits, Model, Retry, Secret, Settings
from proxy.simulator import profiles
from proxy.simulator import serving as simulating
from tests.e2e.running import ASK, HELLO, HURRIED, Answer, House, at, serving, settings, until
from tests.e2e.scripted import (
    ECHO,
    EVENT_STREAM,
    TELLING,
    Act,
    Play,
    Scripted,
    answer,
    chunk,
    refusal,
    scripted,
    stream,
    words,
)

ONE = Limits(concurrency=1, learn=False)
NO_LIMITS = Limits(learn=False)


def saying(text: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def heard(upstream: Scripted) -> list[str]:
    """What was said, in the order in which it arrived."""
    return [exchange.json["messages"][0]["content"] for exchange in upstream.exchanges]


# ── the main job ──

PROMPTS = [f"prompt {number}" for number in range(300)]
TIGHT = replace(profiles.TIGHT, requests_per_minute=5_000, tokens_per_minute=2_000_000, speed=10.0)


async def burst(client: AsyncOpenAI) -> list[Any]:
    """All prompts at once, as naively as it gets; an answer is its text, a failure its exception."""

    async def ask(prompt: str) -> str:
        said: Any = [{"role": "user", "content": prompt}]
        answered = await client.chat.completions.create(model="gpt-4o-mini", messages=said, max_tokens=2)
        return answered.choices[0].message.content or ""

    return await asyncio.gather(*map(ask, PROMPTS), return_exceptions=True)


async def test_a_naive_burst_at_a_provider_with_limits_is_answered_whole_and_in_order() -> None:
    async with (
        simulating(TIGHT) as simulator,
        serving(settings(at(simulator.base_url))) as house,
        house.sdk() as client,
    ):
        answers = await burst(client)
        metrics = await house.metrics()
        stats = simulator.provider.stats
    assert [text.split(" runs")[0] for text in answers] == [f"echo: {prompt}" for prompt in PROMPTS]
    assert stats.refusals <= 30
    assert stats.admitted == 300
    assert metrics("requests_total", outcome="ok") == 300
    assert metrics("rate_limited_total", source="upstream") == stats.refusals


async def test_the_same_burst_straight_at_the_provider_is_mostly_refused() -> None:
    async with (
        simulating(profiles.TIGHT) as simulator,
        AsyncOpenAI(base_url=simulator.base_url, api_key="sk-client", max_retries=0) as client,
    ):
        answers = await burst(client)
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(refused) > 150


# ── places ──


def with_limit_of_three(where: str, address: str) -> Settings:
    three = Limits(concurrency=3, learn=False)
    first, second = at(address, limits=NO_LIMITS), at(address, limits=NO_LIMITS)
    models = {"a": Model(upstreams=("first",)), "b": Model(upstreams=("second",))}
    sections: dict[str, Any] = {}
    if where == "process":
        sections["gate"] = Gate(concurrency=3)
    elif where == "pool of upstreams":
        sections["pools"] = {"account": three}
        first, second = (each.model_copy(update={"pool": "account"}) for each in (first, second))
    elif where == "pool of models":
        sections["pools"] = {"gpu0": three}
        models = {name: model.model_copy(update={"pool": "gpu0"}) for name, model in models.items()}
    elif where == "upstream":
        first = at(address, limits=three)
        models = {name: Model(upstreams=("first",)) for name in models}
    else:
        models = {"a": Model(upstreams=("first",), limits=three), "b": Model(upstreams=("first",), upstream_model="a")}
    return settings({"first": first, "second": second}, models=models, **sections)


@pytest.mark.parametrize("where", ["process", "pool of upstreams", "pool of models", "upstream"])
async def test_a_limit_of_places_is_never_exceeded_by_all_who_share_it(upstream: Scripted, where: str) -> None:
    done = asyncio.Event()
    upstream.otherwise = [done, *answer(ECHO)]
    async with serving(with_limit_of_three(where, upstream.base_url)) as house:
        calls = [
            asyncio.create_task(house.ask(saying(str(number)) | {"model": model, "stream": bool(number % 2)}))
            for number, model in enumerate("ab" * 15)
        ]
        await until(lambda: upstream.in_flight == 3 and house.waiting == 27)
        metrics = await house.metrics()
        done.set()
        assert {answered.status for answered in await asyncio.gather(*calls)} == {200}
        after = await house.metrics()
    gate = {"pool of upstreams": "pool/account", "pool of models": "pool/gpu0", "upstream": "upstream/first"}.get(
        where, where
    )
    assert upstream.peak == 3
    assert metrics("gate_limit", gate=gate) == metrics("gate_in_use", gate=gate) == 3
    assert metrics("gate_queue_depth", gate=gate, priority="default") == 27
    assert metrics("requests_in_flight", operation="chat") == 30
    assert after("gate_in_use") == after("gate_queue_depth") == 0


async def test_a_full_model_does_not_keep_others_waiting(upstream: Scripted) -> None:
    done = asyncio.Event()
    upstream.plays([done, *answer(ECHO)])
    models = {"slow": Model(upstreams=("up",), limits=ONE), "*": Model(upstreams=("up",))}
    async with serving(settings(at(upstream.base_url, limits=NO_LIMITS), models=models)) as house:
        slow = [asyncio.create_task(house.ask(ASK | {"model": "slow"})) for _ in range(5)]
        await until(lambda: house.waiting == 4)
        assert (await house.ask()).status == 200
        done.set()
        await asyncio.gather(*slow)


async def test_a_configured_rate_paces_what_exceeds_its_burst(upstream: Scripted) -> None:
    limits = Limits(requests_per_minute=600, learn=False)
    models = {"*": Model(upstreams=("up",), limits=limits)}
    async with serving(settings(at(upstream.base_url), models=models)) as house:
        answers = await asyncio.gather(*(house.ask() for _ in range(66)))
    assert {answered.status for answered in answers} == {200}
    arrivals = sorted(exchange.at for exchange in upstream.exchanges)
    assert arrivals[-1] - arrivals[0] > 0.45  # 60 at once, then ten a second


async def test_a_burst_at_an_upstream_without_limits_goes_out_at_once(upstream: Scripted, house: House) -> None:
    done = asyncio.Event()
    upstream.otherwise = [done, *answer(ECHO)]
    calls = [asyncio.create_task(house.ask()) for _ in range(100)]
    await until(lambda: upstream.in_flight == 100)
    done.set()
    assert {answered.status for answered in await asyncio.gather(*calls)} == {200}


# ── whose turn ──


async def queued(house: House, *calls: tuple[str, Mapping[str, str]]) -> list[asyncio.Task[Answer]]:
    """These calls, lined up one after the other."""
    tasks = []
    for text, headers in calls:
        tasks.append(asyncio.create_task(house.ask(saying(text), headers=headers)))
        await until(lambda: house.waiting == len(tasks))  # awaited within the turn
    return tasks


@pytest.fixture
async def busy(upstream: Scripted) -> Any:
    """A gateway with one place, which is taken until `upstream.release` is set."""
    release = asyncio.Event()
    upstream.plays([release, *answer(ECHO)])
    async with serving(settings(at(upstream.base_url, limits=ONE))) as house:
        first = asyncio.create_task(house.ask(saying("first")))
        await upstream.exchange()
        yield house, release
        release.set()
        await first


async def test_the_better_class_overtakes_in_the_queue(upstream: Scripted, busy: tuple[House, asyncio.Event]) -> None:
    house, release = busy
    classes = ("batch", "batch", "default", "interactive", "Interactive")
    tasks = await queued(
        house, *((f"{said} {number}", {"x-penstock-priority": said}) for number, said in enumerate(classes))
    )
    metrics = await house.metrics()
    release.set()
    await asyncio.gather(*tasks)
    assert heard(upstream) == ["first", "interactive 3", "Interactive 4", "default 2", "batch 0", "batch 1"]
    assert metrics("gate_queue_depth", priority="batch") == 2
    assert metrics("gate_queue_depth", priority="interactive") == 2


async def test_who_says_no_class_is_served_in_order(upstream: Scripted, busy: tuple[House, asyncio.Event]) -> None:
    house, release = busy
    tasks = await queued(house, *((str(number), {}) for number in range(6)))
    release.set()
    await asyncio.gather(*tasks)
    assert heard(upstream) == ["first", *map(str, range(6))]


async def test_a_caller_who_floods_does_not_keep_another_waiting(upstream: Scripted) -> None:
    done = asyncio.Event()
    said = ECHO | {"usage": {"prompt_tokens": 25, "completion_tokens": 2}}
    upstream.otherwise = [done, *answer(said)]
    keys = {name: f"sk-caller-{name}-0123456789" for name in ("flood", "quiet")}
    callers = {name: Secret(key) for name, key in keys.items()}
    async with serving(settings(at(upstream.base_url, limits=ONE), callers=callers)) as house:

        def ask(text: str, caller: str) -> asyncio.Task[Answer]:
            headers = {"authorization": f"Bearer {keys[caller]}"}
            return asyncio.create_task(house.ask(saying(text) | {"max_tokens": 2}, headers=headers))

        calls = [ask("first", "flood")]
        await upstream.exchange()
        for number in range(20):
            calls.append(ask(f"flood {number}", "flood"))
            await until(lambda: house.waiting == len(calls) - 1)
        calls.append(ask("quiet", "quiet"))
        await until(lambda: house.waiting == 21)
        done.set()
        await asyncio.gather(*calls)
    assert heard(upstream).index("quiet") <= 3


# ── who is turned away ──


def told(answered: Answer, status: int, code: str) -> float:
    """The seconds after which a refused client is asked to come back; fails unless all that belongs there is said."""
    assert (answered.status, answered.error["code"]) == (status, code)
    assert answered.headers["x-should-retry"] == "true"
    seconds = int(answered.headers["retry-after-ms"]) / 1000
    assert 0.8 <= seconds <= 60.0
    assert int(answered.headers["retry-after"]) == max(1, round(seconds))
    return seconds


async def test_a_full_queue_refuses_and_says_when_to_come_back(upstream: Scripted) -> None:
    done = asyncio.Event()
    upstream.otherwise = [done, *answer(ECHO)]
    said = settings(at(upstream.base_url, limits=ONE), gate=Gate(queue_limit=2))
    async with serving(said) as house:
        inside = [asyncio.create_task(house.ask()) for _ in range(3)]
        await until(lambda: house.waiting == 2)
        waits = [told(await house.ask(), 429, "queue_full") for _ in range(8)]
        assert len(upstream.exchanges) == 1
        done.set()
        assert {answered.status for answered in await asyncio.gather(*inside)} == {200}
        metrics = await house.metrics()
    assert len(set(waits)) > 1, "all who were refused together would come back together"
    assert metrics("gate_admissions_total", result="rejected_full") == 8
    assert metrics("request_errors_total", source="gateway", error_type="queue_full") == 8
    assert metrics("rate_limited_total", source="gateway") == 8
    assert metrics("requests_total", outcome="rejected", code="429") == 8


async def test_when_to_come_back_follows_from_how_fast_the_queue_moves(upstream: Scripted) -> None:
    turns = [asyncio.Event() for _ in range(10)]
    upstream.plays(*([turn, *answer(ECHO)] for turn in turns))
    async with serving(settings(at(upstream.base_url, limits=ONE), gate=Gate(queue_limit=30))) as house:
        calls = [asyncio.create_task(house.ask()) for _ in range(31)]
        await until(lambda: house.waiting == 30)
        began = time.monotonic()
        for number, turn in enumerate(turns[:9]):
            turn.set()
            await upstream.exchange(number + 1)
            await asyncio.sleep(0.08)  # the pace that is to be noticed
        pace = (time.monotonic() - began) / 9
        calls += [asyncio.create_task(house.ask()) for _ in range(9)]
        await until(lambda: house.waiting == 30)
        wait = told(await house.ask(), 429, "queue_full")
        turns[9].set()
        await asyncio.gather(*calls)
    assert wait == pytest.approx(30 * pace, rel=0.5)


@pytest.mark.parametrize(
    "headers", [{"x-request-timeout": "0.2"}, {"x-stainless-read-timeout": "1.2"}, {}], ids=["own", "sdk", "configured"]
)
async def test_who_is_not_admitted_before_the_deadline_is_told_in_time(
    upstream: Scripted, headers: dict[str, str]
) -> None:
    done = asyncio.Event()
    upstream.plays([done, *answer(ECHO)])
    gate = Gate(max_wait_seconds=60.0 if headers else 0.2)
    async with serving(settings(at(upstream.base_url, limits=ONE), gate=gate)) as house:
        first = asyncio.create_task(house.ask())
        await upstream.exchange()
        began = time.monotonic()
        refused = await house.ask(headers=headers)
        took = time.monotonic() - began
        done.set()
        await first
        metrics = await house.metrics()
    told(refused, 503, "queue_timeout")
    assert 0.19 < took < 1.0
    assert len(upstream.exchanges) == 1
    assert metrics("gate_admissions_total", result="rejected_timeout") == 1
    assert metrics("request_errors_total", source="gateway", error_type="queue_timeout") == 1


async def test_the_sdk_hears_of_a_queue_timeout_before_it_gives_up_itself(
    upstream: Scripted, busy: tuple[House, asyncio.Event]
) -> None:
    house, _ = busy
    async with house.sdk(timeout=1.3) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="m", messages=HELLO)
    assert caught.value.code == "queue_timeout"


async def test_a_retry_that_cannot_be_in_time_is_not_waited_for(upstream: Scripted, house: House) -> None:
    upstream.otherwise = refusal(500, "boom", retry_after="30")
    began = time.monotonic()
    answered = await house.ask(headers={"x-request-timeout": "5"})
    assert time.monotonic() - began < 1.0
    assert (answered.status, answered.error["code"]) == (500, "boom")
    assert answered.headers["x-should-retry"] == "false"
    assert len(upstream.exchanges) == 1


# ── refusals of the upstream ──


def in_seconds() -> dict[str, str]:
    return {"retry_after": "0.4"}


def in_milliseconds() -> dict[str, str]:
    return {"retry_after": "30", "retry_after_ms": "400"}


def at_a_date() -> dict[str, str]:
    return {"retry_after": formatdate(int(time.time()) + 2, usegmt=True)}


@pytest.mark.parametrize(("when", "least"), [(in_seconds, 0.4), (in_milliseconds, 0.4), (at_a_date, 0.95)])
async def test_a_refusal_holds_everybody_until_the_provider_s_word(upstream: Scripted, when: Any, least: float) -> None:
    upstream.plays(refusal(429, "rate_limit_exceeded", "requests", **when()))
    async with serving(settings(at(upstream.base_url, limits=NO_LIMITS))) as house:
        calls = [asyncio.create_task(house.ask(saying("refused")))]
        first = await upstream.exchange()
        await until(lambda: house.waiting == 1)
        calls += [asyncio.create_task(house.ask(saying(str(number)))) for number in range(5)]
        answers = await asyncio.gather(*calls)
        metrics = await house.metrics()
    assert {answered.status for answered in answers} == {200}
    held = [exchange.at - first.at for exchange in upstream.exchanges[1:]]
    assert min(held) >= least
    assert max(held) < 2.5
    assert len(upstream.exchanges) == 7, "one refusal, though six calls ran into the limit"
    assert heard(upstream)[1] == "refused", "who was refused comes first"
    assert metrics("rate_limited_total", source="upstream", scope="requests") == 1
    assert metrics("upstream_retries_total", reason="requests") == 1
    assert metrics("backoff_seconds_count", source="limit") == 1


async def test_a_hold_at_one_model_does_not_hold_another(upstream: Scripted) -> None:
    upstream.plays(refusal(429, "rate_limit_exceeded", "requests", retry_after="30"))
    async with serving(settings(at(upstream.base_url))) as house:
        held = asyncio.create_task(house.ask(ASK | {"model": "a"}))
        await until(lambda: house.waiting == 1)
        assert (await house.ask(ASK | {"model": "b"})).status == 200
        held.cancel()
        await house.until_idle()


async def test_money_that_ran_out_is_never_asked_again(upstream: Scripted, house: House) -> None:
    upstream.otherwise = refusal(429, "insufficient_quota", "insufficient_quota", "You exceeded it", retry_after="1")
    answered = await house.ask()
    assert (answered.status, answered.error["code"]) == (429, "insufficient_quota")
    assert answered.headers["x-should-retry"] == "false"
    assert len(upstream.exchanges) == 1
    metrics = await house.metrics()
    assert metrics("rate_limited_total", scope="quota") == 1
    assert metrics("requests_total", outcome="rejected", code="429") == 1


async def test_a_refusal_that_outlasts_the_deadline_is_passed_on(upstream: Scripted, house: House) -> None:
    upstream.otherwise = refusal(429, "rate_limit_exceeded", "requests", "Rate limit reached", retry_after="20")
    answered = await house.ask(headers={"x-request-timeout": "0.2"})
    assert (answered.status, answered.error["message"]) == (429, "Rate limit reached")
    assert answered.headers["x-should-retry"] == "false"
    assert answered.headers["retry-after"] == "20"
    assert len(upstream.exchanges) == 1


async def test_a_limit_that_refuses_forever_is_passed_on_at_last(upstream: Scripted, house: House) -> None:
    upstream.otherwise = refusal(429, "rate_limit_exceeded", "requests", retry_after_ms="1")
    answered = await house.ask()
    assert answered.status == 429
    assert answered.headers["x-should-retry"] == "false"
    assert len(upstream.exchanges) == 21


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 409])
async def test_the_last_failure_of_several_is_not_to_be_tried_again(
    upstream: Scripted, house: House, status: int
) -> None:
    upstream.otherwise = refusal(status, "boom", x_should_retry="true")
    answered = await house.ask()
    assert (answered.status, answered.error["code"]) == (status, "boom")
    assert answered.headers["x-should-retry"] == "false"
    assert len(upstream.exchanges) == HURRIED.attempts
    assert (await house.metrics())("upstream_retries_total") == HURRIED.attempts - 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
async def test_what_no_retry_can_mend_is_asked_once(upstream: Scripted, house: House, status: int) -> None:
    upstream.otherwise = refusal(status, "no_use")
    answered = await house.ask()
    assert (answered.status, answered.error["code"]) == (status, "no_use")
    assert len(upstream.exchanges) == 1


async def test_a_client_that_retries_itself_gets_one_retry_of_ours(upstream: Scripted) -> None:
    upstream.otherwise = refusal(500)
    said = settings(at(upstream.base_url), retry=Retry(attempts=5, base_seconds=0.001, cap_seconds=0.01))
    async with serving(said) as house:
        await house.ask(headers={"x-stainless-retry-count": "0"})
        assert len(upstream.exchanges) == 5
        await house.ask(headers={"x-stainless-retry-count": "1"})
        assert len(upstream.exchanges) == 7


async def test_retries_do_not_multiply_a_failure(upstream: Scripted, house: House) -> None:
    upstream.otherwise = refusal(500)
    answers = await asyncio.gather(*(house.ask() for _ in range(100)))
    assert {answered.status for answered in answers} <= {500, 503}
    assert len(upstream.exchanges) <= 100 + 31  # three retries a second over ten seconds, however little succeeds


# ── the next upstream ──


@pytest.mark.parametrize(
    "broken",
    [
        refusal(500),
        refusal(503, "server_is_overloaded"),
        refusal(429, "rate_limit_exceeded", "requests", retry_after="30"),
        [Act.RST],
        [EVENT_STREAM, Act.FIN],
        [b"no HTTP at all\r\n\r\n", Act.FIN],
    ],
    ids=["500", "503", "429", "RST", "a head alone", "garbage"],
)
async def test_before_the_first_byte_the_next_upstream_takes_over(upstream: Scripted, broken: Play) -> None:
    upstream.otherwise = broken
    async with scripted(stream(*TELLING)) as second:
        both = {"first": at(upstream.base_url), "second": at(second.base_url, api_key=Secret("sk-second"))}
        async with serving(settings(both)) as house:
            began = time.monotonic()
            answered = await house.stream()
            took = time.monotonic() - began
            metrics = await house.metrics()
    assert (answered.status, answered.body) == (200, b"".join(TELLING))
    assert took < 1.0  # another upstream is no reason to pause
    assert (len(upstream.exchanges), len(second.exchanges)) == (1, 1)
    assert second.exchanges[0].headers["authorization"] == "Bearer sk-second"
    assert metrics("requests_total", outcome="ok") == 1
    assert (
        metrics("upstream_attempts_total", provider="first")
        == metrics("upstream_attempts_total", provider="second")
        == 1
    )


async def test_after_the_first_byte_no_other_upstream_is_asked(upstream: Scripted) -> None:
    seen = asyncio.Event()
    upstream.plays([EVENT_STREAM, chunk(words("one")), seen, Act.RST])
    async with (
        scripted(stream(*TELLING)) as second,
        serving(settings({"first": at(upstream.base_url), "second": at(second.base_url)})) as house,
        house.http.post(f"{house.base_url}/chat/completions", json=ASK | {"stream": True}) as answered,
    ):
        await answered.content.readany()
        seen.set()
        assert b"stream_truncated" in await answered.read()
    assert second.exchanges == []


async def test_a_full_upstream_is_passed_over_while_the_next_has_room(upstream: Scripted) -> None:
    done = asyncio.Event()
    upstream.otherwise = [done, *answer(ECHO)]
    async with scripted() as second:
        both = {"first": at(upstream.base_url, limits=ONE), "second": at(second.base_url, limits=NO_LIMITS)}
        async with serving(settings(both)) as house:
            first = asyncio.create_task(house.ask())
            await upstream.exchange()
            for _ in range(3):
                assert (await house.ask()).status == 200
            done.set()
            await first
    assert (len(upstream.exchanges), len(second.exchanges)) == (1, 3)


async def test_all_upstreams_failing_is_told_with_the_last_one_s_answer(upstream: Scripted) -> None:
    upstream.otherwise = refusal(500, "first")
    async with scripted() as second:
        second.otherwise = refusal(502, "second")
        async with serving(settings({"first": at(upstream.base_url), "second": at(second.base_url)})) as house:
            answered = await house.ask()
    assert [len(each.exchanges) for each in (upstream, second)] == [2, 1]
    assert answered.error["code"] == "first"
    assert answered.headers["x-should-retry"] == "false"
