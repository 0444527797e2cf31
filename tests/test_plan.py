"""The running form of a configuration, and what outlives it."""

import pytest

from proxy import plan as plans
from proxy.config import PASSTHROUGH, Limits, Model, Secret, Settings, Upstream
from proxy.core.learner import Size
from proxy.plan import MODEL_LIMIT, OPEN_ROUTES, Plan, Pools

KEY = "a-key-of-sixteen-characters"


def upstream(url="http://one.test/v1", **more):
    return Upstream(base_url=url, **more)


def settings(models, *, upstreams=None, **more):
    return Settings(upstreams=upstreams or {"one": upstream()}, models=models, **more)


def to(*upstreams, **more):
    return Model(upstreams=upstreams or ("one",), **more)


def names(route):
    return [(target.upstream.name, target.model) for target in route.targets]


def labels(target):
    return [pool.label for pool in target.pools]


# ── where calls go ──


def test_a_model_goes_to_its_upstreams_in_their_order():
    said = {"one": upstream(), "two": upstream("http://two.test/v1")}
    plan = Plan(settings({"m": to("two", "one", upstream_model="qwen3")}, upstreams=said), Pools())
    assert names(plan.route("m")) == [("two", "qwen3"), ("one", "qwen3")]
    assert plan.route("m") is plan.route("m")
    assert plan.listed("openai") == ("m",)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("claude-3", "claude-3"),
        ("claude-3-5-haiku", "claude-3-*"),
        ("claude-4", "claude-*"),
        ("claude-", "claude-*"),
        ("gpt-4o", "*"),
        ("", "*"),
    ],
)
def test_the_longest_beginning_wins_and_an_exact_name_before_all(model, found):
    plan = Plan(settings({name: to() for name in ("*", "claude-*", "claude-3-*", "claude-3")}), Pools())
    assert plan.route(model).name == found
    assert plan.listed("openai") == ("claude-3",)


def test_a_model_that_stands_for_nothing_has_no_route():
    plan = Plan(settings({"gpt-4o-mini": to(), "claude-*": to()}), Pools())
    assert plan.route("gpt-4o-min") is None
    assert plan.nearest("gpt-4o-min") == "gpt-4o-mini"
    assert plan.nearest("something else") is None


def test_a_wildcard_keeps_the_limits_of_each_model_apart_under_one_label():
    plan = Plan(settings({"*": to()}), Pools())
    one, other = plan.route("gpt-a").targets[0], plan.route("gpt-b").targets[0]
    assert (one.model, other.model) == (None, None)  # as the client wrote it
    assert one.account is not other.account
    assert (one.account.name, one.account.label) == ("one/gpt-a", "one/*")
    assert plan.gates == ("process", "one/*", "one/passthrough")


def test_a_name_longer_than_any_model_has_is_not_remembered(monkeypatch):
    plan = Plan(settings({"*": to(), "gpt-4o-mini": to()}), Pools())
    assert plan.route("x" * MODEL_LIMIT) is not None
    assert plan.route("x" * (MODEL_LIMIT + 1)) is None
    asked = []
    monkeypatch.setattr(plans, "get_close_matches", lambda word, *_, **__: asked.append(word) or [])
    plan.nearest("x" * 10_000_000)
    assert len(asked[0]) == MODEL_LIMIT  # to compare more would stop the gateway for seconds


def test_a_call_takes_from_every_limit_that_names_its_way_and_from_each_once():
    said = {"one": upstream(limits=Limits(concurrency=3), pool="gpu"), "two": upstream("http://two.test/v1")}
    models = {"m": to("one", "two", limits=Limits(requests_per_minute=60), pool="gpu")}
    plan = Plan(settings(models, upstreams=said, pools={"gpu": Limits(concurrency=2)}), Pools())
    one, two = plan.route("m").targets
    assert labels(one) == ["pool/gpu", "upstream/one", "model/m", "one/m"]
    assert labels(two) == ["pool/gpu", "model/m", "two/m"]
    assert one.pools[0] is two.pools[0]
    assert [pool.concurrency for pool in one.pools] == [2, 3, None, None]
    assert one.account is one.pools[-1]
    assert {*labels(one), *labels(two), "process"} == set(plan.gates) - {"one/passthrough", "two/passthrough"}


def test_what_names_no_model_takes_from_its_upstreams_limits_and_has_an_account_of_its_own():
    said = {"one": upstream(limits=Limits(concurrency=3), pool="gpu"), "two": upstream("http://two.test/v1")}
    models = {"m": to("one", limits=Limits(requests_per_minute=60))}
    plan = Plan(settings(models, upstreams=said, pools={"gpu": Limits(concurrency=2)}), Pools())
    one, two = plan.direct("one", "two").targets
    assert labels(one) == ["pool/gpu", "upstream/one", "one/passthrough"]
    assert labels(two) == ["two/passthrough"]
    assert {*labels(one), *labels(two)} <= set(plan.gates)
    assert one.account is plan.direct("one").targets[0].account


def test_a_limit_that_bounds_nothing_is_no_pool():
    plan = Plan(settings({"m": to(pool="idle")}, pools={"idle": Limits()}), Pools())
    assert labels(plan.route("m").targets[0]) == ["one/m"]


def test_aliases_of_one_model_share_what_is_learned_of_it():
    plan = Plan(settings({"fast": to(upstream_model="qwen3"), "cheap": to(upstream_model="qwen3"), "*": to()}), Pools())
    accounts = {plan.route(name).targets[0].account for name in ("fast", "cheap", "qwen3")}
    assert len(accounts) == 1


@pytest.mark.parametrize(
    ("of_upstream", "of_model", "learns"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_learning_is_off_where_either_says_so(of_upstream, of_model, learns):
    said = {"one": upstream(limits=Limits(learn=of_upstream))}
    plan = Plan(settings({"m": to(limits=Limits(learn=of_model))}, upstreams=said), Pools())
    rates = plan.route("m").targets[0].account.rates
    assert (rates.snapshot(0.0).cold_calls is not None) == learns


# ── upstreams ──


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://api.openai.com/v1", "api.openai.com", 443),
        ("http://10.0.0.1:8000/v1/", "10.0.0.1", 8000),
        ("http://[::1]/v1", "::1", 80),
    ],
)
def test_an_upstreams_address_is_taken_apart_for_the_spans(url, host, port):
    known = Plan(settings({"m": to()}, upstreams={"one": upstream(url)}), Pools()).upstreams["one"]
    assert (known.host, known.port, known.base_url) == (host, port, url.rstrip("/"))


@pytest.mark.parametrize(
    ("said", "header", "passthrough"),
    [
        ({"api_key": Secret("sk-1")}, ("Authorization", "Bearer sk-1"), False),
        ({"api_key": Secret("sk-1"), "dialect": "anthropic"}, ("x-api-key", "sk-1"), False),
        ({"api_key": PASSTHROUGH}, None, True),
        ({}, None, False),
    ],
)
def test_the_credential_goes_where_the_dialect_has_it_and_is_not_shown(said, header, passthrough):
    known = Plan(settings({"m": to()}, upstreams={"one": upstream(**said)}), Pools()).upstreams["one"]
    credentials = [(name, value) for name, value in known.headers.items() if "sk-1" in value]
    assert credentials == ([header] if header else [])
    assert known.passthrough == passthrough
    assert "sk-1" not in repr(known)


# ── callers ──


def test_a_caller_is_known_by_the_whole_of_its_key():
    plan = Plan(settings({"m": to()}, callers={"team-a": Secret(KEY), "team-b": Secret(KEY + "b")}), Pools())
    assert plan.needs_key
    assert (plan.caller(KEY), plan.caller(KEY + "b")) == ("team-a", "team-b")
    for other in ("", KEY[:-1], KEY + "x", KEY.upper(), "\ud83d", "ключ", "x" * 1_000_000):
        assert plan.caller(other) is None


def test_without_callers_nobody_needs_a_key():
    assert not Plan(settings({"m": to()}), Pools()).needs_key


# ── what outlives a plan ──


def test_pools_survive_a_new_plan_with_who_is_in_them_and_what_was_learned():
    pools = Pools()
    said = settings({"m": to(limits=Limits(concurrency=5, requests_per_minute=600)), "*": to()})
    old = [Plan(said, pools).route(name).targets[0] for name in ("m", "open")]
    for target in old:
        for pool in target.pools:
            pool.enter(Size(), 0.0)
    plan = Plan(settings({"m": to(limits=Limits(concurrency=2, requests_per_minute=60)), "*": to()}), pools)
    new = [plan.route(name).targets[0] for name in ("m", "open")]
    for before, after in zip(old, new, strict=True):
        assert after.pools == before.pools
        assert all(pool.in_use == 1 for pool in after.pools)
        assert after.account.rates.snapshot(0.0).unanswered == 1
    own = new[0].pools[0]
    assert own.concurrency == 2
    assert [limit.per_minute for limit in own.rates.snapshot(0.0).limits] == [60.0]


def test_a_ceiling_that_is_gone_bounds_nothing_any_more():
    pools = Pools()
    Plan(settings({"m": to(limits=Limits(concurrency=1, requests_per_minute=1))}), pools)
    plan = Plan(settings({"m": to(limits=Limits(concurrency=7))}), pools)
    own = plan.route("m").targets[0].pools[0]
    for _ in range(7):
        assert own.wait(Size(), 0.0) == 0.0
        own.enter(Size(), 0.0)


def test_what_no_longer_stands_in_the_configuration_is_forgotten():
    pools = Pools()
    both = {"one": upstream(), "two": upstream("http://two.test/v1")}
    limited = {"m": to("one", "two", limits=Limits(concurrency=1)), "*": to("two")}
    first = Plan(settings(limited, upstreams=both, pools={"p": Limits(concurrency=1)}), pools)
    first.route("open")
    assert {pool.name for pool in pools} == {"pool/p", "model/m", "one/m", "two/m", "two/open"}
    Plan(settings({"m": to()}), pools)
    assert {pool.name for pool in pools} == {"one/m"}


def test_a_call_keeps_the_plan_it_came_with():
    pools = Pools()
    first = Plan(settings({"m": to(limits=Limits(concurrency=1))}), pools)
    (target,) = first.route("m").targets
    for pool in target.pools:
        pool.enter(Size(), 0.0)
    Plan(settings({"other": to()}), pools)
    for pool in target.pools:
        pool.leave(0.0)
    assert [pool.in_use for pool in target.pools] == [0, 0]


def test_a_model_that_a_reload_names_is_no_longer_told_of_as_the_wildcards():
    pools = Pools()
    behind = Plan(settings({"*": to()}), pools).route("gpt-5").targets[0].account
    assert behind.label == "one/*"
    behind.enter(Size(), 0.0)
    named = Plan(settings({"gpt-5": to(), "*": to()}), pools).route("gpt-5").targets[0].account
    assert named is behind
    assert (named.label, named.in_use) == ("one/gpt-5", 1)
    again = Plan(settings({"*": to()}), pools).route("gpt-5").targets[0].account
    assert (again.label, again.in_use) == ("one/*", 1)


def test_what_pools_were_used_stays_with_their_label():
    """As a counter has to, whatever becomes of the pools: a wildcard's is made of many, which come and go."""
    clock = [0.0]
    pools = Pools(lambda: clock[0])

    def used(label: str) -> float:
        known = sum(pool.held_seconds(clock[0]) for pool in pools if pool.label == label)
        return known + pools.past.get(label, 0.0)

    plan = Plan(settings({"*": to()}), pools)
    account = plan.route("first").targets[0].account
    account.enter(Size(), 0.0)
    clock[0] = 8.0
    account.leave(8.0)
    for number in range(5 * OPEN_ROUTES + 1):
        plan.route(f"model-{number}")
    assert account not in set(pools)
    assert used("one/*") == 8.0
    last = plan.route("last").targets[0].account
    last.enter(Size(), 8.0)
    clock[0] = 10.0
    Plan(settings({"last": to(), "*": to()}), pools)
    assert (used("one/*"), used("one/last")) == (10.0, 0.0)
    clock[0] = 11.0
    assert (used("one/*"), used("one/last")) == (10.0, 1.0)


# ── bounded memory ──


def test_few_of_the_models_behind_a_wildcard_are_remembered():
    pools = Pools()
    plan = Plan(settings({"*": to()}), pools)
    for number in range(10 * OPEN_ROUTES):
        assert plan.route(f"model-{number}").name == "*"
    assert len(plan._open) == OPEN_ROUTES
    assert len(list(pools)) <= 5 * OPEN_ROUTES + 1
    last = plan.route(f"model-{10 * OPEN_ROUTES - 1}")
    assert last.targets[0].account in set(pools)


def test_what_stands_in_the_configuration_is_not_forgotten_for_what_does_not():
    pools = Pools()
    said = settings({"m": to(), "*": to()})
    account = Plan(said, pools).route("m").targets[0].account
    plan = Plan(said, pools)
    for number in range(6 * OPEN_ROUTES):
        plan.route(f"model-{number}")
    assert account in set(pools)
    assert Plan(said, pools).route("m").targets[0].account is account


def test_an_account_that_somebody_is_in_is_not_forgotten():
    pools = Pools()
    plan = Plan(settings({"*": to()}), pools)
    busy = plan.route("busy").targets[0].account
    busy.enter(Size(), 0.0)
    for number in range(6 * OPEN_ROUTES):
        plan.route(f"model-{number}")
    assert plan.route("busy").targets[0].account is busy


def test_more_models_in_use_than_are_remembered_are_served_all_the_same():
    pools = Pools()
    plan = Plan(settings({"*": to()}), pools)
    for number in range(5 * OPEN_ROUTES + 10):
        plan.route(f"model-{number}").targets[0].account.enter(Size(), 0.0)
    assert all(pool.in_use == 1 for pool in pools)
