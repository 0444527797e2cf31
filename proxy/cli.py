"""The command line. What is for people goes to stderr; what is for programs, to stdout."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import uvloop
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxy import app as gateway_app
from proxy import bulk, config, demo, piping, simulator
from proxy import top as top_screen
from proxy.config import ConfigError, Settings
from proxy.simulator import profiles

Result = TypeVar("Result")

cli = typer.Typer(
    name="penstock",
    help="An LLM gateway: point any OpenAI client's base_url at it. It decides who may call which upstream and when, "
    "backs off for everybody at once, passes streams through, and measures every call.",
    epilog="Begin with `penstock demo`; then set OPENAI_API_KEY and run `penstock serve`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
pipelines = typer.Typer(help="Draw a pipeline of the configuration, or run it.", no_args_is_help=True)
cli.add_typer(pipelines, name="pipeline")
err = Console(stderr=True, highlight=False)
PRINTED = 160  # columns of a table that goes into a file or a pipe

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="PENSTOCK_CONFIG", help="The YAML file; see config/ for examples."),
]


def main() -> None:
    cli()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {metadata.version('penstock')}")
        raise typer.Exit


@cli.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@cli.command()
def serve(
    config_file: ConfigFile = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, to stderr.")] = False,
) -> None:
    """Run the gateway.

    Without a file, OPENAI_API_KEY and ANTHROPIC_API_KEY in the environment are enough. Any setting can be given as a
    variable: PENSTOCK_SERVER__PORT=9000. SIGHUP reloads the file, SIGTERM lets calls in flight end and stops.
    """
    _log(debug)

    def load() -> Settings:
        return config.load(config_file, os.environ)

    def ready(gateway: gateway_app.Gateway) -> None:
        server = gateway.plan.settings.server
        err.print(f"[bold]penstock[/bold] {metadata.version('penstock')} is up")
        err.print(
            f"  clients   base_url = {_url(server.host, gateway.port, secure=server.tls is not None)}/v1",
            soft_wrap=True,
        )
        err.print(f"  admin     {_url(server.admin_host, gateway.admin_port)}  (/ui /metrics /healthz /readyz)")
        err.print(f"  models    {', '.join(gateway.plan.settings.models) or 'none'}", soft_wrap=True)

    settings = _checked(load)
    try:
        ended = _run(gateway_app.serve(settings, load, log_fd=1, ready=ready))
    except OSError as error:
        _fail(f"cannot listen: {error.strerror or error}; choose another server.port or server.admin_port")
    if not ended:
        err.print("stopped; some calls were still in flight at the deadline and were cut off")


@cli.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="The YAML file; none: the environment alone.")] = None,
) -> None:
    """Tell every mistake of a configuration at once, each with its line and what would be right."""
    settings = _checked(lambda: config.load(file, os.environ))
    typer.echo(f"{file or 'environment'}: ok, {len(settings.models)} models on {len(settings.upstreams)} upstreams")
    typer.echo(f"state: {settings.state.path or 'kept nowhere; set state.path for files and batches'}")


keys = typer.Typer(help="Keys of callers.", no_args_is_help=True)
cli.add_typer(keys, name="key")


@keys.callback()
def _keys() -> None:
    pass


@keys.command()
def new() -> None:
    """Make a key for a caller: the key is shown this once, and its hash is what the configuration needs."""
    key = f"sk-penstock-{secrets.token_urlsafe(32)}"
    typer.echo(f"key      {key}")
    typer.echo(f"callers  NAME: {config.hashed(key)}")


@cli.command()
def schema() -> None:
    """Write the JSON Schema of the configuration, for editors."""
    typer.echo(json.dumps(config.json_schema(), indent=2, ensure_ascii=False))


PipelineName = Annotated[str, typer.Argument(help="Its name, without pipeline/.")]


@pipelines.command(name="show")
def show_pipeline(name: PipelineName, config_file: ConfigFile = None) -> None:
    """Draw the steps of a pipeline; those that may run at the same time stand together."""
    typer.echo(piping.drawing(name, _pipeline(_checked(lambda: config.load(config_file, os.environ)), name)))


@pipelines.command(name="run")
def run_pipeline(
    name: PipelineName,
    text: Annotated[str, typer.Option("--input", help="The input; - reads it from stdin.")],
    config_file: ConfigFile = None,
    url: Annotated[
        str | None, typer.Option(help="Address of a running gateway; without it one is run for this call.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="A caller's key for it.")] = None,
) -> None:
    """Run a pipeline once: the answer goes to stdout as it comes, what becomes of the steps to stderr."""
    said = sys.stdin.read() if text == "-" else text
    try:
        if url is not None:
            piping.ask(url, key, name, said, err.print)
        else:
            settings = _checked(lambda: config.load(config_file, os.environ))
            _pipeline(settings, name)
            _run(piping.run(settings, name, said, err.print))
    except piping.Failed as error:
        _fail(escape(str(error)))


def _pipeline(settings: Settings, name: str) -> config.Pipeline:
    said = settings.pipelines.get(name)
    if said is None:
        _fail(f"there is no pipeline `{name}`; there are: {', '.join(settings.pipelines) or 'none'}")
    return said


@cli.command()
def limits(
    admin: Annotated[
        str, typer.Option(help="Address of a running gateway's admin port.", envvar="PENSTOCK_ADMIN_URL")
    ] = "http://127.0.0.1:8081",
    key: Annotated[
        str | None, typer.Option(help="Its server.admin_key, if it has one.", envvar="PENSTOCK_ADMIN_KEY")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show every limit of a running gateway: how much, known from what and since when, the level now, who waits."""
    said = _ask(f"{admin.rstrip('/')}/admin/limits", key)
    if as_json:
        typer.echo(json.dumps(said, indent=2))
        return
    out = Console(highlight=False)
    out.print(_limits_table(said["limits"]))
    for upstream in said["upstreams"]:
        if upstream["state"] != "closed":
            why = f" ({upstream['reason']}, asked again in {upstream['shut_seconds']:.0f} s)"
            out.print(
                f"upstream {upstream['upstream']} is {upstream['state']}{why if upstream['state'] == 'shut' else ''}"
            )


@cli.command(name="top")
def top_command(
    admin: Annotated[
        str, typer.Option(help="Address of a running gateway's admin port.", envvar="PENSTOCK_ADMIN_URL")
    ] = "http://127.0.0.1:8081",
    key: Annotated[
        str | None, typer.Option(help="Its server.admin_key, if it has one.", envvar="PENSTOCK_ADMIN_KEY")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the figures once, as into a pipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures once, as JSON.")] = False,
) -> None:
    """Watch a running gateway: throughput, latencies, gates, limits, upstreams, errors and the last calls.

    The same figures are on its admin port as a page, at /ui. `q` ends it.
    """
    try:
        top_screen.run(admin, key, once=once, as_json=as_json)
    except top_screen.NotAllowed:
        _fail(f"the gateway at {admin} asks for a key; give its server.admin_key with --key")
    except top_screen.Unreachable as error:
        _fail(str(error))


@cli.command()
def simulate(
    profile: Annotated[
        str, typer.Option(help=f"What kind of provider: {', '.join(profiles.BY_NAME)}.", show_default=True)
    ] = "tight",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 9000,
    seed: Annotated[int, typer.Option(help="The same seed and calls give the same run.")] = 0,
    requests_per_minute: Annotated[float | None, typer.Option(min=0, help="Another limit of requests.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(min=0, help="Another limit of tokens.")] = None,
    error_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of calls answered 500.")] = 0.0,
    cut_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of streams that end in the middle.")] = 0.0,
) -> None:
    """Run a simulated provider: OpenAI's API and Anthropic's with real limits, headers and refusals, and no model."""
    known = profiles.BY_NAME.get(profile)
    if known is None:
        _fail(f"there is no profile `{profile}`; choose one of {', '.join(profiles.BY_NAME)}")
    chosen = replace(known, error_rate=error_rate, cut_rate=cut_rate)
    if requests_per_minute is not None:
        chosen = replace(chosen, requests_per_minute=requests_per_minute, requests_burst=None)
    if tokens_per_minute is not None:
        chosen = replace(chosen, tokens_per_minute=tokens_per_minute, tokens_burst=None)

    async def stay() -> None:
        async with simulator.serving(chosen, host=host, port=port, seed=seed) as running:
            err.print(f"simulated provider `{profile}` at {running.base_url}; Ctrl-C ends it")
            await asyncio.Event().wait()

    try:
        _run(stay())
    except OSError as error:
        _fail(f"cannot listen: {error.strerror or error}; choose another --port")
    except KeyboardInterrupt:
        pass


@cli.command(name="demo")
def demo_command(
    keep: Annotated[bool, typer.Option("--keep", help="Stay up after the summary, to be tried out.")] = False,
    calls: Annotated[int, typer.Option(min=1, max=2000, help="How many calls at once.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed gives the same provider.")] = 0,
) -> None:
    """Send a burst of calls straight to a provider with limits, then through the gateway, and compare."""
    raise typer.Exit(_run(demo.run(keep=keep, calls=calls, seed=seed)))


batch = typer.Typer(
    name="batch",
    help="Answer a file of prompts, in its order, by the batches of a gateway; look at batches and cancel them.",
    epilog="Begin with `penstock batch run prompts.txt -m gpt-4o-mini -o results.jsonl`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
cli.add_typer(batch)

GatewayUrl = Annotated[
    str | None, typer.Option("--url", help="A running gateway's address.", envvar="PENSTOCK_URL", metavar="URL")
]
CallerKey = Annotated[
    str, typer.Option("--key", help="A caller's key, if it asks for one.", envvar="PENSTOCK_KEY", show_envvar=True)
]
BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="Its id, such as batch_…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, a batch a line.")]


@batch.command(name="run")
def batch_run(
    prompts: Annotated[
        str, typer.Argument(help="A .txt (a prompt a line), .csv or .jsonl file; `-` reads stdin as --format says.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model; each line of a .jsonl may name its own.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the results go; without it to stdout, and no resuming.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="The prompt, with the row's fields: 'Classify: {text}' ({column} of a .csv).")
    ] = "",
    system: Annotated[str, typer.Option(help="A system message before each prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of an answer.")] = None,
    concurrency: Annotated[
        str, typer.Option(help="Most calls at once, for a gateway that this command starts; `auto` finds it.")
    ] = "auto",
    kind: Annotated[str, typer.Option("--format", help="txt, csv or jsonl; by the file's name unless given.")] = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask those anew that failed before.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run with this -o.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    url: GatewayUrl = None,
    key: CallerKey = "",
    config_file: ConfigFile = None,
) -> None:
    """Answer a file of prompts; the results stand in the order of the prompts.

    A running gateway does the work: the one at --url, else one at the configured port. Where there is none, one is
    started for the run, from --config or from OPENAI_API_KEY in the environment. Ended by whatever means, the same
    command goes on where it was. Exit code: 0 all answered, 1 some failed, 2 bad input or no gateway, 130 interrupted.

    penstock batch run reviews.csv -m gpt-4o-mini --template "Classify: {review}" -o classes.jsonl
    """
    settings = None if url else _checked(lambda: config.load(config_file, os.environ))
    wanted = bulk.Wanted(model, template, system, max_tokens)
    try:
        with bulk.gateway(settings, url, key, concurrency) as (remote, where), bulk.opened(prompts, kind) as rows:
            progress = bulk.Progress(err, quiet=quiet)
            made = bulk.run(
                remote,
                bulk.rows(*rows, wanted),
                out,
                sys.stdout.buffer,
                progress,
                retry_failed=retry_failed,
                fresh=fresh,
                where=where,
            )
    except bulk.BadInput as error:
        for problem in error.problems:
            err.print(f"{prompts}: {problem}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (bulk.Stopped, bulk.Refused, bulk.Unreachable, OSError) as error:
        _fail(str(error), code=2)
    except KeyboardInterrupt:
        again = "" if out is None else f"; go on with: {shlex.join(['penstock', *sys.argv[1:]])}"
        err.print(f"interrupted; what is answered is kept{again}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    if not quiet:
        reasons = ", ".join(f"{code} x {count}" for code, count in made.reasons.items())
        err.print(
            f"{made.answered:,} answered, {made.failed:,} failed{f' ({reasons})' if reasons else ''}", markup=False
        )
    raise typer.Exit(made.code)


@batch.command(name="list")
def batch_list(
    url: GatewayUrl = None,
    key: CallerKey = "",
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """List the batches of a running gateway, newest first."""
    _show_batches(lambda remote: remote.batches(), url, key, config_file, as_json)


@batch.command(name="show")
def batch_show(
    batch_id: BatchId,
    url: GatewayUrl = None,
    key: CallerKey = "",
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Show one batch of a running gateway."""
    _show_batches(lambda remote: [remote.batch(batch_id)], url, key, config_file, as_json)


@batch.command(name="cancel")
def batch_cancel(
    batch_id: BatchId,
    url: GatewayUrl = None,
    key: CallerKey = "",
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Cancel one batch of a running gateway; what was answered is kept."""
    _show_batches(lambda remote: [remote.cancel(batch_id)], url, key, config_file, as_json)


def _show_batches(
    ask: Callable[[bulk.Remote], Iterable[bulk.Batch]],
    url: str | None,
    key: str,
    config_file: Path | None,
    as_json: bool,
) -> None:
    settings = None if url else _checked(lambda: config.load(config_file, os.environ))
    try:
        batches = list(ask(bulk.running(settings, url, key)))
    except (bulk.Refused, bulk.Unreachable) as error:
        _fail(str(error), code=2)
    if as_json:
        for each in batches:
            typer.echo(json.dumps(each))
    elif batches:
        Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED).print(bulk.table(batches))
    else:
        err.print("there are no batches")


def _ask(url: str, key: str | None) -> Any:
    """What a running gateway answers on its admin port."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310 - the operator's own address
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
            return json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        _fail(f"{url} answered {error.code}" + ("; give its server.admin_key with --key" if error.code == 401 else ""))
    except (OSError, ValueError) as error:
        _fail(f"no gateway at {url} ({error}); is it running, and is --admin right?")


def _limits_table(pools: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("pool", "limit", "source"):
        table.add_column(heading)
    for heading in ("per minute", "level", "known", "hold", "in flight", "waiting"):
        table.add_column(heading, justify="right")
    for pool in pools:
        places = f"{pool['in_use']}" if pool["concurrency"] is None else f"{pool['in_use']}/{pool['concurrency']}"
        who = f"{sum(pool['waiting'].values())}"
        if not pool["limits"]:
            source = "cold start" if pool["cold_calls"] is not None else "-"
            table.add_row(pool["pool"], "-", source, "-", "-", "-", f"{pool['hold_seconds']:.1f} s", places, who)
        for limit in pool["limits"]:
            known = "-" if limit["known_seconds"] is None else f"{limit['known_seconds']:.0f} s"
            table.add_row(
                pool["pool"],
                limit["limit"],
                limit["source"],
                f"{limit['per_minute']:,.0f}",
                f"{limit['level']:,.0f}",
                known,
                f"{limit['hold_seconds']:.1f} s",
                places,
                who,
            )
    return table


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def _checked(load: Any) -> Settings:
    """The settings, or every mistake on stdout and exit code 1."""
    try:
        settings: Settings = load()
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(str(problem))
        raise typer.Exit(1) from None
    return settings


def _log(debug: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("penstock").setLevel(logging.DEBUG if debug else logging.INFO)


def _url(host: str, port: int, *, secure: bool = False) -> str:
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _fail(message: str, *, code: int = 1) -> NoReturn:
    err.print(f"[red]penstock:[/red] {message}", soft_wrap=True)
    raise typer.Exit(code)
