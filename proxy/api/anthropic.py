"""Anthropic's endpoints, for upstreams that speak its API."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qs

from proxy.api import models
from proxy.api.calling import creating
from proxy.api.dialects import ANTHROPIC
from proxy.api.edge import Endpoint, Visit
from proxy.errors import InvalidRequest
from proxy.plan import Plan
from proxy.relay import Relay

PAGE = 20  # models in one list, where the client does not say
PAGE_MAX = 1000


def endpoints(relay: Relay) -> dict[str, Endpoint]:
    """By path, for the edge."""
    return {
        **creating(relay, ANTHROPIC, "messages", "/v1/messages"),
        **creating(relay, ANTHROPIC, "count_tokens", "/v1/messages/count_tokens"),
        **models.endpoints(relay, ANTHROPIC, _listed, _described),
    }


def _listed(visit: Visit, names: Sequence[str]) -> dict[str, object]:
    """A page of the list: after one name, or before one."""
    asked = {name: values[-1] for name, values in parse_qs(visit.path.partition("?")[2]).items()}
    most = asked.get("limit", str(PAGE))
    if not most.isdecimal() or not 1 <= int(most[:9]) <= PAGE_MAX:
        raise InvalidRequest(f"limit must be a number from 1 to {PAGE_MAX}", param="limit")
    after, before = _at(names, asked.get("after_id"), "after_id"), _at(names, asked.get("before_id"), "before_id")
    if before is not None:
        left = names[:before]
        page = left[-int(most) :]
    else:
        left = names[0 if after is None else after + 1 :]
        page = left[: int(most)]
    return {
        "data": [_described(visit.plan, name) for name in page],
        "has_more": len(page) < len(left),
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _at(names: Sequence[str], name: str | None, param: str) -> int | None:
    if name is None:
        return None
    if name not in names:
        raise InvalidRequest(f"{param} is no model of this list", param=param)
    return names.index(name)


def _described(plan: Plan, model: str) -> dict[str, object]:
    """What only the provider knows is left out; a date that is not known is the epoch."""
    return {
        "type": "model",
        "id": model,
        "display_name": model,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
    }
