"""Sessions on a ledger: day two goes on where day one ended, bit for bit, and what was taken back never was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kecore import Corpus, Editor, EditRequest
from kecore.api.errors import ArtifactError, ArtifactMismatchError, EditStateError
from kecore.edit import attached
from kecore.models import load_model, save_model
from kecore.statistics import KeyStatistics, collect_statistics
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_serve.ledger import Ledger
from kecore_serve.replay import replay_without

PARIS = EditRequest("{} is in the city of", "The tower", "Rome", "Paris")
COOK = EditRequest("The mother tongue of {} is", "Anna", "French", "English")
OSLO = EditRequest("A river in {}:", "Oslo", "Danube")
FACTS = (PARIS, COOK, OSLO)
FAST: dict[str, Any] = {"steps": 3, "contexts": 1, "context_tokens": 2, "layers": [1, 2]}
SETTINGS: dict[str, dict[str, Any]] = {
    "memit": FAST,
    "alphaedit": FAST,
    "ote-se": FAST,
    "ultraedit": {"layers": [1, 2]},
    "grace": {"steps": 3},
}

Open = Callable[[], Editor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tiny_model("llama"), tiny_tokenizer(), tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def statistics(base: Path, tmp_path_factory: pytest.TempPathFactory) -> KeyStatistics:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(100)))
    editor = Editor.from_pretrained(str(base), device="cpu", statistics=None)
    return collect_statistics(editor.view, editor.encoder, Corpus.of(text), [1, 2], tokens=1000)


@pytest.fixture
def fresh(base: Path, statistics: KeyStatistics) -> Open:
    """Opens a session on the base as a new process would: nothing is carried over."""

    def open_session() -> Editor:
        loaded = load_model(str(base), device="cpu")
        return Editor(loaded.model, loaded.tokenizer, statistics=statistics, progress=None)

    return open_session


@pytest.fixture
def ledger(base: Path, fresh: Open, tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger", str(base), fresh().base)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: nn.Module, second: nn.Module) -> bool:
    others = weights(second)
    return all(torch.equal(data, others[name]) for name, data in weights(first).items())


def same_state(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", list(SETTINGS))
def test_days_in_processes_of_their_own_equal_one_session(method: str, fresh: Open, ledger: Ledger) -> None:
    session = fresh()
    for fact in FACTS:
        session.edit(fact, method, **SETTINGS[method])
    for fact in FACTS:
        day = fresh()
        day.follow(Ledger.open(ledger.folder))
        day.edit(fact, method, **SETTINGS[method])
    assert [entry.method for entry in ledger.active()] == [method] * 3
    replayed = fresh()
    replayed.follow(ledger)
    assert same(session.model, replayed.model)
    assert same_state(session.remembered(method), replayed.remembered(method))
    prompts = [fact.text for fact in FACTS]
    assert [session.ask(prompt, max_new_tokens=3) for prompt in prompts] == [
        replayed.ask(prompt, max_new_tokens=3) for prompt in prompts
    ]


@pytest.mark.parametrize("method", ["alphaedit", "ultraedit"])
def test_an_edit_taken_back_was_never_made(method: str, fresh: Open, ledger: Ledger) -> None:
    with fresh() as editor:
        editor.follow(ledger)
        for fact in FACTS:
            editor.edit(fact, method, **SETTINGS[method])
    first, second, third = ledger.active()
    without = fresh()
    without.edit(PARIS, method, **SETTINGS[method])
    without.edit(OSLO, method, **SETTINGS[method])

    session = fresh()
    replay = replay_without(ledger, second.id[:6], session)
    assert replay.ids == (second.id,)
    assert [entry.id for entry in ledger.active()] == [first.id, replay.replaced[third.id]]
    again = fresh()
    again.follow(Ledger.open(ledger.folder))
    assert same(without.model, session.model)
    assert same(without.model, again.model)
    assert same_state(without.remembered(method), again.remembered(method))


def test_one_fact_of_a_batch_is_taken_back(fresh: Open, ledger: Ledger) -> None:
    editor = fresh()
    editor.follow(ledger)
    batch = editor.edit([PARIS, COOK], "alphaedit", **FAST)
    with pytest.raises(ArtifactError, match="has no fact 'nothing'"):
        ledger.take_back(batch.id, fresh, facts=["nothing"])
    gone = ledger.take_back(batch.id, fresh, facts=[COOK.id])
    assert ledger.active_ids() == (gone.replaced[batch.id],)
    alone = fresh()
    alone.edit(PARIS, "alphaedit", **FAST)
    editor.synchronise()
    assert same(alone.model, editor.model)


def test_nothing_is_planned_where_nothing_was_planned_with_it(fresh: Open, ledger: Ledger) -> None:
    editor = fresh()
    editor.follow(ledger)
    last = editor.edit(PARIS, "ft-m", steps=1)

    def never() -> Editor:
        raise AssertionError("a model was loaded")

    assert ledger.take_back(last.id, never).is_exact
    assert ledger.active() == ()


def test_the_last_edit_comes_off_as_if_never_made(fresh: Open, ledger: Ledger) -> None:
    editor = fresh()
    editor.follow(ledger)
    editor.edit(PARIS, "alphaedit", **FAST)
    weights_before, state_before = weights(editor.model), editor.remembered("alphaedit")
    editor.edit(COOK, "alphaedit", **FAST)
    editor.revert()
    assert all(torch.equal(data, weights_before[name]) for name, data in weights(editor.model).items())
    assert same_state(editor.remembered("alphaedit"), state_before)
    assert [event.kind for event in ledger.events()] == ["append", "append", "revert"]


def test_a_session_takes_in_what_another_wrote(fresh: Open, ledger: Ledger) -> None:
    editor, other = fresh(), fresh()
    editor.follow(ledger)
    other.follow(Ledger.open(ledger.folder))
    first = other.edit(PARIS, "ft-m", steps=3)
    assert attached(editor.model) == ()
    editor.edit(COOK, "ft-m", steps=3)
    assert [edit.id for edit in attached(editor.model)] == list(ledger.active_ids())
    editor.withdraw(first.id[:4])
    assert other.synchronise()
    assert not other.synchronise()
    assert same(editor.model, other.model)
    assert [edit.requests for edit in attached(other.model)] == [(COOK,)]


def test_leaving_a_session_leaves_the_ledger(fresh: Open, ledger: Ledger) -> None:
    with fresh() as editor:
        untouched = weights(editor.model)
        editor.follow(ledger)
        editor.edit(PARIS, "ft-m", steps=3)
        assert not all(torch.equal(data, untouched[name]) for name, data in weights(editor.model).items())
    assert all(torch.equal(data, untouched[name]) for name, data in weights(editor.model).items())
    assert len(ledger.active()) == 1
    assert editor.history == ()


def test_a_ledger_that_cannot_be_written_leaves_the_model(
    fresh: Open, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = fresh()
    editor.follow(ledger)
    untouched = weights(editor.model)

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(ledger._database, "add", fail)
    with pytest.raises(OSError, match="no space"):
        editor.edit(PARIS, "ft-m", steps=3)
    monkeypatch.undo()
    assert all(torch.equal(data, untouched[name]) for name, data in weights(editor.model).items())
    assert (ledger.active(), editor.history) == ((), ())
    editor.edit(PARIS, "ft-m", steps=3)
    assert len(ledger.active()) == 1


def test_another_model_another_type_and_a_second_ledger_are_refused(fresh: Open, ledger: Ledger, base: Path) -> None:
    other = Editor(tiny_model("llama", seed=1), tiny_tokenizer(), statistics=None)
    with pytest.raises(ArtifactMismatchError, match="other weights than this model"):
        other.follow(ledger)
    rounded = Editor.on(ledger.folder, device="cpu", dtype="bfloat16", statistics=None)
    with pytest.raises(ArtifactMismatchError, match="stored in float32"):
        rounded.edit(PARIS, "ft-m", steps=3)
    editor = fresh()
    editor.follow(ledger)
    with pytest.raises(EditStateError, match="already"):
        editor.follow(ledger)
    with pytest.raises(EditStateError, match="follows no ledger"):
        fresh().synchronise()
