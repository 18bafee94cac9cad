"""KE: its gated gradient against the published equation, and its constraint."""

from __future__ import annotations

import pytest
import torch
from meta_setting import RECORDS, REQUESTS, SHORT, planned, setting, shaken

from kecore.training import train
from kecore_methods.meta.factors import Reader
from kecore_methods.meta.ke import Ke, KeConfig, KeNetwork

CONFIG = KeConfig(layers=(1, 3), hidden=6, together=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_update_is_the_gated_gradient(architecture: str) -> None:
    """``ΔW = σ(η) (γ softmax(α)ᵀ ⊙ ∇W + δ softmax(β)ᵀ)`` with the whole gradient formed, in the documented units."""
    view, encoder = setting(architecture)
    network: KeNetwork = shaken(KeNetwork(view, CONFIG))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
        shifts = network.shifts(view, items, factors, 1)
        h = network.read(view, items, factors)
        for layer in (1, 3):
            gates = network.gates[str(layer)]
            projection = view.layers[layer].site.linear
            for r in range(len(items)):
                gradient = factors.deltas[layer][r].double().t() @ factors.inputs[layer][r].double()
                alpha, beta, gamma, shift, eta = gates.head(h[r]).double().split(gates.widths)
                gate = torch.outer(gamma, alpha.softmax(0)) * gradient / float(gates.size)
                offset = torch.outer(shift, beta.softmax(0))
                unit = 2 * CONFIG.edit_rate * float(projection.weight.double().square().mean().sqrt())
                unit /= projection.d_in**0.5
                expected = unit * float(torch.sigmoid(eta)) * projection.d_in * (gate + offset)
                up, v = shifts[layer]
                made = (up[r].t() @ v[r]).double()
                assert float((made - expected).norm() / expected.norm()) < 1e-4


def test_before_training_an_update_is_a_step_down_the_gradient() -> None:
    view, encoder = setting()
    network = KeNetwork(view, CONFIG)
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
        network.normalise(factors)
        up, v = network.shifts(view, items, factors, 1)[3]
    gradients = factors.deltas[3].transpose(1, 2) @ factors.inputs[3]
    updates = up.transpose(1, 2) @ v
    assert float(torch.cosine_similarity(updates.flatten(1), gradients.flatten(1)).max()) < -0.95
    size = gradients.square().mean((1, 2)).mean().sqrt()
    torch.testing.assert_close(network.gates["3"].size, size)


def test_the_fact_and_the_models_answer_are_read() -> None:
    view, encoder = setting()
    network: KeNetwork = shaken(KeNetwork(view, CONFIG))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        texts = reader.texts(items)
        factors = reader.factors(texts)
        said = reader.logits(texts).argmax(-1)
        assert factors.answers == tuple(tuple(said[texts.row == i].tolist()) for i in range(3))
        h = network.read(view, items, factors)
        alone = network.read(view, items[1:2], factors.one(1))
        torch.testing.assert_close(alone[0], h[1], rtol=1e-5, atol=1e-6)
        other = network.read(view, items[:1], factors.one(1))
        assert not torch.allclose(other[0], h[1], atol=1e-3)


def test_multiplier_rises_while_the_constraint_is_broken_and_never_below_zero() -> None:
    view, _ = setting()
    network = KeNetwork(view, CONFIG.model_copy(update={"margin": 0.5, "multiplier_rate": 0.2}))
    edit, kl = torch.tensor(2.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    loss = network.objective(edit, kl)
    assert float(loss.detach()) == pytest.approx(2 + 1.0)
    assert float(network.multiplier) == pytest.approx(1.2)  # KL of three margins, and no more than one step
    loss.backward()
    assert float(kl.grad) == pytest.approx(1.0)  # type: ignore[arg-type]
    for _ in range(20):
        network.objective(edit, torch.tensor(0.0))
    assert float(network.multiplier) == 0


def test_a_batch_is_the_sum_of_its_edits() -> None:
    view, encoder = setting()
    trained = train(Ke, view, encoder, RECORDS, CONFIG, schedule=SHORT)
    both = planned(Ke, (view, encoder), REQUESTS, trained)
    single = [planned(Ke, (view, encoder), [request], trained) for request in REQUESTS]
    for name, update in both.updates.items():
        parts = torch.stack([edit.updates[name].matrix() for edit in single])
        torch.testing.assert_close(update.matrix(), parts.sum(0), rtol=1e-4, atol=1e-6)
