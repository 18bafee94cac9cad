"""Steps of the values recorded and replayed, by a tracer that freezes what a CUDA graph freezes.

`make_fx` runs a function once on the host and keeps its tensor operations alone: a value read on the host is an error,
and what the function closes over is a constant of the graph. That is the contract of a CUDA graph, short of its speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engine_worlds import World, make_world
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kecore.api.errors import KecoreWarning
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.engine import value_steps
from kecore.engine import values as values_module
from kecore.engine.graphs import Function
from kecore.engine.value_steps import ValueSettings, all_most_probable
from kecore.engine.values import optimise_values
from kecore.testing import Snapshot

SETTINGS = ValueSettings(steps=6, stop_loss=0.0, learning_rate=0.3)
HOST = ("lift_fresh", "_local_scalar_dense", "nonzero")  # operations with data of the host, or results for it


class Tracer:
    """Stands in for `record`."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.host: set[str] = set()

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Function:
        graph = make_fx(lambda *given: function(*given))(*(given.clone() for given in inputs))
        names = {str(node.target) for node in graph.graph.nodes}
        self.host |= {name for name in names if any(part in name for part in HOST)}
        self.recorded += 1

        def replay(*given: Tensor) -> Sequence[Tensor]:
            self.replayed += 1
            return graph(*given)

        return replay


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    made = Tracer()
    monkeypatch.setattr(value_steps, "record", made)
    monkeypatch.setattr(value_steps, "_RECORDED", ("cpu",))
    return made


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        *[(architecture, {}) for architecture in ("llama", "gpt2", "granite", "gemma2")],
        ("llama", {"optimizer": "adam"}),
        ("llama", {"noise": 0.0, "kl_weight": 0.0}),
        ("llama", {"finished": all_most_probable, "hits": 2}),
    ],
    ids=["llama", "gpt2", "granite", "gemma2", "adam", "plain", "most-probable"],
)
def test_replayed_steps_are_the_steps(
    architecture: str, facts: list[EditRequest], tracer: Tracer, change: dict[str, object]
) -> None:
    view, encoder = make_world(architecture)
    settings = replace(SETTINGS, **change)  # type: ignore[arg-type]
    before = Snapshot(view.model)
    plain = optimise_values(view, RequestBatch.of(facts, encoder), 1, ["", "I know"], settings)
    replayed = optimise_values(view, RequestBatch.of(facts, encoder), 1, ["", "I know"], replace(settings, graphs=True))
    assert tracer.recorded
    assert tracer.replayed
    assert tracer.host == set()
    torch.testing.assert_close(replayed.delta, plain.delta, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(replayed.loss, plain.loss, rtol=1e-5, atol=1e-6)
    assert replayed.steps.tolist() == plain.steps.tolist()
    assert before.differences() == []


def test_recorded_anew_when_rows_are_dropped(world: World, facts: list[EditRequest], tracer: Tracer) -> None:
    view, encoder = world
    losses = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], replace(SETTINGS, steps=4)).loss
    settings = replace(SETTINGS, steps=12, stop_loss=float(losses.sort().values[:2].mean()))
    plain = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], settings)
    assert plain.steps.unique().numel() > 1
    replayed = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], replace(settings, graphs=True))
    assert tracer.recorded > 1
    torch.testing.assert_close(replayed.delta, plain.delta, rtol=1e-5, atol=1e-6)
    assert replayed.steps.tolist() == plain.steps.tolist()


@pytest.mark.filterwarnings("ignore:BartForCausalLM is driven in mode")
@pytest.mark.usefixtures("tracer")
def test_what_cannot_be_recorded_runs_as_ever(facts: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "_ENOUGH", {"cpu": 1})  # many micro-batches, of which one tries
    view, encoder = make_world("bart")  # whose forward reads a tensor on the host
    plain = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], SETTINGS)
    with pytest.warns(KecoreWarning, match=r"not replayed as CUDA graphs: .*_local_scalar_dense") as warned:
        found = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], replace(SETTINGS, graphs=True))
    assert torch.equal(found.delta, plain.delta)
    assert len([w for w in warned if "CUDA graphs" in str(w.message)]) == 1


def test_without_effect_on_a_cpu(world: World, facts: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    view, encoder = world
    monkeypatch.setattr(value_steps, "record", None)
    plain = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], SETTINGS)
    found = optimise_values(view, RequestBatch.of(facts, encoder), 1, [""], replace(SETTINGS, graphs=True))
    assert torch.equal(found.delta, plain.delta)
