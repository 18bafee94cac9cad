"""Further neurons beside a feed-forward block: keys that its input is compared with, and values added to its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import UnsupportedModelError
from kecore.edit import SideModule
from kecore.model import ModelView
from kecore.model.hooks import first_tensor
from kecore.model.sites import Key, ModuleInput, ModuleOutput, Start
from kecore.model.verify import BROKEN, probe_ids
from kecore.text import Rows

__all__ = ["Activation", "Block", "Neurons", "read_queries"]

Activation = Literal["relu", "gelu"]

_ACTIVATIONS = {"relu": functional.relu, "gelu": functional.gelu}
_PROBED_TOKEN = 3  # the token of the probe whose state is changed


@dataclass(frozen=True, slots=True)
class Block:
    """The modules at which the feed-forward block of a layer begins and ends.

    Args:
        layer: index of the layer.
        reader: path of the linear map that reads the block's input: one of the gate and the up projection, where there
            is a gate.
        projection: path of the value projection, whose output is the block's.
        d_in: width of the block's input.
        d_out: width of its output.
    """

    layer: int
    reader: str
    projection: str
    d_in: int
    d_out: int

    @classmethod
    def of(cls, view: ModelView, layer: int) -> Block:
        """Find the block of one layer; the model is frozen by the caller.

        Its reader is the last linear map before the value projection that reads a vector of the residual width and that
        the key depends on: a change of its output at one token changes the key there.

        Raises:
            UnsupportedModelError: there is no such linear map.
        """
        layer_view = view.layers[layer]
        if layer_view.is_mixture:  # the block is one module, which reads and writes
            block = layer_view.block
            return cls(layer, block.name, block.name, d_in=block.d_in, d_out=block.d_out)
        projection = layer_view.site.linear
        input_widths: dict[str, int] = {}  # of each linear map, in the order that they run in
        handles: list[RemovableHandle] = []

        def note_width(path: str) -> Any:
            def hook(_module: nn.Module, args: Any, _output: Any) -> None:
                input_widths[path] = 0
                if args and isinstance(args[0], Tensor):
                    input_widths[path] = args[0].shape[-1]

            return hook

        ids = probe_ids(view.model)
        rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
        try:
            for path, module in layer_view.module.named_modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
                    handles.append(module.register_forward_hook(note_width(path)))
            with torch.no_grad():
                key = view.run(rows, taps=[Key(layer)], last=layer)[Key(layer)]
        finally:
            for handle in handles:
                handle.remove()
        projection_path = projection.name.removesuffix(".weight")
        before = list(takewhile(lambda path: f"{layer_view.name}.{path}" != projection_path, input_widths))
        candidates = [path for path in before if input_widths[path] == view.width]
        for path in reversed(candidates):
            if _key_depends_on(view, layer, rows, key, layer_view.module.get_submodule(path)):
                reader = f"{layer_view.name}.{path}"
                return cls(layer, reader, projection_path, d_in=view.width, d_out=projection.d_out)
        raise UnsupportedModelError(
            f"layer {layer} of {type(view.model).__name__}: none of the linear maps {', '.join(before) or '(none)'} "
            f"that run before {projection_path} reads the residual width and changes its key, so the block's input was "
            "not found"
        )


@torch.no_grad()
def _key_depends_on(view: ModelView, layer: int, rows: Rows, key: Tensor, module: nn.Module) -> bool:
    """Return whether the key at a token changes with the module's output there."""

    def change(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, _PROBED_TOKEN] = -4 * output[0, _PROBED_TOKEN].roll(1)
        return output

    try:
        moved = view.run(rows, taps=[Key(layer)], patches={ModuleOutput(module): change}, last=layer)[Key(layer)]
    except BROKEN:  # what it returns is not a state of the tokens
        return False
    return not torch.equal(moved[0, _PROBED_TOKEN], key[0, _PROBED_TOKEN])


@torch.no_grad()
def read_queries(view: ModelView, rows: Rows, block: Block, first: Start | None = None) -> Tensor:
    """Return the block's input at every token, ``[rows, width, d_in]`` float32; the model is frozen by the caller.

    Args:
        view: the model.
        rows: aligned at their first token.
        block: the block.
        first: the hidden states below it, if they are at hand; see :meth:`ModelView.run`.
    """
    site = ModuleInput(view.model.get_submodule(block.reader))
    return view.run(rows, taps=[site], first=first, last=block.layer)[site].float()


class Neurons(SideModule):
    """Neurons beside the feed-forward blocks of some layers.

    A block's output gains ``Act(q kᵀ + b) v``, summed over the layer's neurons, where ``q`` is the block's input. That
    is what a feed-forward block with so many neurons more would return: in one without a gate each is a further column
    of its first matrix and a further row of its second. Every token is answered for itself, so padding, batches and
    caches make no difference, and with ``relu`` a token at which no neuron is active keeps its output exactly.

    Args:
        blocks: paths of each block's reader and value projection; see :class:`Block`.
        neurons: how many a layer has.
        d_in: width of the blocks' input.
        d_out: width of their output.
        activation: the neurons' own, whatever the block's is.
    """

    keys: Tensor
    biases: Tensor
    values: Tensor

    def __init__(
        self, blocks: Sequence[Sequence[str]], neurons: int, d_in: int, d_out: int, activation: Activation
    ) -> None:
        super().__init__()
        self.blocks, self.activation = [list(pair) for pair in blocks], activation
        self.register_buffer("keys", torch.zeros(len(blocks), neurons, d_in))
        self.register_buffer("biases", torch.zeros(len(blocks), neurons))
        self.register_buffer("values", torch.zeros(len(blocks), neurons, d_out))

    @classmethod
    def at(
        cls, blocks: Sequence[Block], keys: Tensor, biases: Tensor, values: Tensor, activation: Activation
    ) -> Neurons:
        """Return neurons with these tensors, which may require gradients.

        Args:
            blocks: the blocks that they stand beside.
            keys: ``[blocks, neurons, d_in]``.
            biases: ``[blocks, neurons]``.
            values: ``[blocks, neurons, d_out]``.
            activation: of the neurons.
        """
        paths = [(block.reader, block.projection) for block in blocks]
        neurons = cls(paths, neurons=keys.shape[1], d_in=keys.shape[2], d_out=values.shape[2], activation=activation)
        neurons.keys, neurons.biases, neurons.values = keys, biases, values
        return neurons

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        return {
            "blocks": self.blocks,
            "neurons": self.keys.shape[1],
            "d_in": self.keys.shape[2],
            "d_out": self.values.shape[2],
            "activation": self.activation,
        }

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Listen to the readers, and act on the output of the value projections."""
        # All paths are looked up before anything is hooked, so that a missing one leaves no hook behind.
        modules = [(model.get_submodule(reader), model.get_submodule(projection)) for reader, projection in self.blocks]
        handles: list[RemovableHandle] = []
        for index, (reader, projection) in enumerate(modules):
            handles += self._hook_block(index, reader, projection)
        return handles

    def _hook_block(self, index: int, reader: nn.Module, projection: nn.Module) -> list[RemovableHandle]:
        block_inputs: list[Tensor] = []  # of the present pass, until the projection has run

        def listen(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            block_inputs[:] = [args[0]]

        def act(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = first_tensor(output)
            contribution = self.contribution(index, block_inputs.pop().float())
            new_value = (value.float() + contribution.reshape(value.shape)).to(value.dtype)
            return new_value if isinstance(output, Tensor) else (new_value, *output[1:])

        return [reader.register_forward_hook(listen), projection.register_forward_hook(act)]

    def contribution(self, index: int, query: Tensor) -> Tensor:
        """Return what one layer's neurons add, ``[..., d_out]`` for float32 inputs ``[..., d_in]`` of its block."""
        keys = self.keys[index].to(query.device)  # [neurons, d_in]
        biases = self.biases[index].to(query.device)  # [neurons]
        values = self.values[index].to(query.device)  # [neurons, d_out]
        activation = _ACTIVATIONS[self.activation](query @ keys.t() + biases)  # [..., neurons]
        return activation @ values
