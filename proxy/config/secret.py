"""A value that is used and never shown."""

from __future__ import annotations

import hmac
import re
from base64 import b64decode
from hashlib import sha256
from typing import Any, NoReturn

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MASK = "***"
HASHED = "sha256:"  # in front of a hash that stands for a key
SIGNING = "whsec_"  # in front of a secret that webhooks are signed with
SIGNING_BYTES = 24  # that it has at least, by Standard Webhooks
_HASH = re.compile(r"sha256:[0-9a-fA-F]{64}")
PASSTHROUGH = "passthrough"  # in place of a key: the client's own


class Secret:
    """A key. Printing, formatting, logging, dumping and pickling it show no character of it; `reveal` does."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself, for the header it belongs into and for nothing else."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret('{MASK}')"

    def __str__(self) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        """In constant time: how long it takes does not tell how much of a guess is right."""
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_bytes(self._value), _bytes(other._value))

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled: it would leave the process in clear")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            validate,
            json_schema_input_schema=core_schema.str_schema(min_length=1),
            serialization=core_schema.to_string_ser_schema(when_used="json"),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "minLength": 1}


def digest(key: str) -> bytes:
    """What is kept of a caller's key."""
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def hashed(key: str) -> str:
    """A caller's key as a configuration may have it without holding it."""
    return HASHED + digest(key).hex()


def signing_key(secret: Secret) -> bytes:
    """The key that stands in a secret of Standard Webhooks. Raises ValueError: there is none, or it is short."""
    said = secret.reveal()
    key = b64decode(said.removeprefix(SIGNING), validate=True)
    if not said.startswith(SIGNING) or len(key) < SIGNING_BYTES:
        raise ValueError
    return key


def is_hash(key: Secret) -> bool:
    return _HASH.fullmatch(key.reveal()) is not None


def digest_of(key: Secret) -> bytes:
    """The digest of a caller's key, which is given itself or by its hash."""
    said = key.reveal()
    return bytes.fromhex(said.removeprefix(HASHED)) if is_hash(key) else digest(said)


def validate(value: object) -> Secret:
    if isinstance(value, str):
        value = Secret(value)
    if not isinstance(value, Secret):
        raise PydanticCustomError("wrong", "must be text; write it in quotes, as ${NAME} or as file:PATH")
    text = value.reveal()
    if not text:
        raise PydanticCustomError("wrong", "must not be empty; give the key, or take the line out")
    if not all("!" <= character <= "~" for character in text):  # it goes into a header as it is
        raise PydanticCustomError("wrong", "holds a space, a line end or a character beyond ASCII; give the key alone")
    return value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # compare_digest takes no text beyond ASCII
