"""The session: what it refuses, what it keeps, what it brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kecore import Corpus, Editor, EditRecord, EditRequest, KeyStatistics, load_edit
from kecore.api import errors
from kecore.edit import WeightEdit, attached
from kecore.engine import contexts
from kecore.engine.closed_form import ClosedForm
from kecore.model import SiteId
from kecore.statistics import collect_statistics
from kecore.testing import tiny_model, tiny_tokenizer

PARIS = EditRequest("{} is in the city of", "The tower", "Rome", "Paris")
COOK = EditRequest("The mother tongue of {} is", "Anna", "French", "English")
FAST = {"steps": 4, "contexts": 1, "context_tokens": 2}
METHODS = {
    "rome": FAST,
    "memit": FAST,
    "emmet": FAST,
    "alphaedit": FAST,
    "ft-m": {"steps": 3},
    "ft-l": {"steps": 3},
}

pytestmark = pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")


@pytest.fixture(scope="module")
def statistics_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the tiny model that :func:`editor` makes."""
    folder = tmp_path_factory.mktemp("statistics")
    text = folder / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(400)))
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    collect_statistics(editor.view, editor.encoder, Corpus.of(text), range(4), tokens=4000, out=folder)
    return folder


@pytest.fixture
def editor(statistics_file: Path) -> Editor:
    return Editor(tiny_model("llama"), tiny_tokenizer(), statistics=KeyStatistics.load(statistics_file))


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in editor.model.named_parameters()}


def same(editor: Editor, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in editor.model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_edit_changes_only_its_matrices_and_comes_off_bitwise(editor: Editor, method: str) -> None:
    before = weights(editor)
    edit = editor.edit([PARIS, COOK], method, **METHODS[method])
    assert isinstance(edit, WeightEdit)
    changed = {name for name, p in editor.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(edit.updates) != set()
    editor.revert()
    assert same(editor, before)
    assert editor.history == ()


@pytest.mark.parametrize("method", METHODS)
def test_saved_edit_gives_a_fresh_model_the_same_weights(editor: Editor, method: str, tmp_path: Path) -> None:
    editor.edit([PARIS, COOK], method, **METHODS[method])
    fresh = tiny_model("llama")
    load_edit(editor.save(tmp_path)).attach(fresh)
    for name, p in fresh.named_parameters():
        assert torch.equal(p, dict(editor.model.named_parameters())[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_edit(editor: Editor, method: str) -> None:
    first = editor.edit([PARIS, COOK], method, **METHODS[method])
    editor.revert()
    torch.rand(7)  # the global random state is nobody's business
    second = editor.edit([PARIS, COOK], method, **METHODS[method])
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    for name, update in first.updates.items():
        assert torch.equal(update.matrix(), second.updates[name].matrix())


@pytest.mark.parametrize("method", METHODS)
def test_the_target_becomes_more_likely(editor: Editor, method: str) -> None:
    from kecore.inference import score_continuations

    pairs = [(r.text, r.target) for r in (PARIS, COOK)]
    before = [s.mean for s in score_continuations(editor.view, editor.encoder, pairs)]
    editor.edit([PARIS, COOK], method, **{**METHODS[method], "steps": 15})
    after = [s.mean for s in score_continuations(editor.view, editor.encoder, pairs)]
    assert all(new > old + 0.1 for old, new in zip(before, after, strict=True))


def test_context_manager_restores(editor: Editor) -> None:
    before = weights(editor)
    with editor:
        editor.edit(PARIS, "memit", **FAST)
        assert not same(editor, before)
    assert same(editor, before)


def test_sequential_edits_revert_one_by_one(editor: Editor) -> None:
    editor.edit(PARIS, "memit", **FAST)
    middle = weights(editor)
    editor.edit(COOK, "rome", **FAST)
    editor.revert()
    assert same(editor, middle)


def test_alphaedit_keeps_earlier_keys_and_forgets_those_of_reverted_edits(editor: Editor, tmp_path: Path) -> None:
    editor.edit(PARIS, "alphaedit", **FAST)
    second = editor.edit(COOK, "alphaedit", **FAST)
    assert isinstance(second, WeightEdit)
    shapes = {name: t.shape for name, t in second.state.items()}
    editor.revert()
    again = editor.edit(COOK, "alphaedit", **FAST)
    assert isinstance(again, WeightEdit)
    assert {name: t.shape for name, t in again.state.items()} == shapes
    assert load_edit(again.save(tmp_path)).state.keys() == shapes.keys()


def test_alphaedit_second_edit_leaves_the_first_keys_alone(editor: Editor) -> None:
    """The update must hardly move the keys of the edit before, which is what the accumulation is for."""
    first = editor.edit(PARIS, "alphaedit", **FAST, l2=1e-6)
    second = editor.edit(COOK, "alphaedit", **FAST, l2=1e-6)
    assert isinstance(first, WeightEdit)
    assert isinstance(second, WeightEdit)
    for name, update in second.updates.items():
        layer = name.split(".")[2]
        keys = first.state[f"keys/{layer}/0"]
        moved, own = update.matrix() @ keys, first.updates[name].matrix() @ keys
        assert moved.norm() < 0.05 * own.norm()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.edit([], "memit"), errors.RequestError, "at least one"),
        (lambda e: e.edit("Paris is in Italy", "memit"), errors.RequestError, "got str 'Paris is in Italy'"),
        (lambda e: e.edit({"prompt": "{} is in"}, "memit"), errors.RequestError, "got dict"),
        (lambda e: e.edit(None, "memit"), errors.RequestError, "got NoneType"),
        (lambda e: e.evaluate([PARIS, ("Paris", "Italy")]), errors.RequestError, "got tuple"),
        (lambda e: e.edit([PARIS, _other(PARIS)], "memit"), errors.RequestConflictError, "contradict"),
        (lambda e: e.edit(PARIS, "memitt"), errors.MethodNotFoundError, "memit"),
        (lambda e: e.edit(PARIS, "memit", laers=[1]), errors.ConfigError, "laers"),
        (lambda e: e.edit(PARIS, "memit", steps=0), errors.ConfigError, "steps"),
        (lambda e: e.edit(PARIS, "memit", preset="gpt-9"), errors.ConfigError, "gpt-j"),
        (lambda e: e.edit(PARIS, "memit", layers=[9]), errors.LayerError, "0 to 3"),
        (lambda e: e.edit(PARIS, "memit", layers=[]), errors.ConfigError, "empty"),
        (lambda e: e.edit(PARIS, "ft-m", layer=9), errors.LayerError, "0 to 3"),
        (lambda e: e.edit(_long(), "memit"), errors.PromptTooLongError, "tokens"),
        (lambda e: e.revert(), errors.EditStateError, "0"),
        (lambda e: e.save("nowhere"), errors.EditStateError, "nothing"),
    ],
)
def test_bad_input_is_refused_and_nothing_changes(
    editor: Editor, call: Any, error: type[Exception], words: str
) -> None:
    before = weights(editor)
    with pytest.raises(error, match=words):
        call(editor)
    assert same(editor, before)
    assert attached(editor.model) == ()


def _other(request: EditRequest) -> EditRequest:
    return EditRequest(request.prompt, request.subject, "Berlin")


def _long() -> EditRequest:
    return EditRequest("word " * 3000 + "{} is", "Anna", "tall")


def test_requests_are_scored_as_records_without_further_probes(editor: Editor) -> None:
    wanted = editor.evaluate([EditRecord(PARIS)])
    for given in (PARIS, [PARIS], EditRecord(PARIS), (request for request in [PARIS])):
        assert editor.evaluate(given).scores == wanted.scores


def test_statistics_are_asked_for(editor: Editor) -> None:
    editor.statistics = None
    with pytest.raises(errors.UnsupportedCapabilityError, match=r"method 'memit' needs key statistics.*kecore stats"):
        editor.edit(PARIS, "memit", **FAST)
    editor.edit(PARIS, "rome", **FAST, second_moment=False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """A method that takes one request at a time, and fails where anything of it is asked for but its capabilities."""
    from kecore.api import registry
    from kecore.api.types import Capabilities

    class Alone(registry.default_registry().get("ft-m")):  # type: ignore[misc]
        name = "alone"
        capabilities = Capabilities("weights")

    monkeypatch.setattr("kecore.inference.score_continuations", lambda *_a, **_o: pytest.fail("the model ran"))
    monkeypatch.setattr(Alone.Config, "needs", lambda *_: pytest.fail("memory was planned"))
    monkeypatch.setattr(Alone, "plan", lambda *_: pytest.fail("the method ran"))
    return Alone


def test_several_requests_of_a_method_that_takes_one_are_refused_before_anything_runs(
    editor: Editor, alone: type[Any]
) -> None:
    with pytest.raises(
        errors.UnsupportedCapabilityError,
        match=r"'alone' takes one request at a time and 2 came.*'batch'.*'sequential'.*revert.*edits=single",
    ):
        editor.edit([PARIS, COOK, PARIS], alone)


def test_a_request_that_is_repeated_is_one_request(editor: Editor) -> None:
    editor.edit([PARIS, PARIS], "kn", contexts=0, steps=2)


def test_statistics_of_another_model_are_refused(statistics_file: Path) -> None:
    with pytest.raises(errors.StatisticsMismatchError, match="other weights"):
        Editor(tiny_model("llama", seed=1), tiny_tokenizer(), statistics=KeyStatistics.load(statistics_file))


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit"])
def test_layer_without_statistics_is_named_before_anything_runs(
    editor: Editor, statistics_file: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = KeyStatistics.load(statistics_file)
    editor.statistics = KeyStatistics(
        {SiteId(0): whole.moments[SiteId(0)]},
        whole.tokens,
        {SiteId(0): whole.base[SiteId(0)]},
        whole.corpus,
        whole.sources,
    )
    monkeypatch.setattr(ClosedForm, "plan", lambda *_args: pytest.fail("the engine ran"))
    with pytest.raises(errors.StatisticsMismatchError, match="layer 2"):
        editor.edit(PARIS, method, layers=[2], **FAST)


def test_contexts_are_sampled_once_a_session(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    sample = contexts.sample

    def counted(*args: Any) -> tuple[str, ...]:
        asked.append(len(editor.history))
        return sample(*args)

    monkeypatch.setattr(contexts, "sample", counted)
    editor.edit(PARIS, "ft-m", steps=1)
    editor.edit(COOK, "memit", **FAST)
    editor.revert(2)
    editor.edit(COOK, "memit", **FAST)
    editor.edit(PARIS, "memit", **FAST)
    assert asked == [1]  # with an edit on the model, and of the unedited one


def test_what_the_model_answers_already_is_reported(editor: Editor) -> None:
    from kecore.inference import generate

    answer = generate(editor.view, editor.encoder, [PARIS.text], max_new_tokens=1)[0].text
    known = EditRequest(PARIS.prompt, PARIS.subject, answer)
    report = editor.check([known, COOK, EditRecord(COOK)])
    assert report.known == (known,)
    assert report.repeated == (COOK,)
    assert report.requests == (known, COOK, COOK)


def test_facts_that_contradict_each_other_are_not_asked_about(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecore.inference.score_continuations", lambda *_a, **_o: pytest.fail("the model ran"))
    with pytest.raises(errors.RequestConflictError, match="contradict"):
        editor.check([PARIS, _other(PARIS)])


def test_an_edit_does_not_ask_the_model_for_its_answers(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kecore.inference.score_continuations", lambda *_a, **_o: pytest.fail("the answers were asked"))
    editor.edit(PARIS, "ft-m", steps=1)


def test_non_finite_weights_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(errors.NonFiniteError, match="NaN"):
        Editor(model, tiny_tokenizer())


def test_overflowing_update_is_never_attached() -> None:
    editor = Editor(tiny_model("llama").to(torch.float16), tiny_tokenizer())
    before = weights(editor)
    with pytest.raises(errors.NonFiniteError):
        editor.edit(PARIS, "ft-m", learning_rate=1e6, steps=2)
    assert same(editor, before)
    assert attached(editor.model) == ()


def test_edited_model_is_not_taken_for_a_base(editor: Editor) -> None:
    editor.edit(PARIS, "ft-m", steps=1)
    with pytest.raises(errors.EditStateError, match="already"):
        Editor(editor.model, tiny_tokenizer())


def test_chat_edits_inside_the_template(statistics_file: Path) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer(), statistics=KeyStatistics.load(statistics_file), chat=True)
    editor.edit(PARIS, "memit", **FAST)
    prompt = editor.encoder.text(PARIS.text)
    assert PARIS.text in prompt != PARIS.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_from_the_base(statistics_file: Path, dtype: torch.dtype) -> None:
    reference = Editor(tiny_model("llama"), tiny_tokenizer(), statistics=KeyStatistics.load(statistics_file))
    edit = reference.edit([PARIS, COOK], "memit", **FAST)
    assert isinstance(edit, WeightEdit)
    model = tiny_model("llama").to(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    edit.attach(model)
    for name, update in edit.updates.items():
        expected = (base[name].float() + update.matrix()).to(dtype)
        assert torch.equal(dict(model.named_parameters())[name], expected)
    edit.revert(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


def test_a_class_need_not_be_installed(editor: Editor) -> None:
    from kecore.api import registry

    class Mine(registry.default_registry().get("ft-m")):  # type: ignore[misc]
        name = "mine"

    assert editor.edit(PARIS, Mine, steps=1).inspect()["method"] == "mine"
    Mine.reference = ""
    with pytest.raises(errors.PluginError, match=r"reference must be the paper"):
        editor.edit(COOK, Mine, steps=1)


@pytest.mark.parametrize("model", ["demo", None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"got .*; Editor\.from_pretrained\(REF\) loads both"):
        Editor(model, None)
