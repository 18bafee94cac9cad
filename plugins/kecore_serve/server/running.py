"""Running a server: in the foreground until it is told to stop, or in a thread beside other code."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kecore.api.errors import ConfigError

__all__ = ["bind", "run", "running"]

_STARTED_WITHIN = 30.0  # seconds


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens for no one yet.

    Args:
        host: a name or an address.
        port: 0 for one that is free.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}; choose another --port (0: any)") from error
    return listener


def _server(app: FastAPI, drain: float | None) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            # Longer than clients keep a connection that is idle (httpx: 5 s, uvicorn's own figure): whoever closes it
            # first must be the client, or a request that it sends at that moment is lost.
            timeout_keep_alive=120,
            # Seconds after which answers that are not finished are cut.
            timeout_graceful_shutdown=None if drain is None else max(1, int(drain)),
        )
    )


def run(app: FastAPI, listener: socket.socket, *, drain: float | None = None) -> None:
    """Serve until SIGTERM or SIGINT; what was asked for by then is answered, and a second SIGINT cuts it.

    Args:
        app: the application.
        listener: what :func:`bind` returned.
        drain: most seconds to wait for answers; None for as long as they take.
    """
    # uvicorn raises the signal once more when it has stopped, by the handler that was there before.
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _server(app, drain).run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        listener.close()


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the server has stopped by then."""


@contextmanager
def running(app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread inside the block.

    Args:
        app: the application.
        host: the address to listen on.
        port: 0 for one that is free.

    Yields:
        The server's address, such as ``http://127.0.0.1:43215``.
    """
    listener = bind(host, port)
    server = _server(app, None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="kecore-serve", daemon=True)
    thread.start()
    deadline = time.monotonic() + _STARTED_WITHIN
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    try:
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
