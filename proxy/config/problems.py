"""How mistakes are told: where, which key, what is wrong, then what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

Path = tuple[str | int, ...]  # of a value in the tree: keys, and places in lists


@dataclass(slots=True, frozen=True)
class Problem:
    """One mistake.

    Args:
        file: the configuration's path; for a value from the environment the variable's name.
        line: counted from 1; None where there is none.
        key: dotted path of the value; "" for the file as a whole.
        message: what is wrong, then what to do; holds no secret.
    """

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ConfigError(Exception):
    """A configuration that cannot be used, with every mistake in it. The text has one line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: Path) -> str:
    """`models.fast.upstreams[0]`. A key that is long or cannot be printed is told shortened and quoted."""
    told = ""
    for step in path:
        if isinstance(step, int):
            told += f"[{step}]"
        else:
            told += f".{_key(step)}" if told else _key(step)
    return told


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The known word that was meant, as far as can be told."""
    names = list(known)
    if close := get_close_matches(word[:100], names, n=1):
        return close[0]
    meant = word.lower()  # difflib minds case and knows no initials: rpm
    spoken = ((name, (name.lower(), "".join(part[:1] for part in name.split("_")))) for name in names)
    return next((name for name, ways in spoken if meant in ways), None)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the near miss, else what there is."""
    names = sorted(known)
    if close := near_miss(word, names):
        return f"; did you mean {_key(close)}?"
    if names:
        return f"; known: {', '.join(map(_key, names[:12]))}{', …' if len(names) > 12 else ''}"
    return "; none is configured"


def _key(key: str) -> str:
    if key and key.isprintable() and not any(character.isspace() for character in key) and len(key) <= 64:
        return key
    return json.dumps(key if len(key) <= 64 else key[:61] + "...")
