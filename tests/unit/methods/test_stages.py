"""Stages named on a configuration line do what the methods of their names do, on whatever method carries the line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from kecore import Corpus, Editor, EditRequest, KeyStatistics, WeightEdit
from kecore.edit import Dense, LowRank
from kecore.editing.keys import KeyPass
from kecore.errors import ConfigError, KecoreWarning
from kecore.testing import tiny_model, tiny_tokenizer

FACTS = [
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("A river in {}:", "France", "Danube"),
]
FAST: dict[str, Any] = {"steps": 4, "contexts": 1, "context_tokens": 2, "layers": [0, 1, 2]}


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """A session whose tests take their edits off again."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(400)))
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    editor.statistics = KeyStatistics.collect(editor.view, editor.encoder, Corpus.of(text), range(4), tokens=4000)
    return editor


def planned(editor: Editor, method: str, **config: Any) -> WeightEdit:
    with editor, warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        edit = editor.edit(FACTS, method, **{**FAST, **config})
    assert isinstance(edit, WeightEdit)
    return edit


def same(a: WeightEdit, b: WeightEdit) -> bool:
    return list(a.updates) == list(b.updates) and all(
        torch.equal(update.matrix(), b.updates[name].matrix()) for name, update in a.updates.items()
    )


@pytest.mark.parametrize("method", ["rect", "prune"])
def test_a_method_is_memit_with_a_stage(editor: Editor, method: str) -> None:
    strong = {"prune_base": 50.0, "clamp": 100.0}
    own, staged = planned(editor, method, **strong), planned(editor, "memit", stages=method, **strong)
    assert same(own, staged)
    assert (own.method, staged.method) == (method, "memit")


@pytest.mark.parametrize(("method", "base"), [("sphere", "alphaedit"), ("simie", "rome")])
def test_a_stage_makes_its_own_method_of_another(editor: Editor, method: str, base: str) -> None:
    own, staged, plain = planned(editor, method), planned(editor, base, stages=method), planned(editor, base)
    assert same(own, staged)
    assert not same(own, plain)


def test_a_lone_value_is_its_own_anchor_and_the_next_ones_keep_it(editor: Editor) -> None:
    with editor, warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        plain = editor.edit(FACTS[:1], "memit", **FAST)
        editor.revert()
        first = editor.edit(FACTS[:1], "memit", stages="nas", **FAST)
        second = editor.edit(FACTS[1:], "memit", stages="nas", **FAST)
    assert isinstance(plain, WeightEdit)
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    for name, update in plain.updates.items():
        torch.testing.assert_close(first.updates[name].matrix(), update.matrix(), rtol=1e-4, atol=1e-6)
    assert torch.equal(first.state["nas/anchor"], second.state["nas/anchor"])


def test_evoedit_does_not_touch_the_keys_of_earlier_edits(editor: Editor) -> None:
    """What is left of a second edit at the first one's keys is what AlphaEdit leaves there, or a small part of it."""
    left: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        for method, config in (("alphaedit", {}), ("evoedit", {"occupied": 1e-6})):
            with editor:
                editor.edit(FACTS[:1], method, **FAST, **config)
                edit = editor.edit(FACTS[1:], method, **FAST, **config)
            assert isinstance(edit, WeightEdit)
            prefix = {"alphaedit": "keys/2/0", "evoedit": "past/2/keys/0"}[method]
            earlier = edit.state[prefix].double()
            update = list(edit.updates.values())[-1].matrix().double()
            left[method] = float((update @ earlier).norm() / (update.norm() * earlier.norm()))
    assert left["alphaedit"] > 1e-3
    assert left["evoedit"] < 1e-5


def test_evoedit_lets_go_of_a_subject_that_is_edited_again(editor: Editor) -> None:
    with editor, warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        first = editor.edit(FACTS[1:2], "evoedit", **FAST)
        again = editor.edit(FACTS[2:], "evoedit", **FAST)
    assert isinstance(first, WeightEdit)
    assert isinstance(again, WeightEdit)
    for name, update in again.updates.items():
        assert update.norm() > 0.1 * first.updates[name].norm()


def test_forward_replay_optimises_for_the_first_layer(editor: Editor) -> None:
    """With one layer there is nothing to replay: MEMIT-FE is MEMIT. With several, its values are the first one's."""
    one = {"layers": [1]}
    (own,), (memit,) = (planned(editor, method, **one).updates.values() for method in ("memit-fe", "memit"))
    torch.testing.assert_close(own.matrix(), memit.matrix())
    several, first = planned(editor, "memit-fe"), planned(editor, "memit", layers=[0])
    assert several.notes["value_loss"] == first.notes["value_loss"]
    name, *_ = first.updates
    torch.testing.assert_close(several.updates[name].matrix(), first.updates[name].matrix())
    assert len(several.updates) == 3


def test_eamet_turns_values_towards_their_keys_geometry(editor: Editor) -> None:
    free = {"align_divergence": 0.0, "align_squares": 0.0, "stop_loss": 0.0, "layers": [2], "steps": 8}
    memit = planned(editor, "memit", **{**FAST, "stop_loss": 0.0, "layers": [2], "steps": 8})
    assert same(planned(editor, "eamet", **free), memit)
    strong = planned(editor, "eamet", **{**free, "align_squares": 50.0})

    def apart(edit: WeightEdit) -> float:
        """What is missing between the cosine of the two values and that of the two keys."""
        (update,) = edit.updates.values()
        assert isinstance(update, LowRank)
        a, b = update.U.double().t()
        return abs(float(a @ b / (a.norm() * b.norm())) - cosine)

    with editor.view.frozen():
        about = (editor.view, editor.encoder, FACTS, [0, 1, 1], memit.notes["contexts"], (2,))
        keys = KeyPass(*about).advance(2)[0].mean().t().double()
    cosine = float(torch.cosine_similarity(keys[0], keys[1], dim=0))
    assert apart(strong) < 0.5 * apart(memit)


def test_rect_of_everything_is_memit(editor: Editor) -> None:
    assert same(planned(editor, "rect", rect_kept=1.0), planned(editor, "memit"))


def test_a_line_is_a_list(editor: Editor) -> None:
    line = planned(editor, "alphaedit", stages=" blue + merge+rect")
    assert line.config["stages"] == ["blue", "merge", "rect"]
    assert same(line, planned(editor, "alphaedit", stages=["blue", "merge", "rect"]))
    assert line.notes["layers"] == [0, 2]
    assert len(line.notes["value_steps"]) == 2  # one of the two subjects has two requests
    for update in line.updates.values():
        assert isinstance(update, Dense)
        assert float((update.delta != 0).float().mean()) == pytest.approx(0.4, abs=1e-3)


def test_merge_overrules(editor: Editor) -> None:
    assert len(planned(editor, "memit", merge_subjects=False).notes["value_steps"]) == 3
    assert len(planned(editor, "memit", merge_subjects=False, stages="merge").notes["value_steps"]) == 2


def test_an_unknown_stage_is_refused(editor: Editor) -> None:
    with pytest.raises(ConfigError, match=r"no stage 'purple'; known: blue, merge, .*rect"):
        editor.edit(FACTS, "memit", stages="blue + purple")


def test_encore_stops_when_the_target_is_the_answer(editor: Editor) -> None:
    long = {"steps": 25, "stop_loss": 0.0, "noise": 0.0, "norm_weight": 0.0}
    early, late = planned(editor, "encore", **long), planned(editor, "encore", stop_most_probable=False, **long)
    assert set(late.notes["value_steps"]) == {25}
    assert min(early.notes["value_steps"]) < 25


def test_the_norm_constraint_is_a_ridge(editor: Editor) -> None:
    """With one layer and one fact the update is MEMIT's with ``C + norm·mean(diag C)·I`` in place of ``C``."""
    assert editor.statistics is not None
    single: dict[str, Any] = {"layers": [1], "statistics_ridge": 0.0, "accumulate": False}
    absolute = {"preservation_lambda": 7.0}
    size = float(editor.statistics.moment(1).diagonal().mean())
    weighed = planned(editor, "memit", norm_lambda=0.3, **single, **absolute)
    ridged = planned(editor, "memit", **{**single, "statistics_ridge": 0.3 / (7.0 * size)}, **absolute)
    plain = planned(editor, "memit", **single, **absolute)
    (a,), (b,), (c,) = (edit.updates.values() for edit in (weighed, ridged, plain))
    torch.testing.assert_close(a.matrix(), b.matrix())
    assert a.norm() < c.norm()


def test_an_absolute_norm_needs_an_absolute_preservation(editor: Editor) -> None:
    with pytest.raises(ConfigError, match="preservation_lambda"):
        editor.edit(FACTS, "encore", norm_lambda=20)


def test_keys_are_accumulated_and_come_off_with_the_edit(editor: Editor) -> None:
    with editor, warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        first = editor.edit(FACTS[:1], "ote-se", **FAST)
        second = editor.edit(FACTS[1:], "ote-se", **FAST)
        editor.revert()
        again = editor.edit(FACTS[1:], "ote-se", **FAST)
    edits = [edit for edit in (first, second, again) if isinstance(edit, WeightEdit)]
    columns = [sum(t.shape[1] for name, t in edit.state.items() if name.startswith("past/2/keys/")) for edit in edits]
    assert columns[0] < columns[1] == columns[2]
