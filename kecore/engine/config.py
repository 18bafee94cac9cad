"""What the locate-then-edit methods have in common: one configuration and how the engine reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kecore.api.errors import ConfigError
from kecore.api.identity import DTYPES
from kecore.engine.closed_form import ClosedForm
from kecore.engine.layers import at_depth
from kecore.engine.needs import Shape, closed_form
from kecore.engine.values import ValueSettings
from kecore.model import ModelView
from kecore_methods.locate.blue import Boundary
from kecore_methods.locate.stages import StagedConfig

if TYPE_CHECKING:
    from kecore.batch import RequestBatch
    from kecore.memory import Need

__all__ = ["BatchConfig", "LocateConfig"]


class LocateConfig(StagedConfig):
    """Stages that every closed-form method shares; defaults are relative, so they carry over to any model."""

    preset_key: ClassVar[str] = ""
    """The method's set-ups in ``presets.json``; empty where none was published for the method itself."""

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
    context_tokens: int = Field(default=10, ge=1, le=64, description="Length of a context prefix in tokens.")
    bare_weight: float | None = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Weight of the bare prompt's key, its contexts sharing the rest (half in MEMIT's released code); "
        "None counts it as one of them (ROME's).",
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
    kl_weight: float = Field(
        default=0.0625,
        ge=0,
        description="Factor of KL(edited | original) on '<subject> is a' (ROME's and MEMIT's hparams: 0.0625).",
    )
    stop_loss: float = Field(default=0.01, ge=0, description="A value whose loss is below this is finished.")
    stop_most_probable: bool = Field(
        default=False,
        description="A value is also finished once its target is the most probable answer in all contexts "
        "(ENCORE's early stop, arXiv 2502.01636).",
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

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Published set-ups of the method (``presets.json``; ``_source`` says whose)."""
        every = json.loads((files("kecore_methods.locate") / "presets.json").read_text(encoding="utf-8"))
        mine = every.get(cls.preset_key, {})
        return {name: {k: v for k, v in fields.items() if k != "_source"} for name, fields in mine.items()}

    def edited_layers(self, view: ModelView) -> tuple[int, ...]:
        """The layers, chosen by depth unless given."""
        if self.layers is not None:
            if not self.layers:
                raise ConfigError("'layers' is empty; name at least one layer, or leave it out")
            return self.boundary(tuple(view.layer(i).index for i in self.layers))
        return self.boundary(at_depth(view, self.depth_first, self.depth_last))

    def statistics_layers(self, view: ModelView) -> tuple[int, ...]:
        """Return the edited layers: the engine weighs the keys of each against its statistics."""
        return tuple(sorted(self.edited_layers(view)))

    def value_settings(self) -> ValueSettings:
        """Numbers of the target stage."""
        return ValueSettings(
            steps=self.steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            length_penalty=self.length_penalty,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
            kl_weight=self.kl_weight,
            stop_loss=self.stop_loss,
            stop_most_probable=self.stop_most_probable,
            noise=self.noise,
            precision=None if self.precision == "model" else DTYPES[self.precision],
            graphs=self.graphs,
        )

    def needs(self, view: ModelView, batch: RequestBatch) -> Sequence[Need]:
        """Needs of the engine's stages."""
        return closed_form(view, batch, self.memory_shape(view))

    def memory_shape(self, view: ModelView) -> Shape:
        """What of this configuration decides memory."""
        layers = self.edited_layers(view)
        return Shape(
            layers=layers,
            contexts=self.contexts,
            context_tokens=self.context_tokens,
            each=False,
            kl=self.kl_weight > 0,
            precision=self.value_settings().precision,
            anchor=min(layers) if self.blue else None,
        )

    def engine(self, layers: tuple[int, ...], **stages: Any) -> ClosedForm:
        """The engine with this configuration and a method's own stages."""
        form = ClosedForm(
            layers=layers,
            contexts=self.contexts,
            context_tokens=self.context_tokens,
            bare=self.bare_weight,
            gain=self.gain,
            values=self.value_settings(),
            **{**stages, **self.engine_stages()},
        )
        return replace(form, spread=Boundary(form.spread)) if self.blue else form


class BatchConfig(LocateConfig):
    """For methods that solve one system for the whole batch."""

    each_context: bool = Field(
        default=True,
        description="Fit the key of every context; False fits their mean, as the published methods do.",
    )

    def memory_shape(self, view: ModelView) -> Shape:
        """What of this configuration decides memory."""
        return replace(super().memory_shape(view), each=self.each_context)
