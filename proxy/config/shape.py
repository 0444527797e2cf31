"""The settings' own shape, walked by path: which keys a place knows, and what kind of value it wants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from proxy.config.problems import Path
from proxy.config.secret import Secret
from proxy.config.settings import Settings

ANY_SPELLED = "ANY"  # no shell takes a `*` in a variable's name


def wanted(path: Path) -> Any:
    """The type at `path`, None where the settings have no such place."""
    at: Any = Settings
    for step in path:
        at = child(at, step)
    return at


def child(at: Any, step: str | int) -> Any:
    """The type one step below the type `at`, or None."""
    for kind in _kinds(at):
        if fields := fields_of(kind):
            return fields[step].annotation if isinstance(step, str) and step in fields else None
        if get_origin(kind) is tuple:
            return get_args(kind)[0]
        if _is_names(kind):
            return get_args(kind)[1]
    return None


def fields_of(at: Any) -> dict[str, FieldInfo]:
    """The settings of a section; empty for anything else."""
    for kind in _kinds(at):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_fields
    return {}


def is_secret(at: Any) -> bool:
    return Secret in _kinds(at)


def is_text(at: Any) -> bool:
    """Whether a text is taken as it stands, and not read as a number, a list, …"""
    return any(kind is str or kind is Secret or get_origin(kind) is Literal for kind in _kinds(at))


def words(at: Any) -> tuple[str, ...]:
    """The words of a closed choice; empty for anything else."""
    return tuple(word for kind in _kinds(at) if get_origin(kind) is Literal for word in get_args(kind))


def spellings(tree: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Every variable that can be set, without its prefix, and the places it stands for; more than one is ambiguous.

    Args:
        tree: as written; gives the names of upstreams, pools, models and callers.
    """
    found: dict[str, list[Path]] = {}
    for name, path in _spelled(Settings, tree):
        found.setdefault(name, []).append(path)
    return found


def _spelled(at: Any, tree: Any) -> Iterator[tuple[str, Path]]:
    below: Mapping[str, Any] = tree if isinstance(tree, Mapping) else {}
    keys = list(fields_of(at)) or (list(below) if any(map(_is_names, _kinds(at))) else [])
    for key in keys:
        name = _spelling(key)
        yield name, (key,)
        for rest, path in _spelled(child(at, key), below.get(key)):
            yield f"{name}__{rest}", (key, *path)


def _spelling(key: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in key.replace("*", ANY_SPELLED)).upper()


def _is_names(kind: Any) -> bool:
    return get_origin(kind) is Mapping


def _kinds(at: Any) -> tuple[Any, ...]:
    """The types a value may have, without None and without what is only annotated."""
    if get_origin(at) is Annotated:
        return _kinds(get_args(at)[0])
    if get_origin(at) in (Union, UnionType):
        return tuple(kind for member in get_args(at) for kind in _kinds(member))
    return () if at in (None, NoneType) else (at,)
