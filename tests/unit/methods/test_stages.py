"""Stages named on a configuration line do what the methods of their names do, on whatever method carries the line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kecore import Corpus, Editor, EditRequest, WeightEdit
from kecore.api.errors import ConfigError, KecoreWarning
from kecore.api.line import MethodLine
from kecore.batch import RequestBatch
from kecore.edit import Dense, LowRank
from kecore.engine import ClosedForm, LocateConfig
from kecore.engine.keys import Prompts
from kecore.model import SiteId
from kecore.statistics import collect_statistics
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.locate.ote_se import OteSe

FACTS = [
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("A river in {}:", "France", "Danube"),
]
FAST: dict[str, Any] = {"steps": 4, "contexts": 1, "context_tokens": 2, "layers": [0, 1, 2]}
STRONG: dict[str, Any] = {"gain": 50.0, "prune_base": 50.0}  # updates that PRUNE finds too large


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    """A session whose tests take their edits off again."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(400)))
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    editor.statistics = collect_statistics(editor.view, editor.encoder, Corpus.of(text), range(4), tokens=4000)
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
    own, staged = planned(editor, method, **STRONG), planned(editor, "memit", stages=method, **STRONG)
    assert same(own, staged)
    assert not same(own, planned(editor, "memit", **STRONG))
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
    assert torch.equal(first.state["nas/anchor/2"], second.state["nas/anchor/2"])
    given = planned(editor, "memit", stages="nas", nas_anchor=float(first.state["nas/anchor/2"]), layers=[2])
    assert float(given.state["nas/anchor/2"]) == pytest.approx(float(first.state["nas/anchor/2"]))


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
        prompts = Prompts(editor.view, RequestBatch.of(FACTS, editor.encoder), memit.notes["contexts"])
        keys = prompts.begin_pass((2,)).advance(2)[0].mean().t().double()
    cosine = float(torch.cosine_similarity(keys[0], keys[1], dim=0))
    assert apart(strong) < 0.5 * apart(memit)


def test_rect_of_everything_is_memit(editor: Editor) -> None:
    assert same(planned(editor, "rect", rect_kept=1.0), planned(editor, "memit"))


@pytest.mark.parametrize(("method", "base"), [("rect", "memit"), ("prune", "memit"), ("sphere", "alphaedit")])
def test_named_stages_come_beside_the_methods_own(editor: Editor, method: str, base: str) -> None:
    """Of RECT with ``stages=blue`` the stage that makes it RECT stays."""
    both, one = planned(editor, method, stages="blue", **STRONG), planned(editor, base, stages="blue", **STRONG)
    assert same(both, planned(editor, base, stages=f"{method} + blue", **STRONG))
    assert not same(both, one)
    assert both.notes["layers"] == [0, 2]


THE_LINE = "alphaedit + blue + nas + merge"


def test_a_method_may_be_a_line(editor: Editor) -> None:
    line, fields = planned(editor, THE_LINE), planned(editor, "alphaedit", stages="blue + nas + merge")
    assert same(line, fields)
    assert not same(line, planned(editor, "alphaedit", stages="blue + merge"))
    assert (line.method, line.notes["layers"]) == (THE_LINE, [0, 2])
    assert same(line, planned(editor, "AlphaEdit+Blue +  nas", stages="merge"))
    assert {name for name in line.state if "nas" in name} == {"nas/anchor/0", "nas/anchor/2"}


def test_blue_optimises_for_the_first_layer_too(editor: Editor) -> None:
    """Which takes the most memory of the two, and is planned for; both layers have values of every fact."""
    blue, memit = (MethodLine.of(name).make_config(FAST) for name in ("memit + blue", "memit"))
    assert isinstance(blue, LocateConfig)
    assert isinstance(memit, LocateConfig)
    assert (blue.memory_shape(editor.view).anchor, memit.memory_shape(editor.view).anchor) == (0, 2)
    assert blue.memory_shape(editor.view).layers == (0, 2)


def test_a_lines_sequence_remembers(editor: Editor) -> None:
    """Anchor and keys of the first edit are there at the second, as with the same stages by configuration."""
    weights = []
    for method, stages in ((THE_LINE, ""), ("alphaedit", "blue + nas + merge")):
        with editor, warnings.catch_warnings():
            warnings.simplefilter("ignore", KecoreWarning)
            editor.edit(FACTS[:1], method, **FAST, stages=stages)
            weights.append(editor.edit(FACTS[1:], method, **FAST, stages=stages))
    first, second = weights
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    assert same(first, second)
    assert list(first.state) == list(second.state)


def test_a_line_keeps_the_presets_of_its_method() -> None:
    line = MethodLine.of("memit + rect")
    assert line.method is MethodLine.of("memit").method
    assert line.make_config(line.method.Config.preset("llama-2-7b")).to_json()["rect_kept"] == 0.4


@pytest.mark.parametrize("method", ["rect", "prune", "ote-se", "simie", "evoedit"])
def test_what_another_method_published_is_no_preset(method: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'llama-2-7b'; known: none"):
        MethodLine.of(method).method.Config.preset("llama-2-7b")


@pytest.mark.parametrize(
    ("method", "stages", "message"),
    [
        ("memit", "blue + purple", r"no stage 'purple'; installed: blue, merge, .*rect"),
        ("memit", "blu", "no stage 'blu'; did you mean 'blue'"),
        ("memit", "blue + ", "no stage ''"),
        ("memit", ["blue", "blue"], "'blue' is named twice; name each once"),
        ("rect", "rect", r"'rect' is named twice \(it is a part of the method\)"),
        ("memit", 5, "valid tuple"),
        ("memit + bleu", "", r"method 'memit \+ bleu': no stage 'bleu'; did you mean 'blue'"),
        ("memit + blue", "blue", r"'blue' is named twice \(it is a part"),
        ("ft-m + simie", "", r"method 'ft-m \+ simie': no stage can be added.* fits none"),
        ("ft-m", "simie", r"unknown key 'stages' \(stages change .* fits none\)"),
    ],
)
def test_stages_that_do_not_fit_are_refused(editor: Editor, method: str, stages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        editor.edit(FACTS[0], method, **({"stages": stages} if stages else {}))


@pytest.mark.parametrize("empty", ["", "  ", (), []])
def test_no_stage_is_none(empty: Any) -> None:
    rect = MethodLine.of("rect").method.Config
    assert rect.make({"stages": empty}) == rect()


def test_a_configuration_survives_its_json() -> None:
    line = MethodLine.of("rect + blue")
    config = line.make_config({"stages": "nas", "sphere_ratio": 0.25})
    assert line.make_config(config.to_json()) == config
    values = config.to_json()
    assert values["stages"] == ["nas"]  # the line's own stand in the method's name
    assert {name: values[name] for name in ("rect_kept", "nas_anchor", "sphere_ratio", "sphere_suppression")} == {
        "rect_kept": 0.4,
        "nas_anchor": None,
        "sphere_ratio": 0.25,
        "sphere_suppression": 0.5,
    }
    assert "prune_base" not in values


def test_settings_are_those_of_the_stage_that_acts(editor: Editor) -> None:
    tenth, all_of_it = planned(editor, "memit + rect", rect_kept=0.1), planned(editor, "memit + rect", rect_kept=1)
    assert same(all_of_it, planned(editor, "memit"))
    (update, *_) = tenth.updates.values()
    assert float((update.matrix() != 0).float().mean()) == pytest.approx(0.1, abs=1e-2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rect_kpt": 0.3}, r"unknown key 'rect_kpt'; did you mean 'rect_kept'\? known: accumulate, .*rect_kept"),
        ({"rect_kept": 3}, r"'rect_kept': Input should be less than or equal to 1, got 3"),
        ({"rect_kept": "much", "prune_base": 1}, r"'rect_kept': .* valid number.*; 'prune_base': .* greater than 1"),
    ],
)
def test_settings_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodLine.of("memit").make_config(values)


def test_a_line_is_a_list(editor: Editor) -> None:
    line = planned(editor, "alphaedit", stages=" blue + merge+rect")
    assert line.config["stages"] == ["blue", "merge", "rect"]
    assert same(line, planned(editor, "alphaedit", stages=["blue", "merge", "rect"]))
    assert line.notes["layers"] == [0, 2]
    assert len(line.notes["value_steps"]) == 4  # two layers, and one of the two subjects has two requests
    for update in line.updates.values():
        assert isinstance(update, Dense)
        assert float((update.delta != 0).float().mean()) == pytest.approx(0.4, abs=1e-3)


def test_merge_overrules(editor: Editor) -> None:
    assert len(planned(editor, "memit", merge_subjects=False).notes["value_steps"]) == 3
    assert len(planned(editor, "memit", merge_subjects=False, stages="merge").notes["value_steps"]) == 2


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
    size = float(editor.statistics.moment(SiteId(1)).diagonal().mean())
    weighed = planned(editor, "memit", norm_lambda=0.3, **single, **absolute)
    ridged = planned(editor, "memit", **{**single, "statistics_ridge": 0.3 / (7.0 * size)}, **absolute)
    plain = planned(editor, "memit", **single, **absolute)
    (a,), (b,), (c,) = (edit.updates.values() for edit in (weighed, ridged, plain))
    torch.testing.assert_close(a.matrix(), b.matrix())
    assert a.norm() < c.norm()


def test_an_absolute_norm_needs_an_absolute_preservation(editor: Editor) -> None:
    with pytest.raises(ConfigError, match="preservation_lambda"):
        editor.edit(FACTS, "encore", norm_lambda=20)


class FixedValues(OteSe):
    """OTE-SE, of which the facts of a session get given values in turn, whatever model they are optimised on."""

    class Config(OteSe.Config):
        """That of OTE-SE."""

        def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
            """The engine without optimised values."""
            return replace(super().engine(layers, **choices), target=given)


def given(_layer: int, outputs: Callable[[], Tensor], delta: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What is missing to the values of the session's next facts."""
    begin = int(state.get("given", torch.zeros(())))
    state["given"] = torch.tensor(begin + len(delta))
    every = torch.randn(8, delta.shape[1], generator=torch.Generator().manual_seed(3))
    return every[begin : begin + len(delta)] - outputs()


@pytest.mark.parametrize(
    ("config", "equal"),
    [
        ({}, True),
        ({"accumulate": False}, False),
        ({"each_context": True}, False),
        ({"preservation_lambda": None}, False),
        ({"layers": [1, 2]}, False),
    ],
)
def test_edits_of_ote_se_in_sequence_are_one_edit(editor: Editor, config: dict[str, Any], equal: bool) -> None:
    """To float32 accuracy, where nothing but the order of writing differs; docs/methods/ote-se.md says when."""
    facts = [*FACTS[:2], EditRequest("The spire of {}", "Anna", "Rome")]
    fixed = {**FAST, "steps": 1, "gain": 1.0, "layers": [1], "each_context": False, "preservation_lambda": 1.0}
    weight = editor.view.layers[1].site.linear.parameter
    before, found = weight.data.clone(), []
    for parts in ([facts], [facts[:1], facts[1:]], [[fact] for fact in facts]):
        with editor, warnings.catch_warnings():
            warnings.simplefilter("ignore", KecoreWarning)
            for part in parts:
                editor.edit(part, FixedValues, **{**fixed, **config})
            found.append((weight.data - before).double())
    once, *sequences = found
    apart = [float((sequence - once).norm() / once.norm()) for sequence in sequences]
    assert max(apart) < 1e-5 if equal else min(apart) > 1e-4, apart


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
