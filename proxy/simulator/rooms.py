"""Where a provider keeps things: what is sent there, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from proxy.simulator import forms
from proxy.simulator.forms import Form


@dataclass(frozen=True, slots=True)
class Sent:
    """A request to keep something, or for something that is kept."""

    id: str  # in its path; "" where there is none
    query: Mapping[str, str]
    body: bytes
    content_type: str
    serial: str  # hexadecimal digits that nobody else has
    is_anthropics: bool = False  # whether a client of Anthropic's API asks

    def form(self) -> Form:
        """Raises BadAsk."""
        return forms.read(self.body, self.content_type)


@dataclass(frozen=True, slots=True)
class Content:
    """What is given back as it was sent."""

    content: bytes
    filename: str


Deed = Callable[[Sent], bytes | Content]  # JSON, or a file; raises BadAsk


def listed(data: list[dict[str, object]], *, has_more: bool = False) -> bytes:
    """A page of a list."""
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return msgspec.json.encode({"object": "list", "data": data, "has_more": has_more, **ends})
