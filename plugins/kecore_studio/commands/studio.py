"""``kecore studio``: a web page on which facts are edited, and seen before and after."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from kecore.api.errors import MissingDependencyError
from kecore.cli import options
from kecore.cli.console import Screen
from kecore.cli.plugins import help_group

if TYPE_CHECKING:
    from fastapi import FastAPI

    from kecore_studio.security import Guard

__all__ = ["studio"]


@help_group("Edit facts")
def studio(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A Hub id, a directory, a .gguf file, or 'demo'; it can be chosen in the page too.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; other machines reach 0.0.0.0.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(metavar="N", help="At which port; 0 takes a free one.", min=0, max=65535)] = 8642,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in the web browser.")] = False,
    chat: options.Chat = False,
    memory: options.Memory = "auto",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
) -> None:
    """Open a web page for one model: edit facts, and see what changed and what did not.

    Next tokens, texts, paraphrases, neighbours and your own canaries stand side by side, before and after; edits are
    switched on and off, saved and exported. The page needs no network, and the link that is printed carries a token:
    whoever has it can use the session. It ends with Ctrl-C.
    """
    screen = Screen.of(context)
    _need_server()
    listening = _listen(host, port)
    bound_port = int(listening.getsockname()[1])
    from kecore_studio.app import make_app
    from kecore_studio.events import Events
    from kecore_studio.security import Guard, is_loopback
    from kecore_studio.session import Session
    from kecore_studio.settings import Settings

    guard = Guard.make(host, bound_port)
    settings = Settings(device, dtype, seed, options.byte_count(memory), chat, trust_remote_code)
    session = Session(settings, Events())
    app = make_app(session, guard)
    if not is_loopback(host):
        screen.warn(f"{host} is reached by other machines, and what they send and get is not encrypted")
    link = _link(host, bound_port, guard)
    screen.commands("The studio is open, until Ctrl-C", link)
    if model is not None:
        session.load(model)
    if browse:
        typer.launch(link)
    _serve(app, listening)


def _need_server() -> None:
    """Refuse to begin without the packages of the server.

    Raises:
        MissingDependencyError: says how they are installed.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"the studio needs the package '{missing[0]}', which is not installed: pip install 'kecore[studio]'"
        )


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; taken before anything is loaded, so that a port in use is told."""
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((name, port))
    except OSError as error:
        listening.close()
        raise typer.BadParameter(
            f"{host}:{port} cannot be listened at ({error.strerror}); --port 0 takes a free one"
        ) from None
    return listening


def _link(host: str, port: int, guard: Guard) -> str:
    name = host.strip("[]")
    if name in ("0.0.0.0", "::"):  # noqa: S104 - the user asked for it; a link needs a name
        name = socket.gethostname()
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/?token={guard.token}"


def _serve(app: FastAPI, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])
