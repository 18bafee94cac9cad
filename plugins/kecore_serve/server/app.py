"""The application: endpoints, limits around them, and one shape for all errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kecore._version import __version__
from kecore.api.errors import KecoreError
from kecore_serve.server import completions, edits
from kecore_serve.server.errors import ApiError, QueueFullError, StoppingError, describe_error
from kecore_serve.server.exchange import ClientGoneError
from kecore_serve.server.limits import App, Limits, Message, Receive, Send
from kecore_serve.server.metrics import Counted
from kecore_serve.server.schemas import ErrorBody, ModelList, ModelObject
from kecore_serve.server.service import Service, service_of

__all__ = ["make_app"]

_LOG = logging.getLogger(__name__)
_FOLLOW = 2.0
"""Seconds between looks whether another process has changed the ledger."""

_Service = Annotated[Service, Depends(service_of)]
_ERRORS = (400, 401, 404, 405, 409, 413, 421, 429, 500, 503)

_router = APIRouter()


def make_app(service: Service) -> FastAPI:
    """Make the application of a server; its worker is started and stopped with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        following = asyncio.create_task(_follow(service))
        yield
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        # Answers that were asked for are finished by now: the server waits for them before it comes here.
        await asyncio.to_thread(service.worker.stop)

    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in _ERRORS
    }
    app = FastAPI(
        title="kecore serve", version=__version__, lifespan=lifespan, responses=responses, redoc_url=None, docs_url=None
    )
    app.state.service = service
    service.metrics.watch(service.worker, lambda: len(service.model.now.active))
    app.include_router(completions.router)
    app.include_router(edits.router)
    app.include_router(_router)
    app.add_middleware(_Guarded)
    app.add_middleware(Limits, settings=service.settings)
    app.add_middleware(Counted, metrics=service.metrics)
    for kind in (KecoreError, ApiError, QueueFullError, StoppingError):
        app.add_exception_handler(kind, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(RequestValidationError, _tell_validation)
    for gone in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(gone, _forget)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


class _Guarded:
    """Answers where nothing else did, so that the connection goes on: the framework would close it.

    Args:
        app: what answers.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection, as ASGI has it."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            response = await _tell(Request(scope), error)
            await response(scope, receive, send)


@_router.get("/v1/models", tags=["models"])
async def list_models(service: _Service) -> ModelList:
    """List the model that is served."""
    return ModelList(data=[ModelObject(id=service.settings.name, created=service.created)])


@_router.get("/v1/models/{model:path}", tags=["models"])
async def show_model(model: str, service: _Service) -> ModelObject:
    """Show the model that is served."""
    service.check_name(model)
    return ModelObject(id=service.settings.name, created=service.created)


@_router.get("/health", tags=["operation"])
async def health(service: _Service) -> dict[str, str]:
    """Say whether the server lives."""
    if not service.worker.is_alive:
        raise ApiError(503, "the thread that runs the model has ended", "dead", kind="server_error")
    return {"status": "ok"}


@_router.get("/ready", tags=["operation"])
async def ready(service: _Service) -> dict[str, str]:
    """Say whether the server takes requests."""
    if not service.worker.is_ready:
        raise StoppingError("the server is stopping and takes no new requests")
    return {"status": "ready", "state": service.model.now.state}


@_router.get("/metrics", tags=["operation"], responses={200: {"content": {"text/plain": {}}}})
async def show_metrics(service: _Service) -> Response:
    """Show figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


async def _follow(service: Service) -> None:
    """Let the model follow a ledger that other processes write to."""
    while True:
        await asyncio.sleep(_FOLLOW)
        try:
            if await asyncio.to_thread(service.model.is_behind):
                await asyncio.wrap_future(service.worker.operate(service.model.sync))
        except (KecoreError, QueueFullError, StoppingError) as error:
            _LOG.warning("the model does not follow the ledger: %s", error)


async def _tell(_request: Request, error: Exception) -> JSONResponse:
    """Answer with an error."""
    described = describe_error(error)
    if described.status >= HTTPStatus.INTERNAL_SERVER_ERROR and described.status != HTTPStatus.SERVICE_UNAVAILABLE:
        _LOG.error("a request ended in an error", exc_info=error)
    return JSONResponse(described.body(), described.status, headers=dict(described.headers))


async def _tell_http(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error of the framework: an unknown path, a method that a path does not have, no JSON."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what the handler is registered for
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    described = ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    return await _tell(request, described)


async def _tell_validation(request: Request, error: Exception) -> JSONResponse:
    """Answer to a request that is not as the description says: which field, and what is wrong with it."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what the handler is registered for
    first = _telling(error.errors())
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    where = f"{param}: " if param else ""
    return await _tell(request, ApiError(400, f"{where}{first['msg']}", "invalid_value", param=param))


def _telling(errors: Sequence[Any]) -> Any:
    """Return the error that says most: the deepest, since of several possible types each one has its say."""
    return max(errors, key=lambda error: len(error["loc"]))


async def _forget(_request: Request, _error: Exception) -> Response:
    """Answer nobody."""
    return Response(status_code=499)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Describe the endpoints, without FastAPI's own status for invalid requests, which this server never sends."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
