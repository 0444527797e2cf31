"""Where settings come from: the environment's PENSTOCK_ variables over the file over the providers' own variables.

Each source is one of pydantic-settings'; beside its values it knows where each was written, so that every mistake is
told with its file and line, or with its variable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from proxy.config import document, shape, wording
from proxy.config.consistency import contradictions
from proxy.config.problems import ConfigError, Path, Problem, dotted, near_miss
from proxy.config.secret import PASSTHROUGH, Secret
from proxy.config.settings import Settings, State

PREFIX = "PENSTOCK_"
NOT_SETTINGS = ("PENSTOCK_CONFIG", "PENSTOCK_ADMIN_URL", "PENSTOCK_ADMIN_KEY")  # read by the command line
FILE_BYTES_MAX = 1 << 20
SECRET_BYTES_MAX = 1 << 16

_PROVIDERS = (  # variable, name, base_url, dialect, models where another one has the rest
    ("OPENAI_API_KEY", "openai", "https://api.openai.com/v1", "openai", "*"),
    ("ANTHROPIC_API_KEY", "anthropic", "https://api.anthropic.com/v1", "anthropic", "claude-*"),
)
_TWO_WAYS = (
    "nothing to serve; give a configuration (--config FILE or PENSTOCK_CONFIG), "
    "or set OPENAI_API_KEY or ANTHROPIC_API_KEY"
)
_REFERENCE = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What container runtimes set for every service in reach, and so for one that is called penstock.
_SERVICE_LINK = re.compile(r"PENSTOCK_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def load(path: FilePath | None, environ: Mapping[str, str]) -> Settings:
    """The settings in force.

    Args:
        path: the YAML file; None makes do with the environment.
        environ: the variables. `PENSTOCK_A__B` overrides `a.b`; OPENAI_API_KEY and ANTHROPIC_API_KEY give upstreams
            where neither the file nor PENSTOCK_ names any; ${NAME} in the file stands for any of them.

    Raises:
        ConfigError: with every mistake at once; none quotes a secret.
    """
    file = _File(path, environ)
    if not file.whole:
        raise ConfigError(file.problems)
    providers = _Providers(file.tree, environ)
    overrides = _Overrides(providers.tree | file.tree, environ, file.folder)
    if path is None and not {"upstreams", "models"} & (providers.tree.keys() | overrides.tree.keys()):
        raise ConfigError([Problem("environment", None, "", _TWO_WAYS), *overrides.problems])

    sources = (overrides, file, providers)
    found: list[tuple[Path, str]] = []
    settings: Settings | None = None
    try:
        settings = Settings(_build_sources=(sources, {}))
    except ValidationError as error:
        found += wording.mistakes(error, lambda place: any(source.hides(place) for source in sources))
        as_written: dict[str, Any] = reduce(_under, (source.tree for source in sources))
        wrong = {place for place, _ in found}  # pydantic comes to contradictions only where every value is right
        found += [(place, message) for place, message in contradictions(as_written) if place not in wrong]
    problems = [problem for source in sources for problem in source.problems]
    for place, message in found:
        if not any(source.has_told(place) for source in sources):
            where, line = _written(place, overrides, file, providers)
            problems.append(Problem(where, line, dotted(place), message))
    if settings is None or problems:
        raise ConfigError(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    return _with_place(settings, environ)


def _with_place(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with the place where state is kept: where none is given, the user's data, if there is a user."""
    home = environ.get("HOME", "")
    data = environ.get("XDG_DATA_HOME", "") or (f"{home}/.local/share" if home not in ("", "/") else "")
    if settings.state.path is not None or not FilePath(data).is_absolute():
        return settings
    return settings.model_copy(update={"state": State(path=f"{data}/penstock")})


class _Source(PydanticBaseSettingsSource):
    """Values, and what is known about where each was written."""

    def __init__(self, environ: Mapping[str, str], folder: FilePath) -> None:
        super().__init__(Settings)
        self.environ = environ
        self.folder = folder  # that a relative file: starts from
        self.tree: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.broken: set[Path] = set()  # its mistake is told; what follows from it is not
        self.expanded: set[Path] = set()  # came out of a variable, and may be secret whatever it is used for

    def __call__(self) -> dict[str, Any]:
        return self.tree

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self.tree.get(field_name), field_name, False

    def written(self, place: Path) -> tuple[str, int | None] | None:
        """File and line, or variable, of what is at `place` or nearest above it; None where this source has neither."""
        raise NotImplementedError

    def mistake(self, place: Path, message: str) -> None:
        self.broken.add(place)
        where, line = self.written(place) or ("environment", None)
        self.problems.append(Problem(where, line, dotted(place), message))

    def has_told(self, place: Path) -> bool:
        return any(above in self.broken for above in _upwards(place))

    def hides(self, place: Path) -> bool:
        return any(above in self.expanded for above in _upwards(place))

    def depth(self, place: Path) -> int:
        """How many steps of `place` exist here."""
        at: Any = self.tree
        for depth, step in enumerate(place):
            if isinstance(at, str):
                return depth
            try:
                at = at[step]
            except (KeyError, IndexError, TypeError):
                return depth
        return len(place)

    def parsed(self, place: Path, text: str) -> Any:
        """A variable's text, where something else than text is wanted."""
        read = document.read(text)
        for below, _, message in read.mistakes:
            self.mistake((*place, *below), message)
        return read.value

    def with_secrets(self, place: Path, value: Any) -> Any:
        """`value`, with every text in it that is to be secret made one."""
        match value:
            case dict():
                return {key: self.with_secrets((*place, key), below) for key, below in value.items()}
            case list():
                return [self.with_secrets((*place, index), below) for index, below in enumerate(value)]
            case str() if value != PASSTHROUGH and shape.is_secret(shape.wanted(place)):
                return self.secret(place, value)
            case str() if place and str(place[-1]).endswith("_file"):
                return str(self.folder / value)
        return value

    def secret(self, place: Path, text: str) -> Secret | None:
        if not text.startswith("file:"):
            return Secret(text)
        try:
            return Secret(_content(self.folder / text.removeprefix("file:"), SECRET_BYTES_MAX).strip())
        except _Unreadable as error:
            self.mistake(place, f"its file {error}; the path of file: starts at {self.folder.absolute()}")
        return None


class _File(_Source):
    """The YAML file; nothing where there is none."""

    def __init__(self, path: FilePath | None, environ: Mapping[str, str]) -> None:
        super().__init__(environ, path.parent if path else FilePath())
        self.name = str(path) if path else "environment"
        self.lines: dict[Path, int] = {}
        self.whole = path is None or self.read(path)

    def read(self, path: FilePath) -> bool:
        """Whether there is a tree to go on with."""
        try:
            read = document.read(_content(path, FILE_BYTES_MAX))
        except _Unreadable as error:
            return self.refuse(f"{error}; give the path of a configuration in YAML", error.line)
        self.lines, self.broken = read.lines, read.broken
        self.problems += [Problem(self.name, line, dotted(place), message) for place, line, message in read.mistakes]
        if not read.whole or () in read.broken:
            return False
        if read.value is None:
            return self.refuse("is empty; give it upstreams and models, or start without a file")
        if not isinstance(read.value, dict):
            return self.refuse("must be a mapping; write `upstreams:` and `models:` at its left edge", 1)
        self.tree = self.with_secrets((), self.with_variables((), read.value))
        return True

    def refuse(self, message: str, line: int | None = None) -> bool:
        self.problems.append(Problem(self.name, line, "", message))
        return False

    def written(self, place: Path) -> tuple[str, int | None]:
        return self.name, next((self.lines[above] for above in _upwards(place) if above in self.lines), None)

    def with_variables(self, place: Path, value: Any) -> Any:
        """`value`, with each ${NAME} in it replaced."""
        match value:
            case dict():
                return {key: self.with_variables((*place, key), below) for key, below in value.items()}
            case list():
                return [self.with_variables((*place, index), below) for index, below in enumerate(value)]
            case str() if "${" in value:
                return self.replaced(place, value)
        return value

    def replaced(self, place: Path, text: str) -> Any:
        wrong: list[str] = []

        def value(reference: re.Match[str]) -> str:
            escape, name, closed = reference.groups()
            if escape:
                return reference[0][1:]
            if not closed or not _VARIABLE.fullmatch(name):
                wrong.append("holds a ${ without a variable's name and a }; write ${NAME}, or $${ for a plain ${")
            elif name not in self.environ:
                wrong.append(f"the environment variable {name} is not set; set it, or write $${{ for a plain ${{")
            return self.environ.get(name, "")

        replaced = _REFERENCE.sub(value, text)
        if not _is_utf8(replaced):
            wrong.append("takes a variable that is not UTF-8 text; set it anew")
        if wrong:
            for message in dict.fromkeys(wrong):
                self.mistake(place, message)
            return None
        self.expanded.add(place)
        at = shape.wanted(place)
        return replaced if at is None or shape.is_text(at) else self.parsed(place, replaced)


class _Variables(_Source):
    """Values out of variables."""

    def __init__(self, environ: Mapping[str, str], folder: FilePath) -> None:
        super().__init__(environ, folder)
        self.variables: dict[Path, str] = {}

    def written(self, place: Path) -> tuple[str, int | None] | None:
        return next(((self.variables[above], None) for above in _upwards(place) if above in self.variables), None)

    def put(self, place: Path, variable: str, value: Any) -> None:
        at: dict[Any, Any] = self.tree
        for step in place[:-1]:
            if not isinstance(at.get(step), dict):
                at[step] = {}
            at = at[step]
        at[place[-1]] = value
        self.variables[place] = variable


class _Overrides(_Variables):
    """PENSTOCK_SECTION__KEY, and PENSTOCK_SECTION__NAME__KEY for a name of the file. The value is YAML."""

    def __init__(self, tree: Mapping[str, Any], environ: Mapping[str, str], folder: FilePath) -> None:
        super().__init__(environ, folder)
        known = shape.spellings(tree)
        exact: list[tuple[Path, str]] = []
        for variable in environ:
            if not _is_setting(variable, environ[variable]):
                continue
            match known.get(variable.upper().removeprefix(PREFIX), []):
                case [place]:
                    exact.append((place, variable))
                case []:
                    self.unknown(variable, known)
                case places:
                    both = " and ".join(map(dotted, places))
                    self.problems.append(Problem(variable, None, "", f"stands for {both}; rename one of them"))
        for place, variable in sorted(exact, key=lambda one: len(one[0])):  # a part is set after the whole
            self.take(place, variable, environ[variable])

    def take(self, place: Path, variable: str, text: str) -> None:
        self.put(place, variable, None)
        if not _is_utf8(text):
            return self.mistake(place, "is not UTF-8 text; set it anew")
        value = text if shape.is_text(shape.wanted(place)) else self.parsed(place, text)
        self.put(place, variable, self.with_secrets(place, value))

    def unknown(self, variable: str, known: Iterable[str]) -> None:
        meant = near_miss(variable.upper().removeprefix(PREFIX), known)
        what_to_do = (
            f"did you mean {PREFIX}{meant}?"
            if meant
            else "take it away, or write it as PENSTOCK_SECTION__KEY with names that stand in the file"
        )
        self.problems.append(Problem(variable, None, "", f"no setting is called so; {what_to_do}"))


class _Providers(_Variables):
    """Upstreams and models out of the providers' own variables, where nothing else names any."""

    def __init__(self, tree: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        super().__init__(environ, FilePath())
        named = tree.keys() | {variable.upper().removeprefix(PREFIX).lower() for variable in environ}
        if {"upstreams", "models"} & named:
            return
        for variable, name, base_url, dialect, models in _PROVIDERS:
            if key := environ.get(variable):
                upstream = {"base_url": base_url, "dialect": dialect, "api_key": Secret(key.strip())}
                self.put(("models", models if self.tree else "*"), variable, {"upstreams": [name]})
                self.put(("upstreams", name), variable, upstream)


class _Unreadable(Exception):
    """What is wrong with a file, as the end of a sentence about it."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def _content(path: FilePath, bytes_max: int) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(bytes_max + 1)
    except FileNotFoundError:
        raise _Unreadable("does not exist") from None
    except IsADirectoryError:
        raise _Unreadable("is a directory") from None
    except OSError as error:
        raise _Unreadable(f"cannot be read ({error.strerror})") from None
    except ValueError:
        raise _Unreadable("has a name that no file can have") from None
    if len(content) > bytes_max:
        raise _Unreadable(f"is larger than {bytes_max >> 10} KiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unreadable("is not UTF-8 text", content.count(b"\n", 0, error.start) + 1) from None


def _under(upper: dict[str, Any], lower: dict[str, Any]) -> dict[str, Any]:
    """Both, merged key by key as pydantic-settings does it; the upper one wins."""
    merged = lower | upper
    for key in upper.keys() & lower.keys():
        if isinstance(upper[key], dict) and isinstance(lower[key], dict):
            merged[key] = _under(upper[key], lower[key])
    return merged


def _written(place: Path, overrides: _Source, file: _File, providers: _Source) -> tuple[str, int | None]:
    """File and line, or variable, of the value at `place`, or of what should hold it."""
    for source in (overrides, providers):
        depth = source.depth(place)
        if (depth == len(place) or depth > file.depth(place)) and (written := source.written(place[:depth])):
            return written
    return file.written(place)


def _upwards(place: Path) -> Iterator[Path]:
    """`place` and each place above it, the nearest first, the whole last."""
    return (place[:depth] for depth in range(len(place), -1, -1))


def _is_setting(variable: str, value: str) -> bool:
    name = variable.upper()
    if not name.startswith(PREFIX) or name in NOT_SETTINGS:
        return False
    return not _SERVICE_LINK.fullmatch(name) and not (name.endswith("_PORT") and "://" in value)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)  # what the system decodes bad bytes to
