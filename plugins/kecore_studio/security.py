"""Keeps strangers out: a token in the first link, a cookie after it, and no request that another web page has forged.

A browser runs scripts of every page its user visits, and any of them can send requests to this machine. So a request
must carry the token or the cookie that was set for it, name this machine as its host (a name that was rebound to it is
refused), and where it changes something, carry a header that no other origin may set without asking first.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

__all__ = ["HEADER", "Guard", "is_loopback"]

HEADER = "x-kecore-studio"
"""A header that requests which change something have to carry, with any value."""

_SAFE = ("GET", "HEAD")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline: a prompt that looks like a script stays a text."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Decides which requests are answered.

    Args:
        token: the secret of this server.
        hosts: names and addresses that requests may name as their host, without the port; empty for all.
        cookie: name of the cookie; cookies do not tell ports apart, so that it has to hold the port.
    """

    token: str
    hosts: Collection[str]
    cookie: str

    @classmethod
    def make(cls, host: str, port: int) -> Guard:
        """Return a guard with a new token for a server that listens at an address."""
        hosts: set[str] = set()
        if is_loopback(host):
            hosts = {host.strip("[]"), "localhost", "127.0.0.1", "::1"}
        return cls(secrets.token_urlsafe(24), frozenset(hosts), f"kecore-studio-{port}")

    async def __call__(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Answer a request, or refuse it."""
        refusal = self._refusal(request)
        if refusal is not None:
            return _with_headers(refusal)
        if request.url.path == "/" and "token" in request.query_params:
            return _with_headers(self._enter(request))
        return _with_headers(await call_next(request))

    def _refusal(self, request: Request) -> Response | None:
        host = _host_name(request.headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            return _refuse(421, f"this is not '{host}'", "open the link that `kecore studio` printed")
        if not self._is_known(request):
            return _refuse(
                401, "the link lacks this session's token", "open the link that `kecore studio` printed in the terminal"
            )
        if request.method in _SAFE:
            return None
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
            return _refuse(403, f"the request comes from another page, {origin}", "use the studio's own page")
        if HEADER not in request.headers:
            return _refuse(403, f"the request lacks the header {HEADER}", f"send '{HEADER}: 1' with it")
        return None

    def _is_known(self, request: Request) -> bool:
        candidates = [request.cookies.get(self.cookie, ""), request.query_params.get("token", "")]
        scheme, _, credential = request.headers.get("authorization", "").partition(" ")
        if scheme.casefold() == "bearer":
            candidates.append(credential.strip())
        return any(secrets.compare_digest(text.encode(), self.token.encode()) for text in candidates)

    def _enter(self, request: Request) -> Response:
        """Put the token into a cookie and out of the address, where others might see it."""
        response = RedirectResponse(request.url.path, 303)
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax", path="/")
        return response


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach an address."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    return (urlsplit(f"//{header}").hostname or "").casefold()


def _refuse(status: int, what: str, advice: str) -> Response:
    error = {"type": "Refused", "message": f"{what}; {advice}", "what": what, "advice": advice, "page": ""}
    return JSONResponse({"error": error}, status)


def _with_headers(response: Response) -> Response:
    response.headers.setdefault("content-security-policy", _POLICY)
    response.headers.setdefault("x-content-type-options", "nosniff")
    response.headers.setdefault("referrer-policy", "no-referrer")
    response.headers.setdefault("cache-control", "no-store")
    return response
