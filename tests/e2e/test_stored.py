"""What upstreams keep is asked for where it was made, by whoever made it; see the rules of `proxy.api.stored`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.api import stored
from proxy.config import Limits, Model, Passthrough, Secret
from tests.e2e.keeping import Keeper, keeping
from tests.e2e.running import Answer, House, at, serving, settings

QUIET = Limits(learn=False)
MODELS = {
    "one": Model(upstreams=("one",)),
    "two": Model(upstreams=("two",)),
    "both": Model(upstreams=("one", "two")),
}
KEYS = {"a": "sk-caller-a-0123456789", "b": "sk-caller-b-0123456789"}
CALLERS = {alias: Secret(key) for alias, key in KEYS.items()}
RESPONSES = "/v1/responses"


@asynccontextmanager
async def two(**sections: Any) -> AsyncIterator[tuple[House, Keeper, Keeper]]:
    """A gateway in front of two upstreams; what names no model goes to the first."""
    async with keeping("one") as one, keeping("two") as other:
        upstreams = {"one": at(one.base_url, limits=QUIET), "two": at(other.base_url, limits=QUIET)}
        async with serving(settings(upstreams, models=MODELS, **sections)) as house:
            yield house, one, other


def key(caller: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[caller]}"}


async def respond(house: House, model: str = "two", *, caller: str = "", **said: object) -> Answer:
    headers = key(caller) if caller else {}
    return await house.ask({"model": model, "input": "hello"} | said, RESPONSES, headers=headers)


async def make(house: House, path: str = RESPONSES, **headers: str) -> str:
    """The id of something made at the second upstream."""
    if path == RESPONSES:
        return str((await respond(house)).json["id"])
    named = {name.replace("_", "-"): said for name, said in headers.items()} | {"x-penstock-upstream": "two"}
    return str((await house.ask({}, path, headers=named)).json["id"])


async def look(house: House, path: str, method: str = "GET", caller: str = "") -> Answer:
    return await house.ask(b"", path, method=method, headers=key(caller) if caller else {})


# ── rule 1: where it was made, for who made it ──


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("method", "more"),
    [("GET", ""), ("GET", "?stream=false"), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")],
)
async def test_a_stored_response_is_asked_for_where_it_was_made(stream: bool, method: str, more: str) -> None:
    async with two() as (house, one, other):
        made = await respond(house, stream=stream)
        (thing,) = other.kept
        assert thing.encode() in made.body
        answer = await look(house, f"{RESPONSES}/{thing}{more}", method)
    assert (answer.status, one.asked) == (200, [])
    assert other.asked[-1] == f"{method} /responses/{thing}{more}"


async def test_a_chat_completion_is_noted_only_where_it_is_stored() -> None:
    async with two() as (house, one, other):
        ask = {"model": "two", "messages": []}
        stored_id = (await house.ask(ask | {"store": True})).json["id"]
        passing_id = (await house.ask(ask)).json["id"]
        assert (await look(house, f"/v1/chat/completions/{stored_id}/messages")).status == 200
        assert one.asked == []
        assert (await look(house, f"/v1/chat/completions/{passing_id}")).status == 200
        assert len(one.asked) == 1  # it was sought
    assert len(other.asked) == 4


@pytest.mark.parametrize("store", ["vector_stores", "assistants", "threads", "conversations", "containers", "evals"])
async def test_what_else_was_made_is_found_again(store: str) -> None:
    async with two() as (house, one, other):
        thing = await make(house, f"/v1/{store}")
        below = await house.ask({"x": 1}, f"/v1/{store}/{thing}/items")
        deleted = await look(house, f"/v1/{store}/{thing}", "DELETE")
    assert (below.status, deleted.json["deleted"], one.asked) == (200, True, [])
    assert len(other.asked) == 3


async def test_the_upstream_that_the_client_names_is_asked_all_the_same() -> None:
    async with two() as (house, one, _):
        thing = await make(house)
        answer = await house.ask(b"", f"{RESPONSES}/{thing}", method="GET", headers={"x-penstock-upstream": "one"})
    assert (answer.status, one.asked) == (404, [f"GET /responses/{thing}"])


@pytest.mark.parametrize("named", [{}, {"x-penstock-upstream": "two"}])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_to_another_caller_it_does_not_exist(method: str, named: dict[str, str]) -> None:
    async with two(callers=CALLERS) as (house, _, other):
        thing = (await respond(house, caller="a")).json["id"]
        foreign = await house.ask(b"", f"{RESPONSES}/{thing}", method=method, headers=key("b") | named)
        asked = len(other.asked)
        nowhere = await house.ask(b"", f"{RESPONSES}/{thing}x", method=method, headers=key("b") | named)
        own = await house.ask(b"", f"{RESPONSES}/{thing}", method=method, headers=key("a") | named)
    assert (foreign.status, foreign.error["code"], asked) == (404, "not_found", 1)
    assert (nowhere.status, nowhere.json) == (404, foreign.json | {"error": nowhere.error})
    assert nowhere.error["message"].replace(f"{thing}x", thing) == foreign.error["message"]
    assert own.status == 200


async def test_who_makes_the_same_id_again_does_not_become_its_owner() -> None:
    homes = stored.Stored()
    homes.note("resp_1", "one", "a")
    homes.note("resp_1", "two", "b")
    assert homes.is_foreign("resp_1", "b")
    assert not homes.is_foreign("resp_1", "a")
    assert not homes.is_foreign("resp_2", "a")


async def test_of_too_many_the_one_that_was_made_first_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "NOTED", 2)
    homes = stored.Stored()
    for thing in ("resp_1", "resp_2", "resp_3"):
        homes.note(thing, "one", "a")
    assert [homes.is_foreign(f"resp_{number}", "b") for number in (1, 2, 3)] == [False, True, True]


# ── rule 2: what is not known is sought ──


@asynccontextmanager
async def forgetful(**sections: Any) -> AsyncIterator[tuple[House, Keeper, Keeper, str]]:
    """A gateway that was started after a response had been made at the second upstream, and the response's id."""
    async with two(**sections) as (before, one, other):
        thing = (await respond(before, caller="a" if sections else "")).json["id"]
        other.asked.clear()
        async with serving(before.gateway.plan.settings) as house:
            yield house, one, other, thing


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_where_one_upstream_does_not_have_it_the_next_is_asked(method: str) -> None:
    async with forgetful() as (house, one, other, thing):
        answer = await look(house, f"{RESPONSES}/{thing}", method)
        metrics = await house.metrics()
        await look(house, f"{RESPONSES}/{thing}")
    asked = f"{method} /responses/{thing}"
    assert (answer.status, one.asked) == (200, [asked])
    assert other.asked == [asked, f"GET /responses/{thing}"], "where it was found is known from then on"
    assert metrics("requests_total", operation="responses", outcome="ok") == 1
    assert metrics("upstream_attempts_total") == 2


async def test_what_none_of_them_has_is_not_found() -> None:
    async with two() as (house, one, other):
        answer = await look(house, f"{RESPONSES}/resp_none?include=x")
        metrics = await house.metrics()
    assert (answer.status, answer.error["code"], answer.error["message"]) == (
        404,
        "not_found",
        "there is no `resp_none` here, or not what was asked of it",
    )
    assert one.asked == other.asked == ["GET /responses/resp_none?include=x"]
    assert metrics("requests_total", outcome="rejected", code="404") == 1


@pytest.mark.parametrize("broken", ["one", "two"])
async def test_that_it_is_nowhere_is_not_said_while_one_could_not_be_asked(broken: str) -> None:
    async with two() as (house, one, other):
        (one if broken == "one" else other).status = 501
        answer = await look(house, f"{RESPONSES}/resp_none")
    assert answer.status == 501
    assert bool(other.asked) == (broken == "two")


async def test_of_a_single_upstream_its_own_word_is_passed_on() -> None:
    async with keeping("one") as one, serving(settings(at(one.base_url))) as house:
        answer = await look(house, f"{RESPONSES}/resp_none")
    assert (answer.status, answer.error["message"]) == (404, "nothing at /v1/responses/resp_none")


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/vector_stores", "/v1/organization/projects/proj_1", "/v1/batch"]
)
async def test_what_names_no_thing_goes_to_one_upstream_alone(path: str) -> None:
    async with two() as (house, one, other):
        await look(house, path, "PATCH" if path == RESPONSES else "GET")
    assert (len(one.asked) <= 1, other.asked) == (True, [])


async def test_a_refused_call_is_not_sought_any_further() -> None:
    async with two() as (house, one, other):
        one.status = 400
        assert (await look(house, f"{RESPONSES}/resp_none")).status == 400
    assert other.asked == []


# ── rule 3: no body goes anywhere on trial ──


async def test_what_carries_a_body_goes_where_everything_goes() -> None:
    async with two() as (house, one, other):
        answer = await house.ask({"content": "private"}, "/v1/conversations/conv_none/items")
    assert (answer.status, other.asked) == (404, [])
    assert one.asked == ["POST /conversations/conv_none/items"]


# ── responses that follow others ──


async def test_a_response_is_made_where_the_one_before_it_was() -> None:
    async with two() as (house, one, other):
        first = await respond(house, "two")
        second = await respond(house, "both", previous_response_id=first.json["id"])
        third = await respond(house, "both", previous_response_id=second.json["id"])
    assert (second.status, third.status, one.asked) == (200, 200, [])
    assert len(other.asked) == 3


@pytest.mark.parametrize("said", [lambda thing: thing, lambda thing: {"id": thing}])
async def test_a_response_of_a_conversation_is_made_where_it_was_begun(said: Any) -> None:
    async with two() as (house, one, _):
        conversation = await make(house, "/v1/conversations")
        answer = await respond(house, "both", conversation=said(conversation))
    assert (answer.status, one.asked) == (200, [])


async def test_a_model_that_is_not_served_there_cannot_follow() -> None:
    async with two() as (house, one, _):
        first = await respond(house, "two")
        answer = await respond(house, "one", previous_response_id=first.json["id"])
    assert (answer.status, answer.error["param"], one.asked) == (400, "previous_response_id", [])
    assert "upstream two" in answer.error["message"]


async def test_what_follows_a_response_that_is_not_known_seeks_it_among_its_targets() -> None:
    async with forgetful() as (house, one, other, thing):
        answer = await respond(house, "both", previous_response_id=thing)
        again = await respond(house, "both", previous_response_id=answer.json["id"])
    assert (answer.status, again.status) == (200, 200)
    assert (len(one.asked), len(other.asked)) == (1, 2)


async def test_what_follows_nothing_is_told_so() -> None:
    async with two() as (house, one, other):
        nowhere = await respond(house, "both", previous_response_id="resp_none")
        alone = await respond(house, "one", previous_response_id="resp_none")
    assert (nowhere.status, nowhere.error["code"]) == (404, "not_found")
    assert (alone.status, alone.error["code"]) == (400, "previous_response_not_found")
    assert (len(one.asked), len(other.asked)) == (2, 1)


async def test_nobody_follows_what_is_anothers() -> None:
    async with two(callers=CALLERS) as (house, _, other):
        thing = (await respond(house, caller="a")).json["id"]
        foreign = await respond(house, "both", caller="b", previous_response_id=thing)
        nowhere = await respond(house, "both", caller="b", previous_response_id="resp_none")
    assert (foreign.status, foreign.error["code"]) == (nowhere.status, nowhere.error["code"]) == (404, "not_found")
    assert len(other.asked) == 2


@pytest.mark.parametrize("said", [7, None, [], {"id": 7}, {}, "", "é"])
async def test_what_names_nothing_is_the_upstreams_to_judge(said: object) -> None:
    async with two() as (house, one, _):
        await respond(house, "one", conversation=said)
    assert len(one.asked) == 1


async def test_an_upstream_that_is_gone_from_the_configuration_is_not_asked() -> None:
    async with two() as (house, one, _):
        thing = await make(house)
        left = house.gateway.plan.settings.model_copy(
            update={
                "upstreams": {"one": house.gateway.plan.settings.upstreams["one"]},
                "models": {"one": MODELS["one"]},
            }
        )
        house.gateway._load = lambda: left
        await house.gateway.reload()
        assert (await look(house, f"{RESPONSES}/{thing}")).status == 404
    assert one.asked == [f"GET /responses/{thing}"]


async def test_what_is_not_passed_on_is_not_sought() -> None:
    async with two(passthrough=Passthrough(enabled=False)) as (house, one, other):
        answer = await look(house, f"{RESPONSES}/resp_none")
    assert (answer.error["code"], one.asked, other.asked) == ("unknown_path", [], [])
