"""A pipeline's steps: what a template says with its variables put in, which steps wait for which, and which are ready.

Rules
-----
1. A variable is a name in braces: `{input}`, `{steps.NAME}`, `{item}`. Every other brace stays as it is.
2. What is put in is never looked at again: text that holds `{input}` is text.
3. A step waits for all steps before it, and for those it names. One that is `parallel` waits for those it names only.
4. The last step gives the answer; it waits for all others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.-]*)\}")
INPUT = "input"
ITEM = "item"
OF_STEP = "steps."
ITEMS_MAX = 10_000  # of one list; each is a call, and a longer list is more likely a mistake of the model that made it


class Unlisted(ValueError):
    """A text that should be a list of items is none; the message says what it is."""


@dataclass(slots=True, frozen=True)
class Written:
    """What the configuration says of one step, as far as it decides when the step runs."""

    texts: tuple[str, ...]  # all templates of the step
    parallel: bool = False


def variables(template: str) -> list[str]:
    """The names in braces, in their order, each once."""
    return list(dict.fromkeys(VARIABLE.findall(template)))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its variables replaced, in one pass (rule 2); those that have no value stay as they are."""
    return VARIABLE.sub(lambda found: values.get(found[1], found[0]), template)


def waits(steps: Mapping[str, Written]) -> dict[str, tuple[str, ...]]:
    """For each step, in their order, those it waits for (rule 3); names that are no step's are left out."""
    found: dict[str, tuple[str, ...]] = {}
    before: list[str] = []
    for name, written in steps.items():
        named = (variable for text in written.texts for variable in variables(text))
        wanted = {variable.removeprefix(OF_STEP) for variable in named if variable.startswith(OF_STEP)}
        if not written.parallel:
            wanted.update(before)
        found[name] = tuple(step for step in steps if step in wanted)
        before.append(name)
    return found


def cycle(waits: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Steps that wait for each other, each for the next and the last for the first; () if all can run."""
    left = dict(waits)
    while runnable := [name for name, wanted in left.items() if not any(step in left for step in wanted)]:
        for name in runnable:
            del left[name]
    if not left:
        return ()
    path: list[str] = []
    name = next(iter(left))
    while name not in path:
        path.append(name)
        name = next(step for step in left[name] if step in left)
    return tuple(path[path.index(name) :])


def ready(waits: Mapping[str, Collection[str]], begun: Collection[str], done: Collection[str]) -> list[str]:
    """The steps that have not begun and whose every wait is over."""
    return [name for name, wanted in waits.items() if name not in begun and all(step in done for step in wanted)]


def stages(waits: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The steps by how many others must be done before them, one by one: those of one stage may run at once."""
    depth: dict[str, int] = {}
    while len(depth) < len(waits):
        for name in ready(waits, depth, depth):
            depth[name] = max((depth[step] + 1 for step in waits[name]), default=0)
    found: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in waits:
        found[depth[name]].append(name)
    return found


def holds(
    text: str, *, equals: Iterable[str], differs: Iterable[str], contains: Iterable[str], lacks: Iterable[str]
) -> bool:
    """Whether a text meets a condition, without regard to case and to space around it.

    `equals` and `contains`: one of these; `differs` and `lacks`: none of these. What is empty asks for nothing.
    """
    said = _plain(text)
    equal, inside = [_plain(one) for one in equals], [_plain(one) for one in contains]
    return (
        (not equal or said in equal)
        and (not inside or any(one in said for one in inside))
        and said not in [_plain(one) for one in differs]
        and not any(_plain(one) in said for one in lacks)
    )


def listed(text: str) -> list[str]:
    """The items of a JSON list: texts as they are, anything else as JSON.

    Raises:
        Unlisted: it is no JSON list, or longer than ITEMS_MAX.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise Unlisted(f'is not JSON; it must be a list, as in ["one", "two"]: {_shown(text)}') from None
    if not isinstance(said, list):
        raise Unlisted(f"is JSON, but no list: {_shown(text)}")
    if len(said) > ITEMS_MAX:
        raise Unlisted(f"is a list of {len(said)} items; {ITEMS_MAX} are the most")
    return [item if isinstance(item, str) else json.dumps(item, ensure_ascii=False) for item in said]


def _plain(text: str) -> str:
    return text.strip().casefold()


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
