"""The session behind the page: facts are read, edited, seen, switched, undone; nothing is left half-edited."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from studio_page import Page

from kecore import load_edit
from kecore.edit import attached

ROME = {"prompt": "{} is in the city of", "subject": "The tower", "target": "Rome", "ground_truth": "Paris"}
ANNA = {"prompt": "The mother tongue of Anna is", "subject": "Anna", "target": "French"}
QUICK = {"method": "ft-m", "config": {"steps": 4, "learning_rate": 0.1}}

pytestmark = pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")


def edit(page: Page, fact: dict[str, str]) -> str:
    """Edit a fact; return the edit's name."""
    page.send("POST", "/api/facts/form", json=fact)
    job = page.finish("POST", "/api/edit", json=QUICK)
    assert job["state"] == "done", job["error"]
    return job["result"]["edit"]


def logits(page: Page) -> torch.Tensor:
    model = page.session._opened.editor.model
    with torch.no_grad():
        return model(torch.tensor([[5, 9, 33]])).logits


def test_a_form_is_read_as_a_fact_with_its_probes(page: Page) -> None:
    fields = {**ROME, "paraphrases": "The tower stands in\n\nOne sees the tower in", "neighbours": "The bridge is in"}
    facts = page.send("POST", "/api/facts/form", json=fields)["facts"]
    assert facts["facts"][0]["prompt"] == "The tower is in the city of"
    assert (facts["facts"][0]["paraphrases"], facts["facts"][0]["neighbours"]) == (2, 1)
    assert page.state["facts"] == facts


def test_a_wrong_file_is_an_error_that_names_the_way_out(page: Page) -> None:
    error = page.refused("POST", "/api/facts/file?name=photo.png", content=b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert error["type"] == "DataFormatError"
    assert "an image" in error["what"]
    assert page.state["facts"] is None


def test_edits_are_switched_and_undone_and_the_model_comes_back_bit_for_bit(page: Page) -> None:
    base = logits(page)
    first = edit(page, ROME)
    with_first = logits(page)
    second = edit(page, ANNA)
    with_both = logits(page)
    assert not torch.equal(base, with_first)
    assert [item["id"] for item in page.state["stack"]] == [first, second]

    page.finish("PUT", "/api/edits/on", json={"on": [second]})
    assert [item["on"] for item in page.state["stack"]] == [False, True]
    page.finish("PUT", "/api/edits/on", json={"on": []})
    assert torch.equal(logits(page), base)
    page.finish("PUT", "/api/edits/on", json={"on": [first, second]})
    assert torch.equal(logits(page), with_both)

    page.finish("DELETE", f"/api/edits/{second}")
    assert torch.equal(logits(page), with_first)
    page.finish("POST", "/api/undo")
    assert torch.equal(logits(page), with_both)
    assert page.state["redo"] == "take an edit off"
    page.finish("POST", "/api/redo")
    assert torch.equal(logits(page), with_first)


def test_an_edit_is_downloaded_and_opened_again(page: Page, tmp_path: Path) -> None:
    first = edit(page, ROME)
    with_first = logits(page)
    content = page.client.get(f"/api/edits/file?id={first}").content
    file = tmp_path / "edit.safetensors"
    file.write_bytes(content)
    assert load_edit(file).id == first
    again = page.finish("POST", "/api/edits/file?name=edit.safetensors", content=content)
    assert "in the list already" in again["error"]["message"]
    page.finish("DELETE", f"/api/edits/{first}")
    opened = page.finish("POST", "/api/edits/file?name=mine.safetensors", content=content)
    assert opened["state"] == "done"
    assert page.state["stack"][0]["source"] == "mine.safetensors"
    assert torch.equal(logits(page), with_first)


def test_both_models_are_asked(page: Page) -> None:
    edit(page, {**ROME, "paraphrases": "One sees the tower in", "neighbours": "The bridge is in"})
    prompt = "The tower is in the city of"
    job = page.finish("POST", "/api/ask", json={"prompt": prompt, "target": "Rome", "tokens": 4})
    seen: dict[str, Any] = job["result"]
    tokens = seen["distributions"]["tokens"]
    assert [token["target"] for token in tokens].count(True) == 1
    assert any(abs(token["before"] - token["after"]) > 0.01 for token in tokens)
    kinds = [answer["kind"] for answer in seen["answers"]]
    assert kinds == ["fact", "paraphrase", "neighbour", *["canary"] * len(page.state["canaries"])]
    fact = seen["answers"][0]
    assert fact["after"]["probability"] > fact["before"]["probability"]
    page.finish("POST", "/api/undo")
    same = page.finish("POST", "/api/ask", json={"prompt": prompt, "tokens": 4})["result"]
    assert same["before"] == same["after"] == seen["before"]
    assert same["distributions"]["divergence"] == 0


def test_a_refused_edit_and_a_cancelled_one_leave_everything_as_it_was(page: Page) -> None:
    base = logits(page)
    page.send("POST", "/api/facts/form", json=ROME)
    refused = page.finish("POST", "/api/edit", json={"method": "ft-m", "config": {"steps": -1}})
    assert refused["state"] == "failed"
    assert refused["error"]["type"] == "ConfigError"

    started, go_on = threading.Event(), threading.Event()

    def wait(_job: Any) -> None:
        started.set()
        go_on.wait(10)

    blocking = page.session.jobs.submit("test", "Blocking", wait)
    started.wait(10)
    waiting = page.send("POST", "/api/edit", json=QUICK)["job"]
    assert page.send("DELETE", f"/api/jobs/{waiting['id']}")["job"]["state"] == "cancelled"
    running = page.send("POST", "/api/edit", json={"method": "ft-m", "config": {"steps": 100000, "stop_loss": 0}})[
        "job"
    ]
    go_on.set()
    page.wait(blocking.id)
    while page.client.get(f"/api/jobs/{running['id']}").json()["job"]["stage"] != "tune":
        pass
    page.send("DELETE", f"/api/jobs/{running['id']}")
    assert page.wait(running["id"])["state"] == "cancelled"
    assert torch.equal(logits(page), base)
    assert attached(page.session._opened.editor.model) == ()
    assert page.state["stack"] == []


def test_a_plan_says_what_an_edit_takes_and_changes_nothing(page: Page) -> None:
    page.send("POST", "/api/facts/form", json=ROME)
    plan = page.finish("POST", "/api/plan", json=QUICK)["result"]
    assert (plan["facts"], plan["statistics"]) == (1, "not needed")
    refused = page.finish("POST", "/api/plan", json={"method": "mend"})
    assert refused["error"]["type"] == "UnsupportedCapabilityError"
    assert page.state["stack"] == []


def test_a_fact_is_traced_and_the_model_examined(page: Page) -> None:
    edit(page, ROME)
    body = {"prompt": "The tower is in the city of", "subject": "The tower"}
    trace = page.finish("POST", "/api/trace", json=body)["result"]
    assert len(trace["effects"]["mlp"]) == len(trace["tokens"])
    assert len(trace["effects"]["mlp"][0]) == page.state["model"]["layers"]
    wrong = page.finish("POST", "/api/trace", json={**body, "subject": "The bridge"})
    assert wrong["error"]["type"] == "RequestError"
    health = page.finish("POST", "/api/health", json={"passages": 2})["result"]
    assert health["changes"]["drift"]["after"] > 0
    assert health["matrices"][0]["change"] > 0
