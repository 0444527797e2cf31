"""Everything of a provider's API that the gateway need not understand: passed on as it is, both ways.

    path -> upstream, its default or the one that keeps what is named -> relay, as for any call -> the same path there

Method, path, query, body and status are the client's and the upstream's own; of the headers those pass that may.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.api import calling, uploads
from proxy.api.answering import HttpAnswer
from proxy.api.dialects import Dialect
from proxy.api.edge import NOWHERE, Endpoint, Handler, Visit
from proxy.api.stored import STORES, Stored
from proxy.api.uploads import Upload
from proxy.core.headers import PASSED_UPSTREAM
from proxy.core.outcome import Outcome
from proxy.errors import InvalidRequest, UnknownPath
from proxy.plan import Route
from proxy.relay import Runs, Sink

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
TO = "x-penstock-upstream"  # the header by which a client names the upstream
# The first segments of OpenAI's paths, and the words under which they are counted.
OPERATIONS = (
    "assistants",
    "audio",
    "batches",
    "chat",
    "chatkit",
    "completions",
    "containers",
    "content_provenance_checks",
    "conversations",
    "embeddings",
    "evals",
    "files",
    "fine_tuning",
    "images",
    "models",
    "moderations",
    "organization",
    "projects",
    "realtime",
    "responses",
    "skills",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
)
UNKNOWN = "passthrough"  # the word of all other paths
_MARKED = frozenset({"chat", "responses", "threads"})  # whose streams end with a mark, and are broken without it


def endpoints(relay: Runs, stored: Stored, dialect: Dialect) -> dict[str, Endpoint]:
    """By path, for the edge: all of /v1 but what is more exact."""
    handlers = dict.fromkeys(METHODS, handler(relay, stored, dialect))
    found = {"/v1/": Endpoint(UNKNOWN, "/v1/{path}", handlers), "/v1/v1/": NOWHERE}  # a slip in a base_url
    for operation in OPERATIONS:
        path = f"/v1/{operation}"
        found[path] = Endpoint(operation, path, handlers)
        found[f"{path}/"] = Endpoint(operation, f"{path}/{{path}}", handlers)
    return found


def handler(relay: Runs, stored: Stored, dialect: Dialect, sink: Callable[[HttpAnswer], Sink] | None = None) -> Handler:
    """What passes a request on, whatever its method; its answer into a sink, where that changes any of it."""

    async def pass_through(visit: Visit) -> None:
        route = routed(visit, dialect)
        answer = visit.answer if sink is None else sink(visit.answer)
        await pass_on(relay, stored, visit, await uploads.read(visit), route, answer)

    return pass_through


async def pass_on(
    relay: Runs, stored: Stored, visit: Visit, body: Upload, route: Route, sink: Sink, path: str = ""
) -> None:
    """Send a request on as it is, with this body, and its answer back into `sink`: to the upstream that keeps what its
    path names, else to the first of `route`.

    Args:
        path: in place of the client's.

    Raises:
        GatewayError: as `Relay.run`, and for headers that cannot be understood.
        NotFound: what the path names is another caller's, or nowhere.
    """
    request, record = visit.request, visit.record
    route, seeks = stored.at(visit, route, is_named=TO in request.headers, is_bare=body.is_empty)
    asked = calling.call(
        visit,
        route,
        body,
        method=request.method,
        path=path,
        passed=PASSED_UPSTREAM,
        marks_end=record.operation in _MARKED,
        seeks=seeks,
    )
    try:
        await relay.run(asked, sink, record)
        if seeks and record.outcome is Outcome.OK:
            stored.note(seeks, record.upstream, None)
    finally:
        if request.method == "POST" and visit.path.partition("?")[0] in STORES:
            stored.made(visit)


def routed(visit: Visit, dialect: Dialect) -> Route:
    """To the upstream that the client names, or the one for all that names no model."""
    plan = visit.plan
    if visit.path.partition("?")[0].endswith("/"):
        raise UnknownPath("there is no such endpoint; does the path end in a slash too many?")
    if not plan.settings.passthrough.enabled:
        raise UnknownPath("there is no such endpoint; paths that are not listed are not passed on here")
    name = visit.request.headers.get(TO) or plan.catch_all.get(dialect.name)
    if name is None:
        raise UnknownPath(
            f"there is no such endpoint, and no upstream that speaks {dialect.owner}'s API to pass it on to; the "
            "operator can name one as passthrough.upstream"
        )
    if name not in plan.upstreams:
        raise InvalidRequest(f"{TO} names no upstream of this gateway; leave it out, or ask whoever runs it", param=TO)
    return plan.direct(name)
