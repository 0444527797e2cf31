"""How a client is spoken to where the gateway speaks for itself: the shape of its errors, and where it looks for an id.

Which dialect a client speaks is known from the path and headers of its request, before anything can fail, so that a
refusal has the right shape whatever it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from proxy.core.headers import ANTHROPIC_VERSION
from proxy.errors import GatewayError

Shape = Callable[[GatewayError, str], dict[str, object]]


@dataclass(slots=True, frozen=True, eq=False)
class Dialect:
    """
    Attributes:
        name: as the configuration's `dialect` has it.
        owner: whose API it is.
        front: where its clients ask for an answer of a model.
        base: what its clients' base_url is.
        shape: the body of an error, from the error and the id of the call.
        id_header: where its clients look for the id of a call, unless the upstream told one of its own.
        defaults: headers that go upstream where the client does not send them.
    """

    name: str
    owner: str
    front: str
    base: str
    shape: Shape
    id_header: str
    defaults: Mapping[str, str] = field(default_factory=dict)


def _in_openais_shape(error: GatewayError, request_id: str) -> dict[str, object]:
    return error.as_dict()


# Source: Anthropic's API reference, "Errors"; the words of its SDK's `ErrorType`.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _in_anthropics_shape(error: GatewayError, request_id: str) -> dict[str, object]:
    """Our own code stands where Anthropic's do: its SDK gives it as `error_code`."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    told = {"type": kind, "message": str(error), "details": {"error_code": error.code}}
    return {"type": "error", "error": told, "request_id": request_id}


OPENAI = Dialect(
    "openai", "OpenAI", "POST /v1/chat/completions", "base_url ends in /v1", _in_openais_shape, "x-request-id"
)
ANTHROPIC = Dialect(
    "anthropic",
    "Anthropic",
    "POST /v1/messages",
    "base_url ends before /v1",
    _in_anthropics_shape,
    "request-id",
    ANTHROPIC_VERSION,
)
BY_NAME = {dialect.name: dialect for dialect in (OPENAI, ANTHROPIC)}


def spoken(path: str, headers: Mapping[str, str]) -> Dialect:
    """The client's: Anthropic's clients say which version of its API they know, and `/v1/messages` is only theirs."""
    return ANTHROPIC if "anthropic-version" in headers or path.startswith("/v1/messages") else OPENAI
