"""Causal tracing equals three runs of the plain model with hooks of one's own, one state at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.errors import RequestError
from kecore.model import ModelView
from kecore.model.mixer import mixer
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot
from kecore.text import Encoder
from kecore_analysis.trace import ROLES, Known, Trace, average, suggested_layers
from kecore_analysis.tracer import Tracer

KNOWN = Known.of("The capital of France is", "France")
SAMPLES = 2


def hooked(model: nn.Module, ids: Tensor, changes: dict[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """Probabilities of the next token with the outputs of some modules changed."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def after(_m: nn.Module, _a: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

        return after

    handles = [module.register_forward_hook(hook(change)) for module, change in changes.items()]
    try:
        return model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


def restore(place: int, clean: Tensor) -> Callable[[Tensor], Tensor]:
    def change(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, place] = clean[:, place]
        return state

    return change


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_restores_as_a_loop_does(architecture: str) -> None:
    model = tiny_model(architecture)
    view, encoder = ModelView.of(model), Encoder(tiny_tokenizer())
    before = Snapshot(model)
    tracer = Tracer(view, encoder, spread=0.2, samples=SAMPLES, window=2, tokens=40)
    trace = tracer.trace(KNOWN)
    assert not before.differences()

    first, last = trace.subject
    assert "".join(trace.tokens[first : last + 1]).strip() == "France"
    ids = torch.tensor([encoder.encode(KNOWN.prompt).ids])
    noise = 0.6 * torch.randn((SAMPLES, last - first + 1, view.width), generator=torch.Generator().manual_seed(0))
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator, union-attr]
    sites = {
        "hidden": [layer.module for layer in view.layers],
        "mlp": [layer.site.linear.module for layer in view.layers],
        "attention": [mixer(view, layer.index) for layer in view.layers],
    }
    clean: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda state: clean.setdefault(module, state.clone())

    def corrupt(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, first : last + 1] += noise
        return state

    with torch.no_grad():
        plain = hooked(model, ids, {module: keep(module) for modules in sites.values() for module in modules})
        answer = int(plain.argmax())
        rows = ids.expand(SAMPLES, -1)
        corrupted = float(hooked(model, rows, {embedding: corrupt})[:, answer].mean())
        assert trace.clean == pytest.approx(float(plain[0, answer]), rel=1e-4)
        assert trace.corrupted == pytest.approx(corrupted, rel=1e-4)
        for kind, modules in sites.items():
            for layer in range(4):
                window = [layer] if kind == "hidden" else range(max(0, layer - 1), layer + 1)
                for place in range(ids.shape[1]):
                    changes = {modules[i]: restore(place, clean[modules[i]]) for i in window}
                    value = hooked(model, rows, {embedding: corrupt, **changes})[:, answer].mean()
                    assert float(trace.restored[kind][place, layer]) == pytest.approx(float(value), rel=1e-3)


def test_last_state_restored_is_the_clean_run() -> None:
    view = ModelView.of(tiny_model("llama"))
    trace = Tracer(view, Encoder(tiny_tokenizer()), spread=0.2, samples=1, kinds=("hidden",)).trace(KNOWN)
    assert float(trace.restored["hidden"][-1, -1]) == pytest.approx(trace.clean, rel=1e-5)
    assert trace.corrupted != pytest.approx(trace.clean, rel=1e-2)


def test_unit_of_the_noise_is_the_spread_of_the_subjects() -> None:
    view, encoder = ModelView.of(tiny_model("llama")), Encoder(tiny_tokenizer())
    ids = [token for text in ("France", "Tim Cook") for token in encoder.encode(text).ids]
    weight: Any = view.model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    prompts = [Known.of("France is", "France"), Known.of("Tim Cook leads", "Tim Cook")]
    assert Tracer.spread_of(view, encoder, prompts) == pytest.approx(float(weight[ids].detach().std()))


def table(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows)


def test_averages_by_role() -> None:
    mlp = table((0.1, 0.1), (0.2, 0.4), (0.6, 0.8), (0.3, 0.1), (0.4, 0.1), (0.5, 0.1))
    one = Trace(("a", "S1", "S2", "b", "c", "d"), (1, 2), "x", 0.9, 0.1, {"mlp": mlp})
    two = Trace(("S", "b"), (0, 0), "x", 0.7, 0.3, {"mlp": table((0.5, 0.9), (0.3, 0.4))})
    averages = average([one, two])
    assert one.roles() == [-1, 0, 2, 3, 4, 5]
    assert two.roles() == [2, 5]
    assert averages.total == pytest.approx(0.6)
    effects = dict(zip(ROLES, averages.effects["mlp"].tolist(), strict=True))
    assert effects["last subject token"] == pytest.approx([0.35, 0.65])
    assert effects["first subject token"] == pytest.approx([0.1, 0.3])
    assert effects["last token"] == pytest.approx([0.2, 0.05])
    assert all(value != value for value in effects["middle subject tokens"])
    assert suggested_layers(averages) == (1, (1,))
    early = Trace(("S1", "S2", "b"), (0, 1), "x", 0.9, 0.1, {"mlp": table((0.8, 0.77), (0.2, 0.3), (0.1, 0.9))})
    assert suggested_layers(average([early])) == (0, (0, 1))


def test_bad_input_is_refused() -> None:
    with pytest.raises(RequestError, match="not in the prompt"):
        Known.of("The capital of France is", "Italy")
    with pytest.raises(RequestError, match="no prompts"):
        average([])
