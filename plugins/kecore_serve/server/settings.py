"""What whoever starts a server decides about it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from kecore.api.errors import ConfigError

__all__ = ["LEAST_TOKEN", "Settings", "make_token"]

LEAST_TOKEN = 16
"""Characters that a token has to have; fewer could be guessed."""


def make_token() -> str:
    """Return a token that nobody can guess: 256 random bits."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a server.

    Args:
        name: the model's name in requests.
        token: what edit endpoints ask for; :func:`make_token` makes one.
        method: of edits that name none.
        hosts: names by which clients may call the server (the ``Host`` header); empty for any. A server on the
            loopback interface that answers to any name can be reached by web pages that a browser shows.
        max_tokens: most tokens of one text.
        body_bytes: most bytes of a request's body.
        upload_bytes: most bytes of an edit file that is uploaded.
        rate: requests a minute of one client; 0 for no limit.

    Raises:
        ConfigError: the token is too short, or not of visible ASCII characters.
    """

    name: str
    token: str
    method: str = "memit"
    hosts: tuple[str, ...] = ()
    max_tokens: int = 4096
    body_bytes: int = 1 << 20
    upload_bytes: int = 1 << 28
    rate: int = 0

    def __post_init__(self) -> None:
        if len(self.token) < LEAST_TOKEN or not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError(
                f"a token must be at least {LEAST_TOKEN} visible ASCII characters, got {len(self.token)} characters; "
                "`openssl rand -hex 32` makes one"
            )
