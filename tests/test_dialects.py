"""Every error of the gateway, in the shape that each dialect's SDK reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import httpx2
import pytest
from anthropic import APIStatusError
from anthropic.types.shared.error_type import ErrorType

from proxy import errors
from proxy.api.dialects import ANTHROPIC, OPENAI, spoken
from proxy.core.outcome import Reason
from proxy.errors import GatewayError, MethodNotAllowed, StepRefused

KINDS = {*get_args(ErrorType), "request_too_large"}  # what a body that is too large is called stands in the guide only
WORDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def every(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    for below in kind.__subclasses__():
        yield below
        yield from every(below)


NEEDED: dict[type[GatewayError], dict[str, Any]] = {
    MethodNotAllowed: {"allowed": "GET"},
    StepRefused: {"status": 400, "code": None, "reason": Reason.NONE},
}
EACH = pytest.mark.parametrize("kind", list(every(errors.GatewayError)), ids=lambda kind: kind.__name__)


def made(kind: type[GatewayError]) -> GatewayError:
    return kind("no", **NEEDED.get(kind, {}))


@EACH
def test_anthropic_s_sdk_knows_the_kind_and_gives_our_code(kind: type[GatewayError]) -> None:
    error = made(kind)
    body: Any = ANTHROPIC.shape(error, "req_1")
    response = httpx2.Response(error.status, json=body, request=httpx2.Request("POST", "http://x"))
    raised = APIStatusError("no", response=response, body=body)
    assert (body["type"], body["request_id"]) == ("error", "req_1")
    assert raised.type in KINDS
    assert raised.type == WORDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    assert (raised.api_message, raised.error_code) == ("no", error.code)


@EACH
def test_openai_s_shape_holds_the_same_code(kind: type[GatewayError]) -> None:
    error = made(kind)
    body: Any = OPENAI.shape(error, "req_1")
    assert body == {"error": {"message": "no", "type": error.kind, "param": None, "code": error.code}}


@pytest.mark.parametrize(
    ("path", "headers", "dialect"),
    [
        ("/v1/messages", {}, ANTHROPIC),
        ("/v1/messages/batches/b/results", {}, ANTHROPIC),
        ("/v1/models", {"anthropic-version": ""}, ANTHROPIC),
        ("/", {"anthropic-version": "2023-06-01"}, ANTHROPIC),
        ("/v1/models", {}, OPENAI),
        ("/v1/threads/t/messages", {}, OPENAI),
        ("/v2/messages", {}, OPENAI),
        ("", {"x-api-key": "k"}, OPENAI),
    ],
)
def test_a_client_s_dialect_is_known_from_its_path_or_its_version(path: str, headers: Any, dialect: Any) -> None:
    assert spoken(path, headers) is dialect
