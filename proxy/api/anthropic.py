"""Anthropic's endpoints, for upstreams that speak its API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import parse_qs

from proxy.api import message_batches, models, passthrough
from proxy.api.answering import Held
from proxy.api.calling import creating
from proxy.api.dialects import ANTHROPIC
from proxy.api.edge import Endpoint, Visit
from proxy.api.stored import Stored
from proxy.batches import Batches
from proxy.errors import InvalidRequest
from proxy.plan import Plan
from proxy.relay import Runs
from proxy.telemetry import Telemetry

PAGE = 20  # models in one list, where the client does not say
PAGE_MAX = 1000
_RESULTS_URL = re.compile(rb'("results_url"\s*:\s*")[^"]*(/messages/batches/[^"/]+/results")')


def endpoints(relay: Runs, stored: Stored, batches: Batches, telemetry: Telemetry) -> dict[str, Endpoint]:
    """By path, for the edge."""
    passed = dict.fromkeys(passthrough.METHODS, passthrough.handler(relay, stored, ANTHROPIC, _Readdressed))
    return {
        **creating(relay, ANTHROPIC, "messages", "/v1/messages"),
        **creating(relay, ANTHROPIC, "count_tokens", "/v1/messages/count_tokens", is_charged=False),
        **message_batches.endpoints(batches, telemetry, passed),
        **models.endpoints(relay, stored, ANTHROPIC, _listed, _described),
    }


class _Readdressed(Held):
    """The relay's sink for what tells of message batches: their results are to be fetched here.

    The address of the results names the provider's host. A client that followed it would go past the gateway, and show
    its key there. So it becomes a path, which Anthropic's SDKs put behind their base_url; all else passes as it came.
    """

    def holds(self, status: int, headers: Mapping[str, str]) -> bool:
        return headers.get("content-type", "").startswith("application/json")

    async def give(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        body = _RESULTS_URL.sub(rb"\1/v1\2", body)
        await self.answer.start(status, {**headers, "content-length": str(len(body))})
        await self.answer.write(body)
        await self.answer.finish()


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
