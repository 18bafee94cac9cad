"""The engine: what is written reaches the layer it is meant for, and planning leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.config import MethodConfig
from kecore.api.errors import KecoreWarning, LayerError
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.edit import LowRank, WeightEdit
from kecore.engine import closed_form
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys
from kecore.engine.solve import least_squares
from kecore.engine.spread import Evenly
from kecore.engine.value_steps import ValueSettings
from kecore.engine.values import Values
from kecore.model import SiteId
from kecore.ops import Solution
from kecore.testing import Snapshot
from kecore_methods.locate.blue import Boundary
from kecore_methods.locate.pmet import BySquareRoot

SETTINGS = ValueSettings(steps=3, optimizer="gradient", learning_rate=0.2)


def exact(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
    """Write every value exactly, on the mean keys."""
    return least_squares(keys, residuals, None, 0.0, each=False)


def engine(layers: tuple[int, ...], **stages: Any) -> ClosedForm:
    stages = {"solve": exact, **stages}
    return ClosedForm(layers=layers, contexts=0, context_tokens=4, values=SETTINGS, **stages)


def context(world: Any, **fields: Any) -> MethodContext:
    return MethodContext(config=MethodConfig(), encoder=world.encoder, **fields)


def batch(world: Any, facts: list[EditRequest]) -> RequestBatch:
    return RequestBatch.of(facts, world.encoder)


def at_subject(world: Any, fact: EditRequest, layer: int) -> tuple[Tensor, Tensor]:
    """The layer's output and its projection's at the subject's last token, by the whole model."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    part = world.view.layers[layer]
    encoded = world.encoder.encode(fact.text)
    place = encoded.last_token_of(fact.subject_span)
    handles = [m.register_forward_hook(keep) for m in (part.site.linear.module, part.module)]
    with torch.no_grad():
        world.view.model(input_ids=torch.tensor([encoded.ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    value, hidden = (t.reshape(len(encoded.ids), -1)[place] for t in seen)
    return hidden, value


def test_the_boundary_is_one_edit_a_layer(
    any_world: Any, facts: list[EditRequest], recwarn: pytest.WarningsRecorder
) -> None:
    """BLUE: the last layer's values are those of the model that the first layer's update has edited, written whole."""
    view = any_world.view
    before = Snapshot(view.model)
    together = engine((0, 1, 2), spread=Boundary(Evenly())).plan(
        view, batch(any_world, facts[1:3]), context(any_world), "test"
    )
    assert not before.differences()
    first = engine((0,)).plan(view, batch(any_world, facts[1:3]), context(any_world), "test")
    first.attach(view.model)
    last = engine((2,)).plan(view, batch(any_world, facts[1:3]), context(any_world), "test")
    first.revert(view.model)
    assert together.notes["layers"] == [0, 2]
    assert together.notes["value_steps"] == [*first.notes["value_steps"], *last.notes["value_steps"]]
    for part in (first, last):
        ((name, update),) = part.updates.items()
        torch.testing.assert_close(together.updates[name].matrix(), update.matrix(), rtol=1e-4, atol=1e-6)
        assert update.norm() > 0


@pytest.fixture
def wanted(any_world: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Target vectors of the test's own for three subjects, in place of optimised ones."""
    delta = torch.randn(3, any_world.view.width, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3)
    monkeypatch.setattr(closed_form, "optimise_values", lambda *_a, **_k: Values(delta, ones, ones, ones, "full"))
    return delta


@pytest.mark.parametrize(("layers", "gain"), [((1,), 1.0), ((3,), 1.5), ((0, 1, 2), 1.0), ((0, 1, 2), 1.5)])
def test_the_last_layer_moves_by_the_value_however_many_share_it(
    any_world: Any,
    facts: list[EditRequest],
    wanted: Tensor,
    layers: tuple[int, ...],
    gain: float,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Exact solves: what earlier layers leave over, the last one writes."""
    facts = facts[1:]
    before = [at_subject(any_world, fact, layers[-1]) for fact in facts]
    edit = engine(layers, gain=gain).plan(any_world.view, batch(any_world, facts), context(any_world), "test")
    scale = any_world.view.layers[layers[-1]].residual_scale
    behind_norm = scale is None and len(layers) > 1
    assert edit.notes["layers"] == list(layers[-1:] if behind_norm else layers)
    assert [w.category for w in recwarn] == [KecoreWarning] * behind_norm
    edit.attach(any_world.view.model)
    for fact, (hidden, value), delta in zip(facts, before, gain * wanted, strict=True):
        now_hidden, now_value = at_subject(any_world, fact, layers[-1])
        if scale is None:
            torch.testing.assert_close(now_value - value, delta, rtol=1e-3, atol=1e-3)
        else:
            torch.testing.assert_close(now_hidden - hidden, scale * delta, rtol=1e-3, atol=1e-3)
    for share, solved in edit.notes["solve"].items():
        assert solved["edit_residual"] < 1e-4, share


def test_layers_take_even_shares(world: Any, facts: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.ones(1, world.view.width)
    monkeypatch.setattr(
        closed_form,
        "optimise_values",
        lambda *_a, **_k: Values(delta, delta[:, 0], delta[:, 0], delta[:, 0], ""),
    )
    shares: list[Tensor] = []

    def nothing(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        shares.append(residuals.clone())
        mean = keys.mean()
        return Solution(torch.zeros_like(residuals), torch.zeros_like(mean), 1.0, 1.0)

    engine((0, 1, 2, 3), solve=nothing).plan(world.view, batch(world, facts[:1]), context(world), "test")
    assert [float(s.mean()) for s in shares] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1.0], abs=1e-5)


def test_post_processing_changes_what_later_layers_see(world: Any, facts: list[EditRequest]) -> None:
    halved = engine((0, 2), post=lambda _layer, update: LowRank(0.5 * update.U, update.V))
    plain = engine((0, 2))
    a = halved.plan(world.view, batch(world, facts), context(world), "test")
    b = plain.plan(world.view, batch(world, facts), context(world), "test")
    first, last = a.updates
    torch.testing.assert_close(a.updates[first].matrix(), 0.5 * b.updates[first].matrix())
    assert not torch.allclose(a.updates[last].matrix(), 0.5 * b.updates[last].matrix(), rtol=1e-2)


def test_a_plan_leaves_the_model_and_the_process_alone(any_world: Any, facts: list[EditRequest]) -> None:
    any_world.view.model.train()
    before = Snapshot(any_world.view.model)
    full = replace(engine((0, 1)), contexts=2)
    with pytest.warns(KecoreWarning) if any_world.view.layers[0].residual_scale is None else _quietly():
        full.plan(any_world.view, batch(any_world, facts), context(any_world), "test")
    assert before.differences() == []


def test_a_plan_that_fails_leaves_the_model_alone(world: Any, facts: list[EditRequest]) -> None:
    class Boom(Exception):
        pass

    def boom(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        if site.layer == 2:
            raise Boom
        return exact(site, keys, residuals)

    before = Snapshot(world.view.model)
    with pytest.raises(Boom):
        engine((0, 1, 2), solve=boom).plan(world.view, batch(world, facts), context(world), "test")
    assert before.differences() == []


def test_the_edit_says_how_it_was_made(world: Any, facts: list[EditRequest]) -> None:
    made = context(world, seed=11)
    edit = replace(engine((0, 1)), contexts=2).plan(world.view, batch(world, [*facts, facts[0]]), made, "test")
    assert isinstance(edit, WeightEdit)
    assert (edit.method, edit.seed, edit.requests) == ("test", 11, tuple(facts))
    assert len(edit.notes["value_steps"]) == 3  # two requests are about one subject
    assert edit.notes["contexts"][0] == ""
    assert len(edit.notes["contexts"]) == 3
    names = [world.view.layers[i].site.linear.name for i in (0, 1)]
    assert list(edit.updates) == names
    assert edit.transposed == (set(names) if world.view.layers[0].site.linear.transposed else set())
    assert {u.rank for u in edit.updates.values()} == {3}
    assert set(made.stages.seconds) == {"contexts", "values", "keys", "solve"}


def test_same_seed_same_edit(world: Any, facts: list[EditRequest]) -> None:
    full = replace(engine((0, 1)), contexts=2)
    a, b, c = (full.plan(world.view, batch(world, facts), context(world, seed=s), "test") for s in (3, 3, 4))
    for name, update in a.updates.items():
        assert torch.equal(update.matrix(), b.updates[name].matrix())
    assert a.notes["contexts"] != c.notes["contexts"]


def _quietly() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_targets_of_the_projection_are_met_by_the_projection(
    world: Any, facts: list[EditRequest], layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PMET's targets: what layers below push through the residual stream does not count."""
    delta, ones = torch.randn(3, world.view.width, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    monkeypatch.setattr(closed_form, "optimise_values", lambda *_a, **_k: Values(delta, ones, ones, ones, "full"))
    facts = facts[1:]
    before = [at_subject(world, fact, layers[-1])[1] for fact in facts]
    form = engine(layers, spread=BySquareRoot())
    form.plan(world.view, batch(world, facts), context(world), "test").attach(world.view.model)
    for fact, value, wanted in zip(facts, before, delta, strict=True):
        torch.testing.assert_close(at_subject(world, fact, layers[-1])[1] - value, wanted, rtol=1e-3, atol=1e-3)


def test_square_root_spread() -> None:
    keys = Keys(torch.zeros(1, 2), torch.ones(1, 1).to_sparse())
    shares = [float(BySquareRoot().share(0, keys, torch.ones(1, 1), remaining)) for remaining in (4, 3, 2, 1)]
    assert shares == pytest.approx([1 / 2, 3**-0.5, 2**-0.5, 1.0])


class LastWritesAll(Evenly):
    """A spread of the test's own: the first layer is left alone, and of the others the last one writes everything."""

    def parts(self, layers: Sequence[int]) -> Sequence[tuple[int, ...]]:
        return [tuple(layers[-2:])]

    def share(self, site: SiteId, keys: Keys, missing: Tensor, remaining: int) -> Tensor:
        return missing if remaining == 1 else torch.zeros_like(missing)


def test_a_spread_says_which_layers_are_edited_and_what_each_writes(world: Any, facts: list[EditRequest]) -> None:
    form = engine((0, 1, 2), spread=LastWritesAll())
    assert form.edited_layers == (1, 2)
    edit = form.plan(world.view, batch(world, facts[1:3]), context(world), "test")
    assert edit.notes["layers"] == [1, 2]
    silent, writing = edit.updates.values()
    assert silent.norm() == 0
    assert writing.norm() > 0


class OptimisesForTheFirst(Evenly):
    """A spread that moves the anchor and forgets to say how its layers are read."""

    def anchor(self, part: tuple[int, ...]) -> int:
        return part[0]


def test_an_anchor_that_is_not_the_last_layer_needs_residuals_of_its_own(world: Any, facts: list[EditRequest]) -> None:
    with pytest.raises(LayerError, match="has to override 'residuals'"):
        engine((0, 1), spread=OptimisesForTheFirst()).plan(world.view, batch(world, facts), context(world), "test")
