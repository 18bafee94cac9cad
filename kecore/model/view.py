"""ModelView: a language model as editing methods see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kecore.api.errors import KecoreError, LayerError, UnsupportedModelError
from kecore.api.identity import Identity
from kecore.model import hooks
from kecore.model.accelerators import accelerated
from kecore.model.attachment import Attachment
from kecore.model.caches import cache_keyword, kept_cache
from kecore.model.experts import ExpertsView
from kecore.model.handover import Handover, SplitRows
from kecore.model.layer import LayerView, ValueSite
from kecore.model.layout import RightPadding
from kecore.model.probe import find_unembedding, probe
from kecore.model.sites import (
    Beside,
    Key,
    ModuleInput,
    ModuleOutput,
    Output,
    Patch,
    Routed,
    Site,
    SiteId,
    Start,
    Value,
)
from kecore.model.verify import BROKEN, continues, joins, verified, verified_whole

if TYPE_CHECKING:
    from kecore.text import Rows

__all__ = ["ModelView", "Pass"]

_CONTEXT_LENGTH = ("max_position_embeddings", "max_seq_len", "max_target_positions")
"""Names that configurations have for the context length: the last two are MPT's and Whisper's."""


@dataclass(slots=True)
class Pass:
    """What a pass brought back; ``result[site]`` is the tensor at a tapped site.

    Args:
        taps: tapped site to tensor ``[rows, width, n]``, detached; before the patch of the same site, if it has one.
        cache: the key-value cache, when asked for.
        scores: see :attr:`logits`; None where the pass ended before them.
    """

    taps: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    cache: Any = None
    scores: Tensor | None = None

    def __getitem__(self, site: Site) -> Tensor:
        """Return what stood at a tapped site."""
        return self.taps[site]

    @property
    def logits(self) -> Tensor:
        """The model's logits, ``[rows, width, vocab]``, or ``[k, vocab]`` at chosen places.

        Raises:
            LayerError: the pass ended before them.
        """
        if self.scores is None:
            raise LayerError("the pass ended at its last layer, before the logits; run it without `last`")
        return self.scores


@dataclass(frozen=True, eq=False)
class ModelView:
    """A causal language model read by structure; make one with :meth:`of`.

    An encoder-decoder is one too: its layers are the decoder's, and a row of tokens holds what the encoder reads before
    what the decoder reads (:mod:`kecore.model.handover`).

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
        handover: the tokens between what the encoder and what the decoder reads; None for a model without an encoder.
        no_layers: why the layers cannot be read, of a model that is run as a whole; empty where they are known.
    """

    model: nn.Module
    layers: tuple[LayerView, ...]
    width: int
    final_norm: nn.Module | None
    unembedding: nn.Module
    skips: bool = True
    left_padding: bool = True
    positions: bool = True
    handover: Handover | None = None
    no_layers: str = ""

    @classmethod
    def of(cls, model: nn.Module, *, value_projection: str | None = None, whole: bool = False) -> ModelView:
        """Read a model's structure and verify it by perturbation.

        Args:
            model: any transformers language model: causal, encoder-decoder, or the language tower of one that reads
                images as well.
            value_projection: path of the value projection inside a layer (such as ``mlp.down_proj``),
                to overrule the search.
            whole: be content with a view without layers, where they cannot be read: the model can be asked, and edited
                by methods that change what it reads. :attr:`no_layers` says what was found.

        Raises:
            UnsupportedModelError: the structure cannot be read; names what was found.
        """
        if not whole or value_projection is not None:
            return cls._read(model, value_projection)
        try:
            return cls._read(model, None)
        except UnsupportedModelError as error:
            reason = str(error)
            try:
                return cls._read_whole(model, reason)
            except BROKEN:  # it cannot even be asked, so what was found first is what matters
                raise error from None

    @classmethod
    def _read_whole(cls, model: nn.Module, reason: str) -> ModelView:
        """Read a model that is only run as a whole; raises one of :data:`BROKEN` where that does not work."""
        with Attachment.of(model).suspended(), hooks.frozen(model), torch.no_grad():
            words = cast("Any", model).get_input_embeddings()
            view = cls(
                model,
                layers=(),
                width=int(words.weight.shape[-1]),
                final_norm=None,
                unembedding=find_unembedding(model),
                no_layers=reason,
            )
            return verified_whole(view)

    @classmethod
    def _read(cls, model: nn.Module, value_projection: str | None) -> ModelView:
        """Read a model's layers; see :meth:`of`."""
        # What acts beside the model is no part of its structure.
        with Attachment.of(model).suspended(), hooks.frozen(model), torch.no_grad():
            handover = Handover.of(model)
            structure = probe(model, value_projection, handover)
            view = cls(
                model,
                layers=structure.layers,
                width=structure.width,
                final_norm=structure.final_norm,
                unembedding=structure.unembedding,
                left_padding=handover is None,
                positions=handover is None,
                handover=handover,
            )
            try:
                return verified(view, structure.logits)
            except KecoreError:
                raise
            except BROKEN as error:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be run in pieces ({type(error).__name__}: {error})"
                ) from error

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that edits touch; where none can be edited, of the first layer's."""
        if self.sites:
            return self.sites[0].linear.dtype
        module = self.layers[0].module if self.layers else self.model
        return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

    @cached_property
    def max_length(self) -> int | None:
        """Context length in tokens; None where the architecture sets no limit."""
        config = self.model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        values = [getattr(config, name, None) for name in _CONTEXT_LENGTH]
        length = next((value for value in values if isinstance(value, int) and value > 0), None)
        if length is None:
            return None
        words = cast("Any", self.model).get_input_embeddings()
        unused = 0
        for table in self.model.modules():
            if not isinstance(table, nn.Embedding) or table is words or table.num_embeddings != length:
                continue
            if table.padding_idx is not None:
                # RoBERTa and its kin count positions from behind the padding token's.
                unused = max(unused, int(table.padding_idx) + 1)
        return length - unused

    @property
    def handover_ids(self) -> tuple[int, ...]:
        """The tokens between what the encoder and what the decoder reads; none of a model without an encoder."""
        return () if self.handover is None else self.handover.ids

    @cached_property
    def continues(self) -> bool:
        """Whether passes over the model's cache give what one pass over all tokens gives; tried out when first read."""
        return continues(self)

    @cached_property
    def drops_rows(self) -> bool:
        """Whether rows can be taken out of the model's cache without changing the others; tried out when first read."""
        return self.continues and continues(self, dropping=True)

    @cached_property
    def joins_rows(self) -> bool:
        """Whether rows can join the model's cache while others are being written; tried out when first read."""
        return self.left_padding and self.continues and joins(self)

    def layer(self, index: int) -> LayerView:
        """Return one layer.

        Raises:
            UnsupportedModelError: the model's layers cannot be read.
            LayerError: the model has no such layer.
        """
        if self.no_layers:
            raise UnsupportedModelError(
                f"{self.no_layers}. The model is run as a whole; use a method that changes what it reads, such as ice "
                "(`kecore methods` says which)"
            )
        if not 0 <= index < len(self.layers):
            raise LayerError(f"layer {index} was asked for; the model has layers 0 to {len(self.layers) - 1}")
        return self.layers[index]

    @property
    def sites(self) -> tuple[ValueSite, ...]:
        """All places where the model maps keys to values, from the lowest layer up."""
        return tuple(site for layer in self.layers for site in layer.sites)

    def site(self, site: SiteId) -> ValueSite:
        """Return one site.

        Raises:
            LayerError: the model has no such site.
        """
        sites = {value_site.id: value_site for value_site in self.layer(site.layer).sites}
        if site not in sites:
            self.layer(site.layer).check_sites()
            raise LayerError(f"site {site} was asked for; layer {site.layer} has {', '.join(map(str, sites))}")
        return sites[site]

    def experts(self, layer: int) -> ExpertsView:
        """Return the experts that the tokens of a layer are routed to.

        Raises:
            UnsupportedModelError: the layer has experts that cannot be edited.
            LayerError: it has none.
        """
        layer_view = self.layer(layer)
        if layer_view.experts is None:
            layer_view.check_sites()
            raise LayerError(f"layer {layer} of {type(self.model).__name__} has no experts; it is a dense layer")
        return layer_view.experts

    def identity(self) -> Identity:
        """Return the fingerprints of the weights as they are now."""
        return Identity(self.model)

    @contextmanager
    def overlay(self, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Let parameters hold other values inside a block; see :func:`hooks.overlaid`."""
        with hooks.overlaid(dict(values)):
            yield

    def cast(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        """Let every weight hold its value in another type inside a block; None leaves them as they are."""
        if dtype is None:
            return self.overlay({})
        cast_values: dict[nn.Parameter, Tensor] = {}
        for parameter in self.model.parameters():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                cast_values[parameter] = parameter.data.to(dtype)
        return self.overlay(cast_values)

    def run(
        self,
        rows: Rows,
        *,
        taps: Iterable[Site] = (),
        patches: Mapping[Site, Patch] | None = None,
        first: Start | None = None,
        last: int | None = None,
        at: tuple[Tensor, Tensor] | None = None,
        past: tuple[Any, Tensor] | None = None,
        use_cache: bool = False,
    ) -> Pass:
        """Run the model, or some of its layers, on token rows.

        Args:
            rows: the tokens, left- and right-padded as they come.
            taps: sites whose tensors are wanted back.
            patches: site to what changes the tensor there.
            first: where to begin: the layers below are skipped. By default at the tokens.
            last: the layer to end after; there are no logits then.
            at: ``(row [k], column [k])``: places whose logits are wanted. Only these hidden states go
                through the unembedding, and ``logits`` is ``[k, vocab]``.
            past: ``(cache, mask)``: a cache that holds the columns before ``rows``, and the attention
                mask ``[rows, past + width]``.
            use_cache: return the cache of this pass, of a model that goes on from one as it should.

        Raises:
            LayerError: the model has no such layer, or the pass did not reach a tapped site.
        """
        layout = self._layout(rows) if past is None else None
        source = layout.source if isinstance(layout, SplitRows) else None
        if layout is not None:
            rows, first, at, use_cache = layout.rows(rows), layout.start(first), layout.places(at), False
        taps, patches = tuple(taps), patches or {}
        shape = rows.input_ids.shape  # [rows, width]
        result = Pass()
        with ExitStack() as stack:
            # Taps come before patches, so that a tap sees what the model made.
            captured = {site: stack.enter_context(self._captured(site)) for site in taps}
            for site, patch in patches.items():
                stack.enter_context(self._patched(site, patch, shape, layout))
            if first is not None and first.layer > 0:
                stack.enter_context(hooks.resumed(self, first.layer, first.hidden))
            if at is not None:
                stack.enter_context(hooks.substitute(self.unembedding, _gather(at), inputs=True))
            if last is not None:
                stack.enter_context(self._stopped(last, taps, patches))
            stack.enter_context(accelerated(self.model))
            output = self.model(**self.arguments(rows, past, use_cache, source))
            result.scores = output.logits if at is None else output.logits[0]
            result.cache = kept_cache(output) if use_cache else None
        if result.cache is not None and not self.continues:
            result.cache = None
        for site, tensors in captured.items():
            result.taps[site] = _state_of_tokens(site, tensors[0], shape, layout)
        if layout is not None and result.scores is not None and at is None:
            result.scores = layout.to_left(result.scores)
        return result

    def _layout(self, rows: Rows) -> RightPadding | None:
        """Return how the model has to be given these rows; None where they can be given as they are."""
        if self.handover is not None:
            return SplitRows(rows, self.handover)
        return None if self.left_padding else RightPadding(rows)

    def _module(self, site: Site) -> nn.Module:
        """Return the module that writes a site, or reads it if it is a key."""
        match site:
            case ModuleOutput(module) | ModuleInput(module):
                return module
            case Output(layer):
                return self.layer(layer).module
            case Key(layer) | Value(layer):
                return self.layer(layer).block.module
            case Routed(layer):
                return self.experts(layer).module

    def _captured(self, site: Site) -> AbstractContextManager[list[Tensor]]:
        """Return a context that gives the tensor at a site, in a list of one, once the pass has reached it."""
        if isinstance(site, Routed):
            experts = self.experts(site.layer)
            return hooks.capture_argument(experts.module, experts.positions[site.what])
        return hooks.capture([self._module(site)], inputs=isinstance(site, Key | ModuleInput))

    def _patched(
        self, site: Site, patch: Patch, shape: torch.Size, layout: RightPadding | None
    ) -> AbstractContextManager[None]:
        """Return a context in which a patch acts at a site."""
        module = self._module(site)
        if not isinstance(patch, Beside):
            return hooks.substitute(module, _on_rows(patch, shape, layout), inputs=isinstance(site, Key | ModuleInput))
        if isinstance(patch.change, Tensor):
            return hooks.beside(module, patch.change)
        return hooks.beside(module, _on_rows(patch.change, shape, layout))

    def _stopped(
        self, last: int, taps: Collection[Site], patches: Mapping[Site, Patch]
    ) -> AbstractContextManager[None]:
        """Return a context that ends a pass after a layer, or before its value projection where that is enough."""
        needs_value = any(
            site in (Output(last), Value(last)) or isinstance(site, ModuleOutput | ModuleInput) for site in taps
        )
        if not needs_value and not patches:
            if Key(last) in taps:
                return hooks.stopped(self._module(Key(last)), inputs=True)
            routed = [site for site in taps if isinstance(site, Routed) and site.layer == last]
            if routed:
                return hooks.stopped(self._module(routed[0]), inputs=True)
        return hooks.stopped(self._module(Output(last)))

    def tokens_read(self, rows: Rows) -> Tensor:
        """Return which tokens the layers read, ``[rows, width]``: all that are no padding, or those of the decoder."""
        if self.handover is None:
            return rows.attention_mask.bool()
        column = torch.arange(rows.input_ids.shape[1])
        begin = SplitRows(rows, self.handover).offset
        return (column >= begin[:, None]).to(rows.attention_mask.device) & rows.attention_mask.bool()

    def arguments(
        self,
        rows: Rows,
        past: tuple[Any, Tensor] | None = None,
        use_cache: bool = False,
        source: Rows | None = None,
    ) -> dict[str, Any]:
        """Return what the model's own ``forward`` is called with for a pass.

        Args:
            rows: as in :meth:`run`; of an encoder-decoder what the decoder reads, padded on the right.
            past: as in :meth:`run`.
            use_cache: as in :meth:`run`.
            source: what the encoder of an encoder-decoder reads.
        """
        rows = rows.to(self.device)
        if self.handover is not None:
            return {**self.handover.arguments(rows, source), "use_cache": False}
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
        """Return the logits of the unchanged model at chosen places.

        Args:
            rows: token rows.
            row: ``[k]`` row indices.
            column: ``[k]`` column indices.
            past: what stands before the rows; see :meth:`run`.

        Returns:
            ``[k, vocab]`` in the model's dtype.
        """
        rows = rows.to(self.device)
        return self.run(rows, at=(row, column), past=past).logits

    def frozen(self) -> Any:
        """Return a context with evaluation mode, frozen weights, random state untouched; restored on exit."""
        return hooks.frozen(self.model)


def _state_of_tokens(site: Site, tensor: Tensor | None, shape: torch.Size, layout: RightPadding | None) -> Tensor:
    """Return what was captured at a site as ``[rows, width, n]``, with the columns that the caller's rows have."""
    if tensor is None:
        raise LayerError(
            f"the pass did not reach {site}; tap what runs between its first and last layer, of modules those that the "
            "model calls"
        )
    # Some architectures flatten rows and columns before their feed-forward block.
    tensor = tensor.reshape(*shape, tensor.shape[-1])  # [rows, width, n]
    return tensor if layout is None else layout.to_left(tensor)


def _on_rows(
    function: Callable[[Tensor], Tensor], shape: torch.Size, layout: RightPadding | None
) -> Callable[[Tensor], Tensor]:
    """Make a function of ``[rows, width, n]`` one of what a module returns, which may be flat or rotated."""

    def change(output: Tensor) -> Tensor:
        x = output.reshape(*shape, output.shape[-1])  # [rows, width, n]
        x = function(x) if layout is None else layout.to_right(function(layout.to_left(x)))
        return x.reshape(*output.shape[:-1], x.shape[-1])

    return change


def _gather(at: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that picks the hidden states at ``(row [k], column [k])``."""
    row, column = at

    def pick(hidden: Tensor) -> Tensor:
        return hidden[row.to(hidden.device), column.to(hidden.device)].unsqueeze(0)  # [1, k, d_model]

    return pick
