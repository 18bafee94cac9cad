"""MEND: its gradient factors, its network and its edit against the published equations."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meta_setting import RECORDS, REQUESTS, SHORT, planned, setting, shaken
from torch import Tensor

from kecore import MethodContext, training
from kecore.api.errors import ConfigError, DataFormatError
from kecore.edit import LowRank
from kecore.training import train
from kecore_methods.meta.factors import Factors, Reader, low_rank, nll
from kecore_methods.meta.learner import GradientLearner
from kecore_methods.meta.mend import Mend, MendConfig, MendNetwork, SharedMLP

CONFIG = MendConfig(layers=(1, 3), rank=4, together=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_are_the_gradient_of_each_request_alone(architecture: str) -> None:
    view, encoder = setting(architecture)
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    assert len({len(item.ids) for item in items}) > 1
    with view.frozen():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
    for index, item in enumerate(items):
        projection = view.layers[3].site.linear
        projection.parameter.requires_grad_(True)
        logits = view.model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([logits[j - 1, item.ids[j]] for j in range(item.start, len(item.ids))]).mean()
        (expected,) = torch.autograd.grad(loss, projection.parameter)
        expected = expected.t() if projection.transposed else expected
        made = factors.deltas[3][index].t() @ factors.inputs[3][index]
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-7)
        alone = factors.one(index)
        assert alone.mask.shape == (1, len(item.ids) - 1)
        torch.testing.assert_close(alone.deltas[3][0].t() @ alone.inputs[3][0], made)


def test_network_is_the_published_equation() -> None:
    """``h = z + ReLU(s₁ ⊙ (U₁V₁z + b) + o₁)``, ``g = h + s₂ ⊙ (U₂V₂h + b₂) + o₂``, written out in float64."""
    mlp = SharedMLP(width=6, rank=2, matrices=2)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    z = torch.randn(5, 6)

    def layer(x: Tensor, i: int, matrix: int) -> Tensor:
        inner = mlp.up[i].double() @ (mlp.down[i].double() @ x) + mlp.bias[i].double()
        return mlp.scale[i][matrix].double() * inner + mlp.shift[i][matrix].double()

    for matrix in range(2):
        rows: list[Tensor] = []
        for row in z.double():
            h = row + torch.relu(layer(row, 0, matrix))
            rows.append(h + layer(h, 1, matrix))
        torch.testing.assert_close(mlp(z, matrix).double(), torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mlp(z, 0), mlp(z, 1))


def test_untrained_network_is_the_identity_that_can_learn() -> None:
    mlp = SharedMLP(width=6, rank=2, matrices=1)
    z = torch.randn(5, 6)
    assert torch.equal(mlp(z, 0), z)
    mlp(z, 0).square().sum().backward()
    assert all(float(up.grad.abs().sum()) > 0 for up in mlp.up if up.grad is not None)


def test_tokens_without_gradient_take_no_part() -> None:
    """As in the released code, which drops them from the statistics and from the update."""
    view, encoder = setting()
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
    with_gradient = factors.with_gradient(3)
    assert with_gradient.sum() < factors.mask.sum()  # of the last layer: those that predict a token of the target
    assert with_gradient.sum(1).tolist() == [len(item.ids) - item.start for item in items]
    # What such a token reads is nowhere seen.
    inputs = dict(factors.inputs)
    inputs[3] = inputs[3].masked_fill((factors.mask & ~with_gradient)[..., None], 100.0)
    edited: list[tuple[Tensor, Tensor]] = []
    fresh: MendNetwork = shaken(MendNetwork(view, CONFIG))
    for given in (factors, replace(factors, inputs=inputs)):
        network = copy.deepcopy(fresh)
        network.normalise(given)
        edited.append(network.edited(given, 3))
    torch.testing.assert_close(edited[0], edited[1])
    assert not edited[0][0][~with_gradient].any()


def test_edit_is_the_sum_over_tokens_of_the_networks_factors() -> None:
    view, encoder = setting()
    network: MendNetwork = shaken(MendNetwork(view, CONFIG))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
        shifts = network.shifts(view, items, factors, together=3)
        for layer in (1, 3):
            weight = view.layers[layer].site.linear.weight
            rate = 0.05 * weight.square().mean().sqrt() / weight.shape[1] ** 0.5
            rate = rate * (100 * network.rates[str(layer)]).exp()
            expected = torch.zeros(weight.shape)
            for r, t in factors.with_gradient(layer).nonzero().tolist():
                inputs, deltas = network.inputs[str(layer)], network.deltas[str(layer)]
                u = (factors.inputs[layer][r, t] - inputs.mean) / inputs.deviation
                d = (factors.deltas[layer][r, t] - deltas.mean) / deltas.deviation
                (shared,) = network.shared.values()
                out = shared(torch.cat([u, d])[None], (1, 3).index(layer))[0]
                expected -= rate * torch.outer(out[len(u) :], out[: len(u)])
            up, v = shifts[layer]
            torch.testing.assert_close(up[0].t() @ v[0], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_the_sum_of_its_edits_and_what_training_saw() -> None:
    view, encoder = setting()
    trained = train(Mend, view, encoder, RECORDS, CONFIG, schedule=SHORT)
    both = planned(Mend, (view, encoder), REQUESTS, trained)
    single = [planned(Mend, (view, encoder), [request], trained) for request in REQUESTS]
    for name, update in both.updates.items():
        assert isinstance(update, LowRank)
        parts = torch.stack([edit.updates[name].matrix() for edit in single])
        torch.testing.assert_close(update.matrix(), parts.sum(0), rtol=1e-4, atol=1e-6)
    # The pass of the training, in which each row has an update of its own, is the model with that edit on it.
    network = Mend().network(view, CONFIG)
    network.load_state_dict(dict(trained.tensors))
    items = [encoder.encode(request.text, request.target) for request in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        texts = reader.texts(items)
        shifts = network.shifts(view, items, reader.factors(texts), together=1)
        each = nll(reader.logits(texts, shifts, torch.arange(3)), texts)
        for index, edit in enumerate(single):
            edit.attach(view.model)
            alone = reader.texts([items[index]])
            torch.testing.assert_close(nll(reader.logits(alone), alone), each[texts.row == index], rtol=1e-4, atol=1e-5)
            edit.revert(view.model)


@pytest.mark.parametrize(("k", "d_out", "d_in"), [(3, 4, 5), (9, 4, 6), (9, 6, 4)])
def test_more_factors_than_rows_are_written_without_loss(k: int, d_out: int, d_in: int) -> None:
    u, v = torch.randn(k, d_out), torch.randn(k, d_in)
    update = LowRank(*low_rank(u, v))
    assert update.rank == min(k, d_out, d_in)
    torch.testing.assert_close(update.matrix(), u.t() @ v)


def test_states_at_hand_give_the_same_pass() -> None:
    view, encoder = setting()
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        whole, upper = Reader(view, encoder, (0,)), Reader(view, encoder, (2,))
        texts = whole.texts(items)
        assert texts.below is None
        states = [upper.states([item])[0] for item in items]
        torch.testing.assert_close(upper.logits(upper.texts(items, states)), whole.logits(texts), rtol=1e-4, atol=1e-4)
        assert torch.equal(upper.logits(upper.texts(items)), upper.logits(upper.texts(items, upper.states(items))))


def test_training_continues_bit_for_bit_and_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, encoder = setting()
    whole = train(Mend, view, encoder, RECORDS, CONFIG, schedule=SHORT)
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Mend, view, encoder, RECORDS, CONFIG, schedule=SHORT, out=tmp_path, progress=stop)
    again = train(Mend, view, encoder, RECORDS, CONFIG, schedule=SHORT, out=tmp_path)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
    curve = whole.record["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[0]["KL"] < 1e-3


def test_bad_training_is_refused() -> None:
    view, encoder = setting()
    with pytest.raises(ConfigError, match="batches of 3 records cannot be cut into edits of 2"):
        train(Mend, view, encoder, RECORDS, CONFIG, schedule=replace(SHORT, batch_size=3))
    bare = [
        replace(record, probes=tuple(probe for probe in record.probes if probe.kind != "locality"))
        for record in RECORDS
    ]
    with pytest.raises(DataFormatError, match="no locality probe with an answer"):
        train(Mend, view, encoder, bare, CONFIG, schedule=SHORT)


def test_held_out_records_that_are_left_over_are_an_edit_of_fewer() -> None:
    view, encoder = setting()
    with view.frozen():
        learner = GradientLearner(Mend().network(view, CONFIG), view, RECORDS, MethodContext(CONFIG, encoder))
        five = learner.evaluate(RECORDS[:5])
        four, one = learner.evaluate(RECORDS[:4]), learner.evaluate(RECORDS[4:5])
    assert five["loss"] == pytest.approx((4 * four["loss"] + one["loss"]) / 5, rel=1e-5)


def test_factors_of_different_lengths_are_stacked() -> None:
    def ones(n: int) -> Factors:
        mask = torch.ones(1, n, dtype=torch.bool)
        return Factors({0: torch.ones(1, n, 2)}, {0: torch.ones(1, n, 3)}, mask, ((n,),))

    parts = [ones(2), ones(4)]
    both = Factors.stack(parts)
    assert both.answers == ((2,), (4,))
    assert both.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert both.inputs[0].shape == (2, 4, 2)
    assert float(both.deltas[0][0].sum()) == 6
