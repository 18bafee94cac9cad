"""``kecore serve`` answers over HTTP with a model whose edits change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.api.errors import MissingDependencyError
from kecore.cli import options
from kecore.cli.console import Screen, count_noun
from kecore.cli.loading import Loading, provide_statistics
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from kecore.editor import Editor

__all__ = ["serve"]

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@help_group("Use edits elsewhere")
def serve(
    context: typer.Context,
    model: options.Model,
    ledger: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The ledger that the edits are kept in; begun where there is none.",
            show_default="one that ends with the server",
        ),
    ] = None,
    edits: options.Edits = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="The port; 0 for one that is free.", min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="KECORE_SERVE_TOKEN",
            help="What edit endpoints ask for; better in the variable, since others see arguments.",
            show_default="made up and printed",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The model's name in requests.", show_default="MODEL")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A name that clients may call the server by (repeatable).",
            show_default="on the loopback interface its names, else any",
        ),
    ] = None,
    trust: Annotated[
        list[Path] | None,
        typer.Option(
            "--trust",
            metavar="FILE",
            help="A public key; edit files that none of them signed are refused (repeatable).",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"The method of edits that name none. {options.METHODS_HELP}")
    ] = "memit",
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Get the key statistics that --method reads before the first request comes."),
    ] = False,
    stats: options.Stats = None,
    chat: options.Chat = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of one text.", min=1)] = 4096,
    rows: Annotated[int, typer.Option(metavar="N", help="Most texts that are written at once.", min=1)] = 64,
    queue: Annotated[int, typer.Option(metavar="N", help="Most requests that wait.", min=1)] = 256,
    rate: Annotated[int, typer.Option(metavar="N", help="Most requests a minute of one client; 0: any.", min=0)] = 0,
    drain: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Most that a stopping server waits for answers.", min=1, show_default="any time"
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Serve MODEL over HTTP, as OpenAI does, and edit it while it runs.

    Every answer says which state of the edits it was made with. SIGTERM or Ctrl-C: what was asked for is answered,
    then it ends. docs/live-server.md has the endpoints.
    """
    screen = Screen.of(context)
    _check_extra()
    from kecore.edit import load_edit
    from kecore.hub import EDIT, artifact_file
    from kecore_serve.server.app import make_app
    from kecore_serve.server.live import LiveModel
    from kecore_serve.server.opening import Capacity, make_service, open_ledger
    from kecore_serve.server.running import bind, run
    from kecore_serve.server.settings import Settings, make_token

    budget = options.byte_count(memory)
    hosts = tuple(allow_host or ())
    if not hosts and host in (*_LOOPBACK, "::1"):
        hosts = _LOOPBACK
    token_of_edits = make_token() if token is None else token
    settings = Settings(
        name=name or model, token=token_of_edits, method=method, hosts=hosts, max_tokens=max_tokens, rate=rate
    )
    listener = bind(host, port)
    check = _make_check(trust or ())
    for path in edits or []:
        check(artifact_file(path, EDIT), None)
    loaded_edits = [load_edit(path) for path in edits or []]
    loading = Loading(model, device, dtype, trust_remote_code, seed)
    editor = loading.edit(screen, statistics="auto" if stats is None else stats, chat=chat, memory=budget)
    if prepare:
        _prepare(screen, editor, method)
    with open_ledger(ledger, editor, model) as opened:
        live = LiveModel(editor, opened, check)
        service = make_service(live, settings, Capacity(rows=rows, queue=queue), loaded_edits)
        address = f"http://{host}:{listener.getsockname()[1]}"
        screen.log(
            f"{count_noun(len(live.now.active), 'edit')} on '{model}', state {live.state}, ledger "
            f"{ledger or 'in a temporary folder'}"
        )
        if token is None:
            screen.log(f"token for edits, shown this once: {token_of_edits}")
        screen.log(f"serving '{settings.name}' on {address}/v1")
        run(make_app(service), listener, drain=drain)
    screen.log("stopped; everything that was asked for is answered")


def _check_extra() -> None:
    """Refuse to go on without the packages of the extra.

    Raises:
        MissingDependencyError: says how to install them.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"kecore serve needs {package}: pip install 'kecore[serve]'")


def _make_check(trust: Sequence[Path]) -> Callable[[Path, str | None], None]:
    """Return what refuses edit files that none of these keys has signed; without keys all are taken."""
    from kecore_serve.signatures import check_signature, read_public_key

    keys = [read_public_key(path) for path in trust]

    def check(path: Path, signature: str | None) -> None:
        if keys:
            check_signature(path, keys, signature)

    return check


def _prepare(screen: Screen, editor: Editor, method: str) -> None:
    """Get the key statistics that a method reads, before anybody waits for them."""
    from kecore.api.line import MethodLine
    from kecore.statistics_source import StatisticsSource

    line = MethodLine.of(method)
    layers = editor.statistics_layers(line)
    if layers and editor.statistics is None:
        provide_statistics(screen, editor, line, layers, StatisticsSource())
