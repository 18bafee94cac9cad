"""What the endpoints of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from fastapi import Request

from kecore.text import Encoder
from kecore_serve.server.errors import ApiError
from kecore_serve.server.live import LiveModel
from kecore_serve.server.metrics import Metrics
from kecore_serve.server.settings import Settings
from kecore_serve.server.worker import Worker

__all__ = ["STATE_HEADER", "Service", "service_of"]

STATE_HEADER = "X-Kecore-State"
"""The header that says which state of the edits an answer was made with."""


@dataclass(eq=False)
class Service:
    """A served model.

    Args:
        model: the model with its edits.
        worker: the thread that runs it.
        settings: of the server.
        metrics: its figures.
        created: seconds since the epoch at which it was started.
    """

    model: LiveModel
    worker: Worker
    settings: Settings
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.encoder.tokenizer

    @cached_property
    def plain_encoder(self) -> Encoder:
        """Makes tokens of prompts as they are, also where facts are edited in the chat template."""
        return Encoder(self.tokenizer)

    def check_name(self, name: str) -> None:
        """Refuse requests for another model.

        Raises:
            ApiError: 404, with the name that is served.
        """
        if name != self.settings.name:
            message = f"there is no model '{name[:100]}' here; this server has '{self.settings.name}'"
            raise ApiError(404, message, "model_not_found", param="model")


def service_of(request: Request) -> Service:
    """Return the service of the application that was asked."""
    return cast(Service, request.app.state.service)
