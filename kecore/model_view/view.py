"""ModelView: a causal language model as editing methods see it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kecore.errors import LayerError
from kecore.model_view import hooks
from kecore.model_view.identity import Identity
from kecore.model_view.linear import LinearView

if TYPE_CHECKING:
    from kecore.text import Rows

__all__ = ["LayerView", "ModelView", "Pass"]


@dataclass(frozen=True, slots=True)
class LayerView:
    """One decoder layer.

    Args:
        index: position in the stack.
        name: module path.
        module: the layer.
        value_projection: the linear map whose input is the key and whose output enters the residual
            stream: the feed-forward block's last matrix.
        residual_scale: ``c`` where adding ``v`` to the projection's output adds ``c v`` to the layer's
            output; None where something (a norm after the block) stands between them.
    """

    index: int
    name: str
    module: nn.Module
    value_projection: LinearView
    residual_scale: float | None


@dataclass(slots=True)
class Pass:
    """What a partial forward pass brought back.

    Args:
        logits: the model's logits, None if the pass was stopped before them.
        hidden: layer index to that layer's output ``[rows, width, d_model]``.
        keys: layer index to the input of its value projection ``[rows, width, d_in]``.
        values: layer index to the output of its value projection ``[rows, width, d_model]``.
        cache: the key-value cache, when asked for.
    """

    logits: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    cache: Any = None


@dataclass(frozen=True, eq=False)
class ModelView:
    """A causal language model read by structure; make one with :meth:`of`.

    Args:
        model: the transformers model.
        layers: the decoder stack.
        width: width of the residual stream.
        final_norm: the module between the last layer and the unembedding, if there is one.
        unembedding: the module that turns hidden states into logits.
        tuple_layers: the layers return tuples instead of tensors.
    """

    model: nn.Module
    layers: tuple[LayerView, ...]
    width: int
    final_norm: nn.Module | None
    unembedding: nn.Module
    tuple_layers: bool

    @classmethod
    def of(cls, model: nn.Module, *, value_projection: str | None = None) -> ModelView:
        """Read a model's structure and verify it by perturbation.

        Args:
            model: any transformers causal language model.
            value_projection: path of the value projection inside a layer (such as ``mlp.down_proj``),
                to overrule the search.

        Raises:
            UnsupportedModelError: the structure cannot be read; names what was found.
        """
        from kecore.model_view.probe import probe

        return probe(model, value_projection)

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that edits touch."""
        return self.layers[0].value_projection.weight.dtype

    @cached_property
    def max_length(self) -> int | None:
        """Context length in tokens; None where the architecture sets no limit."""
        config = self.model.config.get_text_config()  # type: ignore[operator, union-attr]
        value = getattr(config, "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else None

    def layer(self, index: int) -> LayerView:
        """One layer.

        Raises:
            LayerError: the model has no such layer.
        """
        if not 0 <= index < len(self.layers):
            raise LayerError(
                f"layer {index} was asked for; the model has layers 0 to {len(self.layers) - 1}"
            )
        return self.layers[index]

    def identity(self) -> Identity:
        """Fingerprints of the weights as they are now."""
        return Identity(self.model)

    @contextmanager
    def overlay(self, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let parameters hold other values inside a block; see :func:`hooks.overlaid`."""
        with hooks.overlaid(dict(values)):
            yield

    def forward(
        self,
        rows: Rows,
        *,
        resume: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        hidden: Collection[int] = (),
        keys: Collection[int] = (),
        values: Collection[int] = (),
        change: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
        add: Mapping[int, Tensor] | None = None,
        at: tuple[Tensor, Tensor] | None = None,
        past: tuple[Any, Tensor] | None = None,
        use_cache: bool = False,
    ) -> Pass:
        """Run the model, or a piece of it, on token rows.

        Args:
            rows: the tokens, left- and right-padded as they come.
            resume: ``(l, hidden)``: skip the layers below ``l`` and feed ``hidden`` to layer ``l``.
            stop: end after this layer; there are no logits then.
            hidden: layers whose output is wanted.
            keys: layers whose keys (input of the value projection) are wanted.
            values: layers whose value projection's output is wanted.
            change: layer index to a function applied to the output of its value projection.
            add: layer index to a matrix ``[d_out, d_in]`` that acts beside its value projection
                (differentiable, unlike an overlay).
            at: ``(row [k], column [k])``: places whose logits are wanted. Only these hidden states go
                through the unembedding, and ``logits`` is ``[k, vocab]``.
            past: ``(cache, mask)``: a cache that holds the columns before ``rows``, and the attention
                mask ``[rows, past + width]``.
            use_cache: return the cache of this pass.
        """
        out = Pass()
        with ExitStack() as stack:
            wanted = [(out.hidden, hidden, False), (out.values, values, False), (out.keys, keys, True)]
            captured: list[tuple[dict[int, Tensor], list[int], list[Tensor]]] = []
            for store, layers, inputs in wanted:
                modules = [
                    self.layers[i].module if store is out.hidden else self.layers[i].value_projection.module
                    for i in layers
                ]
                found = stack.enter_context(hooks.capture(modules, inputs=inputs))
                captured.append((store, list(layers), found))
            shape = rows.input_ids.shape
            for index, function in (change or {}).items():
                module = self.layers[index].value_projection.module
                stack.enter_context(hooks.substitute(module, _shaped(function, shape)))
            for index, matrix in (add or {}).items():
                stack.enter_context(hooks.beside(self.layers[index].value_projection.module, matrix))
            if resume is not None and resume[0] > 0:
                stack.enter_context(hooks.resumed(self, *resume))
            if at is not None:
                stack.enter_context(hooks.substitute(self.unembedding, _gather(at), inputs=True))
            if stop is not None:
                stack.enter_context(hooks.stopped(self.layers[stop].module))
            result = self.model(**self._arguments(rows, past, use_cache))
            out.logits = result.logits if at is None else result.logits[0]
            out.cache = getattr(result, "past_key_values", None)
        for store, layers, found in captured:
            # Some architectures flatten rows and columns before their feed-forward block.
            store.update((i, x.reshape(*shape, x.shape[-1])) for i, x in zip(layers, found, strict=True))
        return out

    def _arguments(self, rows: Rows, past: tuple[Any, Tensor] | None, use_cache: bool) -> dict[str, Any]:
        rows = rows.to(self.device)
        arguments: dict[str, Any] = {
            "input_ids": rows.input_ids,
            "attention_mask": rows.attention_mask,
            "use_cache": use_cache or past is not None,
        }
        positions = rows.position_ids
        if past is not None:
            cache, mask = past
            arguments["past_key_values"] = cache
            arguments["attention_mask"] = mask
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -rows.input_ids.shape[1] :]
        if self._takes_positions:
            arguments["position_ids"] = positions
        return arguments

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    @torch.no_grad()
    def logits_at(self, rows: Rows, row: Tensor, column: Tensor) -> Tensor:
        """Logits of the unchanged model at chosen places.

        Args:
            rows: token rows.
            row: ``[k]`` row indices.
            column: ``[k]`` column indices.

        Returns:
            ``[k, vocab]`` in the model's dtype.
        """
        logits = self.forward(rows, at=(row, column)).logits
        return torch.empty(0) if logits is None else logits

    def frozen(self) -> Any:
        """Context: evaluation mode, frozen weights, random state untouched; restored on exit."""
        return hooks.frozen(self.model)

    def select(self, layers: Sequence[int]) -> list[LayerView]:
        """Several layers, checked."""
        return [self.layer(index) for index in layers]


def _shaped(function: Callable[[Tensor], Tensor], shape: torch.Size) -> Callable[[Tensor], Tensor]:
    def change(output: Tensor) -> Tensor:
        return function(output.reshape(*shape, output.shape[-1])).reshape(output.shape)

    return change


def _gather(at: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    row, column = at

    def pick(hidden: Tensor) -> Tensor:
        return hidden[row.to(hidden.device), column.to(hidden.device)].unsqueeze(0)

    return pick
