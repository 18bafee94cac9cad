"""Who is let in: the token, the cookie, and no request that another page has forged."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from studio_page import Page

from kecore_studio.security import HEADER, Guard, is_loopback


@pytest.fixture
def stranger(page: Page) -> TestClient:
    """A client without the cookie."""
    return TestClient(page.client.app, follow_redirects=False)


def test_a_stranger_is_refused_and_told_what_to_do(stranger: TestClient) -> None:
    answer = stranger.get("/api/state")
    assert answer.status_code == 401
    assert "kecore studio" in answer.json()["error"]["advice"]
    assert stranger.get("/").status_code == 401
    assert stranger.get("/?token=guess").status_code == 401


def test_the_link_becomes_a_cookie_and_the_token_leaves_the_address(stranger: TestClient) -> None:
    answer = stranger.get("/?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "httponly" in answer.headers["set-cookie"].lower()
    page = stranger.get("/")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]


def test_other_origins_hosts_and_bare_requests_change_nothing(page: Page) -> None:
    forged = page.client.post("/api/undo", headers={"origin": "http://evil.example", HEADER: "1"})
    assert forged.status_code == 403
    assert page.client.post("/api/undo").status_code == 403
    assert page.client.get("/api/state", headers={"host": "evil.example"}).status_code == 421
    assert page.client.post("/api/undo", headers={"origin": "http://testserver", HEADER: "1"}).status_code == 200


def test_a_guard_knows_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("[::1]")
    assert not is_loopback("192.168.1.7")
    assert Guard.make("192.168.1.7", 1).hosts == frozenset()
    assert len(Guard.make("localhost", 1).token) > 20
