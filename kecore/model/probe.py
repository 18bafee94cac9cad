"""Reading a model by structure: find the decoder stack and the value projections.

No table of architectures and no comparison with a model's name. One short forward pass records what runs.
The decoder stack is the module list that holds most of the parameters that ran; a layer's value projection is
the widest linear map that leads back to the residual width outside attention. What is found here is only
believed once :mod:`kecore.model.verify` has perturbed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kecore.api.errors import NonFiniteError, UnsupportedModelError
from kecore.model import hooks
from kecore.model.handover import Handover
from kecore.model.layer import BlockView, LayerView, ValueSite
from kecore.model.linear import LinearView, is_packed, orientation, packed_map
from kecore.model.mixture import Mixture, ModuleCall, read_mixture
from kecore.model.verify import BROKEN, TOKENS, probe_ids
from kecore.text import Rows

__all__ = ["Structure", "find_unembedding", "probe"]

_LEAST_SHARE = 0.1
"""Least share of a layer's weights outside attention that a value projection holds: a third in most models, a sixth in
hybrids."""

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


def probe(model: nn.Module, value_projection: str | None = None, handover: Handover | None = None) -> Structure:
    """Read a model's structure; see :meth:`kecore.model.view.ModelView.of`, which freezes the model before."""
    _refuse_out_of_reach(model)
    unembedding = find_unembedding(model)
    trace = _Trace(model, handover)
    logits = trace.run()
    runs = _decoder_stack(type(model).__name__, trace)
    width = _residual_width(type(model).__name__, runs)
    mixtures: dict[int, Mixture] = {}
    if value_projection is None:
        mixtures = _read_mixtures(trace, runs, unembedding, width)
    layers: list[LayerView] = []
    for index, run in enumerate(runs):
        items = 0 if isinstance(run.output, Tensor) else len(run.output)
        if index in mixtures:
            layers.append(_mixture_layer(index, run, mixtures[index], items))
            continue
        linear = _value_projection(run, trace.inside(run.module), width, value_projection)
        block = BlockView(linear.module, linear.name.removesuffix(".weight"), linear.d_in, linear.d_out)
        layer = LayerView(
            index,
            name=run.name,
            module=run.module,
            block=block,
            sites=(ValueSite(index, None, linear),),
            residual_scale=None,  # found out by :mod:`kecore.model.verify`
            items=items,
        )
        layers.append(layer)
    modules_after = [call.module for call in trace.calls[runs[-1].calls_before :]]
    final_norm = next((module for module in modules_after if module is not unembedding), None)
    return Structure(tuple(layers), width, final_norm, unembedding, logits)


def _refuse_out_of_reach(model: nn.Module) -> None:
    """Refuse a model that was compiled or is not in memory: it cannot be run in parts and changed."""
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


def find_unembedding(model: nn.Module) -> nn.Module:
    """Return the module that turns hidden states into logits, or refuse a model that has none."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embedding, so it is not a causal language model with a "
            "head; load it with AutoModelForCausalLM"
        )
    return head


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of a module without children.

    Args:
        module: the module.
        x: what it read.
        y: what it returned.
        path: path of the module inside the layer that is looked at; empty in the trace of the whole model.
    """

    module: nn.Module
    x: Tensor
    y: Tensor
    path: str = ""

    @property
    def is_linear_map(self) -> bool:
        """Whether the module multiplies states by a matrix."""
        if not self.x.is_floating_point():
            return False
        weight = getattr(self.module, "weight", None)
        return is_packed(self.module) or (isinstance(weight, Tensor) and weight.ndim > 1)

    @property
    def d_in(self) -> int:
        """Width of what was read."""
        return int(self.x.shape[-1])

    @property
    def d_out(self) -> int:
        """Width of what was returned."""
        return int(self.y.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One call of a member of a module list, such as a decoder layer.

    Args:
        name: module path.
        module: the member.
        output: what it returned.
        calls_before: how many calls of modules without children had come before its end.
    """

    name: str
    module: nn.Module
    output: Any
    calls_before: int

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


class _Trace:
    """Records one forward pass: leaf modules in order of execution, and the members of module lists."""

    def __init__(self, model: nn.Module, handover: Handover | None) -> None:
        self.model = model
        self.handover = handover
        self.calls: list[_Call] = []
        self.runs: dict[str, list[_Run]] = {}  # by the name of the module list
        self.lists: dict[str, nn.ModuleList] = {}
        inside_encoder = _encoder_modules(model) if handover is not None else set[nn.Module]()
        for name, module in model.named_modules():  # parents come before their children
            if module in inside_encoder:
                continue
            # Module lists inside a decoder layer (experts, norms) are not stacks, so only outermost lists compete.
            is_inside = any(name.startswith(f"{outer}.") for outer in self.lists)
            if isinstance(module, nn.ModuleList) and len(module) and not is_inside:
                self.lists[name] = module

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
                if not _has_children(module) and (next(module.parameters(), None) is not None or is_packed(module)):
                    handles.append(module.register_forward_hook(self._leaf))
            for name, members in self.lists.items():
                for index, module in enumerate(members):
                    handles.append(module.register_forward_hook(self._member(name, f"{name}.{index}")))
            logits = self.model(**_probe_arguments(self.model, self.handover)).logits
        except BROKEN as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run on token ids alone ({type(error).__name__}: {error}); "
                "kecore edits language models that can read text alone"
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

    def _member(self, list_name: str, path: str) -> Any:
        """Return a hook that records the calls of a member of a module list."""

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            self.runs.setdefault(list_name, []).append(_Run(path, module, output, len(self.calls)))

        return keep

    def inside(self, layer: nn.Module) -> list[_Call]:
        """Return the calls of modules without children inside a layer, with their paths, in order of execution."""
        paths = {id(module): path for path, module in layer.named_modules()}
        return [replace(call, path=paths[id(call.module)]) for call in self.calls if id(call.module) in paths]


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """Return all modules of an encoder-decoder that its decoder does not hold and that its encoder does."""
    parts: dict[str, set[nn.Module]] = {}
    for name in ("get_encoder", "get_decoder"):
        getter = getattr(model, name, None)
        part = getter() if getter is not None else None
        parts[name] = set(part.modules()) if isinstance(part, nn.Module) else set()
    return parts["get_encoder"] - parts["get_decoder"]


def _probe_arguments(model: nn.Module, handover: Handover | None) -> dict[str, Any]:
    """Return what the model is called with to see what runs."""
    ids = probe_ids(model)
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    if handover is not None:
        return {**handover.arguments(rows), "use_cache": False}
    return {"input_ids": ids, "attention_mask": rows.attention_mask, "use_cache": False}


def _decoder_stack(model_name: str, trace: _Trace) -> list[_Run]:
    """Return the layers that ran, of the module list that most of the parameters belong to."""
    stacks: list[list[_Run]] = []
    for runs in trace.runs.values():
        each_runs_once = len({id(run.module) for run in runs}) == len(runs)
        if each_runs_once and all(_has_children(run.module) for run in runs):
            stacks.append(runs)
    if not stacks:
        lists: list[str] = []
        for name, members in trace.lists.items():
            lists.append(f"{name} ({len(members)} modules, {len(trace.runs.get(name, []))} calls)")
        raise UnsupportedModelError(
            f"{model_name}: expected a module list of decoder layers that each run once, found: "
            f"{', '.join(lists) or 'none'}"
        )
    return max(stacks, key=lambda runs: sum(_parameter_count(run.module) for run in runs))


def _residual_width(model_name: str, runs: list[_Run]) -> int:
    """Return the width of the residual stream, or refuse layers that hand on anything else."""
    shapes = {tuple(hooks.first_tensor(run.output).shape) for run in runs}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[:2] != (1, TOKENS):
        raise UnsupportedModelError(
            f"{model_name}: expected every layer to hand on one residual stream [rows, tokens, width], here "
            f"[1, {TOKENS}, width]; {runs[0].name} hands on {list(shape)}"
        )
    return int(shape[-1])


def _read_mixtures(trace: _Trace, runs: Sequence[_Run], unembedding: nn.Module, width: int) -> dict[int, Mixture]:
    """Return what was found in the layers that keep their values in several matrices, by the layers' index."""
    modules_of_layer: dict[int, dict[str, nn.Module]] = {}
    matrices: dict[int, list[str]] = {}
    for index, run in enumerate(runs):
        matrices[index] = _expert_matrices(run, unembedding)
        if matrices[index]:
            modules_of_layer[index] = _modules_around(run.module, matrices[index])
    calls = _calls_of(trace, [module for modules in modules_of_layer.values() for module in modules.values()])
    mixtures: dict[int, Mixture] = {}
    for index, modules in modules_of_layer.items():
        mixture = read_mixture(runs[index].name, modules, calls, width)
        if mixture.experts is None:
            reason = (
                "it keeps its values in several matrices of one kind, as a mixture of experts does "
                f"({', '.join(matrices[index][:3])}), and {mixture.reason}"
            )
            mixture = replace(mixture, reason=reason)
        mixtures[index] = mixture
    return mixtures


def _modules_around(layer: nn.Module, matrices: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules of a layer that hold some matrices, by path, outer ones first; not the layer itself."""
    modules: dict[str, nn.Module] = {}
    for path, module in layer.named_modules():
        if path and not _is_attention(layer, path) and any(name.startswith(f"{path}.") for name in matrices):
            modules[path] = module
    return modules


@torch.no_grad()
def _calls_of(trace: _Trace, modules: Sequence[nn.Module]) -> dict[nn.Module, list[ModuleCall]]:
    """Return the calls of some modules in one pass over a few tokens."""
    calls: dict[nn.Module, list[ModuleCall]] = {}
    if not modules:
        return calls

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(module, []).append(ModuleCall(args, kwargs, output))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        trace.model(**_probe_arguments(trace.model, trace.handover))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _mixture_layer(index: int, run: _Run, mixture: Mixture, items: int) -> LayerView:
    """Return a layer that keeps its values in several matrices.

    Raises:
        UnsupportedModelError: nothing in it can be changed, by no method.
    """
    if mixture.block is None:
        raise UnsupportedModelError(
            f"{run}: {mixture.reason}. A dense part can be named with ModelView.of(model, "
            "value_projection='path.inside.layer')"
        )
    sites: list[ValueSite] = []
    if mixture.experts is not None:
        for expert in range(mixture.experts.count):
            sites.append(ValueSite(index, expert, mixture.experts.linear(expert)))
    return LayerView(
        index,
        name=run.name,
        module=run.module,
        block=mixture.block,
        sites=tuple(sites),
        residual_scale=None,  # found out by :mod:`kecore.model.verify`
        items=items,
        experts=mixture.experts,
        no_sites=mixture.reason,
    )


def _expert_matrices(run: _Run, unembedding: nn.Module) -> list[str]:
    """Return what stacks or lists the matrices of several experts in a layer, by path; empty in a dense layer."""
    # The stream may be several residual streams side by side; the unembedding reads one.
    widths = {int(hooks.first_tensor(run.output).shape[-1])}
    head_weight = getattr(unembedding, "weight", None)
    if isinstance(head_weight, Tensor):
        widths.add(int(head_weight.shape[-1]))
    lists: list[str] = []
    parameters: list[str] = []
    for path, module in run.module.named_modules():
        if isinstance(module, nn.ModuleList) and _are_alike(module) and not _is_attention(run.module, path):
            lists.append(path)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if _is_stacked(parameter, widths) and not _is_attention(run.module, name):
                parameters.append(name)
    return [*lists, *parameters]


def _is_stacked(parameter: Tensor, widths: set[int]) -> bool:
    """Return whether a parameter holds several matrices, each from or to a residual width.

    A block-diagonal map holds several matrices too, of other widths.
    """
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not widths.isdisjoint(parameter.shape[1:])


def _are_alike(modules: nn.ModuleList) -> bool:
    """Return whether a list holds several modules with matrices of the same shapes."""
    shapes: set[tuple[torch.Size, ...]] = set()
    for module in modules:
        shapes.add(tuple(parameter.shape for parameter in module.parameters() if parameter.ndim > 1))
    return len(modules) > 1 and len(shapes) == 1 and shapes != {()}


def _is_attention(layer: nn.Module, path: str) -> bool:
    """Return whether a path inside a layer leads through attention: the one thing that is told by name."""
    names = path.split(".")
    owner = path.rpartition(".")[0]
    if owner:
        names.append(type(layer.get_submodule(owner)).__name__)
    return any("attn" in name.lower() or "attention" in name.lower() for name in names)


def _value_projection(run: _Run, calls: list[_Call], width: int, wanted: str | None) -> LinearView:
    """Return a layer's value projection.

    Args:
        run: the layer.
        calls: the calls inside it.
        width: width of the residual stream.
        wanted: path of the projection inside the layer; None to look for it.
    """
    maps = [call for call in calls if call.is_linear_map]
    if wanted is not None:
        candidates = [call for call in calls if call.path == wanted]
    else:
        candidates = [call for call in maps if call.d_out == width and not _is_attention(run.module, call.path)]
    maps_that_ran = ", ".join(f"{call.path} [{call.d_out}, {call.d_in}]" for call in maps) or "none"
    if not candidates:
        what = f"{wanted!r} is not among them" if wanted else f"none leads back to the residual width {width}"
        raise UnsupportedModelError(
            f"{run}: found no value projection; the layer ran the linear maps {maps_that_ran}, and outside attention "
            f"{what}. {_NAME_IT}"
        )
    # The feed-forward block is the widest thing in a layer (gates, adapters and mixers are narrower) and, where it
    # is no wider than the residual stream, the last: of equally wide ones `max` returns the first that it meets.
    call = max(reversed(candidates), key=lambda candidate: candidate.d_in)
    transposed = orientation(call.module, call.x, call.y)
    packed = packed_map(call.module, call.x, call.y) if transposed is None else None
    if transposed is None and packed is None:
        raise UnsupportedModelError(
            f"{run}: {call.path} ({type(call.module).__name__}) is no linear map of its weight, plain or "
            f"quantised; a model in a layout that is not read can be edited in its original type. {_NAME_IT}"
        )
    share = call.d_in * width / _parameters_outside_attention(run.module)
    if wanted is None and share < _LEAST_SHARE:
        raise UnsupportedModelError(
            f"{run}: {call.path} leads back to the residual width but holds only {share:.0%} of the weights outside "
            f"attention, so the layer's values must be elsewhere; it ran {maps_that_ran}. {_NAME_IT}"
        )
    return LinearView(call.module, f"{run.name}.{call.path}.weight", bool(transposed), packed=packed)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parameters_outside_attention(layer: nn.Module) -> int:
    """Return how many numbers the weights of a layer hold outside attention."""
    named = layer.named_parameters()
    return sum(parameter.numel() for name, parameter in named if not _is_attention(layer, name))
