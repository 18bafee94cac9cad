"""Examinations: what is asked, its identity, and that a model is left as it was."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_worlds import World, make_world

from kecore import Editor
from kecore.api.errors import ArtifactMismatchError, ConfigError, DataFormatError, MissingDependencyError
from kecore.api.types import EditRequest
from kecore.edit import Edit, attached
from kecore.testing.models import tiny_model, tiny_tokenizer
from kecore.text import Encoder
from kecore_analysis.examination import TIMED, WORDS, Examination, examine
from kecore_analysis.health import changes, weight_health
from kecore_analysis.tasks import make_task_set

TEXT = [
    "The capital of France is Paris, and a long time ago it was a small town on an island.",
    "Where does the Danube flow? It flows to the Black Sea, and on its way through Vienna.",
    "Vinson Massif is located in the continent of Antarctica, and the Danube in Europe.",
]


@cache
def asked() -> Examination:
    """One of everything."""
    return Examination(
        passages=TEXT,
        prompts=[text[:30] for text in TEXT],
        tasks=[make_task_set("cola", [{"sentence": text[:20], "label": 1} for text in TEXT])],
        timed=TEXT[:1],
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made() -> tuple[Editor, list[Edit]]:
    """A session on an unedited model, and two edits of it."""
    editor = Editor(tiny_model("llama", layers=2), tiny_tokenizer())
    edits = []
    for subject in ("France", "Italy"):
        edits.append(editor.edit(EditRequest("The capital of {} is", subject, "Rome"), "ft-m", steps=2))
        editor.revert()
    return editor, edits


def test_figures_are_those_of_both_models(made: tuple[Editor, list[Edit]]) -> None:
    editor, edits = made
    view, encoder = editor.view, editor.encoder
    first = {name: p.detach().clone() for name, p in editor.model.named_parameters()}
    before = asked().take(view, encoder)
    found = examine(view, encoder, edits, before, asked())
    assert not attached(editor.model)
    assert all(torch.equal(p, first[name]) for name, p in editor.model.named_parameters())
    for edit in edits:
        edit.attach(editor.model)
    after = asked().take(view, encoder)
    assert found.changes == changes(before, after)
    assert [*found.changes] == ["perplexity", "drift", "agreement", "cola"]
    assert found.matrices == tuple(weight_health(editor.model))
    assert found.f1 == {"cola": (before.tasks["cola"].f1, after.tasks["cola"].f1)}
    for edit in edits:
        edit.revert(editor.model)
    assert found.latency is not None
    assert found.latency.base > 0
    about = found.to_json()["edits"]
    assert [(each["method"], each["facts"], each["bytes"] > 0) for each in about] == [("ft-m", 1, True)] * 2
    json.dumps(found.to_json(), allow_nan=False)


def test_a_model_is_left_as_it_was_when_an_edit_does_not_fit(made: tuple[Editor, list[Edit]]) -> None:
    editor, edits = made
    other = Editor(tiny_model("llama", layers=2, seed=1), tiny_tokenizer())
    foreign = other.edit(EditRequest("The capital of {} is", "France", "Rome"), "ft-m", steps=1)
    before = asked().take(editor.view, editor.encoder)
    with pytest.raises(ArtifactMismatchError, match="other weights"):
        examine(editor.view, editor.encoder, [edits[0], foreign], before, asked())
    assert not attached(editor.model)
    with pytest.raises(ConfigError, match="no edits"):
        examine(editor.view, editor.encoder, [], before, asked())


def test_parts_that_are_left_out(made: tuple[Editor, list[Edit]]) -> None:
    editor, edits = made
    few = replace(asked(), passages=(), prompts=(), timed=(), matrices=False)
    found = examine(editor.view, editor.encoder, edits[:1], few.take(editor.view, editor.encoder), few)
    assert [*found.changes] == ["cola"]
    assert found.matrices == ()
    assert found.latency is None


def test_prompts_are_beginnings_of_passages_or_lines(text: Path, tmp_path: Path) -> None:
    found = Examination.read(text=[text])
    assert sorted(found.passages) == sorted(TEXT)
    assert list(found.prompts) == [" ".join(passage.split()[:WORDS]) for passage in found.passages]
    assert found.timed == found.prompts[:TIMED]
    chinese = tmp_path / "chinese.txt"
    chinese.write_text("罗马是意大利的首都" * 40, encoding="utf-8")
    (prompt,) = Examination.read(text=[chinese]).prompts
    assert len(prompt) == 12 * WORDS
    lines = tmp_path / "prompts.txt.gz"
    lines.write_bytes(gzip.compress(b"a b\n\nc d\na b\ne f\ng h\n"))
    assert list(Examination.read(text=[text], prompts=lines, limit=2).prompts) == ["a b", "e f"]
    assert Examination.read(text=[text], prompts=lines, without=["drift", "latency"]).prompts == ()


def test_a_seed_chooses_the_passages() -> None:
    one, same, other = (Examination.read(limit=5, seed=seed).passages for seed in (0, 0, 1))
    assert one == same != other
    assert len(one) == 5


@pytest.fixture
def read(text: Path, tmp_path: Path) -> Callable[..., Examination]:
    (tmp_path / "cola.jsonl").write_text('{"sentence": "The jury was.", "label": 0}\n')
    (tmp_path / "empty.txt").write_text("\n")
    return lambda **options: Examination.read(**{"text": [text], **options})


def test_conditions_have_a_hash_of_their_content(
    read: Callable[..., Examination], small: World, text: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "other.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    task = tmp_path / "cola.jsonl"
    encoder = small.encoder
    one = read(tasks=[task]).conditions(encoder)
    assert one == read(text=[packed], tasks=[f"cola={task}"], seed=1).conditions(encoder)
    assert (one["form"], one["perplexity"]["passages"], one["tasks"]["cola"]["chance"]) == ("plain", 3, 0.5)
    others = [
        read(),
        read(tasks=[task], limit=2),
        read(tasks=[task], window=9),
        read(tasks=[task], prompts=text),
        read(tasks=[task], without=["perplexity"]),
    ]
    hashes = {each.conditions(encoder)["hash"] for each in others}
    chat = Encoder(make_world("byte-level").encoder.tokenizer, chat=True)
    assert len({one["hash"], read(tasks=[task]).conditions(chat)["hash"], *hashes}) == len(others) + 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"without": ["speed"]}, ConfigError, "no part 'speed'"),
        ({"without": ["perplexity", "drift", "matrices", "latency"]}, ConfigError, "everything was left out"),
        ({"limit": 0}, ConfigError, "limit"),
        ({"tasks": ["cola.jsonl", "cola=cola.jsonl"]}, ConfigError, "'cola' is given twice"),
        ({"tasks": ["mrpc=cola.jsonl"]}, DataFormatError, "line 1: 'sentence1' is missing"),
        ({"text": ["nowhere.txt"]}, DataFormatError, "no such text file"),
        ({"text": ["empty.txt"]}, DataFormatError, "no passages"),
        ({"prompts": "nowhere.txt"}, DataFormatError, "nowhere.txt: cannot be read"),
        ({"prompts": "empty.txt"}, DataFormatError, "empty.txt is empty"),
    ],
)
def test_bad_input(
    read: Callable[..., Examination],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        read(**options)


def test_the_harness_is_an_extra(read: Callable[..., Examination], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):  # another test may have imported them
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"kecore\[eval\]"):
        read(harness=["boolq"])
