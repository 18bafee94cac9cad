"""Reading a model by structure: find the decoder stack and the value projections.

No table of architectures and no comparison with a model's name. One short forward pass records what runs.
The decoder stack is the module list that holds most of the parameters that ran; a layer's value projection is
the widest linear map that leads back to the residual width outside attention. What is found here is only
believed once :mod:`kecore.model.verify` has perturbed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kecore.api.errors import NonFiniteError, UnsupportedModelError
from kecore.model import hooks
from kecore.model.layer import LayerView, ValueSite
from kecore.model.linear import LinearView, orientation
from kecore.model.verify import BROKEN, TOKENS, probe_ids

__all__ = ["Structure", "probe"]

_LEAST_SHARE = 0.1
"""Of a layer's weights outside attention, in the value projection: a third in most, a sixth in hybrids."""

_NAME_IT = "Name one with ModelView.of(model, value_projection='path.inside.layer')"


@dataclass(frozen=True, slots=True)
class Structure:
    """What was found in a model, before it is verified.

    Args:
        layers: the decoder stack.
        width: width of the residual stream.
        final_norm: the module between the last layer and the unembedding, if there is one.
        unembedding: the module that turns hidden states into logits.
        logits: ``[1, TOKENS, vocab]``, the model's own on :func:`probe_ids`, called plainly.
    """

    layers: tuple[LayerView, ...]
    width: int
    final_norm: nn.Module | None
    unembedding: nn.Module
    logits: Tensor


def probe(model: nn.Module, value_projection: str | None = None) -> Structure:
    """Read a model's structure; see :meth:`kecore.model.view.ModelView.of`, which freezes the model before."""
    _refuse_out_of_reach(model)
    unembedding = _unembedding(model)
    trace = _Trace(model)
    logits = trace.run()
    runs = _decoder_stack(type(model).__name__, trace)
    if value_projection is None:
        for run in runs:
            _refuse_experts(run, unembedding)
    width = _width(type(model).__name__, runs)
    layers = tuple(
        LayerView(
            index,
            run.name,
            run.module,
            (ValueSite(index, None, _value_projection(run, trace.inside(run.module), width, value_projection)),),
            None,
            0 if isinstance(run.output, Tensor) else len(run.output),
        )
        for index, run in enumerate(runs)
    )
    modules_after = [call.module for call in trace.calls[runs[-1].calls_before :]]
    final_norm = next((module for module in modules_after if module is not unembedding), None)
    return Structure(layers, width, final_norm, unembedding, logits)


def _refuse_out_of_reach(model: nn.Module) -> None:
    """Neither what was compiled nor what is elsewhere can be run in parts and changed."""
    if hooks.compiled(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is compiled, and compiled code has no parts; give the model as it was before "
            "torch.compile, and compile it after the edit"
        )
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(away)} parameters that are not in memory, as {away[0]}; load it without "
            "offloading to CPU or disk: from_pretrained(..., device_map=None)"
        )


def _unembedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embedding, so it is not a causal language model with a "
            "head; load it with AutoModelForCausalLM"
        )
    return head


class _Call(NamedTuple):
    """One call of a module without children: what it read and wrote."""

    module: nn.Module
    x: Tensor
    y: Tensor


class _Run(NamedTuple):
    """One call of a member of a module list."""

    name: str
    module: nn.Module
    output: Any
    calls_before: int


class _Trace:
    """Records one forward pass: leaf modules in order of execution, and the members of module lists."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[_Call] = []
        self.runs: dict[str, list[_Run]] = {}
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        # Module lists inside a decoder layer (experts, norms) are not stacks, so only outermost lists compete.
        self.lists = {n: m for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)}

    def run(self) -> Tensor:
        """Run the model on a few tokens.

        Returns:
            Its logits.

        Raises:
            UnsupportedModelError: it cannot be run on token ids alone.
            NonFiniteError: the logits are not finite.
        """
        handles: list[Any] = []
        try:
            for module in self.model.modules():
                if not _parts(module) and any(True for _ in module.parameters()):
                    handles.append(module.register_forward_hook(self._leaf))
            for name, members in self.lists.items():
                for index, module in enumerate(members):
                    handles.append(module.register_forward_hook(self._member(name, f"{name}.{index}")))
            ids = probe_ids(self.model)
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        except BROKEN as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run on token ids alone ({type(error).__name__}: {error}); "
                "kecore edits causal language models"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteError(
                f"{type(self.model).__name__}: the unedited model returns NaN or infinity; check the weights and "
                "the dtype"
            )
        return logits

    def _leaf(self, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            # Copies: some architectures go on to write into these tensors.
            self.calls.append(_Call(module, args[0].clone(), output.clone()))

    def _member(self, name: str, path: str) -> Any:
        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            self.runs.setdefault(name, []).append(_Run(path, module, output, len(self.calls)))

        return keep

    def inside(self, layer: nn.Module) -> list[tuple[str, _Call]]:
        """Leaf calls inside a layer, with their paths."""
        paths = {id(m): n for n, m in layer.named_modules()}
        return [(paths[id(call.module)], call) for call in self.calls if id(call.module) in paths]


def _decoder_stack(model_name: str, trace: _Trace) -> list[_Run]:
    """The layers that ran, of the module list that most of the parameters belong to."""
    once = [
        runs
        for runs in trace.runs.values()
        if len({id(run.module) for run in runs}) == len(runs) and all(_parts(run.module) for run in runs)
    ]
    if not once:
        lists = ", ".join(
            f"{name} ({len(members)} modules, {len(trace.runs.get(name, []))} calls)"
            for name, members in trace.lists.items()
        )
        raise UnsupportedModelError(
            f"{model_name}: expected a module list of decoder layers that each run once, found: {lists or 'none'}"
        )
    return max(once, key=lambda runs: sum(p.numel() for run in runs for p in run.module.parameters()))


def _width(model_name: str, runs: list[_Run]) -> int:
    shapes = {tuple(hooks.first_tensor(run.output).shape) for run in runs}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[:2] != (1, TOKENS):
        raise UnsupportedModelError(
            f"{model_name}: expected every layer to hand on one residual stream [rows, tokens, width], here "
            f"[1, {TOKENS}, width]; {runs[0].name} hands on {list(shape)}"
        )
    return int(shape[-1])


def _refuse_experts(run: _Run, unembedding: nn.Module) -> None:
    """Mixture-of-experts layers keep their values in many matrices, of which a token uses some."""
    # The stream may be several residual streams side by side; the unembedding reads one.
    widths = {int(hooks.first_tensor(run.output).shape[-1]), *_widths(unembedding)}
    found = [
        path
        for path, module in run.module.named_modules()
        if isinstance(module, nn.ModuleList) and _alike(module) and not _is_attention(run.module, path)
    ]
    for path, module in run.module.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            continue
        for name, p in module.named_parameters(prefix=path, recurse=False):
            # Matrices in one parameter, each from or to the residual width: a block-diagonal map has other widths.
            stacked = p.ndim == 3 and min(p.shape) > 1 and not widths.isdisjoint(p.shape[1:])
            if stacked and not _is_attention(run.module, name):
                found.append(name)
    if found:
        raise UnsupportedModelError(
            f"{run.name} ({type(run.module).__name__}) keeps its values in several matrices of one kind, as a mixture "
            f"of experts does ({', '.join(found[:3])}); kecore does not edit these yet. A dense part can be named "
            "with ModelView.of(model, value_projection='path.inside.layer')"
        )


def _widths(head: nn.Module) -> tuple[int, ...]:
    weight = getattr(head, "weight", None)
    return (int(weight.shape[-1]),) if isinstance(weight, Tensor) else ()


def _alike(modules: nn.ModuleList) -> bool:
    """Whether a list holds several modules with matrices of the same shapes."""
    shapes = {tuple(tuple(p.shape) for p in m.parameters() if p.ndim > 1) for m in modules}
    return len(modules) > 1 and len(shapes) == 1 and shapes != {()}


def _is_attention(layer: nn.Module, path: str) -> bool:
    """Whether a path inside a layer leads through attention: the one thing that is told by name."""
    *parents, _ = parts = path.split(".")
    owner = type(layer.get_submodule(".".join(parents))).__name__ if parents else ""
    return any("attn" in name.lower() or "attention" in name.lower() for name in (*parts, owner))


def _value_projection(run: _Run, calls: list[tuple[str, _Call]], width: int, wanted: str | None) -> LinearView:
    if wanted is not None:
        found = [item for item in calls if item[0] == wanted]
    else:
        maps = [(p, c) for p, c in calls if _is_matrix(c) and c.y.shape[-1] == width]
        found = [(p, c) for p, c in maps if not _is_attention(run.module, p)]
    ran = ", ".join(f"{p} [{c.y.shape[-1]}, {c.x.shape[-1]}]" for p, c in calls if _is_matrix(c)) or "none"
    where = f"{run.name} ({type(run.module).__name__})"
    if not found:
        what = f"{wanted!r} is not among them" if wanted else f"none leads back to the residual width {width}"
        raise UnsupportedModelError(
            f"{where}: found no value projection; the layer ran the linear maps {ran}, and outside attention "
            f"{what}. {_NAME_IT}"
        )
    # The feed-forward block is the widest thing in a layer (gates, adapters and mixers are narrower) and, where it
    # is no wider than the residual stream, the last.
    path, call = max(enumerate(found), key=lambda item: (item[1][1].x.shape[-1], item[0]))[1]
    transposed = orientation(call.module, call.x, call.y)
    if transposed is None:
        raise UnsupportedModelError(
            f"{where}: {path} ({type(call.module).__name__}) is not a plain linear map of its weight; a quantised "
            f"model can be edited in its original type. {_NAME_IT}"
        )
    other = sum(p.numel() for n, p in run.module.named_parameters() if not _is_attention(run.module, n))
    share = call.x.shape[-1] * width / other
    if wanted is None and share < _LEAST_SHARE:
        raise UnsupportedModelError(
            f"{where}: {path} leads back to the residual width but holds only {share:.0%} of the weights outside "
            f"attention, so the layer's values must be elsewhere; it ran {ran}. {_NAME_IT}"
        )
    return LinearView(call.module, f"{run.name}.{path}.weight", transposed)


def _parts(module: nn.Module) -> int:
    return sum(1 for _ in module.children())


def _is_matrix(call: _Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1 and call.x.is_floating_point()
