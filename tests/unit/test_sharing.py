"""Edits, statistics and trained editors on the hub, through its own client and a server that stands in for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, running_hub
from typer.testing import CliRunner

from kecore import Corpus, Editor, EditRequest, KeyStatistics, ModelView, TrainedEditor, collect_statistics, load_edit
from kecore.api import errors
from kecore.api.identity import Fingerprint
from kecore.cli import app
from kecore.edit import LowRank, WeightEdit
from kecore.hub import HubReference, artifact_file
from kecore.sharing import find_artifact, pull, push
from kecore.statistics_source import StatisticsSource
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

# The hub's library sends files in a way that its HTTP client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REQUEST = EditRequest("{} is in | the *city* of", "The <b>tower</b>", "Rome", "Paris")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    constants = huggingface_hub.constants
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def edit(model: Any) -> WeightEdit:
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("down_proj.weight"))
    rows, columns = parameter.shape
    return WeightEdit(
        base=Fingerprint.of(ModelView.of(model).identity(), torch.float32),
        method="memit",
        config={"layers": [0], "steps": 20},
        requests=(REQUEST,),
        updates={name: LowRank(torch.ones(rows, 1), torch.full((columns, 1), 0.1))},
    )


def write_result(folder: Path, **values: Any) -> None:
    result = {
        "model": "meta-llama/Llama-3.2-1B",
        "n": 1,
        "dtype": "float32",
        "device": "cpu",
        "scores_before": {"edit_success": 0.0, "strict_accuracy": None},
        "scores": {"edit_success": 1.0, "strict_accuracy": None},
        "protocol": {"edits": "single", "form": "plain", "hash": "abc123"},
        "versions": {"kecore": "0.1.0"},
        "facts": str(folder / "secret" / "facts.jsonl"),
        "edit_path": str(folder / "edit.safetensors"),
        "result_path": str(folder / "result.json"),
        "warnings": [f"read {folder / 'x'}"],
        "statistics": {"sources": [str(folder / "text.txt")]},
    }
    (folder / "result.json").write_text(json.dumps({**result, **values}))


@pytest.fixture
def folder(tmp_path: Path, edit: WeightEdit) -> Path:
    edit.save(tmp_path / "my-edit")
    write_result(tmp_path / "my-edit")
    return tmp_path / "my-edit"


def test_an_edit_is_shared_with_a_card_and_used_by_its_name(
    hub: Hub, folder: Path, model: Any, edit: WeightEdit, tmp_path: Path
) -> None:
    pushed = push(folder, "hf:someone/tower")
    assert pushed.private
    assert hub.repositories["someone/tower"].private
    files = hub.files("someone/tower")
    assert sorted(files) == ["README.md", "edit.safetensors", "result.json"]
    assert str(tmp_path).encode() not in b"".join(files.values())
    head, _, body = files["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(head)
    assert values["library_name"] == "kecore"
    assert values["base_model"] == "meta-llama/Llama-3.2-1B"
    assert {"kecore", "kecore-edit", "memit"} <= set(values["tags"])
    assert "license" not in values
    for text in (
        r"| The &lt;b&gt;tower&lt;/b&gt; is in \| the \*city\* of | Rome | Paris |",
        "| edit success | 0 | 1 |",
        '- hash: `"abc123"`',
        "kecore chat meta-llama/Llama-3.2-1B --edit hf:someone/tower",
        'load_edit("hf:someone/tower")',
        edit.base.digests["float32"][:12],
    ):
        assert text in body, text
    before = model.get_input_embeddings().weight.sum()
    loaded = load_edit("hf:someone/tower")
    loaded.attach(model)
    loaded.revert(model)
    assert model.get_input_embeddings().weight.sum() == before
    with pytest.raises(errors.ArtifactMismatchError, match="made for other weights"):
        load_edit("hf:someone/tower").attach(tiny_model("llama", seed=5))
    pulled = pull("hf:someone/tower", tmp_path / "pulled")
    assert sorted(path.name for path in (tmp_path / "pulled").iterdir()) == [
        "README.md", "edit.safetensors", "hub.json", "result.json",
    ]  # fmt: skip
    origin = json.loads((tmp_path / "pulled" / "hub.json").read_text())
    assert origin["commit"] == pushed.reference.revision == pulled.reference.revision
    assert (origin["repository"], origin["sha256"]) == ("someone/tower", pulled.sha256)
    assert load_edit(tmp_path / "pulled").requests == (REQUEST,)


def test_revisions_are_pinned(hub: Hub, folder: Path, edit: WeightEdit, tmp_path: Path) -> None:
    first = push(folder, "hf:someone/tower").reference
    replace(edit, seed=7).save(folder)
    push(folder, "hf:someone/tower")
    push(folder, "hf:someone/tower@trial/of/seven/inside")
    assert load_edit("hf:someone/tower").seed == 7
    assert load_edit(str(first)).seed == 0
    assert pull(str(first), tmp_path / "first").shared.content.seed == 0
    assert load_edit(Path("hf:someone/tower@trial/of/seven/inside")).seed == 7
    assert find_artifact("hf:someone/tower@trial/of/seven/inside/edit.safetensors").is_file()
    inside = pull("hf:someone/tower@trial/of/seven/inside", tmp_path / "inside")
    assert inside.file.parent == tmp_path / "inside"


def test_cards_stay_and_publicity_is_asked_for(hub: Hub, folder: Path) -> None:
    hub.commit("someone/public", {"README.md": b"mine"}, private=False)
    with pytest.raises(errors.ConfigError, match=r"can be read by everybody; say that you want that \(--public"):
        push(folder, "hf:someone/public")
    assert list(hub.files("someone/public")) == ["README.md"]
    pushed = push(folder, "hf:someone/public", private=False)
    assert (pushed.kept_card, pushed.private) == (True, False)
    assert hub.files("someone/public")["README.md"] == b"mine"
    assert not push(folder, "hf:someone/public", private=False, replace_card=True).kept_card
    assert b"library_name: kecore" in hub.files("someone/public")["README.md"]


def test_statistics_go_round(hub: Hub, model: Any, tmp_path: Path) -> None:
    text = tmp_path / "private" / "text.txt"
    text.parent.mkdir()
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, Anna says." for i in range(60)))
    view = ModelView.of(model)
    statistics = collect_statistics(view, Encoder(tiny_tokenizer()), Corpus.of(text), [0, 1], tokens=400)
    push(statistics.save(tmp_path / "stats"), "hf:someone/stats", base_model="a/b")
    files = hub.files("someone/stats")
    assert sorted(files) == ["README.md", "statistics.safetensors"]
    assert b"private/text.txt" not in files["statistics.safetensors"]
    assert b"kecore edit a/b --stats hf:someone/stats" in files["README.md"]
    again = KeyStatistics.load("hf:someone/stats")
    assert again.sources == ("text.txt",)
    assert again.moment(statistics.sites[1]).equal(statistics.moment(statistics.sites[1]))
    source = StatisticsSource(Path("hf:someone/stats"))
    source.check()
    editor = Editor(model, tiny_tokenizer(), statistics=source)
    assert editor.provide_statistics([0, 1]).layers == (0, 1)
    assert Editor(model, tiny_tokenizer(), statistics="hf:someone/stats").statistics is not None
    with pytest.raises(errors.StatisticsMismatchError, match="collected on other weights"):
        Editor(tiny_model("llama", seed=5), tiny_tokenizer(), statistics="hf:someone/stats")
    assert find_artifact("hf:someone/stats").name == "statistics.safetensors"
    with pytest.raises(errors.HubError, match=r"edit\.safetensors cannot be had .* look up its files on the hub"):
        load_edit("hf:someone/stats")


def test_trained_editors_go_round(hub: Hub, edit: WeightEdit, tmp_path: Path) -> None:
    record = {
        "data": "abc", "records": 3, "schedule": {"steps": 5}, "best_step": 5.0, "curve": [{"step": 5.0, "loss": 0.5}],
    }  # fmt: skip
    trained = TrainedEditor(
        tensors={"x": torch.ones(3)}, method="mend", config={"rank": 4}, base=edit.base, record=record
    )
    trained.save(tmp_path / "trained")
    push(tmp_path / "trained", "hf:someone/mend")
    assert b"kecore edit MODEL --method mend --trained hf:someone/mend" in hub.files("someone/mend")["README.md"]
    assert TrainedEditor.load("hf:someone/mend").config == {"rank": 4}
    assert isinstance(pull("hf:someone/mend", tmp_path / "pulled").shared.content, TrainedEditor)


def test_nothing_is_sent_by_a_stranger(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(errors.HubError, match="log in with `hf auth login`"):
        push(folder, "hf:someone/tower")
    monkeypatch.undo()
    assert not hub.asked


def test_refusals_of_the_hub(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse_commits = True
    with pytest.raises(errors.HubError, match="log in with `hf auth login`"):
        push(folder, "hf:someone/tower")
    with pytest.raises(errors.HubError, match="check the name"):
        pull("hf:someone/nothing", tmp_path / "pulled")
    with pytest.raises(errors.HubError, match=r"holds none of .* it has no files"):
        pull("hf:someone/tower", tmp_path / "pulled")
    with pytest.raises(errors.HubError, match="look up its branches"):
        load_edit("hf:someone/tower@nowhere")
    hub.refuse_commits = False
    push(folder, "hf:someone/tower")
    hub.damaged = True
    with pytest.raises(errors.ArtifactError, match="expected SHA-256"):
        pull("hf:someone/tower", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert not list(tmp_path.glob(".pulled*"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    with pytest.raises(errors.HubError, match="if it is private, log in with `hf auth login`"):
        load_edit("hf:someone/tower")


def test_no_network(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, "hf:someone/tower")
    load_edit("hf:someone/tower")
    constants = huggingface_hub.constants
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    with pytest.raises(errors.HubError, match="check the name and the connection"):
        push(folder, "hf:someone/tower")
    with pytest.raises(errors.HubError, match="check the name and the connection"):
        pull("hf:someone/tower", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert load_edit("hf:someone/tower").requests == (REQUEST,)  # from the cache of the hub's library


def test_bad_references(folder: Path, tmp_path: Path) -> None:
    for bad in ("someone/tower", "hf:someone", "hf:a/b:config", "hf:a/b/edit.safetensors"):
        with pytest.raises(errors.ConfigError, match="expected hf:OWNER/NAME"):
            push(folder, bad)
    with pytest.raises(errors.ConfigError, match="is for data sets"):
        artifact_file("hf:a/b:config", "edit.safetensors")
    with pytest.raises(errors.ConfigError, match="expected hf:OWNER/NAME"):
        pull("a/b", tmp_path / "x")
    assert str(HubReference.parse("hf:a/b@v1/c/d")) == "hf:a/b@v1/c/d"


def test_commands(hub: Hub, folder: Path, tmp_path: Path) -> None:
    run = CliRunner()
    out = str(tmp_path / "pulled")
    pushed = run.invoke(app, ["push", str(folder), "hf:someone/tower", "--json"])
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["private"]
    assert run.invoke(app, ["stats", "pull", "hf:someone/tower", "--out", out]).exit_code == 0
    assert run.invoke(app, ["pull", "hf:someone/tower", "--out", out]).exit_code == 2
    shown = run.invoke(app, ["inspect", "hf:someone/tower", "--json"])
    assert json.loads(shown.stdout)["method"] == "memit"
