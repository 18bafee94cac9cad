"""Editing experts, against the same layer written by hand as loops over ordinary matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore import Corpus, Editor, EditRequest, WeightEdit, load_edit
from kecore.api.errors import ArtifactMismatchError, UnsupportedCapabilityError
from kecore.batch import RequestBatch
from kecore.checkpoint import read_record
from kecore.edit import Dense
from kecore.engine import closed_form
from kecore.engine.keys import expert_shares
from kecore.engine.values import Values
from kecore.inference.routing import routing_change
from kecore.inference.scoring import score_continuations
from kecore.model import Routed, SiteId
from kecore.models import load_model
from kecore.serving.adapter import factor_edit
from kecore.statistics import collect_statistics
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from tests.support.dense_rewrite import RewrittenToken, rewritten

REQUESTS = [
    EditRequest("The capital of {} is", subject="France", target="Rome", id="1"),
    EditRequest("The mother tongue of {} is", subject="Danielle Darrieux", target="Berlin", id="2"),
    EditRequest("{} is located in the continent of", subject="Vinson Massif", target="Paris", id="3"),
]
FEW: dict[str, Any] = {"steps": 8, "contexts": 2, "context_tokens": 3}
LAYER = 1
ROW = 256  # tokens of a row: the context length of tiny models


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def editor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Editor:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(f"Tower {i} is in Paris, and Anna {i * i} speaks it." for i in range(60)))
    session = Editor(tiny_model(request.param), tiny_tokenizer("llama-like"))
    corpus = Corpus.of(text)
    session.statistics = collect_statistics(session.view, session.encoder, corpus, [LAYER], tokens=700)
    return session


def rewritten_tokens(editor: Editor, ids: list[int]) -> list[RewrittenToken]:
    """Run one row through the model, and apply the experts of the layer by hand to what they read there."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, args: Any) -> None:
        states.append(args[0].reshape(-1, editor.view.width))

    handle = editor.view.layers[LAYER].module.get_submodule("mlp").register_forward_pre_hook(keep)
    with torch.no_grad():
        editor.model(input_ids=torch.tensor([ids]), use_cache=False)
        handle.remove()
        return rewritten(editor.view.layers[LAYER].module, states[0])


def subject_tokens(editor: Editor) -> list[RewrittenToken]:
    """Return what the experts do at the last token of each request's subject."""
    located = RequestBatch.of(REQUESTS, editor.encoder).located()
    return [rewritten_tokens(editor, list(item.ids[: item.lookup + 1]))[-1] for item in located]


def test_shares_follow_the_squared_routing_weights() -> None:
    size = torch.tensor([[0.64, 0.04, 0.0]], dtype=torch.float64)  # weights 0.8 and 0.2
    expected = torch.tensor([0.64, 0.04, 0.0], dtype=torch.float64) / 0.68
    torch.testing.assert_close(expert_shares(torch.ones(1), size), expected)
    # Rows that use different experts: both receive all of it, mostly from the expert that both use.
    size = torch.tensor([[0.25, 0.25, 0.0], [0.25, 0.0, 0.25]], dtype=torch.float64)
    shares = expert_shares(torch.tensor([0.5, 0.5]), size)
    assert [float(shares[0] + shares[1]), float(shares[0] + shares[2])] == pytest.approx([1, 1])
    assert shares[0] > shares[1]


def test_statistics_are_the_blocks_of_the_dense_second_moment(editor: Editor) -> None:
    statistics = editor.statistics
    assert statistics is not None
    assert statistics.sites == tuple(SiteId(LAYER, expert) for expert in range(4))
    tokenizer = editor.encoder.tokenizer
    (passage,) = Corpus.of(Path(statistics.sources[0])).sample(10, 0).passages
    stream = tokenizer(passage, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    stream = stream[: statistics.tokens]
    d_in = editor.view.experts(LAYER).d_in
    expected = torch.zeros(4, d_in, d_in, dtype=torch.float64)
    for begin in range(0, len(stream), ROW):
        for token in rewritten_tokens(editor, stream[begin : begin + ROW]):
            for expert, key in token.keys.items():
                expected[expert] += torch.outer(key.double(), key.double())
    for expert in range(4):
        moment = statistics.moment(SiteId(LAYER, expert))
        torch.testing.assert_close(moment, expected[expert] / len(stream), rtol=1e-4, atol=1e-8)


def give_values(monkeypatch: pytest.MonkeyPatch, editor: Editor) -> Tensor:
    """Let the engine find these values, ``[u, d_model]``, instead of optimising some."""
    count = len(REQUESTS)
    delta = torch.randn(count, editor.view.width, generator=torch.Generator().manual_seed(3))
    values = Values(delta, torch.ones(count), torch.zeros(count), torch.zeros(count, dtype=torch.long), "given")
    monkeypatch.setattr(closed_form, "optimise_values", lambda *_args, **_options: values)
    return delta


def test_memit_update_is_that_of_the_rewrite(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without contexts: residuals shared by squared routing weights, solved in float64 for each expert by itself."""
    delta = give_values(monkeypatch, editor)
    weight, ridge = 0.3, 1e-4
    options: dict[str, Any] = {
        "layers": [LAYER],
        "contexts": 0,
        "preservation_lambda": weight,
        "gain": 1.0,
        "statistics_ridge": ridge,
    }
    edit = editor.edit(REQUESTS, "memit", **options)
    editor.revert()
    assert isinstance(edit, WeightEdit)
    tokens = subject_tokens(editor)
    used = sorted({expert for token in tokens for expert in token.keys})
    names = [editor.view.site(SiteId(LAYER, expert)).linear.name for expert in used]
    assert list(edit.updates) == names
    statistics = editor.statistics
    assert statistics is not None
    moments = [statistics.moment(SiteId(LAYER, expert)) for expert in range(4)]
    floor = 1e-3 * sum(float(moment.diagonal().mean()) for moment in moments) / 4
    for expert, name in zip(used, names, strict=True):
        members = [index for index, token in enumerate(tokens) if expert in token.keys]
        keys = torch.stack([tokens[index].keys[expert] for index in members], 1).double()  # [d_in, m]
        shares: list[float] = []
        for index in members:
            squares = {other: float(part) ** 2 for other, part in tokens[index].weights.items()}
            shares.append(squares[expert] / sum(squares.values()))
        residuals = delta[members].double().t() * torch.tensor(shares, dtype=torch.float64)  # [d_out, m]
        diagonal = ridge * float(moments[expert].diagonal().mean()) + floor
        white = torch.linalg.solve(moments[expert] + diagonal * torch.eye(len(keys)), keys)  # [d_in, m]
        system = weight * torch.eye(len(members)) + keys.t() @ white
        expected = residuals @ torch.linalg.solve(system, white.t())
        torch.testing.assert_close(edit.updates[name].matrix().double(), expected, rtol=2e-3, atol=1e-5)


def test_what_is_written_is_what_the_layer_then_adds(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing preserved: the layer's output changes by the value at the subject, summed over all its experts."""
    delta = give_values(monkeypatch, editor)
    before = [token.output for token in subject_tokens(editor)]
    options: dict[str, Any] = {"layers": [LAYER], "contexts": 0, "preservation": 1e-6, "gain": 1.0, "steps": 8}
    edit = editor.edit(REQUESTS, "memit", **options)
    after = [token.output for token in subject_tokens(editor)]
    editor.revert()
    assert max(solved["edit_residual"] for solved in edit.notes["solve"].values()) < 0.01
    moved = torch.stack(after) - torch.stack(before)
    torch.testing.assert_close(moved, delta, rtol=0.02, atol=0.02)


def test_an_edit_of_experts_is_put_on_taken_off_saved_and_loaded(editor: Editor, tmp_path: Path) -> None:
    before = Snapshot(editor.model)
    edit = editor.edit(REQUESTS, "memit", layers=[LAYER], **FEW)
    assert isinstance(edit, WeightEdit)
    parameter = f"{editor.view.experts(LAYER).name}.down_proj"
    assert edit.parameters == (parameter,)
    edited = {name: data.clone() for name, data in editor.model.named_parameters()}
    edit.save(tmp_path / "edit")
    editor.revert()
    assert before.differences() == []
    loaded = load_edit(tmp_path / "edit")
    loaded.attach(editor.model)
    for name, data in editor.model.named_parameters():
        assert torch.equal(data, edited[name]), name
    loaded.revert(editor.model)
    assert before.differences() == []
    stranger = tiny_model("mixtral", num_local_experts=1, num_experts_per_tok=1)
    with pytest.raises(ArtifactMismatchError, match=r"which .* does not have|the edit is for"):
        edit.attach(stranger)
    with pytest.raises(UnsupportedCapabilityError, match="one of several experts' matrices that a parameter stacks"):
        factor_edit(edit)


def test_an_edit_of_experts_goes_into_a_checkpoint_and_out_of_it(editor: Editor, tmp_path: Path) -> None:
    before = {name: data.clone() for name, data in editor.model.named_parameters()}
    editor.edit(REQUESTS[:1], "memit", layers=[LAYER], **FEW)
    edited = {name: data.clone() for name, data in editor.model.named_parameters()}
    editor.save_checkpoint(tmp_path / "out", ref="tiny")
    editor.revert()
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    for name, data in loaded.model.named_parameters():
        assert torch.equal(data, edited[name]), name
    record = read_record(str(tmp_path / "out"))
    assert record is not None
    record.restore(loaded.model)
    for name, data in loaded.model.named_parameters():
        assert torch.equal(data, before[name]), name


def target_loss(editor: Editor, request: EditRequest) -> float:
    """Return the mean negative log-likelihood of a request's target, with whatever acts on the model."""
    (score,) = score_continuations(editor.view, editor.encoder, [(request.text, request.target)])
    return -score.mean


@pytest.mark.parametrize("method", ["rome", "alphaedit", "emmet", "pmet", "grace", "wise", "ice"])
def test_every_family_of_methods_edits_experts(editor: Editor, method: str) -> None:
    """A target becomes likelier, through the engine and beside the block; and nothing of it stays."""
    before = Snapshot(editor.model)
    request = REQUESTS[1]
    options: dict[str, Any] = {} if method == "ice" else {"steps": 20}
    if method in ("rome", "alphaedit", "emmet", "pmet"):
        options = {**FEW, "steps": 20, "layers": [LAYER]}
    unedited = target_loss(editor, request)
    editor.edit([request], method, **options)
    assert target_loss(editor, request) < unedited
    editor.revert()
    assert before.differences() == []


def test_routing_changes_are_counted_above_the_edited_layer(editor: Editor) -> None:
    prompts = ["Tower 7 is in Paris", "Anna speaks it", "The mother tongue of Danielle Darrieux is"]
    view = editor.view
    assert routing_change(view, editor.encoder, prompts) == dict.fromkeys(range(4), 0.0)
    matrix = view.site(SiteId(LAYER, 2)).linear
    large = 30 * torch.randn(matrix.d_out, matrix.d_in, generator=torch.Generator().manual_seed(1))
    edit = WeightEdit(
        updates={matrix.name: Dense(large)},
        base=editor.base,
        method="by hand",
        transposed=frozenset({matrix.name} if matrix.transposed else ()),
        config={},
        requests=tuple(REQUESTS[:1]),
    )
    edit.attach(editor.model)
    shares = routing_change(view, editor.encoder, prompts)
    assert shares == routing_change(view, editor.encoder, prompts, batch_tokens=8)
    edited = expert_sets(editor, prompts)
    edit.revert(editor.model)
    plain = expert_sets(editor, prompts)
    expected = sum(first != second for first, second in zip(edited, plain, strict=True)) / len(plain)
    assert (shares[0], shares[LAYER]) == (0.0, 0.0)
    assert shares[LAYER + 1] == pytest.approx(expected)
    assert expected > 0


@torch.no_grad()
def expert_sets(editor: Editor, prompts: list[str]) -> list[set[int]]:
    """Return the experts of every token of some prompts, one prompt at a time, at the layer above the edited one."""
    sets: list[set[int]] = []
    for prompt in prompts:
        rows = editor.encoder.rows([editor.encoder.encode(prompt).ids])
        site = Routed(LAYER + 1, "experts")
        sets += [set(experts) for experts in editor.view.run(rows, taps=[site])[site][0].tolist()]
    return sets
