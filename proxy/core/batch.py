"""What a batch may do: its states, what a line of its input must be, and what became of an item.

    validating -> in_progress -> finalizing -> completed
        |             |  `----------------------------------> expired     (not done in time)
        |             `-> cancelling -> cancelled                         (what is done is kept)
        `-> failed                                                        (the input is wrong)

Rules
-----
1. A batch moves along these arrows only, and each state has the time at which it was entered. The last ones are final.
2. A batch whose input has one mistake runs none of its lines; all mistakes are told, up to `MISTAKES_TOLD`.
3. All lines of a batch ask one model: so it can be handed on whole, and waits for one upstream's limits.
4. An item ends once, done or failed. What the gateway refused, or an upstream refused for a limit, for money or for its
   credential, is no end: the item is run again.

The words of the mistakes are those of OpenAI's Batch API.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from hashlib import blake2b

import msgspec

from proxy.core import asked
from proxy.core.asked import Unreadable
from proxy.core.outcome import Outcome, Reason
from proxy.core.usage import Usage

LINES_MAX = 50_000
INPUT_BYTES_MAX = 200 << 20
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MESSAGES = "/v1/messages"  # of Anthropic's message batches
WINDOWS = {"24h": 86_400}  # seconds, by `completion_window`
MISTAKES_TOLD = 100
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
_RAW = msgspec.json.Decoder(msgspec.Raw)
_ENCODE = msgspec.json.encode


class Status(Enum):
    """The value is OpenAI's word."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in _NEXT


_NEXT: Mapping[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset({Status.FAILED, Status.IN_PROGRESS, Status.CANCELLING, Status.EXPIRED}),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.CANCELLING, Status.EXPIRED}),
    Status.FINALIZING: frozenset({Status.COMPLETED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
}
OPEN = tuple(_NEXT)


class NotPossible(Exception):
    """The batch is in a state from which it cannot go there."""

    def __init__(self, batch: Batch, wanted: Status) -> None:
        super().__init__(f"the batch is {batch.status.value} and cannot become {wanted.value}")
        self.status = batch.status


class Mistake(msgspec.Struct, frozen=True):
    """What is wrong with an input; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Handed(msgspec.Struct, frozen=True):
    """A batch that its provider runs, as the provider knows it.

    Attributes:
        upstream: its configured name.
        file_id, batch_id: "" until they are known.
        completed, failed: items, as the provider counts them; their results come at the end.
    """

    upstream: str
    file_id: str = ""
    batch_id: str = ""
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """Times are seconds since the epoch.

    Attributes:
        owner: alias of the caller that made it; "" where nobody needs a key.
        output_file_id, error_file_id: reserved from the start; there is such a file from its first line on.
        output_seconds: how long these files are kept; None: as long as the batch.
        traceparent: of the request that submitted it.
        entered: when it came into each of its states.
        completed, failed: items that ended so.
        used: tokens of all its answers.
        unrun: of those that failed, how many had not been run when it ended.
        handed: to whom it was handed on; None: it is run here.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    output_seconds: int | None = None
    metadata: dict[str, str] | None = None
    traceparent: str = ""
    status: Status = Status.VALIDATING
    entered: dict[str, int] = {}
    model: str = ""
    mistakes: list[Mistake] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    unrun: int = 0
    used: Usage = Usage()
    handed: Handed | None = None

    @property
    def pending(self) -> int:
        return self.total - self.completed - self.failed

    @property
    def ended_at(self) -> int:
        """When it came into its final state."""
        return self.entered[self.status.value]

    def item_id(self, line: int) -> str:
        """The same at every run, so that an upstream can know a call again."""
        return f"batch_req_{self.id.removeprefix('batch_')}{line:05x}"


def moved(batch: Batch, status: Status, now: float) -> Batch:
    """The batch, in another state since `now`.

    Raises:
        NotPossible: rule 1.
    """
    if status not in _NEXT.get(batch.status, ()):
        raise NotPossible(batch, status)
    return msgspec.structs.replace(batch, status=status, entered={**batch.entered, status.value: int(now)})


class File(msgspec.Struct, kw_only=True):
    """
    Attributes:
        purpose: batch or batch_output.
        batch: the id of the batch whose lines it holds; "" for one that was uploaded.
        expires_at: None: it is kept until somebody deletes it, or its batch.
    """

    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    batch: str = ""


# ── the input ──


class Line(msgspec.Struct, frozen=True):
    """A request of the input: where its line stands in the file, in bytes, its end of line left out."""

    number: int
    start: int
    length: int
    custom_id: str


class Input:
    """Reads the lines of an input, one after the other, and finds what is wrong with them.

    Args:
        endpoint: one of ENDPOINTS, the one that all its requests are for.
        line_bytes_max: longest line that can be run.

    Attributes:
        mistakes: found so far; the batch can run only if there are none at the end.
        model: the one that its requests ask, "" before the first.
        count: requests.
    """

    def __init__(self, endpoint: str, line_bytes_max: int) -> None:
        self._endpoint, self._line_bytes_max = endpoint, line_bytes_max
        self._seen: set[bytes] = set()  # digests: 50,000 ids may be of any length
        self.mistakes: list[Mistake] = []
        self.model = ""
        self.count = 0

    @property
    def is_hopeless(self) -> bool:
        """Nothing that may follow needs to be read."""
        return len(self.mistakes) >= MISTAKES_TOLD or self.count > LINES_MAX

    def take(self, text: bytes, number: int, start: int) -> Line | None:
        """The next line, without its end; None if it is blank or wrong."""
        if number == 1:
            start, text = (start + 3, text[3:]) if text.startswith(b"\xef\xbb\xbf") else (start, text)
        if not text.strip():
            return None
        self.count += 1
        if self.count > LINES_MAX:
            message = f"The batch has more than {LINES_MAX:,} requests. Split it into several batches."
            self.mistakes.append(Mistake("too_many_tasks", message))
            return None
        if len(text) > self._line_bytes_max:
            message = f"This line is longer than {self._line_bytes_max} bytes, the most a request may have."
            self.mistakes.append(Mistake("request_too_large", message, number))
            return None
        try:
            return Line(number, start, len(text), self._custom_id(text))
        except _Wrong as wrong:
            self.mistakes.append(Mistake(wrong.code, str(wrong), number, wrong.param))
            return None

    def close(self) -> None:
        """There are no more lines."""
        if not self.count and not self.mistakes:
            message = "The input file is empty. It needs at least one request, one for each line."
            self.mistakes.append(Mistake("empty_file", message))

    def _custom_id(self, text: bytes) -> str:
        try:
            fields = _FIELDS.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _Wrong("invalid_json_line", "This line is not parseable as valid JSON.") from None
        custom_id = _told(fields, "custom_id")
        digest = blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            message = f"The custom_id '{custom_id[:100]}' is a duplicate of another request. Each must be unique."
            raise _Wrong("duplicate_custom_id", message, "custom_id")
        self._seen.add(digest)
        if _told(fields, "method") != "POST":
            raise _Wrong("invalid_method", "The method of a request must be POST.", "method")
        if _told(fields, "url") != self._endpoint:
            message = f"The URL provided for this request does not match the batch's endpoint, {self._endpoint}."
            raise _Wrong("invalid_url", message, "url")
        if "body" not in fields:
            raise _Wrong("missing_required_parameter", "Missing required parameter: 'body'.", "body")
        self._check_body(bytes(fields["body"]))
        return custom_id

    def _check_body(self, body: bytes) -> None:
        try:
            wanted = asked.read(body)
        except Unreadable as error:
            raise _Wrong(error.code, str(error), f"body.{error.param}" if error.param else "body") from None
        if wanted.stream:
            raise _Wrong("invalid_request", "A request of a batch cannot be streamed.", "body.stream")
        self.model = self.model or wanted.model
        if wanted.model != self.model:
            message = (
                f"The model '{wanted.model[:100]}' does not match the first request's, '{self.model[:100]}'. "
                "All requests of a batch must use the same model."
            )
            raise _Wrong("mismatched_model", message, "body.model")


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def _told(fields: Mapping[str, msgspec.Raw], name: str) -> str:
    if name not in fields:
        raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
    try:
        value = _TEXT.decode(fields[name])
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = ""
    if not value:
        raise _Wrong("invalid_type", f"'{name}' must be a text that is not empty.", name)
    return value


def body_of(line: bytes) -> bytes:
    """The request that a line of a checked input holds."""
    return bytes(_FIELDS.decode(line)["body"])


# ── what became of an item ──


class End(Enum):
    DONE = "done"
    FAILED = "failed"
    AGAIN = "again"  # it was refused, or never sent: it is not over
    PAUSE = "pause"  # so would all the others be: no use in asking before something has changed


_LIMITS = frozenset({Reason.REQUESTS, Reason.TOKENS, Reason.UNNAMED, Reason.SLOW_DOWN, Reason.FULL})
_OUTSIDE = frozenset({Reason.MONEY, Reason.SHUT, Reason.CONNECT})


def end_of(outcome: Outcome, reason: Reason, status: int) -> End:
    """Rule 4. `outcome` is that of the call, `reason` and `status` those of its last attempt.

    A 401 is the credential's matter; a 403 may be the item's, and where it is not, the upstream is shut after a few.
    """
    if outcome is Outcome.OK:
        return End.DONE
    if reason in _OUTSIDE or status == 401:
        return End.PAUSE
    if reason in _LIMITS or outcome is Outcome.CANCELLED:
        return End.AGAIN
    return End.FAILED


class Result(msgspec.Struct, frozen=True):
    """An item's line of the output, or of the errors.

    Attributes:
        line: JSON, with its end of line.
    """

    is_done: bool
    line: bytes
    used: Usage | None = None


def answered(item_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """The line for an item that was answered, well or not. A body that is not JSON becomes a text."""
    response = {"status_code": status, "request_id": request_id, "body": _json(body)}
    return _ENCODE({"id": item_id, "custom_id": custom_id, "response": response, "error": None}) + b"\n"


def unanswered(item_id: str, custom_id: str, code: str, message: str) -> bytes:
    """The line for an item that no answer came for."""
    error = {"code": code, "message": message}
    return _ENCODE({"id": item_id, "custom_id": custom_id, "response": None, "error": error}) + b"\n"


_UNRUN = {
    Status.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Status.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request was executed."),
}


def unrun(batch: Batch, number: int, custom_id: str) -> Result:
    """What became of an item whose batch is over, when it had not ended."""
    return Result(False, unanswered(batch.item_id(number), custom_id, *_UNRUN[batch.status]))


def counted(batch: Batch, result: Result) -> Batch:
    """The batch, with one item more that has ended."""
    return msgspec.structs.replace(
        batch,
        completed=batch.completed + result.is_done,
        failed=batch.failed + (not result.is_done),
        used=batch.used if result.used is None else _together(batch.used, result.used),
    )


def finalized(batch: Batch, now: float) -> Batch:
    """The batch, on its way to its end if it has nothing left to run."""
    if batch.pending or batch.status is not Status.IN_PROGRESS:
        return batch
    return moved(batch, Status.FINALIZING, now)


def results_file(batch: Batch, *, done: bool, size: int, now: float) -> File:
    """The file of a batch's results, of their first `size` bytes. How long it is kept is known when the batch ends."""
    return File(
        id=batch.output_file_id if done else batch.error_file_id,
        owner=batch.owner,
        purpose="batch_output",
        filename=f"{batch.id}_{'output' if done else 'error'}.jsonl",
        bytes=size,
        created_at=int(now),
        batch=batch.id,
    )


def _together(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.input + other.input,
        one.output + other.output,
        one.cached + other.cached,
        one.cache_write + other.cache_write,
        one.reasoning + other.reasoning,
    )


def _json(body: bytes) -> object:
    try:
        raw = _RAW.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body.decode("utf-8", "replace")
    return msgspec.Raw(msgspec.json.format(body, indent=-1)) if b"\n" in body else raw
