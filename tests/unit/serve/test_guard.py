"""The guard on a tiny model: what it sees against sums by hand, and what it does where a limit is passed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kecore import Editor, EditRequest
from kecore.api.errors import ConfigError, DataFormatError, EditStateError
from kecore.edit import WeightEdit
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_serve.guard import Canary, Guard, Policy, load_canaries

FACTS = [EditRequest("The capital of {} is", "Italy", "Berlin")]
MORE = [EditRequest("The company of {} is", "Tim Cook", "Paris")]
PASSAGES = ["The tower is in the city of Paris.", "Anna speaks it, and Tim Cook is in Berlin."]
CANARIES = [Canary("The tower is in"), Canary("Anna speaks")]
OPEN = {"perplexity_ratio": None, "agreement": None, "canaries": None, "change": None, "spectral": None}


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(tiny_model("gpt2"), tiny_tokenizer())


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def guard(editor: Editor, **policy: object) -> Guard:
    return Guard(editor, Policy.make({**OPEN, **policy}), PASSAGES, CANARIES, window=16)


def test_what_it_sees(editor: Editor) -> None:
    with editor:
        watch = guard(editor, change=100.0, spectral=100.0)
        before = weights(editor)
        done = watch.edit(FACTS, "ft-m", steps=2)
        done = watch.edit(MORE, "ft-m", steps=2)
        assert isinstance(done.edit, WeightEdit)
        assert done.report.drift is not None
        assert not done.report.breaches
        assert done.report.canaries == 2
        (matrix,) = done.report.matrices
        update = weights(editor)[matrix.name].double() - before[matrix.name].double()
        base = before[matrix.name].double()
        assert matrix.change == pytest.approx(float(update.norm() / base.norm()), rel=1e-3)
        spectral = torch.linalg.svdvals(update).max()
        assert matrix.spectral == pytest.approx(float(spectral / torch.linalg.svdvals(base).max()), rel=1e-3)
        assert matrix.stable_rank == pytest.approx(float((update.norm() / spectral) ** 2), rel=1e-3)


@pytest.mark.parametrize("limit", ["agreement", "canaries", "perplexity_ratio", "change", "spectral"])
def test_each_limit_takes_the_batch_off(editor: Editor, limit: str) -> None:
    allowed = {"agreement": 1.0, "canaries": 1.0, "perplexity_ratio": 1.0}.get(limit, 1e-9)
    before = weights(editor)
    with editor:
        done = guard(editor, **{limit: allowed}).edit(FACTS, "ft-m", steps=30, relative_learning_rate=1.0)
        assert done.edit is None
        assert {breach.limit for breach in done.report.breaches} == {limit}
        assert limit in str(done.report.breaches[0])
        assert not editor.history
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(editor).items())


def test_what_follows_a_breach(editor: Editor) -> None:
    with editor:
        watch = guard(editor, change=1e-9, on_breach="report")
        assert watch.edit(FACTS, "ft-m", steps=1).edit is not None
    with editor:
        watch = guard(editor, change=1e-9, on_breach="stop")
        assert watch.edit(FACTS, "ft-m", steps=1).edit is not None
        with pytest.raises(EditStateError, match="the guard has stopped \\(change"):
            watch.edit(MORE, "ft-m", steps=1)
        watch.resume()
        assert watch.edit(MORE, "ft-m", steps=1).report.breaches
    with editor:
        watch = guard(editor, change=1e-9, on_breach="hand-over")
        done = watch.edit(FACTS, "ft-m", steps=1)
        assert done.handed_over
        assert done.edit is not None
        assert done.edit.method == "grace"
        assert not done.report.matrices
        with pytest.raises(EditStateError, match="compares with the unedited model"):
            Guard(editor, passages=PASSAGES)


def test_what_cannot_be_watched_is_refused(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to watch"):
        Guard(editor, Policy.make(OPEN))
    with pytest.raises(ConfigError, match="does not answer the canary"):
        Guard(editor, canaries=[Canary("The tower is in", "Tim Cook Tim Cook Tim")])
    file = tmp_path / "canaries.jsonl"
    file.write_text('{"prompt": "A"}\n{"prompt": "B", "answer": "C"}\n')
    assert load_canaries(file) == [Canary("A"), Canary("B", "C")]
    file.with_suffix(".txt").write_text("A\n\nB \n")
    assert load_canaries(file.with_suffix(".txt")) == [Canary("A"), Canary("B")]
    file.write_text('{"prompt": "A"}\n{"prompt": 3}\n')
    with pytest.raises(DataFormatError, match=r"canaries\.jsonl:2"):
        load_canaries(file)
    file.write_text("")
    with pytest.raises(DataFormatError, match="holds no canaries"):
        load_canaries(file)
