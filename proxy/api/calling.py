"""From a request to a call: what the endpoints of both dialects have in common.

body -> what it asks for -> the route of its model -> a call for the relay
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import replace
from types import MappingProxyType

from proxy.api import dialects, uploads
from proxy.api.dialects import Dialect
from proxy.api.edge import Endpoint, Handler, Visit
from proxy.api.stored import Stored
from proxy.core import asked
from proxy.core.asked import Asked, Unreadable
from proxy.core.headers import TO_UPSTREAM
from proxy.errors import InvalidRequest, ModelNotFound
from proxy.plan import Plan, Route
from proxy.relay import Call, Runs, Wanted
from proxy.upstreams import Line


def creating(
    relay: Runs,
    dialect: Dialect,
    operation: str,
    path: str,
    *,
    reports_usage: bool = False,
    is_charged: bool = True,
    otherwise: str = "",
    beside: Mapping[str, Handler] = MappingProxyType({}),
    stored: Stored | None = None,
    stores: bool = False,
) -> dict[str, Endpoint]:
    """The endpoint whose JSON body names a model, which is to answer it.

    Args:
        is_charged: whether its tokens and requests are taken from the limits that the provider has for the model.
        otherwise: the model where the body names none; "": it must.
        beside: handlers of other methods.
        stored: where it is noted which upstream keeps an answer that is stored.
        stores: whether answers are unless the body says `store: false`, and may follow others; else only with
            `store: true`.
    """

    async def create(visit: Visit) -> None:
        wanted = read(await visit.body(), otherwise)
        wanted.is_charged = is_charged
        route, seeks = chosen(visit, wanted, dialect), ""
        if stored is not None and stores:
            route, seeks = stored.followed(visit, wanted, route)
        if not is_charged:
            route = visit.plan.uncharged(route)
        try:
            await answer(relay, visit, wanted, route, reports_usage=reports_usage, seeks=seeks)
        finally:
            if stored is not None and wanted.is_set("store", otherwise=stores):
                stored.made(visit)

    return {path: Endpoint(operation, path, {"POST": create, **beside})}


def uploading(relay: Runs, dialect: Dialect, operation: str, path: str, otherwise: str = "") -> dict[str, Endpoint]:
    """The endpoint whose form names a model, which is to answer it; what is in its files streams through."""

    async def create(visit: Visit) -> None:
        async with uploads.form(visit, uploads.MODEL, uploads.STREAM) as form:
            wanted = form.calling(otherwise)
            await answer(relay, visit, wanted, chosen(visit, wanted, dialect))

    return {path: Endpoint(operation, path, {"POST": create})}


def chosen(visit: Visit, wanted: Wanted, dialect: Dialect) -> Route:
    """Where it goes, which the record is told with what is asked for. Raises as `routed`."""
    record = visit.record
    record.asked_model, record.stream, record.max_tokens = wanted.model, wanted.stream, wanted.max_tokens
    route = routed(visit.plan, wanted.model, dialect)
    record.model = route.name
    return route


async def answer(
    relay: Runs, visit: Visit, wanted: Wanted, route: Route, *, reports_usage: bool = False, seeks: str = ""
) -> None:
    """Have it answered by one of the route's targets; `reports_usage` and `seeks` as of `proxy.relay.Call`."""
    if wanted.stream:
        visit.answer.expect_stream()
    await relay.run(call(visit, route, wanted, reports_usage=reports_usage, seeks=seeks), visit.answer, visit.record)


def read(body: bytes, otherwise: str = "") -> Asked:
    """What a JSON body asks for. Raises InvalidRequest."""
    try:
        return asked.read(body, otherwise)
    except Unreadable as error:
        raise InvalidRequest(str(error), code=error.code, param=error.param) from None


def routed(plan: Plan, model: str, dialect: Dialect) -> Route:
    """Where calls for a model go.

    Raises:
        ModelNotFound: it stands for nothing here.
        InvalidRequest: it is served, but not in the client's dialect.
    """
    route = plan.route(model)
    if route is None:
        near = plan.nearest(model)
        hint = f"did you mean `{near}`?" if near else "GET /v1/models lists those there are."
        raise ModelNotFound(f"the model `{model[:200]}` is not known here; {hint}", param="model")
    if route.dialect != dialect.name:
        other = dialects.BY_NAME[route.dialect]
        raise InvalidRequest(
            f"the model `{model[:200]}` is served by an upstream that speaks {other.owner}'s API, not "
            f"{dialect.owner}'s; ask for it with {other.owner}'s client, by {other.front}",
            code="wrong_dialect",
            param="model",
        )
    return route


def call(
    visit: Visit,
    route: Route,
    wanted: Wanted,
    *,
    method: str = "POST",
    path: str = "",
    passed: Set[str] = TO_UPSTREAM,
    reports_usage: bool = False,
    marks_end: bool = True,
    seeks: str = "",
    accept: Callable[[str | None], Awaitable[Line]] | None = None,
) -> Call:
    """What a request asks for, as the relay takes it; `passed` are the headers that may go upstream."""
    policy = visit.policy
    if seeks:
        policy = replace(policy, attempts=max(policy.attempts, len(route.targets)))
    return Call(
        method=method,
        path=path or visit.path,
        route=route,
        asked=wanted,
        headers={**visit.answer.dialect.defaults, **visit.forwarded(passed)},
        credential=visit.credential,
        priority=visit.priority,
        caller=visit.record.caller,
        deadline=visit.deadline,
        policy=policy,
        reports_usage=reports_usage,
        marks_end=marks_end,
        seeks=seeks,
        accept=accept,
    )
