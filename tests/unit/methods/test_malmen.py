"""MALMEN: the aggregation of shifts against the normal equation in float64."""

from __future__ import annotations

import pytest
import torch
from meta_setting import RECORDS, REQUESTS, SHORT, planned, setting, shaken

from kecore.edit import LowRank
from kecore.training import train
from kecore_methods.meta.factors import Reader
from kecore_methods.meta.malmen import Malmen, MalmenConfig, MalmenNetwork

CONFIG = MalmenConfig(layers=(1, 3), rank=4, together=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_shifts_are_the_normal_equation(architecture: str) -> None:
    """``S = D Uᵀ (U Uᵀ + λI)⁻¹`` with ``d = S_t u``, ``S_t = -α δ̃ ũᵀ`` the shift of one token, formed in full."""
    view, encoder = setting(architecture)
    network: MalmenNetwork = shaken(MalmenNetwork(view, CONFIG))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
        for together in (1, 3):
            shifts = network.shifts(view, items, factors, together)
            for layer in (1, 3):
                edited_u, edited_delta = (x.double() for x in network.edited(factors, layer))
                for group in range(3 // together):
                    columns: list[tuple[torch.Tensor, torch.Tensor]] = []
                    for r, t in factors.mask.nonzero().tolist():
                        if r // together != group:
                            continue
                        key = factors.inputs[layer][r, t].double()
                        shift = -float(network.rate(layer)) * torch.outer(edited_delta[r, t], edited_u[r, t])
                        columns.append((key, shift @ key))
                    keys, change = (torch.stack(part, 1) for part in zip(*columns, strict=True))
                    ridge = float(network.preservation(layer)) * torch.eye(len(keys), dtype=torch.float64)
                    expected = change @ keys.t() @ torch.linalg.inv(keys @ keys.t() + ridge)
                    up, v = shifts[layer]
                    made = (up[group].t() @ v[group]).double()
                    assert float((made - expected).norm() / expected.norm()) < 1e-4


def test_a_large_ridge_is_the_sum_of_edits_alone() -> None:
    """With ``λ`` far above the keys the system is diagonal, and edits do not see each other."""
    view, encoder = setting()
    network = MalmenNetwork(view, CONFIG.model_copy(update={"preservation": 1e5}))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        factors = reader.factors(reader.texts(items))
        network.normalise(factors)
        (up, v), (each_up, each_v) = (network.shifts(view, items, factors, k)[3] for k in (3, 1))
    together, apart = up[0].t() @ v[0], (each_up.transpose(1, 2) @ each_v).sum(0)
    assert float((together - apart).norm() / apart.norm()) < 1e-3


def test_a_batch_is_planned_as_it_was_trained() -> None:
    view, encoder = setting()
    trained = train(Malmen, view, encoder, RECORDS, CONFIG, schedule=SHORT)
    curve = trained.record["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    edit = planned(Malmen, (view, encoder), REQUESTS, trained)
    network = Malmen().network(view, CONFIG)
    network.load_state_dict(dict(trained.tensors))
    items = [encoder.encode(r.text, r.target) for r in REQUESTS]
    with view.frozen(), torch.no_grad():
        reader = Reader(view, encoder, (1, 3))
        shifts = network.shifts(view, items, reader.factors(reader.texts(items)), 3)
    for layer, (up, v) in shifts.items():
        update = edit.updates[view.layers[layer].site.linear.name]
        assert isinstance(update, LowRank)
        torch.testing.assert_close(update.matrix(), up[0].t() @ v[0], rtol=1e-4, atol=1e-6)
    alone = planned(Malmen, (view, encoder), REQUESTS[:1], trained)
    name = next(iter(edit.updates))
    assert not torch.allclose(alone.updates[name].matrix(), edit.updates[name].matrix())
