"""What upstreams keep for callers: responses, files, vector stores, ... Each is asked for where it was made.

    made by a call -> its id is noted -> whoever names it is led to its home

1. Only its maker is led there; to any other caller it does not exist.
2. What is not known (the notes end with the process) is sought: where an upstream has none of it, the next is asked.
3. What carries a body is not sought: nobody's data goes to an upstream on trial. It goes where everything goes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace

from proxy.api.edge import Visit
from proxy.core.asked import Asked
from proxy.errors import InvalidRequest, NotFound
from proxy.plan import Route

NOTED = 100_000  # things; with their ids 24 MiB
FOLLOWED = ("previous_response_id", "conversation")  # fields of a response that name what it follows
STORES = frozenset(
    {
        "/assistants",
        "/chat/completions",
        "/containers",
        "/conversations",
        "/evals",
        "/files",
        "/fine_tuning/jobs",
        "/messages/batches",
        "/responses",
        "/skills",
        "/threads",
        "/uploads",
        "/vector_stores",
        "/videos",
    }
)  # paths at which things are made, and below which each has its own
_NO_THINGS = ("characters", "compact", "edits", "extensions", "input_tokens", "runs")  # that stand where ids do
_THING = re.compile(rf"(?:{'|'.join(STORES)})/(?!(?:{'|'.join(_NO_THINGS)})(?:[/?]|$))([^/?]+)")

Home = tuple[str, str | None]  # the upstream that keeps a thing, and the alias of its caller; None: nobody knows whose


class Stored:
    """Where things are, by their ids: the last NOTED that were made or asked for."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, Home] = OrderedDict()

    def note(self, thing: str, upstream: str, owner: str | None) -> None:
        """A thing was made, or found. What has a home already keeps it."""
        self._homes.setdefault(thing, (upstream, owner))
        if len(self._homes) > NOTED:
            self._homes.popitem(last=False)

    def made(self, visit: Visit) -> None:
        """The call has ended; what it made is noted, if it told an id."""
        record = visit.record
        if record.response_id:
            self.note(record.response_id, record.upstream, record.caller)

    def is_foreign(self, thing: str, caller: str) -> bool:
        """Whether it is known to be another caller's."""
        home = self._homes.get(thing)
        return home is not None and home[1] not in (None, caller)

    def at(self, visit: Visit, route: Route, *, is_named: bool, is_bare: bool) -> tuple[Route, str]:
        """Where the thing is that a request's path names.

        Args:
            route: where the request goes else.
            is_named: the client has named that upstream itself.
            is_bare: the request carries no body.

        Returns:
            the route, and what is to be sought on it (see `proxy.relay.Call`).

        Raises:
            NotFound: it is another caller's.
        """
        named = _THING.match(visit.path)
        if named is None:
            return route, ""
        thing, plan = named[1], visit.plan
        upstream = self._home(visit, thing)
        if upstream is not None:
            return (route if is_named else plan.direct(upstream)), ""
        if is_bare and not is_named:
            first = route.targets[0].upstream.name
            others = (name for name, said in plan.upstreams.items() if said.dialect == route.dialect and name != first)
            route = plan.direct(first, *others)
        return route, _sought(visit, thing, route)

    def followed(self, visit: Visit, asked: Asked, route: Route) -> tuple[Route, str]:
        """Where a response can be made that follows what an upstream keeps: of its model's targets, those there.

        Returns:
            as `at`.

        Raises:
            NotFound: what it follows is another caller's.
            InvalidRequest: what it follows is kept where its model is not served.
        """
        field, thing = next(((name, said) for name in FOLLOWED if (said := asked.named(name))), ("", ""))
        if not thing:
            return route, ""
        upstream = self._home(visit, thing)
        if upstream is None:
            return route, _sought(visit, thing, route)
        targets = tuple(target for target in route.targets if target.upstream.name == upstream)
        if not targets:
            raise InvalidRequest(
                f"`{field}` names what upstream {upstream} keeps, and the model `{asked.model[:200]}` is not served "
                "there; ask for a model that is, or send what went before as `input`",
                param=field,
            )
        return replace(route, targets=targets), ""

    def _home(self, visit: Visit, thing: str) -> str | None:
        """The upstream that keeps it; None where that is not known. Raises NotFound: it is another caller's."""
        home = self._homes.get(thing)
        if home is None or home[0] not in visit.plan.upstreams:
            return None
        if self.is_foreign(thing, visit.record.caller):
            raise NotFound.of(thing)
        self._homes.move_to_end(thing)
        return home[0]


def _sought(visit: Visit, thing: str, route: Route) -> str:
    """With one upstream and no callers to be kept apart, the upstream's own answer says all there is to say."""
    return thing if visit.plan.needs_key or len(route.targets) > 1 else ""
