"""OpenAI's endpoints: the calls the gateway understands."""

from __future__ import annotations

from urllib.parse import quote, unquote

import msgspec

from proxy.api.edge import Endpoint, Handler, Visit
from proxy.core import asked
from proxy.core.asked import Asked, Unreadable
from proxy.core.outcome import Outcome
from proxy.errors import InvalidRequest, ModelNotFound
from proxy.plan import Plan, Route
from proxy.relay import Call, Relay


def endpoints(relay: Relay) -> dict[str, Endpoint]:
    """By path, for the edge."""
    models = Endpoint("models", "/v1/models", {"GET": _list_models(relay)})
    model = Endpoint("models", "/v1/models/{model}", {"GET": _one_model(relay)})
    return {
        **_creating(relay, "chat", "/v1/chat/completions", reports_usage=True),
        **_creating(relay, "completions", "/v1/completions", reports_usage=True),
        **_creating(relay, "embeddings", "/v1/embeddings"),
        **_creating(relay, "responses", "/v1/responses"),
        "/v1/models": models,
        "/v1/models/": model,
    }


def _creating(relay: Relay, operation: str, path: str, *, reports_usage: bool = False) -> dict[str, Endpoint]:
    async def create(visit: Visit) -> None:
        wanted = _read(await visit.body())
        record = visit.record
        record.asked_model, record.stream, record.max_tokens = wanted.model, wanted.stream, wanted.max_tokens
        route = _route(visit.plan, wanted.model)
        record.model = route.name
        await relay.run(_call(visit, route, wanted, reports_usage=reports_usage), visit.answer, record)

    return {path: Endpoint(operation, path, {"POST": create})}


def _call(
    visit: Visit, route: Route, wanted: Asked, *, method: str = "POST", path: str = "", reports_usage: bool = False
) -> Call:
    return Call(
        method=method,
        path=path or visit.path,
        route=route,
        asked=wanted,
        headers=visit.forwarded,
        credential=visit.credential,
        priority=visit.priority,
        caller=visit.record.caller,
        deadline=visit.deadline,
        policy=visit.policy,
        reports_usage=reports_usage,
    )


def _read(body: bytes) -> Asked:
    try:
        return asked.read(body)
    except Unreadable as error:
        raise InvalidRequest(str(error), code=error.code, param=error.param) from None


def _route(plan: Plan, model: str) -> Route:
    route = plan.route(model)
    if route is None:
        near = plan.nearest(model)
        hint = f"did you mean `{near}`?" if near else "GET /v1/models lists those there are."
        raise ModelNotFound(f"the model `{model[:200]}` is not known here; {hint}", param="model")
    if route.dialect != "openai":
        raise InvalidRequest(
            f"the model `{model[:200]}` is served by an upstream that speaks {route.dialect}'s API, not OpenAI's",
            code="wrong_dialect",
            param="model",
        )
    return route


# ── models ──


def _list_models(relay: Relay) -> Handler:
    async def list_models(visit: Visit) -> None:
        """The configured names; where all are wildcards, what the upstream behind the first of them lists."""
        if visit.plan.models or (route := _first_wildcard(visit.plan)) is None:
            await _give(visit, {"object": "list", "data": [_described(visit.plan, name) for name in visit.plan.models]})
            return
        visit.record.model = route.name
        await relay.run(_call(visit, route, _naming(route.name), method="GET"), visit.answer, visit.record)

    return list_models


def _one_model(relay: Relay) -> Handler:
    async def one_model(visit: Visit) -> None:
        model = unquote(visit.path.removeprefix("/models/").partition("?")[0])
        if not _stays_below(model):
            raise ModelNotFound("the path names no model; GET /v1/models lists those there are.", param="model")
        route = _route(visit.plan, model)
        visit.record.model = route.name
        if model in visit.plan.models:
            await _give(visit, _described(visit.plan, model))
            return
        await relay.run(
            _call(visit, route, _naming(model), method="GET", path=f"/models/{quote(model)}"),
            visit.answer,
            visit.record,
        )

    return one_model


def _stays_below(model: str) -> bool:
    """Whether it may stand in an upstream's path, where it is asked for with our credential."""
    return model.isprintable() and "\\" not in model and {"", ".", ".."}.isdisjoint(model.split("/"))


def _first_wildcard(plan: Plan) -> Route | None:
    names = (name for name in plan.settings.models if name.endswith("*"))
    routes = (plan.route(name) for name in names)
    return next((route for route in routes if route is not None and route.dialect == "openai"), None)


def _naming(model: str) -> Asked:
    """A request without a body that is about `model`."""
    return Asked(body=b"", model=model, stream=False, max_tokens=None, wants_usage=False)


def _described(plan: Plan, model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": plan.settings.models[model].upstreams[0]}


async def _give(visit: Visit, said: object) -> None:
    visit.record.outcome = Outcome.OK
    await visit.answer.give(200, msgspec.json.encode(said), {"content-type": "application/json"})
