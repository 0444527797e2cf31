"""Tokens as the upstream counted them, from any dialect's way of saying so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TOKENS_MAX = 1 << 53  # more than any call can have; a larger figure is a mistake of the upstream


@dataclass(slots=True, frozen=True)
class Usage:
    """All figures are tokens, >= 0.

    `input` counts every token read, cached ones and cache writes among them; `output` counts reasoning tokens among
    them. The other fields are subsets and never summed with these two.
    """

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input + other.input,
            self.output + other.output,
            self.cached + other.cached,
            self.cache_write + other.cache_write,
            self.reasoning + other.reasoning,
        )


def of(said: object) -> Usage | None:
    """The usage object of an answer (`usage` in OpenAI's chat, completions, embeddings, responses and realtime, and in
    Anthropic's messages), or None where it holds no count."""
    if not isinstance(said, Mapping):
        return None
    entered = _count(said, "prompt_tokens", "input_tokens")
    left = _count(said, "completion_tokens", "output_tokens")
    if entered is None and left is None:
        return None
    details_in = _part(said, "prompt_tokens_details", "input_tokens_details", "input_token_details")
    details_out = _part(said, "completion_tokens_details", "output_tokens_details", "output_token_details")
    cached = _count(details_in, "cached_tokens")
    written = _count(details_in, "cache_write_tokens", "cache_creation_tokens")
    if cached is None and written is None:  # Anthropic counts them beside input_tokens, not within
        cached = _count(said, "cache_read_input_tokens")
        written = _count(said, "cache_creation_input_tokens")
        entered = (entered or 0) + (cached or 0) + (written or 0)
    reasoned = _count(details_out, "reasoning_tokens", "thinking_tokens")
    return Usage(entered or 0, left or 0, cached or 0, written or 0, reasoned or 0)


def later(before: Usage | None, told: Usage) -> Usage:
    """What holds when a stream tells its usage again. All figures are totals, so the later one holds; one that is left
    out the second time stays, as when Anthropic tells the input at the start and only the output at the end."""
    if before is None:
        return told
    fresh = told.input - told.cached - told.cache_write
    cached, written = told.cached or before.cached, told.cache_write or before.cache_write
    return Usage(
        max(0, (fresh or before.input - before.cached - before.cache_write) + cached + written),
        told.output or before.output,
        cached,
        written,
        told.reasoning or before.reasoning,
    )


def _part(said: Mapping[str, object], *names: str) -> Mapping[str, object]:
    for name in names:
        part = said.get(name)
        if isinstance(part, Mapping):
            return part
    return {}


def _count(said: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = said.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if 0 <= value <= TOKENS_MAX:
            return int(value)
    return None
