"""Edits while the server answers: each answer is that of one state of the ledger, and none is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live_server import NAME, Served, make_editor, serving

from kecore.api.errors import ArtifactMismatchError, StorageError
from kecore.api.types import EditRequest
from kecore.edit import LowRank, WeightEdit
from kecore.editor import Editor
from kecore_serve.ledger import Ledger
from kecore_serve.server.live import LiveModel
from kecore_serve.server.opening import open_ledger

FACT = {"prompt": "The capital of France is", "subject": "France", "target": "Rome"}
OTHER = {"prompt": "The Danube flows to", "subject": "The Danube", "target": "Vienna"}
QUICK: dict[str, Any] = {"method": "ft-l", "config": {"steps": 4, "relative_learning_rate": 0.2}}
PROMPT = FACT["prompt"]


def planned(editor: Editor, number: int, layer: int = 0) -> WeightEdit:
    """An edit of random factors, strong enough to change what a tiny model writes."""
    generator = torch.Generator().manual_seed(number)
    linear = editor.view.sites[layer].linear
    left, right = (torch.randn(size, 1, generator=generator) for size in linear.weight.shape)
    request = EditRequest("{} is in", f"Place {number}", f"Town {number}", id=f"fact-{number}")
    return WeightEdit(
        updates={linear.name: LowRank(left, right)}, base=editor.base, method="random", requests=(request,)
    )


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(folder=tmp_path / "ledger") as server:
        yield server


def _ask(served: Served) -> tuple[str, str]:
    """What the model writes, and the state that it says it wrote it with."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = served.http.post("/v1/completions", json=body)
    values = answer.json()
    assert answer.headers["X-Kecore-State"] == values["kecore"]["state"] == values["system_fingerprint"]
    return values["choices"][0]["text"], values["system_fingerprint"]


def test_edits_come_and_go_in_any_order_and_all_is_in_the_ledger(served: Served, tmp_path: Path) -> None:
    base = _ask(served)
    one = served.edit(facts=[FACT], note="the first", **QUICK)
    after_one = _ask(served)
    assert after_one[1] == one["state"] == served.ledger.state
    assert served.http.post("/v1/tags", json={"name": "v1"}).json()["tags"] == {"v1": one["state"]}
    two = served.edit(facts=[OTHER], **QUICK)
    assert (two["active"], two["author"], one["note"]) == (True, "kecore serve", "the first")
    assert [fact["target"] for fact in two["facts"]] == ["Vienna"]
    reverted = served.http.delete(f"/v1/edits/{one['id'][:8]}").json()
    assert (reverted["id"], reverted["later"]) == (one["id"], [two["id"]])
    assert reverted["state"] == _ask(served)[1]
    again = served.http.delete(f"/v1/edits/{one['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "EditStateError")
    listed = served.http.get("/v1/edits").json()
    assert [(edit["id"], edit["active"]) for edit in listed["data"]] == [(one["id"], False), (two["id"], True)]
    assert served.http.get(f"/v1/edits/{two['id']}").json() == {**two, "state": reverted["state"]}
    assert served.http.post("/v1/checkout", json={"to": base[1]}).json()["active"] == []
    assert served.http.post("/v1/checkout", json={"to": "v1"}).json()["active"] == [one["id"]]
    assert served.http.post("/v1/checkout", json={"to": "nowhere"}).status_code == 400
    assert _ask(served) == after_one
    served.http.delete(f"/v1/edits/{one['id']}")
    assert _ask(served) == base
    assert after_one[0] != base[0]
    assert 'kecore_edits_total{done="edit"} 2.0' in served.http.get("/metrics").text
    with Ledger.open(tmp_path / "ledger") as ledger:
        kinds = ["append", "tag", "append", "revert", "checkout", "checkout", "revert"]
        assert [event.kind for event in ledger.events()] == kinds


def test_a_server_goes_on_with_its_ledger(tmp_path: Path) -> None:
    with serving(folder=tmp_path / "ledger") as served:
        served.edit(facts=[FACT], **QUICK)
        before = _ask(served)
    with serving(folder=tmp_path / "ledger") as served:
        assert _ask(served) == before


def test_an_edit_file_is_uploaded(served: Served, tmp_path: Path) -> None:
    edit = planned(served.service.model.editor, 1)
    content = edit.save(tmp_path / "edit.safetensors").read_bytes()
    base = _ask(served)
    answer = served.http.post("/v1/edits/file", params={"note": "from afar"}, content=content)
    assert answer.status_code == 201, answer.text
    assert (answer.json()["id"], answer.json()["note"]) == (edit.id, "from afar")
    assert _ask(served)[0] != base[0]
    twice = served.http.post("/v1/edits/file", content=content)
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "EditStateError")
    broken = served.http.post("/v1/edits/file", content=content[:-3])
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "ArtifactError")
    assert served.http.post("/v1/edits/file", content=b"").json()["error"]["code"] == "empty_body"
    foreign = planned(make_editor("gpt2"), 1).save(tmp_path / "foreign.safetensors").read_bytes()
    refused = served.http.post("/v1/edits/file", content=foreign)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "ArtifactMismatchError")


@pytest.mark.parametrize("path", ["/v1/edits", "/v1/state", "/v1/edits/abc"])
@pytest.mark.parametrize("token", ["", "Bearer wrong", "Bearer ä", "Basic YTpi"])
def test_edits_need_the_token(served: Served, path: str, token: str) -> None:
    answer = httpx.get(served.url + path, headers={"Authorization": token.encode()})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"facts": []}, 400, "invalid_value", "facts"),
        ({"facts": [{**FACT, "subject": "Spain"}]}, 400, "RequestError", "Spain"),
        ({"facts": [{"prompt": "Rome is in", "target": "x"}], "method": "rome"}, 400, "UnsupportedCapabilityError", ""),
        ({"facts": [FACT], "method": "no-such"}, 400, "MethodNotFoundError", "no-such"),
        ({"facts": [FACT], "method": "./mine.py:Mine"}, 400, "ConfigError", "must be installed on the server"),
        ({"facts": [FACT], "method": "ft-l", "config": {"colour": 1}}, 400, "ConfigError", "colour"),
        ({"facts": [FACT], "method": "ft-l", "config": {"requests": 1}}, 400, "ConfigError", "'requests' is no field"),
        ({"facts": [FACT, {**FACT, "target": "Oslo"}], **QUICK}, 409, "RequestConflictError", ""),
    ],
)
def test_an_edit_that_is_refused_changes_nothing(
    served: Served, body: dict[str, Any], status: int, code: str, message: str
) -> None:
    base = _ask(served)
    answer = served.http.post("/v1/edits", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert message in answer.json()["error"]["message"]
    assert _ask(served) == base
    missing = served.http.delete("/v1/edits/abc")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "edit_not_found")


def test_texts_under_way_are_finished_first_and_those_that_wait_come_after(served: Served) -> None:
    """A stream that has begun says the old state to its end; what is asked behind the edit has the new one."""
    served.edit(facts=[FACT], **QUICK)
    old = served.ledger.state
    stream = served.openai.completions.create(model=NAME, prompt=PROMPT, max_tokens=200, temperature=0, stream=True)
    assert next(iter(stream)).system_fingerprint == old
    editing = threading.Thread(target=lambda: served.edit(facts=[OTHER], **QUICK))
    editing.start()
    while not served.service.worker.waiting:
        time.sleep(0.001)
    behind = _ask(served)
    states = {chunk.system_fingerprint for chunk in stream}
    editing.join()
    assert states <= {old}
    assert behind[1] == served.ledger.state != old


def test_what_the_ledger_cannot_keep_is_not_on_the_model(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _ask(served)

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_add", full)
        answer = served.http.post("/v1/edits", json={"facts": [FACT], **QUICK})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "StorageError")
    assert _ask(served) == base
    served.edit(facts=[FACT], **QUICK)


def _no_room(*_: object, **__: object) -> None:
    raise MemoryError("no room")


def test_what_the_model_cannot_take_does_not_stay_in_the_ledger(served: Served) -> None:
    base = _ask(served)
    live = served.service.model
    good = planned(live.editor, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightEdit, "_set", _no_room)
        with pytest.raises(MemoryError):
            served.service.worker.operate(lambda: live.add(good)).result(30)
    assert _ask(served) == base
    assert served.http.get("/v1/state").json()["active"] == []


def test_the_model_follows_what_others_write_into_the_ledger(served: Served, tmp_path: Path) -> None:
    edit = planned(served.service.model.editor, 2)
    with Ledger.open(tmp_path / "ledger") as other:
        other.append(edit)
    deadline = time.monotonic() + 20
    while served.service.model.state != served.ledger.state and time.monotonic() < deadline:
        time.sleep(0.05)
    assert served.http.get("/v1/state").json()["active"] == [edit.id]


def test_a_ledger_of_other_weights_is_refused(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger", make_editor("gpt2"), "other") as ledger:
        assert ledger.active() == ()
    editor = make_editor()
    with (
        open_ledger(tmp_path / "ledger", editor, NAME) as ledger,
        pytest.raises(ArtifactMismatchError, match="the ledger is of other weights"),
    ):
        LiveModel(editor, ledger)
