"""The studio's server: the page, a JSON interface to the session, and a stream of events."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePath
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import BackgroundTasks, Body, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from kecore._version import __version__
from kecore.api.errors import ConfigError, KecoreError
from kecore_studio.events import format_event
from kecore_studio.jobs import Job, describe_error
from kecore_studio.security import Guard
from kecore_studio.session import EditChoice, Session

__all__ = ["PAGE", "make_app"]

PAGE = Path(__file__).with_name("page")
"""The folder of the page: HTML, CSS and modules of JavaScript, as they are served."""

_MOST_BYTES = 256 * 2**20
"""Bytes of an upload."""

Text = Annotated[str, Body(embed=True)]


def make_app(session: Session, guard: Guard) -> FastAPI:
    """Return the server.

    Args:
        session: what the page shows; it is closed with the server.
        guard: decides which requests are answered.
    """

    @asynccontextmanager
    async def live(_app: FastAPI) -> AsyncIterator[None]:
        yield
        session.close()

    app = FastAPI(title="kecore studio", version=__version__, lifespan=live, docs_url=None, redoc_url=None)
    app.middleware("http")(guard)
    app.add_exception_handler(KecoreError, _explain)
    app.add_exception_handler(RequestValidationError, _explain_request)
    _add_state(app, session)
    _add_facts(app, session)
    _add_work(app, session)
    _add_stack(app, session)
    _add_catalogue(app)
    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


async def _explain(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": describe_error(error)}, 400)


async def _explain_request(_request: Request, error: Exception) -> Response:
    problems: list[str] = []
    for item in getattr(error, "errors", list)():
        place = ".".join(str(step) for step in item["loc"][1:])
        problems.append(f"{place or item['loc'][0]}: {item['msg']}")
    return JSONResponse(
        {"error": describe_error(ConfigError(f"the request cannot be read: {', '.join(problems)}"))}, 400
    )


def _ticket(job: Job) -> dict[str, Any]:
    """Return what a page gets for a job that it submitted."""
    return {"job": job.to_json()}


def _add_state(app: FastAPI, session: Session) -> None:
    """Add the state of the session and what happens to it."""

    @app.get("/api/state")
    def state() -> dict[str, Any]:
        return session.to_json()

    @app.get("/api/events")
    async def events() -> Response:
        first = format_event("state", session.to_json())
        return StreamingResponse(session.events.listen(first), media_type="text/event-stream")

    @app.get("/api/jobs/{id}")
    def job(id: str) -> Any:
        found = session.jobs.get(id)
        return _missing(id) if found is None else {"job": found.to_json(whole=True)}

    @app.delete("/api/jobs/{id}")
    def cancel(id: str) -> Any:
        found = session.jobs.cancel(id)
        return _missing(id) if found is None else _ticket(found)


def _missing(id: str) -> Response:
    error = ConfigError(f"there is no job {id} any more; ask again")
    return JSONResponse({"error": describe_error(error)}, 404)


def _add_facts(app: FastAPI, session: Session) -> None:
    """Add the facts and the canaries."""

    @app.post("/api/facts/form")
    def form(fields: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        from kecore_studio.facts import read_form

        session.set_sheet(read_form(fields))
        return _sheet(session)

    @app.post("/api/facts/text")
    def text(text: Text) -> dict[str, Any]:
        from kecore_studio.facts import guess_name, read_facts

        session.set_sheet(read_facts(text.encode(), guess_name(text), shown_name=""))
        return _sheet(session)

    @app.post("/api/facts/file")
    async def file(request: Request, name: str) -> dict[str, Any]:
        from kecore_studio.facts import read_facts

        content = await _content(request)
        session.set_sheet(await run_in_threadpool(read_facts, content, unquote(name)))
        return _sheet(session)

    @app.delete("/api/facts")
    def clear() -> dict[str, Any]:
        session.set_sheet(None)
        return {"facts": None}

    @app.put("/api/canaries")
    def canaries(prompts: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
        session.set_canaries(prompts)
        return {"canaries": list(session.canaries)}


def _sheet(session: Session) -> dict[str, Any]:
    sheet = session.sheet
    return {"facts": None if sheet is None else sheet.to_json()}


async def _content(request: Request) -> bytes:
    """Return the body of an upload.

    Raises:
        ConfigError: it is too large.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _MOST_BYTES:
            raise ConfigError(
                f"the file has more than {_MOST_BYTES >> 20} MiB, which the page does not take; use the command line"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _add_work(app: FastAPI, session: Session) -> None:
    """Add everything that runs the model."""

    @app.post("/api/load")
    def load(ref: Text) -> dict[str, Any]:
        return _ticket(session.load(ref))

    @app.post("/api/plan")
    def plan(choice: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        return _ticket(session.plan(_read_choice(choice)))

    @app.post("/api/edit")
    def edit(choice: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        return _ticket(session.edit(_read_choice(choice)))

    @app.post("/api/ask")
    def ask(
        prompt: Text,
        target: Annotated[str, Body()] = "",
        tokens: Annotated[int, Body(ge=1, le=400)] = 40,
        page: Annotated[str, Body()] = "",
    ) -> dict[str, Any]:
        return _ticket(session.ask(prompt, target, tokens=tokens, page=page))

    @app.post("/api/trace")
    def trace(
        prompt: Text,
        subject: Annotated[str, Body()],
        edited: Annotated[bool, Body()] = False,
        samples: Annotated[int, Body(ge=1, le=50)] = 3,
        page: Annotated[str, Body()] = "",
    ) -> dict[str, Any]:
        return _ticket(session.trace(prompt, subject, edited=edited, samples=samples, page=page))

    @app.post("/api/health")
    def health(passages: Annotated[int, Body(embed=True, ge=2, le=1000)] = 24) -> dict[str, Any]:
        return _ticket(session.examine(passages))

    @app.post("/api/export")
    def export(
        out: Text, to: Annotated[str, Body()] = "peft", force: Annotated[bool, Body()] = False
    ) -> dict[str, Any]:
        if not out.strip():
            raise ConfigError("no folder is named; give one that is not there yet, or empty")
        return _ticket(session.export(Path(out.strip()).expanduser(), to, force=force))


def _read_choice(values: dict[str, Any]) -> EditChoice:
    """Read how facts are to be edited.

    Raises:
        ConfigError: a field is unknown or of another type.
    """
    types: dict[str, Callable[[Any], bool]] = {
        "method": lambda value: isinstance(value, str) and bool(value.strip()),
        "preset": lambda value: isinstance(value, str),
        "config": lambda value: value is None or isinstance(value, dict),
        "numbers": lambda value: value is None or _are_numbers(value),
    }
    for name, value in values.items():
        if name not in types:
            raise ConfigError(f"an edit has no field '{name}'; known: {', '.join(types)}")
        if not types[name](value):
            raise ConfigError(f"the field '{name}' of an edit cannot be {value!r}; docs/studio.md lists what it takes")
    if "method" not in values:
        raise ConfigError("no method is named; choose one")
    return EditChoice(**values)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _add_stack(app: FastAPI, session: Session) -> None:
    """Add the list of edits."""

    @app.put("/api/edits/on")
    def switch(on: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
        return _ticket(session.switch(on))

    @app.delete("/api/edits/{id}")
    def remove(id: str) -> dict[str, Any]:
        return _ticket(session.remove(id))

    @app.post("/api/undo")
    def undo() -> dict[str, Any]:
        return _ticket(session.undo())

    @app.post("/api/redo")
    def redo() -> dict[str, Any]:
        return _ticket(session.redo())

    @app.get("/api/edits/file")
    def download(tasks: BackgroundTasks, id: Annotated[str, Query()] = "") -> Response:
        path = session.edit_file(id)
        tasks.add_task(shutil.rmtree, path.parent, ignore_errors=True)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream", background=tasks)

    @app.post("/api/edits/file")
    async def upload(request: Request, name: str) -> dict[str, Any]:
        return _ticket(session.open_edit(await _content(request), PurePath(unquote(name)).name))


def _add_catalogue(app: FastAPI) -> None:
    """Add what does not belong to the session: methods, pages of errors, stores of results."""

    @app.get("/api/methods")
    def methods() -> dict[str, Any]:
        from kecore.catalogue import methods

        return {"methods": [{**card.to_json(), "about": card.about()} for card in methods()]}

    @app.get("/api/errors/{name}")
    def error_page(name: str) -> dict[str, str]:
        from kecore.api.pages import error_page

        return {"name": name, "page": error_page(name)}

    @app.get("/api/stores")
    def stores() -> dict[str, Any]:
        from kecore_studio.benchmarks import find_stores

        return {"folder": str(Path.cwd()), "stores": find_stores(Path.cwd())}

    @app.get("/api/store")
    def store(path: str) -> dict[str, Any]:
        from kecore_studio.benchmarks import read_store

        return read_store(Path(path).expanduser())
