"""Which models there are, in either dialect: those the configuration names, or what the upstream itself lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote, unquote

import msgspec

from proxy.api import passthrough
from proxy.api.calling import call, routed
from proxy.api.dialects import Dialect
from proxy.api.edge import Endpoint, Visit
from proxy.api.stored import Stored
from proxy.core.asked import Asked
from proxy.core.outcome import Outcome
from proxy.errors import ModelNotFound
from proxy.plan import Plan, Route
from proxy.relay import Runs


def endpoints(
    relay: Runs,
    stored: Stored,
    dialect: Dialect,
    listed: Callable[[Visit, Sequence[str]], object],
    described: Callable[[Plan, str], object],
) -> dict[str, Endpoint]:
    """By path, for the edge.

    Args:
        listed: the list of these names, as the dialect tells it.
        described: one of them.
    """

    async def list_models(visit: Visit) -> None:
        """The configured names; where all are wildcards, what the upstream behind the first of them lists."""
        names = visit.plan.listed(dialect.name)
        if names or (route := visit.plan.first_wildcard(dialect.name)) is None:
            await _give(visit, listed(visit, names))
            return
        await _ask_upstream(relay, visit, route, route.name, visit.path)

    async def one_model(visit: Visit) -> None:
        model = _named(visit.path)
        route = routed(visit.plan, model, dialect)
        if model in visit.plan.listed(dialect.name):
            visit.record.model = route.name
            await _give(visit, described(visit.plan, model))
            return
        _, mark, query = visit.path.partition("?")
        await _ask_upstream(relay, visit, route, model, f"/models/{quote(model)}{mark}{query}")

    passed = passthrough.handler(relay, stored, dialect)
    return {
        "/v1/models": Endpoint("models", "/v1/models", {"GET": list_models}),
        "/v1/models/": Endpoint("models", "/v1/models/{model}", {"GET": one_model, "DELETE": passed}),
    }


def _named(path: str) -> str:
    model = unquote(path.removeprefix("/models/").partition("?")[0])
    if not _stays_below(model):
        raise ModelNotFound("the path names no model; GET /v1/models lists those there are.", param="model")
    return model


def _stays_below(model: str) -> bool:
    """Whether it may stand in an upstream's path, where it is asked for with our credential."""
    return model.isprintable() and "\\" not in model and {"", ".", ".."}.isdisjoint(model.split("/"))


async def _ask_upstream(relay: Runs, visit: Visit, route: Route, model: str, path: str) -> None:
    visit.record.model = route.name
    about = Asked(body=b"", model=model, stream=False, max_tokens=None, wants_usage=False)
    await relay.run(call(visit, route, about, method="GET", path=path), visit.answer, visit.record)


async def _give(visit: Visit, said: object) -> None:
    visit.record.outcome = Outcome.OK
    await visit.answer.give(200, msgspec.json.encode(said), {"content-type": "application/json"})
