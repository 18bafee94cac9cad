"""A client that speaks to the studio as its page does."""

from __future__ import annotations

import time
from typing import Any

from fastapi.testclient import TestClient

from kecore_studio.security import HEADER
from kecore_studio.session import Session


class Page:
    """A client that speaks as the page does.

    Args:
        client: sends the requests.
        session: the session behind the server.
    """

    def __init__(self, client: TestClient, session: Session) -> None:
        self.client, self.session = client, session

    @property
    def state(self) -> dict[str, Any]:
        """What the page shows."""
        return self.client.get("/api/state").json()

    def send(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Send a request that has to succeed, and return its JSON."""
        answer = self.client.request(method, path, headers={HEADER: "1"}, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, method: str, path: str, **options: Any) -> dict[str, str]:
        """Send a request that has to be refused, and return the error."""
        answer = self.client.request(method, path, headers={HEADER: "1"}, **options)
        assert answer.status_code >= 400, answer.text
        return answer.json()["error"]

    def finish(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Send a request that begins a job, and return the job once it has ended."""
        return self.wait(self.send(method, path, **options)["job"]["id"])

    def wait(self, id: str, seconds: float = 60.0) -> dict[str, Any]:
        """Return a job once it has ended."""
        end = time.monotonic() + seconds
        while True:
            job = self.client.get(f"/api/jobs/{id}").json()["job"]
            if job["state"] in ("done", "failed", "cancelled"):
                return job
            assert time.monotonic() < end, f"job {id} did not end: {job}"
            time.sleep(0.01)
