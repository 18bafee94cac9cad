"""What the locate-then-edit methods have in common: one configuration and how the engine reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from kecore.api.errors import ConfigError
from kecore.api.identity import DTYPES
from kecore.engine.closed_form import ClosedForm, by_subject, each_alone, unsolved
from kecore.engine.layers import at_depth
from kecore.engine.needs import Shape, closed_form
from kecore.engine.staged import StagedConfig
from kecore.engine.value_steps import Finished, ValueSettings, all_most_probable, most_probable_in_contexts
from kecore.model import ModelView

if TYPE_CHECKING:
    from kecore.batch import RequestBatch
    from kecore.memory import Need

__all__ = ["BatchConfig", "LocateConfig"]


_Length = Annotated[int, Field(ge=1, le=64)]


class LocateConfig(StagedConfig):
    """Stages that every closed-form method shares; defaults are relative, so they carry over to any model."""

    layers: tuple[int, ...] | None = Field(
        default=None, description="Edited layers; None takes the layers between depth_first and depth_last."
    )
    depth_first: float = Field(
        default=0.03, ge=0, le=1, description="Depth of the first edited layer (0 bottom, 1 top)."
    )
    depth_last: float = Field(default=0.17, ge=0, le=1, description="Depth of the last edited layer.")
    contexts: int = Field(
        default=5,
        ge=0,
        le=64,
        description="Context prefixes sampled from the model (kecore's choice: for the keys 15 changed nothing, "
        "docs/design/0001-values-and-keys.md; ROME's hparams: 20).",
    )
    context_tokens: _Length | Annotated[tuple[_Length, ...], Field(min_length=1)] = Field(
        default=10,
        description="Length of a context prefix in tokens, 1 to 64; several lengths are given to equal shares of the "
        "contexts ([5, 10] with 20 contexts in ROME's hparams).",
    )
    bare_weight: float | None = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Weight of the bare prompt's key, its contexts sharing the rest (half in MEMIT's released code); "
        "None counts it as one of them (ROME's).",
    )
    residual: Literal["mean", "bare"] = Field(
        default="mean",
        description="Where what is left to write is measured: the mean of all contexts, or the bare prompt alone "
        "(MEMIT's released code).",
    )
    merge_subjects: bool = Field(
        default=True,
        description="Requests about one subject share key and value (MEMIT-Merge, arXiv 2502.07322); False as "
        "published: each has its own.",
    )
    steps: int = Field(
        default=20,
        ge=1,
        description="Evaluations of the value loss (Adam makes one update fewer). 20 in ROME's and MEMIT's hparams for "
        "GPT-2 XL, and kept: docs/design/0001-values-and-keys.md.",
    )
    optimizer: Literal["gradient", "adam"] = Field(
        default="gradient", description="Normalised gradient descent, or Adam as published."
    )
    learning_rate: float = Field(
        default=0.1, gt=0, description="First step relative to |h| (gradient), or Adam's rate in hidden units (adam)."
    )
    length_penalty: float = Field(default=0.2, ge=0, description="Factor of |delta| / |h| in the value loss.")
    weight_decay: float = Field(default=0.0, ge=0, description="Factor of |delta| / |h|^2 in it, as published.")
    clamp: float = Field(default=4.0, gt=0, description="Largest |delta| / |h| (ROME's hparams: 4; MEMIT's: 0.75).")
    relative_to: Literal["hidden", "projection"] = Field(
        default="hidden",
        description="Whose norm |h| is: of the layer's hidden state (MEMIT's released code), or of the value "
        "projection's output (ROME's), which is several times shorter.",
    )
    kl_weight: float = Field(
        default=0.0625,
        ge=0,
        description="Factor of KL(edited | original) on '<subject> is a' (ROME's and MEMIT's hparams: 0.0625).",
    )
    kl_position: Literal["last", "subject"] = Field(
        default="last",
        description="Token of that text whose next token is kept: the last one (the papers' wording), or the subject's "
        "last one (the released code of ROME, MEMIT and their successors).",
    )
    stop_loss: float = Field(default=0.01, ge=0, description="A value whose loss is below this is finished.")
    stop_most_probable: bool = Field(
        default=False,
        description="A value is also finished once its target is the most probable answer in all contexts "
        "(ENCORE's early stop, arXiv 2502.01636).",
    )
    stop_hits: int = Field(
        default=1,
        ge=1,
        description="At how many evaluations that must have been so (ENCORE's released prob_cutoff: 2 to 4).",
    )
    stop_bare: bool = Field(
        default=True, description="The bare prompt counts among these contexts; False as in ENCORE's released code."
    )
    noise: float = Field(
        default=0.5,
        ge=0,
        description="Noise on the tokens behind the subject while values are optimised; 0 as published.",
    )
    gain: float = Field(
        default=1.1,
        gt=0,
        description="Factor of the values when they are written: prompts whose keys differ from the fitted ones "
        "receive a part of it only; 1 as published.",
    )
    precision: Literal["model", "float32", "bfloat16", "float16"] = Field(
        default="model", description="Type of frozen weights while values are optimised."
    )
    graphs: bool = Field(
        default=False,
        description="Replay the steps of values as CUDA graphs: less work for the host, which small batches on a GPU "
        "wait for. Without effect on a CPU.",
    )
    statistics_ridge: float = Field(
        default=1e-4,
        ge=0,
        description="Added to the key statistics, relative to their mean diagonal (arXiv 2506.04226).",
    )

    def edited_layers(self, view: ModelView) -> tuple[int, ...]:
        """Return the layers that are edited: of those chosen, by depth unless given, what the spread writes to.

        Raises:
            ConfigError: ``layers`` is empty.
            LayerError: the model has no such layer.
        """
        if self.layers is None:
            chosen = at_depth(view, self.depth_first, self.depth_last)
        elif self.layers:
            chosen = tuple(sorted({view.layer(i).index for i in self.layers}))
        else:
            raise ConfigError("'layers' is empty; name at least one layer, or leave it out")
        return self.engine(chosen, solve=unsolved).edited_layers

    def statistics_layers(self, view: ModelView) -> tuple[int, ...]:
        """Return the edited layers: the engine weighs the keys of each against its statistics."""
        return tuple(sorted(self.edited_layers(view)))

    def grouped(self, layers: tuple[int, ...], batch: RequestBatch) -> RequestBatch:
        """Return a batch as the engine groups it: which requests share key and value.

        Args:
            layers: layers that may be edited, ascending.
            batch: the requests as the editor made them ready.
        """
        return self.engine(layers, solve=unsolved).grouping(batch)

    def value_settings(self) -> ValueSettings:
        """Numbers of the target stage."""
        return ValueSettings(
            steps=self.steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            length_penalty=self.length_penalty,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
            relative_to=self.relative_to,
            kl_weight=self.kl_weight,
            kl_position=self.kl_position,
            stop_loss=self.stop_loss,
            finished=self._early_stop(),
            hits=self.stop_hits,
            noise=self.noise,
            precision=None if self.precision == "model" else DTYPES[self.precision],
            graphs=self.graphs,
        )

    def _early_stop(self) -> Finished | None:
        if not self.stop_most_probable:
            return None
        return all_most_probable if self.stop_bare or not self.contexts else most_probable_in_contexts

    def needs(self, view: ModelView, batch: RequestBatch) -> Sequence[Need]:
        """Return the memory that the engine's stages need."""
        return closed_form(view, batch, self.memory_shape(view))

    def memory_shape(self, view: ModelView) -> Shape:
        """Return what of this configuration decides memory."""
        form = self.engine(self.edited_layers(view), solve=unsolved)
        anchors = [form.spread.anchor(part) for part in form.spread.parts(form.layers)]
        return Shape(
            layers=form.layers,
            contexts=self.contexts,
            context_tokens=self.context_tokens if isinstance(self.context_tokens, int) else max(self.context_tokens),
            each=False,
            kl=self.kl_weight > 0,
            precision=self.value_settings().precision,
            anchor=min(anchors),  # values of the lowest layer take the most memory
            steps=self.steps,
        )

    def engine(self, layers: tuple[int, ...], **choices: Any) -> ClosedForm:
        """Return the engine with this configuration, a method's own choices, and the stages on top of them.

        Args:
            layers: layers that may be edited, ascending.
            choices: fields of :class:`ClosedForm`, ``solve`` among them.
        """
        form = ClosedForm(
            layers=layers,
            contexts=self.contexts,
            context_tokens=self.context_tokens,
            bare=self.bare_weight,
            gain=self.gain,
            bare_residual=self.residual == "bare",
            values=self.value_settings(),
            grouping=by_subject if self.merge_subjects else each_alone,
            **choices,
        )
        return self.apply_stages(form)


class BatchConfig(LocateConfig):
    """For methods that solve one system for the whole batch."""

    each_context: bool = Field(
        default=True,
        description="Fit the key of every context; False fits their mean, as the published methods do.",
    )

    def memory_shape(self, view: ModelView) -> Shape:
        """Return what of this configuration decides memory."""
        return replace(super().memory_shape(view), each=self.each_context)
