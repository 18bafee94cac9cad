"""``/v1/edits``: what is edited into the served model, by those who have the token."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from kecore.api.errors import ArtifactError, ConfigError
from kecore.api.types import EditRequest
from kecore_serve.records import Entry
from kecore_serve.server.errors import ApiError
from kecore_serve.server.live import Snapshot
from kecore_serve.server.schemas import (
    CheckoutRequest,
    EditList,
    EditObject,
    EditRequestBody,
    FactBody,
    Reverted,
    StateObject,
    TagRequest,
)
from kecore_serve.server.service import STATE_HEADER, Service, service_of

__all__ = ["router"]

T = TypeVar("T")
_BEARER = HTTPBearer(auto_error=False, description="The token that the server printed, or was given.")
_Service = Annotated[Service, Depends(service_of)]


def check_token(
    service: _Service, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
) -> None:
    """Refuse those without the token, in a time that does not depend on how much of it they have.

    Raises:
        ApiError: 401.
    """
    given = "" if credentials is None else credentials.credentials
    if not secrets.compare_digest(given.encode("utf-8", "replace"), service.settings.token.encode()):
        raise ApiError(
            401, "edits need the server's token, as `Authorization: Bearer TOKEN`", "invalid_token",
            kind="authentication_error", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


router = APIRouter(prefix="/v1", tags=["edits"], dependencies=[Depends(check_token)])


@router.get("/edits")
def list_edits(service: _Service) -> EditList:
    """List all edits that were ever made, oldest first."""
    now = service.model.now
    return EditList(data=[_edit_object(entry, now) for entry in service.model.entries()], state=now.state)


@router.post("/edits", status_code=201)
async def make_edit(body: EditRequestBody, response: Response, service: _Service) -> EditObject:
    """Edit facts into the model; texts under way are finished first, and those that wait are written after it."""
    method = body.method or service.settings.method
    if ":" in method:
        raise ConfigError(f"a method over HTTP must be installed on the server, got the file '{method[:100]}'")
    requests = [_edit_request(fact) for fact in body.facts]
    entry, now = await _operate(
        service,
        "edit",
        lambda: service.model.edit(requests, method, preset=body.preset, config=body.config, note=body.note),
    )
    response.headers[STATE_HEADER] = now.state
    return _edit_object(entry, now)


@router.post(
    "/edits/file",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {
        "schema": {"type": "string", "format": "binary"}}}}},
)  # fmt: skip
async def upload_edit(
    request: Request,
    response: Response,
    service: _Service,
    note: Annotated[str, Query(max_length=2_000)] = "",
    x_kecore_signature: Annotated[str | None, Header(max_length=200)] = None,
) -> EditObject:
    """Put an edit file on the model, which was made on the same base; the body is the file."""
    with tempfile.TemporaryDirectory(prefix="kecore-serve-") as folder:
        path = Path(folder) / "edit.safetensors"
        await _receive(request, path, service.settings.upload_bytes)
        edit = await run_in_threadpool(service.model.read, path, x_kecore_signature)
        entry, now = await _operate(service, "upload", lambda: service.model.add(edit, note=note))
    response.headers[STATE_HEADER] = now.state
    return _edit_object(entry, now)


@router.get("/edits/{edit_id}")
def show_edit(edit_id: str, service: _Service) -> EditObject:
    """Show one edit; the beginning of its id is enough."""
    return _edit_object(_find(service, edit_id), service.model.now)


@router.delete("/edits/{edit_id}")
async def revert_edit(edit_id: str, response: Response, service: _Service) -> Reverted:
    """Take an edit back, whichever it is; the others stay."""
    entry = await run_in_threadpool(_find, service, edit_id)
    withdrawal, now = await _operate(service, "revert", lambda: service.model.revert(entry.id))
    response.headers[STATE_HEADER] = now.state
    return Reverted(id=entry.id, state=now.state, later=list(withdrawal.later))


@router.get("/state")
def show_state(service: _Service) -> StateObject:
    """Show the edits that are on the model, and the tags of the ledger."""
    return _state_object(service)


@router.post("/tags", status_code=201)
async def make_tag(body: TagRequest, service: _Service) -> StateObject:
    """Give the state of now a name."""
    await _operate(service, "tag", lambda: service.model.tag(body.name))
    return await run_in_threadpool(_state_object, service)


@router.post("/checkout")
async def check_out(body: CheckoutRequest, service: _Service) -> StateObject:
    """Let the edits be on the model that were there at a tag or state, and no others."""
    await _operate(service, "checkout", lambda: service.model.checkout(body.to))
    return await run_in_threadpool(_state_object, service)


def _edit_request(fact: FactBody) -> EditRequest:
    request = EditRequest(fact.prompt, fact.subject, fact.target, ground_truth=fact.ground_truth)
    return request if fact.id is None else replace(request, id=fact.id)


async def _operate(service: Service, done: str, run: Callable[[], T]) -> tuple[T, Snapshot]:
    """Let the worker change the edits in its turn, to the end even if the client does not wait for it.

    Returns:
        What came of it, and what was on the model right after it.
    """

    def run_and_look() -> tuple[T, Snapshot]:
        return run(), service.model.now

    result, now = await asyncio.shield(asyncio.wrap_future(service.worker.operate(run_and_look)))
    service.metrics.edits.labels(done).inc()
    return result, now


async def _receive(request: Request, path: Path, limit: int) -> None:
    """Write the body of a request to a file.

    Raises:
        ApiError: it is empty or too large.
    """
    size = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise ApiError(413, f"the edit is larger than {limit:,} bytes", "body_too_large")
            await run_in_threadpool(file.write, chunk)
    if not size:
        raise ApiError(400, "the body is empty; send an edit file, such as `curl --data-binary @F`", "empty_body")


def _find(service: Service, edit_id: str) -> Entry:
    try:
        return service.model.find(edit_id)
    except ArtifactError as error:
        raise ApiError(404, str(error), "edit_not_found", param="edit_id") from error


def _edit_object(entry: Entry, now: Snapshot) -> EditObject:
    return EditObject(
        id=entry.id,
        method=entry.method,
        config=dict(entry.config),
        seed=entry.seed,
        facts=[dict(fact) for fact in entry.facts],
        created=entry.time,
        author=entry.author,
        note=entry.note,
        active=entry.id in now.active,
        state=now.state,
    )


def _state_object(service: Service) -> StateObject:
    now = service.model.now
    return StateObject(state=now.state, active=list(now.active), tags=service.model.tags)
