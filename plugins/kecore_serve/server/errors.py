"""Errors of the server, and how any error is told over HTTP: in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kecore.api.errors import (
    EditStateError,
    HubError,
    JudgeError,
    KecoreError,
    MemoryBudgetError,
    NativeError,
    PluginError,
    PromptTooLongError,
    RequestConflictError,
    StorageError,
    StoreInUseError,
    WorkerError,
)

__all__ = ["ApiError", "QueueFullError", "StoppingError", "describe_error"]


class QueueFullError(Exception):
    """So many requests wait already that no further one is taken."""


class StoppingError(Exception):
    """The server finishes what it has begun and takes nothing new."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error as the client is told of it.

    Args:
        status: of HTTP.
        message: what was expected, what came and what to do.
        code: a word for programs.
        param: the field of the request that is to blame.
        kind: ``type`` in the body.
        headers: further headers of the answer.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    kind: str = "invalid_request_error"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


_OURS = (StorageError, MemoryBudgetError, NativeError, PluginError, HubError, JudgeError, WorkerError)
"""Errors that no change of the request would end."""


def describe_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; nothing of the server's insides where kecore did not expect it."""
    if isinstance(error, ApiError):
        return error
    retry = {"Retry-After": "1"}
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), "queue_full", kind="server_error", headers=retry)
    if isinstance(error, StoppingError):
        return ApiError(503, str(error), "stopping", kind="server_error", headers=retry)
    if isinstance(error, StoreInUseError):
        return ApiError(503, str(error), "ledger_in_use", kind="server_error", headers=retry)
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), "context_length_exceeded", param="messages")
    if isinstance(error, (EditStateError, RequestConflictError)):
        return ApiError(409, str(error), type(error).__name__)
    if isinstance(error, KecoreError) and not isinstance(error, _OURS):
        return ApiError(400, str(error), type(error).__name__)
    if isinstance(error, KecoreError):
        return ApiError(500, str(error), type(error).__name__, kind="server_error")
    return ApiError(500, "the server failed; its log says more", "internal_error", kind="server_error")
