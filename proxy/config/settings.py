"""What can be configured: one frozen model per section. The text under a field is its documentation and its description
in the JSON Schema.

Made in code (`Settings(upstreams=..., models=...)`) the models read neither file nor environment; `load` does.
Types are strict: `"8080"` is not a port and `true` is not a limit of 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from proxy.config import secret, tls
from proxy.config.consistency import contradictions
from proxy.config.pipelines import written
from proxy.config.secret import PASSTHROUGH, SIGNING, SIGNING_BYTES, Secret, signing_key
from proxy.core import pipeline

COUNT_MAX = 10**12  # more than any limit sold; small enough that a float holds it exactly
SECONDS_MAX = 86_400.0  # a day; whoever writes more means milliseconds
DOLLARS_MAX = 1e6  # for a million tokens; a thousand times the dearest model there is
CALLER_KEY_MIN = 16  # characters; a shorter key can be guessed
ENVIRONMENT = "env"  # in place of a proxy: the one that the environment names
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
_MODEL_NAME = r"^[^\s*]{0,200}\*?$"
_HOST_NAME = re.compile(r"^(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*)(\.[A-Za-z0-9_-]+)*\.?$")


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", message)


def _name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise _wrong("a name is 1 to 64 letters, digits, `_`, `.` or `-`; rename it")
    return name


def _model_name(name: str) -> str:
    if not name or not re.fullmatch(_MODEL_NAME, name):
        raise _wrong("a model is an exact name, a beginning that ends in `*`, or `*` alone, without spaces; rename it")
    return name


def _host(host: str) -> str:
    try:
        ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise _wrong("must be an address or a host name, without scheme, port or brackets") from None
    return host


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _wrong("is not a URL; write it like https://api.openai.com/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise _wrong("must be an http or https URL with a host; write it like https://api.openai.com/v1")
    if "@" in parts.netloc:
        raise _wrong("must hold no user and no password; give the key as api_key")
    if "#" in url:
        raise _wrong("must hold no `#`; take it and what follows out")
    if not all("!" <= character <= "~" for character in url) or "\\" in url:
        raise _wrong("holds a character that no URL may hold; percent-encode it")
    return url


def _base_url(url: str) -> str:
    if "?" in url or "#" in url:
        raise _wrong("must end with its path; take the `?` or `#` and what follows out")
    return _url(url).rstrip("/")


def _signing(secret: Secret) -> Secret:
    try:
        signing_key(secret)
    except ValueError:
        raise _wrong(
            f"must be {SIGNING} and base64 of at least {SIGNING_BYTES} bytes; make one with "
            f"`echo {SIGNING}$(head -c 32 /dev/urandom | base64)`"
        ) from None
    return secret


def _or_in_short(whole: JsonSchemaValue, short: JsonSchemaValue) -> JsonSchemaValue:
    """The schema of a part that a word or a text can stand for."""
    told = whole.pop("description")
    return {"description": told, "anyOf": [short, whole]}


def _api_key(value: object) -> Secret | Literal["passthrough"] | None:
    if value is None or value == PASSTHROUGH:
        return value  # type: ignore[return-value]  # comparison with a constant does not narrow
    return secret.validate(value)


def _proxy(value: object) -> Secret | Literal["env"] | None:
    if value is None or value == ENVIRONMENT or (isinstance(value, Secret) and value.reveal() == ENVIRONMENT):
        return None if value is None else "env"
    proxy = secret.validate(value)
    try:
        parts = urlsplit(proxy.reveal())
        is_right = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/")
    except ValueError:
        is_right = False
    if not is_right:
        raise _wrong("must be an http URL with a host, or env; write it like http://USER:PASSWORD@proxy.internal:3128")
    return proxy


def _long_enough(key: Secret) -> Secret:
    if len(key.reveal()) < CALLER_KEY_MIN:
        raise _wrong(f"must be at least {CALLER_KEY_MIN} characters; a shorter key can be guessed")
    return key


def _admin_key(key: Secret) -> Secret:
    if secret.is_hash(key):
        raise _wrong("must be the key itself; only callers may be given by a hash")
    return _long_enough(key)


def _caller_key(key: Secret) -> Secret:
    if key.reveal().startswith(secret.HASHED) and not secret.is_hash(key):
        raise _wrong("must be sha256: and 64 hexadecimal digits, or the key itself; see `penstock key new`")
    return _long_enough(key)


def _pattern(said: str) -> str:
    try:
        re.compile(said.encode())
    except re.error as error:
        raise _wrong(f"is no regular expression: {error}") from None
    return said


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise _wrong("names an upstream twice; name each once, in the order they are to be tried")
    return names


Count = Annotated[int, Field(ge=1, le=COUNT_MAX)]
CountOrZero = Annotated[int, Field(ge=0, le=COUNT_MAX)]
Seconds = Annotated[float, Field(gt=0, le=SECONDS_MAX, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=SECONDS_MAX, allow_inf_nan=False)]
Dollars = Annotated[float, Field(ge=0, le=DOLLARS_MAX, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Host = Annotated[str, AfterValidator(_host)]
Name = Annotated[str, AfterValidator(_name)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
AdminKey = Annotated[Secret, AfterValidator(_admin_key)]
CallerKey = Annotated[Secret, AfterValidator(_caller_key)]
ProxyUrl = Annotated[Secret | Literal["env"] | None, PlainValidator(_proxy, json_schema_input_type=str | None)]
FilePath = Annotated[str, Field(min_length=1, max_length=4000)]
ApiKey = Annotated[Secret | Literal["passthrough"] | None, PlainValidator(_api_key, json_schema_input_type=str | None)]


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )


class Tls(_Part):
    """What clients are shown, and what they have to show. Read anew at each reload, but for client_ca_file."""

    cert_file: FilePath
    """The certificate in PEM, those above it after it; its path starts at the configuration's folder."""
    key_file: FilePath
    """Its key in PEM, without a password."""
    client_ca_file: FilePath | None = None
    """Authorities in PEM; with them, a client without a certificate of theirs is refused."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            tls.for_clients(self.cert_file, self.key_file, self.client_ca_file)
        except tls.BadFile as error:
            raise _wrong(str(error)) from None
        return self


class Server(_Part):
    """Where the gateway listens, and how it takes and ends connections."""

    host: Host = "127.0.0.1"
    """Address the endpoints for clients listen on; anything but loopback needs callers, or allow_anonymous."""
    port: Port = 8080
    """Port of the endpoints for clients; 0 takes any free one."""
    admin_host: Host = "127.0.0.1"
    """Address that health, metrics and administration listen on."""
    admin_port: Port = 8081
    """Port of health, metrics and administration; 0 takes any free one."""
    admin_key: AdminKey | None = None
    """Key that metrics and administration ask for, as a bearer token; health answers without it."""
    allow_anonymous: bool = False
    """Whether a gateway without callers, or its admin port without a key, may listen beyond loopback, where whoever
    reaches it can use it."""
    max_body_bytes: Count = 64 * 1024 * 1024
    """Largest body of a request, in bytes; a larger one is refused with 413."""
    max_upload_bytes: Count = 1024 * 1024 * 1024
    """Largest body of a request that streams through to its upstream, such as a file, in bytes."""
    bodies_bytes: Count = 512 * 1024 * 1024
    """Bytes of memory for the bodies of all requests in flight. Beyond it one of more than 64 KiB waits, unread, and is
    refused with 503 at its deadline; room for the largest body there is always."""
    max_connections: Count | None = None
    """Most connections that clients have at once; one more is told so and closed. Half of the files that the process
    may open where none is given: a call needs another one, to its upstream."""
    tls: Tls | None = None
    """What secures the endpoints for clients; they speak plain HTTP without it."""
    idle_seconds: Seconds = 75.0
    """How long a client's connection is kept on which there is no request."""
    read_seconds: Seconds = 10.0
    """How long a client may take for the head of a request; and the stretch over which its pace with a body is
    measured."""
    body_bytes_per_second: CountOrZero = 1000
    """The slowest a client may send a body, on average over read_seconds; a slower one is refused with 408. 0 allows
    any."""
    ping_seconds: SecondsOrZero = 15.0
    """The longest a streamed answer is silent, its client's wait for it included: then a comment is sent, which clients
    skip; 0 sends none."""
    write_stall_seconds: Seconds = 60.0
    """How long a client may take nothing of what is sent to it before its call is ended."""
    drain_seconds: SecondsOrZero = 120.0
    """How long calls in flight may go on after SIGTERM before they are cut off."""


class Limits(_Part):
    """What may be in flight and how fast: the word `auto`, or a mapping of ceilings.

    `auto` sets no ceiling: what the upstream allows is learned.
    """

    concurrency: Count | None = None
    """Most calls in flight at once."""
    requests_per_minute: Count | None = None
    """Most requests a minute."""
    tokens_per_minute: Count | None = None
    """Most tokens a minute, those read and those written together."""
    learn: bool = True
    """Whether the upstream's real limits are learned below these ceilings; false takes the ceilings as they are."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _or_in_short(handler.resolve_ref_schema(handler(schema)), {"const": "auto"})


_AUTO: Any = Field(default_factory=Limits, json_schema_extra={"default": "auto"})


class Upstream(_Part):
    """A provider's endpoint with one credential."""

    base_url: Annotated[str, AfterValidator(_base_url), Field(examples=["https://api.openai.com/v1"])]
    """Address of the provider; what follows /v1 in a request's path follows it."""
    api_key: Annotated[ApiKey, Field(examples=["${OPENAI_API_KEY}", "file:/run/secrets/openai", PASSTHROUGH])] = None
    """The credential, as ${NAME} from the environment or file:PATH; `passthrough` sends the client's own; none at all
    for a local server."""
    dialect: Literal["openai", "anthropic"] = "openai"
    """The API it speaks."""
    limits: Limits = _AUTO
    """Limits of this upstream, over all its models."""
    pool: str | None = None
    """Name of a pool whose limits its calls share."""
    connect_seconds: Seconds = 5.0
    """How long a connection may take to stand."""
    first_byte_seconds: Seconds = 600.0
    """How long the answer may take to begin, once connected."""
    idle_seconds: Seconds = 120.0
    """How long an answer that has begun may be silent."""
    proxy: Annotated[ProxyUrl, Field(examples=["http://proxy.internal:3128", ENVIRONMENT])] = None
    """An HTTP proxy that it is reached through; `env` takes HTTPS_PROXY, HTTP_PROXY and NO_PROXY of the environment,
    which are not looked at otherwise."""
    ca_file: FilePath | None = None
    """Authorities in PEM that its certificate has to be of, instead of the system's."""
    client_cert_file: FilePath | None = None
    """A certificate in PEM that it is shown."""
    client_key_file: FilePath | None = None
    """The key of that certificate, where it is in a file of its own."""
    connections: CountOrZero = 0
    """Most connections held to it; 0 sets no bound beside the limits."""
    idle_connections: CountOrZero | None = None
    """Most connections kept that no call uses; 100, but 8 where self_hosted: a small server may give each a thread."""
    keep_alive_seconds: Seconds | None = None
    """How long such a connection is kept; 30, but 4 where self_hosted: many servers close theirs after 5."""
    drain_seconds: SecondsOrZero = 0.0
    """How long an answer whose client has left is read on, so that its usage is known; 0 closes its connection at
    once."""
    self_hosted: bool = False
    """Whether it is a server of your own, whose concurrency is found by its speed rather than by its refusals."""
    propagate_trace: bool = False
    """Whether the trace's id is sent along (W3C traceparent)."""
    _certificates: str = PrivateAttr("")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        files = (self.ca_file, self.client_cert_file, self.client_key_file)
        try:
            tls.for_upstream(*files)
            self._certificates = tls.fingerprint(*files)
        except tls.BadFile as error:
            raise _wrong(str(error)) from None
        return self

    @property
    def certificates(self) -> str:
        """Another one when a file of certificates or its key has changed."""
        return self._certificates


class Price(_Part):
    """What a model's tokens cost, in US dollars for a million of them, as providers' price lists tell it."""

    input: Dollars
    """Tokens read."""
    output: Dollars
    """Tokens written."""
    cached_input: Dollars | None = None
    """Those of the input that the provider read from its cache; as input where it is not given."""
    cache_write: Dollars | None = None
    """Those of the input that the provider wrote to its cache; as input where it is not given."""
    reasoning: Dollars | None = None
    """Those of the output that were spent on reasoning; as output where it is not given."""


class Model(_Part):
    """A route: where calls for one model name go."""

    upstreams: Annotated[tuple[str, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)]
    """Names of the upstreams, in the order they are tried; all of one dialect."""
    upstream_model: Text | None = None
    """The model's name as the upstreams know it, where it differs."""
    limits: Limits = _AUTO
    """Limits of this model, over all its upstreams."""
    pool: str | None = None
    """Name of a pool whose limits its calls share."""
    price: Price | None = None
    """What its tokens cost; without it its calls are counted as unpriced."""
    batch_mode: Literal["gateway", "upstream"] = "gateway"
    """Who runs its batches: this gateway, call by call, or its first upstream, by a batch API of its own."""
    capture_content: Literal["none", "truncated", "full"] = "none"
    """Whether the spans of kept traces tell what was asked and answered: the first 4 KiB of each, or 64 KiB (full)."""


class Message(_Part):
    """One message of a step's request."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who says it."""
    content: str
    """Template of what is said."""


class Map(_Part):
    """A list, for each item of which a step is run: a template, or a mapping."""

    over: Text
    """Template of a JSON list, as in "{steps.split}"; the step's own templates have each item as {item}."""
    concurrency: Count = 100
    """Most items of one list at once."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) == 1 and list(value.values()) == [None]:
            raise _wrong("holds braces that YAML takes for a mapping; put it in quotes")
        return {"over": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _or_in_short(handler.resolve_ref_schema(handler(schema)), {"type": "string"})


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[
    tuple[Text, ...], Field(strict=False), BeforeValidator(_several, json_schema_input_type=str | list[str])
]


class When(_Part):
    """What a text must be for a step to run; case, and space around it, do not matter."""

    value: str
    """Template of the text, as in "{steps.kind}"."""
    equals: Texts = ()
    """It is one of these."""
    differs: Texts = ()
    """It is none of these."""
    contains: Texts = ()
    """One of these stands in it."""
    lacks: Texts = ()
    """None of these stands in it."""


class OnError(_Part):
    """What becomes of a pipeline whose step failed: the word `fail` or `skip`, or a mapping."""

    skip: bool = False
    """Whether it goes on as if the step had given an empty text; `skip` for short."""
    fallback: ModelName | None = None
    """A model that is asked in the place of the step's."""

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in ("fail", "skip"):
            raise _wrong("must be fail, skip or {fallback: MODEL}")
        return {"skip": value == "skip"}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _or_in_short(handler.resolve_ref_schema(handler(schema)), {"enum": ["fail", "skip"]})


class Step(_Part):
    """One step of a pipeline: a call to a model. Its templates hold {input}, {steps.NAME} and, in a map, {item}."""

    model: ModelName
    """The model that is asked, one that `models` stands for."""
    prompt: str | None = None
    """Template of what the user says; or give messages."""
    messages: Annotated[tuple[Message, ...], Field(strict=False)] = ()
    """All messages, where more than one is needed."""
    parallel: bool = False
    """Whether it waits for the steps that it names only, and not for all before it."""
    map: Map | None = None
    """A list, for each item of which the step is run; it gives the list of the answers."""
    when: When | None = None
    """A condition for the step; where it does not hold, the step gives an empty text."""
    on_error: OnError = Field(default_factory=OnError, json_schema_extra={"default": "fail"})
    """What becomes of the pipeline if the step fails; in a map, what becomes of the item."""
    concurrency: Count | None = None
    """Most calls of this step at once, over all runs of the pipeline."""
    max_tokens: Count | None = None
    """Most tokens of its answer."""
    timeout_seconds: Seconds | None = None
    """How long one call of it may take, the wait for its place among it."""
    output: Mapping[str, Any] | None = None
    """JSON Schema of the answer: the model is asked for it, and an answer that does not fit fails the step."""
    parameters: Mapping[str, Any] = {}
    """Further fields of its request, as in {temperature: 0}."""


class Pipeline(_Part):
    """Steps that are one model to whoever calls: pipeline/NAME."""

    steps: Annotated[Mapping[Name, Step], Field(min_length=1, json_schema_extra={"propertyNames": {"pattern": _NAME}})]
    """The steps by name, in their order. The last one gives the answer."""
    progress: bool = False
    """Whether a streamed answer begins at once, and tells in comments which step has ended."""

    def waits(self) -> dict[str, tuple[str, ...]]:
        """For each step, those that must be done before it."""
        return pipeline.waits({name: written(step.model_dump()) for name, step in self.steps.items()})


class Gate(_Part):
    """How many calls this process lets through, and how many may wait."""

    concurrency: Count = 1000
    """Most calls in flight at once, over all upstreams."""
    queue_limit: CountOrZero = 10_000
    """Most calls that wait for a place; one more is refused with 429. 0 lets none wait."""
    max_wait_seconds: SecondsOrZero = 600.0
    """How long a call may wait for its place, unless its client asks for less."""
    weights: Annotated[
        Mapping[Name, Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]],
        Field(json_schema_extra={"propertyNames": {"pattern": _NAME}}),
    ] = {}
    """Share of each caller while several wait, by alias; 1 where none is given."""
    overload: Annotated[
        tuple[Literal["interactive", "default"], ...], Field(strict=False), AfterValidator(_distinct)
    ] = ("interactive",)
    """The priorities whose queue, when it stands for too long, serves the newest first and refuses who waited 2 s."""


class Passthrough(_Part):
    """Where requests go that the gateway need not understand: files, vector stores, assistants and so on."""

    enabled: bool = True
    """Whether they are passed on; else they are answered 404."""
    upstream: str | None = None
    """Name of the upstream they go to; where none is given, the first one of the model `*`, or else of any model, that
    speaks the client's API."""


class Retry(_Part):
    """How a failed attempt is tried again, before the first byte of an answer has left."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Most attempts at one call, the first among them; 1 never tries again."""
    base_seconds: Seconds = 0.5
    """The first pause is drawn from 0 to this; each further one from twice as long a stretch."""
    cap_seconds: Seconds = 20.0
    """The longest stretch a pause is drawn from; at least base_seconds."""


class State(_Part):
    """What is kept on the disk: files, batches, and what came of them."""

    path: Annotated[str, Field(min_length=1, max_length=4000)] | None = None
    """Directory of this gateway's own; penstock under $XDG_DATA_HOME or ~/.local/share where none is given."""


class Webhook(_Part):
    """An address that is told by a signed POST, as OpenAI's webhooks are."""

    url: Annotated[str, AfterValidator(_url), Field(examples=["https://example.com/batches"])]
    """Where events are sent."""
    secret: Annotated[Secret, AfterValidator(_signing), Field(examples=["${WEBHOOK_SECRET}"])]
    """What they are signed with: whsec_ and base64, as ${NAME} from the environment or file:PATH."""


class Batches(_Part):
    """Batches that this gateway runs."""

    keep_days: Annotated[float, Field(gt=0, le=3650, allow_inf_nan=False)] = 30.0
    """How long a batch that ended is kept, with its results, and an uploaded file."""
    webhook: Webhook | None = None
    """Who is told that a batch has ended; nobody else can say where to."""


class Jobs(_Part):
    """The service of small jobs: /complete, /batch and /stream."""

    model: Text | None = None
    """The model of those who name none; without it, the only one of `models`, if there is but one."""


class Telemetry(_Part):
    """What is kept of the calls."""

    trace_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01
    """Share of ordinary calls whose trace is kept, 0 to 1; failed, retried and slow ones always are."""
    trace_slow_seconds: SecondsOrZero = 30.0
    """A call that took longer counts as slow."""
    log: bool = True
    """Whether the access log is written to stdout, one line for each call."""
    slow_log_seconds: SecondsOrZero = 60.0
    """A call that still runs is logged each time so much more has passed; 0 never."""
    audit: bool = True
    """Whether the audit log is written to stderr: starts, stops, reloads, keys denied, administration."""
    per_caller: bool = False
    """Whether calls, tokens and cost are counted by the alias of their key as well."""
    service_name: Text = "penstock"
    """Name of this service in traces."""
    redact: Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], Field(strict=False)] = ()
    """Regular expressions: what they find is masked in what a model's capture_content tells; credentials always are."""


class Settings(BaseSettings):
    """Configuration of Penstock, the gateway for LLM calls.

    Any text may hold ${NAME}, the environment variable of that name ($${ stands for itself). An API key may be
    file:PATH, relative to this file. Every value can be overridden, as in PENSTOCK_SERVER__PORT=9000.
    """

    model_config = SettingsConfigDict(
        title="Penstock",
        extra="forbid",
        frozen=True,
        strict=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    server: Server = Server()
    """Where the gateway listens."""
    upstreams: Annotated[Mapping[Name, Upstream], Field(json_schema_extra={"propertyNames": {"pattern": _NAME}})] = {}
    """The providers, by names of your own."""
    pools: Annotated[Mapping[Name, Limits], Field(json_schema_extra={"propertyNames": {"pattern": _NAME}})] = {}
    """Limits shared by several upstreams or models (one account, one GPU), by names of your own."""
    models: Annotated[
        Mapping[ModelName, Model],
        Field(json_schema_extra={"propertyNames": {"pattern": _MODEL_NAME, "minLength": 1}}),
    ] = {}
    """The models, as clients name them: exact, a beginning such as `claude-*`, or `*` for any other. The longest match
    wins."""
    pipelines: Annotated[Mapping[Name, Pipeline], Field(json_schema_extra={"propertyNames": {"pattern": _NAME}})] = {}
    """Steps that are run one after the other, by names of your own; a client asks for the model pipeline/NAME."""
    gate: Gate = Gate()
    """How many calls this process lets through, and how many may wait."""
    callers: Annotated[Mapping[Name, CallerKey], Field(json_schema_extra={"propertyNames": {"pattern": _NAME}})] = {}
    """Who may call: a key for each alias, or its SHA-256 as sha256:HEX. With any, every call needs one; aliases appear
    in metrics, keys nowhere."""
    passthrough: Passthrough = Passthrough()
    """Where requests go that the gateway need not understand."""
    retry: Retry = Retry()
    """How a failed attempt is tried again."""
    state: State = State()
    """Where files and batches are kept."""
    jobs: Jobs = Jobs()
    """The service of small jobs."""
    batches: Batches = Batches()
    """How batches are run and kept."""
    telemetry: Telemetry = Telemetry()
    """What is kept of the calls."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Made in code, settings are what the code says; `load` brings its own sources."""
        return (init_settings,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = [
            InitErrorDetails(type=_wrong(message), loc=path, input=None)
            for path, message in contradictions(self.model_dump())
        ]
        if found:
            raise ValidationError.from_exception_data("Settings", found, hide_input=True)
        return self

    def match(self, model: str) -> str | None:
        """The name in `models` that stands for this model: itself, else the longest beginning that fits, else None."""
        if model in self.models:
            return model
        fits = [name for name in self.models if name.endswith("*") and model.startswith(name[:-1])]
        return max(fits, key=len, default=None)


def describe(settings: Settings) -> dict[str, Any]:
    """The settings in force as JSON values, defaults filled in and every secret masked."""
    return settings.model_dump(mode="json")


def json_schema() -> dict[str, Any]:
    """JSON Schema of the file, for editors: every key with its description, default and bounds."""
    schema = Settings.model_json_schema()
    return {
        "$schema": SCHEMA_DIALECT,
        **schema,
        "examples": [
            {
                "upstreams": {"openai": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"}},
                "models": {"*": {"upstreams": ["openai"]}},
            }
        ],
    }
