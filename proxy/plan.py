"""The running form of one configuration: who may call, and where a model's calls go.

A plan does not change, but for its pools, which are running state and outlive it: a new plan takes over the pools of
the old one by name, so a reload forgets neither who is in flight nor what was learned. A call keeps the plan it came
with.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed lacks it

from proxy import config
from proxy.config import PASSTHROUGH, PIPELINE, Secret, Settings
from proxy.config.secret import digest, digest_of, signing_key
from proxy.core import cost
from proxy.core.concurrency import Gradient
from proxy.core.cost import Price
from proxy.core.learner import Learner
from proxy.core.pool import Pool
from proxy.telemetry import content
from proxy.upstreams import Upstream

OPEN_ROUTES = 200  # models served by a wildcard that are remembered, each with what was learned of its limits
MODEL_LIMIT = 512  # characters of a model's name; a longer one would fill that memory, and real ones stay below 200
USER_AGENT = "penstock"
KEPT = (100, 30.0)  # idle connections, and seconds; in front of most providers stands something that keeps them for 75
WEBHOOK_SECONDS = 15.0  # for it to answer
KEPT_OWN = (8, 4.0)  # llama.cpp gives each of its eight threads to a connection, used or not, and closes it after 5 s


@dataclass(slots=True, frozen=True)
class Webhook:
    """Who is told of a batch's end, and the key that this is signed with."""

    target: Upstream
    key: bytes = field(repr=False)


@dataclass(slots=True, frozen=True, eq=False)
class Target:
    """One upstream as a route uses it.

    Attributes:
        model: the model's name there; None: as the client wrote it.
        pools: all limits that a call to it takes from, besides the process's.
        account: the one of them in which the provider's own limits are kept.
    """

    upstream: Upstream
    model: str | None
    pools: tuple[Pool, ...]
    account: Pool


@dataclass(slots=True, frozen=True, eq=False)
class Route:
    """A model and where its calls go, best first."""

    name: str  # as the configuration has it, so it may be a label
    dialect: str
    targets: tuple[Target, ...]
    captures: int = 0  # bytes of what is asked, and of what is answered, that a kept trace tells
    pipeline: Pipeline | None = None  # the model is one: it has no targets, its steps have


@dataclass(slots=True, frozen=True, eq=False)
class Step:
    """One step of a pipeline.

    Attributes:
        label: pipeline/step, as metrics call it.
        said: its part of the configuration.
        waits_for: the steps that must be done before it.
        route: where its calls go; its own bound is among the pools of each target.
        fallback: where a call goes that failed there; None: nowhere.
    """

    name: str
    label: str
    said: config.Step
    waits_for: tuple[str, ...]
    route: Route
    fallback: Route | None


@dataclass(slots=True, frozen=True, eq=False)
class Pipeline:
    """Steps that are one model; the last of them gives the answer.

    Attributes:
        progress: whether a streamed answer tells which step has ended.
    """

    name: str
    steps: Mapping[str, Step]
    progress: bool

    @property
    def routes(self) -> list[Route]:
        """Of all its calls."""
        steps = self.steps.values()
        return [route for step in steps for route in (step.route, step.fallback) if route is not None]


class Pools:
    """All pools of the process but its own, by name.

    Args:
        now: the monotonic clock, in seconds.

    Attributes:
        past: place-seconds, by label: of pools that were forgotten or have another label now; less those that pools
            brought from the label they had before. With those of the label's pools they only grow, as a counter does.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.past: dict[str, float] = {}
        self._named: dict[str, Pool] = {}
        self._accounts: OrderedDict[str, Pool] = OrderedDict()
        self._configured: frozenset[str] = frozenset()  # accounts that stand in the configuration

    def named(self, name: str, limits: config.Limits, *, learns_concurrency: bool = False) -> Pool:
        """The pool of that name, made or brought to these ceilings."""
        pool = self._named.setdefault(name, Pool(name, name))
        places = limits.concurrency
        if not learns_concurrency:
            pool.gradient = None
        else:
            pool.gradient = pool.gradient or Gradient()
            pool.gradient.configure(limits.concurrency)
            places = int(pool.gradient.limit)
        pool.resize(places, self._now())
        requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
        if pool.rates is not None:
            pool.rates.configure(requests_per_minute=requests, tokens_per_minute=tokens, learn=False)
        elif requests is not None or tokens is not None:
            pool.rates = Learner(requests_per_minute=requests, tokens_per_minute=tokens, learn=False)
        return pool

    def account(self, name: str, label: str, *, learn: bool) -> Pool:
        """The pool in which one provider's limits for one model are kept; its holds are kept even if nothing is to be
        learned."""
        pool = self._accounts.get(name)
        if pool is None:
            self._forget_idle()
            pool = self._accounts[name] = Pool(name, label, rates=Learner(learn=learn))
        else:
            self._relabel(pool, label)
            if pool.rates is not None:
                pool.rates.configure(requests_per_minute=None, tokens_per_minute=None, learn=learn)
        self._accounts.move_to_end(name)
        return pool

    def keep(self, names: set[str], upstreams: set[str], accounts: Iterable[str]) -> None:
        """Forget the pools that no longer stand in the configuration. Calls in flight keep theirs until they end."""
        self._configured = frozenset(accounts)
        self._named = {name: pool for name, pool in self._named.items() if name in names}
        for name in [name for name in self._accounts if name.split("/", 1)[0] not in upstreams]:
            del self._accounts[name]

    def _forget_idle(self) -> None:
        """At a bound forget the account that was not asked for longest, of those that only wildcards made and nobody is
        in."""
        if len(self._accounts) >= 5 * OPEN_ROUTES + len(self._configured):
            open_ones = ((name, pool) for name, pool in self._accounts.items() if name not in self._configured)
            idle = next((name for name, pool in open_ones if not pool.in_use), None)
            if idle is not None:
                forgotten = self._accounts.pop(idle)
                self._count(forgotten.label, forgotten.held_seconds(self._now()))

    def _relabel(self, pool: Pool, label: str) -> None:
        """A model that was met behind a wildcard has been named since, or the other way round."""
        if pool.label != label:
            held = pool.held_seconds(self._now())
            self._count(pool.label, held)
            self._count(label, -held)
            pool.label = label

    def _count(self, label: str, held_seconds: float) -> None:
        self.past[label] = self.past.get(label, 0.0) + held_seconds

    def __iter__(self) -> Iterator[Pool]:
        yield from self._named.values()
        yield from self._accounts.values()


class Plan:
    """
    Args:
        settings: checked by `proxy.config`, so every name in it stands for something.
        pools: running state; brought to the ceilings of `settings`.

    Attributes:
        upstreams: by name.
        catch_all: name of the upstream for what names no model, by dialect.
        gates: labels of all pools; they stand in the configuration.
    """

    def __init__(self, settings: Settings, pools: Pools) -> None:
        self.settings = settings
        self.upstreams = {name: _upstream(name, said) for name, said in settings.upstreams.items()}
        self._pools = pools
        self._callers = {digest_of(key): alias for alias, key in settings.callers.items()}
        self._shared = _shared(settings, pools)
        accounts = [
            f"{upstream}/{said.upstream_model or name}"
            for name, said in settings.models.items()
            for upstream in said.upstreams
        ]
        passed = map(_passed, settings.upstreams)
        for model in _of_steps(settings):
            name = settings.match(model) or model
            said = settings.models[name]
            accounts += [f"{upstream}/{said.upstream_model or model}" for upstream in said.upstreams]
        self.gates = tuple(dict.fromkeys(("process", *self._shared, *accounts, *passed)))
        pools.keep(set(self._shared), set(self.upstreams), accounts)
        priced = {name: said.price for name, said in settings.models.items() if said.price is not None}
        self._prices = {name: cost.price(**said.model_dump()) for name, said in priced.items()}
        self._exact = {name: self._route(name, None) for name in settings.models if not name.endswith("*")}
        self._open: OrderedDict[str, Route] = OrderedDict()
        self._direct: dict[tuple[str, ...], Route] = {}
        self.catch_all = _catch_all(settings)
        self.pipelines = {name: self._pipeline(name, said) for name, said in settings.pipelines.items()}
        self._exact |= {f"{PIPELINE}{name}": _whole(each) for name, each in self.pipelines.items()}

    @property
    def webhook(self) -> Webhook | None:
        """Who is told of a batch's end."""
        return None if self.settings.batches.webhook is None else _webhook(self.settings.batches.webhook)

    @property
    def needs_key(self) -> bool:
        return bool(self._callers)

    def caller(self, key: str) -> str | None:
        """The alias of a caller's key, None for an unknown one. How long it takes tells nothing about any key."""
        given = digest(key)
        found = None
        for known, alias in self._callers.items():
            if hmac.compare_digest(known, given):
                found = alias
        return found

    def route(self, model: str) -> Route | None:
        """Where calls for `model` go; None if it stands for nothing here."""
        route = self._exact.get(model) or self._open.get(model)
        if route is not None:
            return route
        name = self.settings.match(model) if len(model) <= MODEL_LIMIT else None
        if name is None or model.startswith(PIPELINE):
            return None
        route = self._open[model] = self._route(name, model)
        if len(self._open) > OPEN_ROUTES:
            self._open.popitem(last=False)
        return route

    def price(self, model: str) -> Price | None:
        """What a model's tokens cost; None where nobody said."""
        name = self.settings.match(model)
        return None if name is None else self._prices.get(name)

    @property
    def prices(self) -> Mapping[str, Price]:
        """By configured model, where one is given."""
        return self._prices

    def direct(self, *upstreams: str) -> Route:
        """Where a request goes that names no model: to these upstreams, best first."""
        route = self._direct.get(upstreams)
        if route is None:
            targets = tuple(self._passing(name) for name in upstreams)
            route = self._direct[upstreams] = Route(upstreams[0], targets[0].upstream.dialect, targets)
        return route

    def uncharged(self, route: Route) -> Route:
        """The same targets, for what takes nothing from the limits that their providers have for the model."""
        return replace(route, targets=tuple(map(self._uncharged, route.targets)))

    def nearest(self, model: str) -> str | None:
        """The configured model that `model` may be a slip of."""
        by_sound = {name.casefold(): name for name in self._exact}
        return next((by_sound[near] for near in get_close_matches(model[:MODEL_LIMIT].casefold(), by_sound, n=1)), None)

    def listed(self, dialect: str) -> tuple[str, ...]:
        """The models that are served in this dialect and can be listed: wildcards are not among them."""
        return tuple(name for name, route in self._exact.items() if route.dialect == dialect)

    def first_wildcard(self, dialect: str) -> Route | None:
        """The route of the first wildcard that is served in this dialect."""
        routes = (self.route(name) for name in self.settings.models if name.endswith("*"))
        return next((route for route in routes if route is not None and route.dialect == dialect), None)

    def _route(self, name: str, asked: str | None) -> Route:
        said = self.settings.models[name]
        targets = tuple(self._target(upstream, name, said, asked) for upstream in said.upstreams)
        return Route(name, targets[0].upstream.dialect, targets, content.MOST[said.capture_content])

    def _pipeline(self, name: str, said: config.Pipeline) -> Pipeline:
        waits = said.waits()
        steps = {}
        for step, told in said.steps.items():
            label = f"{name}/{step}"
            pool = self._shared.get(f"step/{label}")
            fallback = told.on_error.fallback
            steps[step] = Step(
                step,
                label,
                told,
                waits[step],
                self._bounded(told.model, pool),
                None if fallback is None else self._bounded(fallback, pool),
            )
        return Pipeline(name, steps, said.progress)

    def _bounded(self, model: str, pool: Pool | None) -> Route:
        """The route of a model, with a bound of one's own."""
        route = self.route(model)
        assert route is not None  # or the configuration would have been refused
        if pool is None:
            return route
        return replace(route, targets=tuple(replace(target, pools=(pool, *target.pools)) for target in route.targets))

    def _target(self, upstream: str, name: str, said: config.Model, asked: str | None) -> Target:
        there = self.settings.upstreams[upstream]
        account = self._pools.account(
            f"{upstream}/{said.upstream_model or asked or name}",
            f"{upstream}/{said.upstream_model or name}",
            learn=there.limits.learn and said.limits.learn,
        )
        shared = self._among(f"pool/{said.pool}", f"pool/{there.pool}", f"upstream/{upstream}", f"model/{name}")
        return Target(self.upstreams[upstream], said.upstream_model, (*shared, account), account)

    def _passing(self, upstream: str) -> Target:
        """An upstream for what names no model; such calls have an account of their own there."""
        there = self.settings.upstreams[upstream]
        account = self._pools.account(_passed(upstream), _passed(upstream), learn=there.limits.learn)
        shared = self._among(f"pool/{there.pool}", f"upstream/{upstream}")
        return Target(self.upstreams[upstream], None, (*shared, account), account)

    def _uncharged(self, target: Target) -> Target:
        account = self._passing(target.upstream.name).account
        pools = tuple(pool for pool in target.pools if pool is not target.account)
        return Target(target.upstream, target.model, (*pools, account), account)

    def _among(self, *wanted: str) -> list[Pool]:
        return [self._shared[key] for key in dict.fromkeys(wanted) if key in self._shared]


def _passed(upstream: str) -> str:
    return f"{upstream}/passthrough"


def _catch_all(settings: Settings) -> dict[str, str]:
    """By dialect: the upstream that the configuration names, else the first of `*`, else the first of any model."""
    models = sorted(settings.models, key="*".__ne__)
    names = [name for model in models for name in settings.models[model].upstreams]
    if settings.passthrough.upstream is not None:
        names.insert(0, settings.passthrough.upstream)
    return {settings.upstreams[name].dialect: name for name in reversed(names)}


def _shared(settings: Settings, pools: Pools) -> dict[str, Pool]:
    """The pools with ceilings of their own; what has none needs no pool."""
    wanted = {f"pool/{name}": limits for name, limits in settings.pools.items()}
    wanted |= {f"upstream/{name}": said.limits for name, said in settings.upstreams.items()}
    wanted |= {f"model/{name}": said.limits for name, said in settings.models.items()}
    wanted |= {
        f"step/{name}/{step}": config.Limits(concurrency=told.concurrency)
        for name, said in settings.pipelines.items()
        for step, told in said.steps.items()
    }
    learning = {
        f"upstream/{name}" for name, said in settings.upstreams.items() if said.self_hosted and said.limits.learn
    }
    return {
        name: pools.named(name, limits, learns_concurrency=name in learning)
        for name, limits in wanted.items()
        if name in learning or _bounds(limits)
    }


def _of_steps(settings: Settings) -> Iterator[str]:
    """All models that steps ask, or fall back to."""
    for said in settings.pipelines.values():
        for step in said.steps.values():
            yield step.model
            if step.on_error.fallback is not None:
                yield step.on_error.fallback


def _whole(said: Pipeline) -> Route:
    return Route(f"{PIPELINE}{said.name}", "openai", (), pipeline=said)


def _bounds(limits: config.Limits) -> bool:
    ceilings = (limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute)
    return any(ceiling is not None for ceiling in ceilings)


def _upstream(name: str, said: config.Upstream) -> Upstream:
    parts = urlsplit(said.base_url)
    most, seconds = KEPT_OWN if said.self_hosted else KEPT
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if isinstance(said.api_key, Secret):
        key = said.api_key.reveal()
        headers |= {"x-api-key": key} if said.dialect == "anthropic" else {"Authorization": f"Bearer {key}"}
    return Upstream(
        name=name,
        base_url=said.base_url,
        host=parts.hostname or "",
        port=parts.port or (443 if parts.scheme == "https" else 80),
        headers=headers,
        passthrough=said.api_key == PASSTHROUGH,
        dialect=said.dialect,
        connect_seconds=said.connect_seconds,
        first_byte_seconds=said.first_byte_seconds,
        idle_seconds=said.idle_seconds,
        connections=said.connections,
        idle_connections=most if said.idle_connections is None else said.idle_connections,
        keep_alive_seconds=seconds if said.keep_alive_seconds is None else said.keep_alive_seconds,
        drain_seconds=said.drain_seconds,
        propagate_trace=said.propagate_trace,
        proxy=_proxy(said, parts),
        ca_file=said.ca_file,
        client_cert_file=said.client_cert_file,
        client_key_file=said.client_key_file,
        certificates=said.certificates,
    )


def _webhook(said: config.Webhook) -> Webhook:
    parts = urlsplit(said.url)
    there = config.Upstream(base_url=f"{parts.scheme}://{parts.netloc}", first_byte_seconds=WEBHOOK_SECONDS)
    return Webhook(replace(_upstream("webhook", there), base_url=said.url), signing_key(said.secret))


def _proxy(said: config.Upstream, parts: SplitResult) -> str | None:
    if isinstance(said.proxy, Secret):
        return said.proxy.reveal()
    if said.proxy is None or proxy_bypass_environment(parts.hostname or ""):
        return None
    return getproxies_environment().get(parts.scheme)
