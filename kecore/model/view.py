"""ModelView: a causal language model as editing methods see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kecore.api.errors import LayerError
from kecore.api.identity import Identity
from kecore.model import hooks
from kecore.model.attachment import Attachment
from kecore.model.attention import on_cpu
from kecore.model.caches import cache_keyword, kept_cache
from kecore.model.gemm import by_onednn
from kecore.model.linear import LinearView

if TYPE_CHECKING:
    from kecore.text import Rows

__all__ = ["LayerView", "ModelView", "Pass"]

_CONTEXT_LENGTH = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""What configurations call it: the last two are MPT's and Whisper's."""


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
        items: length of the tuple that the layer returns; 0 where it returns a bare tensor.
    """

    index: int
    name: str
    module: nn.Module
    value_projection: LinearView
    residual_scale: float | None
    items: int = 0


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
        skips: layers below the one that a pass is resumed at can be skipped. Where an upper layer reads more
            of them than the residual stream (shared keys and values), they run and their output is replaced.
        left_padding: padding before a row's tokens changes nothing. Where it would (positions counted from the
            first column, recurrent states), passes are run with all padding on the right.
        positions: position ids are passed to the model. Off where its own are others than the token's place in
            its row.
    """

    model: nn.Module
    layers: tuple[LayerView, ...]
    width: int
    final_norm: nn.Module | None
    unembedding: nn.Module
    skips: bool = True
    left_padding: bool = True
    positions: bool = True

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
        from kecore.model.probe import probe

        with Attachment.of(model).suspended():  # what acts beside the model is no part of its structure
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
        config = self.model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        named = (getattr(config, name, None) for name in _CONTEXT_LENGTH)
        value = next((n for n in named if isinstance(n, int) and n > 0), None)
        words = cast("Any", self.model).get_input_embeddings()
        tables = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        # RoBERTa and its kin count places from behind the padding token's.
        unused = [t.padding_idx + 1 for t in tables if t.num_embeddings == value and t.padding_idx is not None]
        return value and value - max(unused, default=0)

    @cached_property
    def continues(self) -> bool:
        """Whether passes over the model's cache give what one pass over all tokens does; found out when first asked."""
        from kecore.model.verify import continues

        return continues(self)

    @cached_property
    def drops_rows(self) -> bool:
        """Whether rows can be taken out of the model's cache without changing the others; found out when asked."""
        from kecore.model.verify import continues

        return self.continues and continues(self, dropping=True)

    def layer(self, index: int) -> LayerView:
        """One layer.

        Raises:
            LayerError: the model has no such layer.
        """
        if not 0 <= index < len(self.layers):
            raise LayerError(f"layer {index} was asked for; the model has layers 0 to {len(self.layers) - 1}")
        return self.layers[index]

    def identity(self) -> Identity:
        """Fingerprints of the weights as they are now."""
        return Identity(self.model)

    @contextmanager
    def overlay(self, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let parameters hold other values inside a block; see :func:`hooks.overlaid`."""
        with hooks.overlaid(dict(values)):
            yield

    def cast(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        """Let every weight hold its value in another type inside a block; None leaves them as they are."""
        others = (p for p in self.model.parameters() if p.is_floating_point() and p.dtype != dtype)
        return self.overlay({p: p.data.to(dtype) for p in others} if dtype is not None else {})

    def forward(
        self,
        rows: Rows,
        *,
        resume: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        hidden: Collection[int] = (),
        keys: Collection[int] = (),
        values: Collection[int] = (),
        change: Mapping[Any, Callable[[Tensor], Tensor]] | None = None,
        add: Mapping[int, Tensor | Callable[[Tensor], Tensor]] | None = None,
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
            change: layer index to a function applied to the output of its value projection; or any module to one
                applied to its own, which must be a state of the tokens.
            add: layer index to a matrix ``[d_out, d_in]`` that acts beside its value projection
                (differentiable, unlike an overlay), or to a function of its keys ``[rows, width, d_in]``.
            at: ``(row [k], column [k])``: places whose logits are wanted. Only these hidden states go
                through the unembedding, and ``logits`` is ``[k, vocab]``.
            past: ``(cache, mask)``: a cache that holds the columns before ``rows``, and the attention
                mask ``[rows, past + width]``.
            use_cache: return the cache of this pass, of a model that goes on from one as it should.
        """
        out = Pass()
        layout = _Layout(rows) if past is None and not self.left_padding else None
        if layout is not None:
            rows, at, use_cache = layout.rows(rows), layout.at(at), False
            resume = (resume[0], layout.to_right(resume[1])) if resume else None
        shape = rows.input_ids.shape
        with ExitStack() as stack:
            captured: list[tuple[dict[int, Tensor], list[int], list[Tensor]]] = []
            for store, wanted in ((out.hidden, hidden), (out.values, values), (out.keys, keys)):
                modules = [
                    self.layers[i].module if store is out.hidden else self.layers[i].value_projection.module
                    for i in wanted
                ]
                found = stack.enter_context(hooks.capture(modules, inputs=store is out.keys))
                captured.append((store, list(wanted), found))
            for index, function in (change or {}).items():
                module = self.layers[index].value_projection.module if isinstance(index, int) else index
                stack.enter_context(hooks.substitute(module, _shaped(function, shape, layout)))
            for index, extra in (add or {}).items():
                extra = extra if isinstance(extra, Tensor) else _shaped(extra, shape, layout)
                stack.enter_context(hooks.beside(self.layers[index].value_projection.module, extra))
            if resume is not None and resume[0] > 0:
                stack.enter_context(hooks.resumed(self, *resume))
            if at is not None:
                stack.enter_context(hooks.substitute(self.unembedding, _gather(at), inputs=True))
            if stop is not None:
                only_keys = stop in keys and stop not in hidden and stop not in values and not change
                last = self.layers[stop]
                module = last.value_projection.module if only_keys else last.module
                stack.enter_context(hooks.stopped(module, inputs=only_keys))
            stack.enter_context(by_onednn(self.layers[0].value_projection.parameter))
            stack.enter_context(on_cpu(self.model, self.device))
            result = self.model(**self.arguments(rows, past, use_cache))
            out.logits = result.logits if at is None else result.logits[0]
            out.cache = kept_cache(result) if use_cache else None
        if out.cache is not None and not self.continues:
            out.cache = None
        for store, wanted, found in captured:
            # Some architectures flatten rows and columns before their feed-forward block.
            for index, tensor in zip(wanted, found, strict=True):
                tensor = tensor.reshape(*shape, tensor.shape[-1])
                store[index] = tensor if layout is None else layout.to_left(tensor)
        if layout is not None and out.logits is not None and at is None:
            out.logits = layout.to_left(out.logits)
        return out

    def arguments(self, rows: Rows, past: tuple[Any, Tensor] | None = None, use_cache: bool = False) -> dict[str, Any]:
        """What the model's own ``forward`` is called with for a pass; see :meth:`forward`."""
        rows = rows.to(self.device)
        arguments: dict[str, Any] = {
            "input_ids": rows.input_ids,
            "attention_mask": rows.attention_mask,
            "use_cache": use_cache or past is not None,
        }
        positions = rows.position_ids
        if past is not None:
            cache, mask = past
            arguments[cache_keyword(self.model)] = cache
            arguments["attention_mask"] = mask
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -rows.input_ids.shape[1] :]
        if self.positions:
            arguments["position_ids"] = positions
        return arguments

    @torch.no_grad()
    def logits_at(self, rows: Rows, row: Tensor, column: Tensor, past: tuple[Any, Tensor] | None = None) -> Tensor:
        """Logits of the unchanged model at chosen places.

        Args:
            rows: token rows.
            row: ``[k]`` row indices.
            column: ``[k]`` column indices.
            past: what stands before the rows; see :meth:`forward`.

        Returns:
            ``[k, vocab]`` in the model's dtype.
        """
        rows = rows.to(self.device)
        logits = self.forward(rows, at=(row, column), past=past).logits
        return torch.empty(0) if logits is None else logits

    def frozen(self) -> Any:
        """Context: evaluation mode, frozen weights, random state untouched; restored on exit."""
        return hooks.frozen(self.model)


class _Layout:
    """The same rows with all padding on the right: each row's columns rotated by its offset."""

    def __init__(self, rows: Rows) -> None:
        width = rows.input_ids.shape[1]
        self.offset = rows.offset
        self.columns = (torch.arange(width) + rows.offset.cpu()[:, None]) % width
        self.inverse = (torch.arange(width) - rows.offset.cpu()[:, None]) % width

    def to_right(self, x: Tensor) -> Tensor:
        """Rotate ``[rows, width, ...]`` so that the tokens come first."""
        return x[torch.arange(len(x))[:, None], self.columns]

    def to_left(self, x: Tensor) -> Tensor:
        """Undo :meth:`to_right`."""
        return x[torch.arange(len(x))[:, None], self.inverse]

    def rows(self, rows: Rows) -> Rows:
        """Rotated token rows."""
        moved = self.to_right(rows.input_ids), self.to_right(rows.attention_mask)
        return replace(rows, input_ids=moved[0], attention_mask=moved[1], offset=torch.zeros_like(rows.offset))

    def at(self, at: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Rotated places."""
        return at and (at[0], at[1] - self.offset.to(at[0].device)[at[0]])


def _shaped(
    function: Callable[[Tensor], Tensor], shape: torch.Size, layout: _Layout | None
) -> Callable[[Tensor], Tensor]:
    def change(output: Tensor) -> Tensor:
        x = output.reshape(*shape, output.shape[-1])
        x = function(x) if layout is None else layout.to_right(function(layout.to_left(x)))
        return x.reshape(*output.shape[:-1], x.shape[-1])

    return change


def _gather(at: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    row, column = at

    def pick(hidden: Tensor) -> Tensor:
        return hidden[row.to(hidden.device), column.to(hidden.device)].unsqueeze(0)

    return pick
