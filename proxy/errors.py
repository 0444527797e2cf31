"""What the gateway itself may answer. Each error knows its status, its code and the word it is counted under.

GatewayError
├── Malformed             400  not HTTP, or HTTP that can be read in two ways; its connection ends
├── InvalidRequest        400  the request cannot be understood; says what would be right
├── Unauthorized          401  no key, or an unknown one
├── UnknownPath           404  no such endpoint
├── ModelNotFound         404  no route for this model; names the nearest
├── NotFound              404  no such thing, or none of this caller's
├── MethodNotAllowed      405
├── TooSlow               408  the request did not come in time; its connection ends
├── WrongState            409  a batch or file in this state does not allow it
├── BodyTooLarge          413
├── ExpectationFailed     417  another expectation than 100-continue
├── Cancelled             499  a prompt on a WebSocket that its client has cancelled
├── HeadersTooLarge       431  the head of the request is too large; its connection ends
├── MethodNotImplemented  501  a method for proxies; its connection ends
├── VersionNotSupported   505  neither HTTP/1.1 nor HTTP/1.0; its connection ends
├── QueueFull             429  too many wait already; come back after `retry_after`
├── QueueTimeout          503  no place before the deadline
├── BodiesFull            503  no room in memory for its body
├── TooManyConnections    503  clients have as many as they may; this one ends
├── Draining              503  this process is stopping; another one will answer
├── StateOff              503  this gateway keeps no state, so it has no files and batches
├── StateUnavailable      503  nothing can be written now: no room, or another process holds the file
├── UpstreamShut          503  the upstream is not asked for now: no money, a refused credential, or it only fails
├── UpstreamUnreachable   502  no connection to the upstream
├── UpstreamBroke         502  the upstream closed or reset the connection before its answer
├── UpstreamGarbage       502  the upstream's answer was not HTTP
├── UpstreamTimeout       504  the upstream was late with its first byte
├── StepRefused           502  a step's upstream said no, with the status it said it with
├── StepTimeout           504  a step took longer than the configuration allows
├── StepUnfit             502  a step's answer is not what the configuration asks for
├── StreamTruncated       502  the answer broke off after it had begun; told in band
└── Internal              500  a mistake of ours; logged with its traceback, never shown

ClientGone is not an answer: it says that there is nobody left to answer; ClientStalled, that nobody reads it.
"""

from __future__ import annotations

from typing import ClassVar

from proxy.core.outcome import Reason


class ClientGone(Exception):
    """The client can no longer be written to. Never the upstream's fault."""


class ClientStalled(ClientGone):
    """The client is there, but has taken nothing for too long."""


class GatewayError(Exception):
    """An answer of the gateway's own.

    Args:
        message: what is wrong, then what to do; shown to the client, so it holds no secret.
        code: a narrower code than the class's own.
        param: the field of the request that is wrong.
        retry_after: seconds after which the client may come back; None when coming back does not help.

    Attributes:
        more: what else is told of it, beside message, type, param and code.
    """

    status: int = 500
    default_code: ClassVar[str] = "internal_error"
    kind: ClassVar[str] = "server_error"  # `error.type` in OpenAI's shape
    word: ClassVar[str] = "internal"  # `error_type` of metrics and logs
    source: ClassVar[str] = "gateway"  # whose budget it comes out of: client, gateway or upstream
    should_retry: bool | None = None  # x-should-retry; None: left to the client
    closes: ClassVar[bool] = False  # what follows on the connection is not read

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.more: dict[str, object] = {}

    def as_dict(self) -> dict[str, object]:
        """The body in OpenAI's shape."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code} | self.more}


class Unheard(GatewayError):
    """The request was not heard to its end, so whatever follows on its connection is not either."""

    status, kind = 400, "invalid_request_error"
    word, source, closes = "invalid_request", "client", True


class Malformed(Unheard):
    default_code = "malformed_request"


class TooSlow(Unheard):
    status, default_code = 408, "request_too_slow"


class HeadersTooLarge(Unheard):
    status, default_code = 431, "headers_too_large"


class MethodNotImplemented(Unheard):
    status, default_code = 501, "method_not_implemented"


class VersionNotSupported(Unheard):
    status, default_code = 505, "http_version_not_supported"


class InvalidRequest(GatewayError):
    status, default_code, kind = 400, "invalid_request", "invalid_request_error"
    word, source = "invalid_request", "client"


class Unauthorized(GatewayError):
    status, default_code, kind = 401, "invalid_api_key", "invalid_request_error"
    word, source = "auth", "client"


class UnknownPath(GatewayError):
    status, default_code, kind = 404, "unknown_path", "invalid_request_error"
    word, source = "not_found", "client"


class ModelNotFound(GatewayError):
    status, default_code, kind = 404, "model_not_found", "invalid_request_error"
    word, source = "not_found", "client"


class NotFound(GatewayError):
    status, default_code, kind = 404, "not_found", "invalid_request_error"
    word, source = "not_found", "client"

    @classmethod
    def of(cls, thing: str) -> NotFound:
        """For what no upstream has, and in the same words for what is another caller's."""
        return cls(f"there is no `{thing[:100]}` here, or not what was asked of it")


class WrongState(GatewayError):
    status, default_code, kind = 409, "wrong_state", "invalid_request_error"
    word, source = "invalid_request", "client"
    should_retry = False


class MethodNotAllowed(GatewayError):
    status, default_code, kind = 405, "method_not_allowed", "invalid_request_error"
    word, source = "invalid_request", "client"

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class BodyTooLarge(GatewayError):
    status, default_code, kind = 413, "request_too_large", "invalid_request_error"
    word, source = "invalid_request", "client"


class ExpectationFailed(GatewayError):
    status, default_code, kind = 417, "expectation_failed", "invalid_request_error"
    word, source = "invalid_request", "client"


class Cancelled(GatewayError):
    status, default_code, kind = 499, "cancelled", "invalid_request_error"
    word, source = "client_disconnect", "client"


class QueueFull(GatewayError):
    status, default_code, kind, word = 429, "queue_full", "requests", "queue_full"
    should_retry: bool | None = True


class QueueTimeout(GatewayError):
    status, default_code, word = 503, "queue_timeout", "queue_timeout"
    should_retry: bool | None = True


class BodiesFull(GatewayError):
    status, default_code, word = 503, "bodies_full", "overloaded"
    should_retry: bool | None = True


class TooManyConnections(GatewayError):
    status, default_code, word = 503, "too_many_connections", "overloaded"
    should_retry: bool | None = True
    closes = True


class Draining(GatewayError):
    status, default_code, word = 503, "draining", "overloaded"
    should_retry: bool | None = True
    closes = True


class StateOff(GatewayError):
    status, default_code = 503, "state_off"
    should_retry = False


class StateUnavailable(GatewayError):
    status, default_code = 503, "state_unavailable"
    should_retry = True


class UpstreamError(GatewayError):
    """The upstream gave no answer that could be passed on. It was retried here, so the client need not."""

    status, default_code, kind = 502, "upstream_error", "upstream_error"
    word, source = "upstream_5xx", "upstream"
    should_retry: bool | None = False


class UpstreamShut(UpstreamError):
    status, default_code, word = 503, "upstream_shut", "overloaded"


class UpstreamUnreachable(UpstreamError):
    default_code, word = "upstream_unreachable", "connect"


class UpstreamBroke(UpstreamError):
    default_code, word = "upstream_broke", "connect"


class UpstreamGarbage(UpstreamError):
    default_code, word = "upstream_garbage", "upstream_5xx"


class UpstreamTimeout(UpstreamError):
    status, default_code, word = 504, "upstream_timeout", "timeout"


class StreamTruncated(UpstreamError):
    default_code, word = "stream_truncated", "stream_broken"


class StepRefused(UpstreamError):
    """A step of a pipeline was answered with an error, whose status is told on."""

    default_code = "step_refused"

    def __init__(self, message: str, *, status: int, code: str | None, reason: Reason) -> None:
        super().__init__(message, code=code)
        self.status, self.reason = status, reason


class StepTimeout(UpstreamError):
    status, default_code, word = 504, "step_timeout", "timeout"


class StepUnfit(UpstreamError):
    default_code, word = "step_unfit", "unfit"


class Internal(GatewayError):
    pass
