"""What the documentation says is so: its links, commands, examples, names and tables."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml

from proxy import config, errors
from proxy.api import edge
from proxy.cli import cli
from proxy.config import shape
from proxy.core import headers, outcome
from proxy.core.outcome import Meaning, Outcome, Reason
from proxy.telemetry.log import Line
from tests.docs import tables

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
OPERATING = tables.PAGE.read_text()

FENCE = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ (.+)$")


def blocks(page: Path, language: str = "") -> Iterator[str]:
    return (text for kind, text in FENCE.findall(page.read_text()) if kind == language or not language)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def code(page: Path) -> Iterator[str]:
    """Every line of code: of blocks, and each span within a sentence."""
    for block in blocks(page):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page))}


def rows(section: str) -> list[list[str]]:
    """The cells of the first table below a heading of docs/operating.md, without its head."""
    below = OPERATING.split(f"# {section}\n", 1)[1]
    table = re.search(r"(?m)^\|.*\n\|[-|]+\n((?:^\|.*\n)+)", below)
    assert table is not None, section
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table[1].splitlines()]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ── links, commands, examples ──


@EACH_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@EACH_PAGE
def test_every_command_exists_with_its_options(page: Path) -> None:
    group = typer.main.get_command(cli)
    assert isinstance(group, typer.core.TyperGroup)
    for line in code(page):
        said = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?penstock ([a-z].*)", line)
        if said is None or "|" in line:
            continue
        name, *rest = shlex.split(said[1], comments=True)
        assert name in group.commands, line
        command = group.commands[name]
        if isinstance(command, typer.core.TyperGroup) and rest:
            name, *rest = rest
            assert name in command.commands, line
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, line


@EACH_PAGE
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    for line in code(page):
        for name in re.findall(r"(?:^|\s)make ([a-z]+)", line):
            assert name in targets, line


@EACH_PAGE
def test_every_configuration_shown_is_one(page: Path, tmp_path: Path) -> None:
    shown = [block for block in blocks(page, "yaml") if "upstreams" in yaml.safe_load(block)]
    for number, block in enumerate(shown):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        environ = {name: f"a-key-for-{name.lower()}" for name in re.findall(r"\$\{(\w+)\}", block)}
        config.load(file, environ)


@EACH_PAGE
def test_every_variable_stands_for_a_setting(page: Path) -> None:
    example = yaml.safe_load((ROOT / "config" / "penstock.example.yaml").read_text())
    known = shape.spellings(example).keys() | _asked_for(typer.main.get_command(cli))
    for name in re.findall(r"\bPENSTOCK_([A-Z0-9_]+\b)", page.read_text()):
        assert name in known, name


def _asked_for(command: Any) -> set[str]:
    """The variables that options of a command can be given by, without PENSTOCK_."""
    within = getattr(command, "commands", {}).values()
    named = {str(parameter.envvar).removeprefix("PENSTOCK_") for parameter in command.params if parameter.envvar}
    return named.union(*map(_asked_for, within))


@EACH_PAGE
def test_every_file_named_in_code_spans_exists(page: Path) -> None:
    for span in re.findall(r"`((?:proxy|tests|config|grafana|docs)/[\w./-]+)`", prose(page)):
        assert (ROOT / span).exists(), span


def test_python_examples_compile() -> None:
    for block in blocks(ROOT / "README.md", "python"):
        compile(block, "README.md", "exec")


# ── what the code knows ──


def test_the_table_of_settings_is_the_codes() -> None:
    assert tables.renewed(OPERATING) == OPERATING, "run .venv/bin/python -m tests.docs.tables"


def test_every_error_of_the_gateway_is_listed_as_it_is() -> None:
    listed = {words(code)[0]: (status, retry) for code, status, retry, *_ in rows("Errors")}
    known = {}
    for error in every_subclass(errors.GatewayError):
        if not error.__subclasses__():
            retry = "" if error.should_retry is None else str(error.should_retry).lower()
            known[error.default_code] = (str(error.status), retry)
    for file in [*(ROOT / "proxy" / "api").glob("*.py"), *(ROOT / "proxy" / "core").glob("*.py")]:
        for narrower in re.findall(r'\bcode(?:: str)?\s?=\s?"(\w+)"', file.read_text()):
            known[narrower] = (str(errors.InvalidRequest.status), "")
    assert listed == known


def every_subclass(kind: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    for below in kind.__subclasses__():
        yield below
        yield from every_subclass(below)


def test_every_reason_is_listed_with_what_follows_from_it() -> None:
    followed: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    meanings = [meaning for meaning in vars(outcome).values() if isinstance(meaning, Meaning)]
    broken = (Reason.CONNECT, Reason.FIRST_BYTE, Reason.IDLE, Reason.RESET, Reason.GARBAGE, Reason.EOF)
    meanings += [outcome.of_failure(reason, begun=False) for reason in broken]
    meanings += [outcome.of_failure(Reason.ERROR_EVENT, begun=True)]
    for meaning in meanings:
        if meaning.reason is not Reason.NONE:
            followed[meaning.reason.value][0].add(meaning.outcome.value)
            followed[meaning.reason.value][1].add(meaning.retry.value)
    listed = {
        words(reason)[0]: (set(ended.split(", ")), set(again.split(", ")))
        for reason, _, ended, again in rows("Retries and failover")
    }
    assert listed == followed
    assert listed.keys() | {Reason.NONE.value} == {reason.value for reason in Reason}


def test_every_field_of_the_access_log_is_listed() -> None:
    listed = [field for first, _ in rows("Logs") for field in words(first)]
    assert sorted(listed) == sorted(Line.__struct_fields__)
    told = next(meaning for first, meaning in rows("Logs") if "outcome" in first)
    assert set(told.split(", ")) == {each.value for each in Outcome}


def test_the_headers_that_reach_an_upstream_are_listed() -> None:
    told = re.search(r"only these reach an upstream: (.*?)\.", OPERATING, re.DOTALL)
    assert told is not None
    assert set(words(told[1])) == headers.TO_UPSTREAM
    also = re.search(r"what is \[passed on as it is\]\(.*?\) (.*?) do too\.", OPERATING, re.DOTALL)
    assert also is not None
    assert set(words(also[1])) == headers.PASSED_UPSTREAM - headers.TO_UPSTREAM


def test_the_headers_a_client_may_send_are_those_that_are_read() -> None:
    source = Path(edge.__file__).read_text()
    sent = (ROOT / "README.md").read_text().split("A client may send:", 1)[1].split("An answer carries", 1)[0]
    for name in ("x-penstock-priority", "x-request-timeout", "x-request-id", "traceparent", "x-api-key"):
        assert f'"{name}"' in source
        assert name in sent


def test_the_design_names_every_floor_and_every_core_module() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = [re.findall(r"\w+", floor) for floor in contracts[0]["layers"]]
    drawing = re.search(r"(?ms)^proxy/$(.*?)^```", design)
    assert drawing is not None
    drawn = [re.findall(r"(?m)^ {3}\(?(\w+)(?:\.py|/)", floor) for floor in re.split(r"─{20,}", drawing[1])]
    for floor in floors:
        assert any(floor[0] in names for names in drawn), floor
    order = [next(index for index, names in enumerate(drawn) if floor[0] in names) for floor in floors]
    assert order == sorted(order)
    table = design.split("| core module |", 1)[1].split("\n\n", 1)[0]
    named = {name for row in table.splitlines()[2:] for name in words(row.split("|")[1])}
    assert named == {file.stem for file in (ROOT / "proxy" / "core").glob("*.py")} - {"__init__"}


# ── what no file may say ──

REGISTRY = re.compile(r"(?:pypi|pythonhosted|npmjs|debian)[.](?:org|com|io)")
MACHINE = re.compile(r"(?<![\w.~}])/(?:work|home|root|Users)/")


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout, so nothing says which files are the project's")
    listed = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        file = ROOT / name
        if file.is_file():
            text = file.read_text(errors="replace")
            assert not REGISTRY.search(text), name
            assert not MACHINE.search(text), name
