"""Reading a model by structure: find the decoder stack and the value projections, then prove it.

No table of architectures and no comparison with a model's name. One short forward pass records which
linear maps run; the value projection of a layer is the last one that leads back to the residual width
outside attention. Then each finding is checked by perturbation: a vector added to the projection's
output at one token must change the layer's output at that token and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kecore.errors import NonFiniteError, UnsupportedModelError
from kecore.model_view import hooks
from kecore.model_view.linear import LinearView, orientation
from kecore.model_view.view import LayerView, ModelView
from kecore.text import Rows

__all__ = ["probe"]

_TOKENS = 6  # enough to tell "this token only" from "later tokens too"
_PLACE = 3


def probe(model: nn.Module, value_projection: str | None = None) -> ModelView:
    """Build a :class:`ModelView`; see :meth:`ModelView.of`."""
    unembedding = _unembedding(model)
    stack_name, stack = _decoder_stack(model)
    with hooks.frozen(model), torch.no_grad():
        trace = _Trace(model, stack, unembedding)
        with trace:
            model(**_probe_input(model))
        trace.check(type(model).__name__, stack_name)
        layers: list[LayerView] = []
        for index, module in enumerate(stack):
            name = f"{stack_name}.{index}"
            linear = _value_projection(name, module, trace, value_projection)
            layers.append(LayerView(index, name, module, linear, None))
        view = ModelView(
            model=model,
            layers=tuple(layers),
            width=trace.width,
            final_norm=trace.final_norm,
            unembedding=unembedding,
            tuple_layers=trace.tuple_layers,
        )
        return _verified(view)


def _unembedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embedding, so it is not a causal language model with a "
            "head; load it with AutoModelForCausalLM"
        )
    return head


def _decoder_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    depth = getattr(config, "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    # A stack may sit inside another module list (experts in layers), so only outermost lists compete.
    outer = [(n, m) for n, m in found if not any(n.startswith(o + ".") for o, _ in found)]
    matching = [(n, m) for n, m in outer if depth is None or len(m) == depth]
    if not matching:
        lists = ", ".join(f"{n} ({len(m)})" for n, m in outer) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a module list of {depth} decoder layers, found: {lists}"
        )
    return max(matching, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _probe_input(model: nn.Module) -> dict[str, Any]:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    # Distinct ids away from the special ones that usually open the vocabulary.
    ids = torch.tensor([[(vocabulary // 2 + 7 * i) % vocabulary for i in range(_TOKENS)]], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


class _Trace:
    """Records one forward pass: linear maps in order of execution, layer outputs, the final norm."""

    def __init__(self, model: nn.Module, stack: nn.ModuleList, unembedding: nn.Module) -> None:
        self.model, self.stack, self.unembedding = model, stack, unembedding
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.outputs: list[Any] = []
        self.final_norm: nn.Module | None = None
        self._in_stack = {id(m) for m in stack.modules()}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module in self.model.modules():
            if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
                self._handles.append(module.register_forward_hook(self._leaf))
        for layer in self.stack:
            self._handles.append(layer.register_forward_hook(self._layer))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _leaf(self, module: nn.Module, args: Any, output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        if id(module) in self._in_stack:
            self.calls.append((module, args[0].detach(), output.detach()))
        elif len(self.outputs) == len(self.stack) and module is not self.unembedding:
            self.final_norm = self.final_norm or module

    def _layer(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append(output)

    def check(self, model_name: str, stack_name: str) -> None:
        if len(self.outputs) != len(self.stack):
            raise UnsupportedModelError(
                f"{model_name}: expected each layer of {stack_name} to run once, {len(self.outputs)} ran "
                f"of {len(self.stack)}"
            )
        last = hooks.first_tensor(self.outputs[-1])
        if not bool(torch.isfinite(last).all()):
            raise NonFiniteError(
                f"{model_name}: the unedited model returns NaN or infinity; check the weights and the dtype"
            )

    @property
    def tuple_layers(self) -> bool:
        return not isinstance(self.outputs[0], Tensor)

    @property
    def width(self) -> int:
        return int(hooks.first_tensor(self.outputs[-1]).shape[-1])


def _value_projection(name: str, layer: nn.Module, trace: _Trace, wanted: str | None) -> LinearView:
    paths = {id(m): n for n, m in layer.named_modules()}
    calls = [(paths[id(m)], m, x, y) for m, x, y in trace.calls if id(m) in paths]
    if wanted is not None:
        calls = [call for call in calls if call[0] == wanted]
    else:
        _refuse_experts(name, layer)
        outside = [c for c in calls if "attn" not in c[0].lower() and "attention" not in c[0].lower()]
        back = [c for c in outside if c[3].shape[-1] == trace.width]
        # A feed-forward block that is as wide as the residual stream leaves only the order to go by.
        calls = [c for c in back if c[2].shape[-1] != trace.width] or back
    for path, module, x, y in reversed(calls):
        transposed = orientation(module, x, y)
        if transposed is not None:
            return LinearView(module, f"{name}.{path}.weight", transposed)
    raise UnsupportedModelError(
        f"{name} ({type(layer).__name__}): found no linear map from a feed-forward block back to the "
        f"residual width {trace.width}; the layer ran "
        + (", ".join(f"{p} {tuple(getattr(m, 'weight', x).shape)}" for p, m, x, _ in calls) or "none")
        + ". Name one with ModelView.of(model, value_projection='path.inside.layer')"
    )


def _refuse_experts(name: str, layer: nn.Module) -> None:
    """Mixture-of-experts layers keep their values in many matrices, of which a token uses some."""
    found = [
        path
        for path, module in layer.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and _alike(module)
    ]
    found += [p for p, w in layer.named_parameters() if w.ndim == 3 and min(w.shape) > 1]
    if found:
        raise UnsupportedModelError(
            f"{name} ({type(layer).__name__}) is a mixture of experts ({', '.join(found[:3])}); its values "
            "are spread over expert matrices, which kecore does not edit yet. A dense part can be named with "
            "ModelView.of(model, value_projection='path.inside.layer')"
        )


def _alike(modules: Iterable[nn.Module]) -> bool:
    shapes = {tuple(tuple(p.shape) for p in m.parameters()) for m in modules}
    return len(shapes) == 1 and shapes != {()}


def _verified(view: ModelView) -> ModelView:
    """Perturb each value projection and read off where its output goes."""
    inputs = _probe_input(view.model)
    rows = Rows(inputs["input_ids"], inputs["attention_mask"], torch.zeros(1, dtype=torch.long))
    every = range(len(view.layers))
    whole = view.forward(rows, hidden=every, values=every)
    generator = torch.Generator().manual_seed(0)
    layers: list[LayerView] = []
    for part in view.layers:
        below = (part.index, whole.hidden[part.index - 1]) if part.index else None
        clean = view.forward(rows, resume=below, stop=part.index, hidden=[part.index]).hidden[part.index]
        spread = float(whole.values[part.index].float().std()) + float(clean.float().std())
        bump = spread * torch.randn(view.width, generator=generator).to(clean)

        def add(output: Tensor, bump: Tensor = bump) -> Tensor:
            output = output.clone()
            output[0, _PLACE] += bump.to(output)
            return output

        moved = view.forward(
            rows, resume=below, stop=part.index, hidden=[part.index], change={part.index: add}
        ).hidden[part.index]
        scale = _residual_scale(part, bump.float(), (moved - clean).float()[0], float(clean.abs().max()))
        layers.append(LayerView(part.index, part.name, part.module, part.value_projection, scale))
    _check_gather(view, rows, whole.logits)
    return ModelView(
        view.model, tuple(layers), view.width, view.final_norm, view.unembedding, view.tuple_layers
    )


def _residual_scale(part: LayerView, bump: Tensor, change: Tensor, size: float) -> float | None:
    elsewhere = torch.cat([change[:_PLACE], change[_PLACE + 1 :]]).abs().max()
    here = change[_PLACE]
    eps = torch.finfo(part.value_projection.weight.dtype).eps
    if not bool(here.abs().max() > 8 * eps * size) or bool(elsewhere > 8 * eps * size):
        raise UnsupportedModelError(
            f"{part.value_projection.name}: a change of this map's output at one token must change the layer's "
            f"output at that token alone; it changed by {float(here.abs().max()):.3g} there and by "
            f"{float(elsewhere):.3g} elsewhere. Name another map with "
            "ModelView.of(model, value_projection='path.inside.layer')"
        )
    scale = float(here @ bump / (bump @ bump))
    error = float((here - scale * bump).norm() / here.norm())
    if error > max(1e-3, 32 * eps):
        return None
    return 1.0 if abs(scale - 1) < max(1e-3, 8 * eps) else scale


def _check_gather(view: ModelView, rows: Rows, logits: Tensor | None) -> None:
    place = (torch.zeros(1, dtype=torch.long), torch.tensor([_PLACE]))
    try:
        alone = view.forward(rows, at=place).logits
        same = alone is not None and logits is not None and torch.allclose(
            alone[0].float(), logits[0, _PLACE].float(), rtol=1e-2, atol=1e-2
        )
    except (RuntimeError, IndexError) as error:
        warnings.warn(f"logits cannot be gathered: {error}", stacklevel=2)
        same = False
    if not same:
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: {type(view.unembedding).__name__} as output embedding does not give "
            "the model's logits from the hidden state of single tokens"
        )
