"""What no single value of a pipeline shows: steps, variables and models that do not exist, and steps that wait for each
other. Works on the plain tree, as `consistency` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxy.config.problems import Path, near_miss, nearest
from proxy.core import pipeline, schema
from proxy.core.pipeline import INPUT, ITEM, OF_STEP, Written

PIPELINE = "pipeline/"  # begins the name of a model that is one
OWN_FIELDS = ("model", "messages", "stream", "stream_options")  # of a step's request; they are no parameters
_CONDITIONS = ("equals", "differs", "contains", "lacks")

Tree = Mapping[str, Any]
Found = Iterator[tuple[Path, str]]


def contradictions(tree: Tree) -> Found:
    """Every contradiction in the pipelines of `tree`, as where it is and what is wrong, then what to do."""
    for name in _part(tree, "models"):
        if name.startswith(PIPELINE):
            yield ("models", name), "is the name of a pipeline; rename the model"
    for name, said in _part(tree, "pipelines").items():
        steps = _part(said, "steps")
        at: Path = ("pipelines", name, "steps")
        known = {step: part for step, part in steps.items() if isinstance(part, Mapping)}
        for step, part in known.items():
            for below, message in (*_variables(part, known), *_asked(part), *_models(tree, part)):
                yield (*at, step, *below), message
        yield from _order(at, known)


def templates(step: Tree) -> Iterator[tuple[Path, str]]:
    """Every template of a step, with its place."""
    found: list[tuple[Path, Any]] = [(("prompt",), step.get("prompt"))]
    messages = step.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        found.append((("messages", index, "content"), _at(message, "content")))
    mapped = step.get("map")
    found.append((("map", "over"), mapped if isinstance(mapped, str) else _at(mapped, "over")))
    found.append((("when", "value"), _at(step.get("when"), "value")))
    return ((place, text) for place, text in found if isinstance(text, str))


def _variables(step: Tree, steps: Tree) -> Found:
    for place, text in templates(step):
        mapped = step.get("map") is not None and place[0] in ("prompt", "messages")
        known = [INPUT, *([ITEM] if mapped else []), *(OF_STEP + name for name in steps)]
        for name in pipeline.variables(text):
            if name in known:
                continue
            if name == ITEM:
                yield place, "{item} is what `map` gives to prompt and messages; give the step a map, or take it out"
            elif name.startswith(OF_STEP):
                yield place, f"{{{name}}}: no such step{nearest(name.removeprefix(OF_STEP), steps)}"
            else:
                meant = near_miss(name, known)
                hint = f"did you mean {{{meant}}}?" if meant else f"known: {', '.join(f'{{{one}}}' for one in known)}."
                yield place, f"{{{name}}}: no such variable; {hint} Braces that mean themselves have a space in them"


def _asked(step: Tree) -> Found:
    """What the step asks, and what it asks for."""
    match step.get("prompt") is not None, bool(step.get("messages")):
        case False, False:
            yield ("prompt",), "is missing; give the step a prompt, or messages"
        case True, True:
            yield ("messages",), "stand beside a prompt; give the one or the other"
    if isinstance(when := step.get("when"), Mapping) and not any(when.get(word) for word in _CONDITIONS):
        yield ("when",), f"asks for nothing; give it one of {', '.join(_CONDITIONS)}"
    if isinstance(output := step.get("output"), Mapping):
        for below, message in schema.strangers(output):
            yield ("output", *below), message
    for field in _part(step, "parameters"):
        if field in OWN_FIELDS:
            yield ("parameters", field), "is what the step itself says; take it out"


def _models(tree: Tree, step: Tree) -> Found:
    fallback = _at(step.get("on_error"), "fallback")
    for place, model in ((("model",), step.get("model")), (("on_error", "fallback"), fallback)):
        if not isinstance(model, str):
            continue
        route = _route(_part(tree, "models"), model)
        if route is None or model.endswith("*"):
            yield place, f"no such model{nearest(model, _part(tree, 'models'))}"
        elif (upstream := _foreign(tree, route)) is not None:
            yield place, f"goes to {upstream}, which speaks anthropic's API; a step needs one that speaks openai's"


def _route(models: Tree, model: str) -> Any:
    fits = [name for name in models if name == model or (name.endswith("*") and model.startswith(name[:-1]))]
    best = max(fits, key=lambda name: (name == model, len(name)), default=None)
    return None if best is None else models[best]


def _foreign(tree: Tree, route: Any) -> str | None:
    """An upstream of the route that speaks another dialect than a step does."""
    names = _at(route, "upstreams")
    for name in names if isinstance(names, list | tuple) else ():
        if isinstance(name, str) and _at(_part(tree, "upstreams").get(name), "dialect") == "anthropic":
            return name
    return None


def _order(at: Path, steps: Tree) -> Found:
    waits = pipeline.waits({name: written(step) for name, step in steps.items()})
    if circle := pipeline.cycle(waits):
        told = " for ".join((*circle, circle[0]))
        yield (*at, circle[0]), f"waits for itself: {told}; a step may name those before it, or parallel ones"
    if steps and steps[last := list(steps)[-1]].get("parallel") is True:
        yield (
            (*at, last, "parallel"),
            "is the last step's, which gives the answer and waits for all others; take it out",
        )


def written(step: Tree) -> Written:
    """What decides when the step runs."""
    return Written(tuple(text for _, text in templates(step)), step.get("parallel") is True)


def _at(said: Any, key: str) -> Any:
    """What stands at `key`, None where nothing does."""
    return said.get(key) if isinstance(said, Mapping) else None


def _part(said: Any, key: str) -> Tree:
    """The mapping at `key`, an empty one where there is none."""
    part = _at(said, key)
    return part if isinstance(part, Mapping) else {}
