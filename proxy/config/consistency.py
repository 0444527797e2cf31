"""What no single value shows: parts of a configuration that contradict each other.

Works on the plain tree, as written or as dumped, so that these mistakes are told together with wrong values. What has
the wrong shape is skipped here; its own mistake is told elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any

from proxy.config import pipelines
from proxy.config.problems import Path, nearest
from proxy.config.secret import PASSTHROUGH, Secret, digest_of

Tree = Mapping[str, Any]
Found = Iterator[tuple[Path, str]]


def contradictions(tree: Tree) -> Found:
    """Every contradiction in `tree`, as where it is and what is wrong, then what to do."""
    yield from _nothing_to_serve(tree)
    yield from _unknown_names(tree)
    yield from _mixed_dialects(tree)
    yield from _open_doors(tree)
    yield from _passed_through(tree)
    yield from _one_port_twice(tree)
    yield from _keys_without_certificates(tree)
    yield from _shared_keys(tree)
    yield from _weightless(tree)
    yield from _base_beyond_cap(tree)
    yield from pipelines.contradictions(tree)


def _nothing_to_serve(tree: Tree) -> Found:
    if tree.get("upstreams") in (None, {}):
        yield ("upstreams",), "names no upstream; give at least one, with its base_url"
    if tree.get("models") in (None, {}):
        yield ("models",), 'names no model; give at least one, such as "*": {upstreams: [NAME]}'


def _unknown_names(tree: Tree) -> Found:
    upstreams, pools = _part(tree, "upstreams"), _part(tree, "pools")
    for name, model in _parts(tree, "models"):
        for index, upstream in _listed(model):
            if upstream not in upstreams:
                yield ("models", name, "upstreams", index), f"no such upstream{nearest(upstream, upstreams)}"
    passed = _part(tree, "passthrough").get("upstream")
    if isinstance(passed, str) and passed not in upstreams:
        yield ("passthrough", "upstream"), f"no such upstream{nearest(passed, upstreams)}"
    for kind in ("upstreams", "models"):
        for name, part in _parts(tree, kind):
            pool = part.get("pool")
            if isinstance(pool, str) and pool not in pools:
                yield (kind, name, "pool"), f"no such pool{nearest(pool, pools)}"


def _mixed_dialects(tree: Tree) -> Found:
    upstreams = _part(tree, "upstreams")
    for name, model in _parts(tree, "models"):
        by_dialect: dict[str, str] = {}
        for _, upstream in _listed(model):
            part = upstreams.get(upstream)
            if isinstance(part, Mapping) and isinstance(dialect := part.get("dialect", "openai"), str):
                by_dialect.setdefault(dialect, upstream)
        if {"openai", "anthropic"} <= by_dialect.keys():
            told = " and ".join(f"{dialect} ({upstream})" for dialect, upstream in by_dialect.items())
            yield ("models", name, "upstreams"), f"mixes the dialects {told}; make it two models, one for each dialect"


def _open_doors(tree: Tree) -> Found:
    """Without keys whoever reaches the gateway spends its money, or reloads it: then loopback only, unless allowed."""
    server = _part(tree, "server")
    if server.get("allow_anonymous") is True:
        return
    if not tree.get("callers") and _is_public(server.get("host")):
        yield (
            ("server", "host"),
            "is not loopback, and without callers anyone who reaches it could use your keys; "
            "add callers, listen on 127.0.0.1, or say server.allow_anonymous: true",
        )
    if server.get("admin_key") is None and _is_public(server.get("admin_host")):
        yield (
            ("server", "admin_host"),
            "is not loopback, and without server.admin_key anyone who reaches it could administer the gateway; "
            "add admin_key, listen on 127.0.0.1, or say server.allow_anonymous: true",
        )


def _is_public(host: Any) -> bool:
    return isinstance(host, str) and not is_loopback(host)


def _passed_through(tree: Tree) -> Found:
    if not tree.get("callers"):
        return
    for name, upstream in _parts(tree, "upstreams"):
        if upstream.get("api_key") == PASSTHROUGH:
            yield (
                ("upstreams", name, "api_key"),
                "is passthrough, but with callers the key a client sends is the gateway's; "
                "give the upstream a key of its own, or take callers out",
            )


def _one_port_twice(tree: Tree) -> Found:
    server = _part(tree, "server")
    host, admin_host = server.get("host", "127.0.0.1"), server.get("admin_host", "127.0.0.1")
    port, admin_port = server.get("port", 8080), server.get("admin_port", 8081)
    if port and port == admin_port and (host == admin_host or "0.0.0.0" in (host, admin_host)):
        yield ("server", "admin_port"), "is the same as server.port; give it one of its own, or 0 for any free one"


def _keys_without_certificates(tree: Tree) -> Found:
    for name, upstream in _parts(tree, "upstreams"):
        if upstream.get("client_key_file") is not None and upstream.get("client_cert_file") is None:
            yield ("upstreams", name, "client_key_file"), "is of no use without client_cert_file; give both, or neither"


def _shared_keys(tree: Tree) -> Found:
    first: dict[bytes, str] = {}
    for alias, key in _part(tree, "callers").items():
        if isinstance(key, Secret) and (other := first.setdefault(digest_of(key), alias)) != alias:
            yield ("callers", alias), f"has the same key as callers.{other}; give each caller a key of its own"


def _weightless(tree: Tree) -> Found:
    callers = _part(tree, "callers")
    for alias in _part(_part(tree, "gate"), "weights"):
        if alias not in callers:
            yield ("gate", "weights", alias), f"no such caller{nearest(alias, callers)}"


def _base_beyond_cap(tree: Tree) -> Found:
    retry = _part(tree, "retry")
    base, cap = retry.get("base_seconds", 0.5), retry.get("cap_seconds", 20.0)
    if isinstance(base, int | float) and isinstance(cap, int | float) and base > cap:
        yield ("retry",), "base_seconds must be <= cap_seconds; lower the one or raise the other"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name other than localhost may resolve to anything."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _part(tree: Tree, key: str) -> Tree:
    part = tree.get(key)
    return part if isinstance(part, Mapping) else {}


def _parts(tree: Tree, key: str) -> Iterator[tuple[str, Tree]]:
    for name, part in _part(tree, key).items():
        if isinstance(part, Mapping):
            yield name, part


def _listed(model: Tree) -> Iterator[tuple[int, str]]:
    upstreams = model.get("upstreams")
    if isinstance(upstreams, list | tuple):
        for index, upstream in enumerate(upstreams):
            if isinstance(upstream, str):
                yield index, upstream
