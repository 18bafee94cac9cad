"""StableEdit: UltraEdit, with gradients whitened by their whole covariance, and statistics warmed up beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.engine import contexts
from kecore.model import ModelView
from kecore.text import Encoder
from kecore_methods.locate.lifelong import Running, features
from kecore_methods.locate.ultraedit import Lifelong

__all__ = ["StableEdit"]


class StableEdit(Lifelong):
    """Lifelong normalisation with a warm-up stage and full whitening."""

    class Config(Lifelong.Config):
        """Configuration of StableEdit."""

        warm_up: int = Field(
            default=20, ge=0, le=512, description="Texts sampled from the model that statistics begin with."
        )
        warm_up_tokens: int = Field(default=20, ge=1, le=512, description="Length of such a text in tokens.")
        shrinkage: float = Field(
            default=0.1, gt=0, description="Added to the gradients' covariance, relative to its mean diagonal."
        )

    name = "stableedit"
    reference = (
        "Ma et al., More Edits, More Stable: Understanding the Lifelong Normalization in Sequential Model Editing, "
        "ICML 2026, arXiv:2605.11836"
    )

    def prepare_statistics(self, view: ModelView, layers: Sequence[int], context: MethodContext) -> None:
        """Begin the statistics with texts of the model's own, before the first edit of a session."""
        config: StableEdit.Config = context.config
        if context.state or not config.warm_up:
            return
        with context.stages("warm-up"):
            plain = Encoder(context.encoder.tokenizer, max_length=context.encoder.max_length)
            sampled = contexts.sample(view, plain, config.warm_up, config.warm_up_tokens, context.seed)
            # Every token of a text but its first is one that the model had to predict.
            texts = [replace(plain.encode(text), start=1) for text in sampled if text]
            layer_features = features(view, plain, texts, layers, context.memory, context.progress)
            for layer, tokens in layer_features.items():
                site = view.layers[layer].site.id
                Running(context.state, f"running/{site}/keys").add(tokens.keys)
                self.running(f"running/{site}", context).add(tokens.gradients)

    def running(self, name: str, context: MethodContext) -> Running:
        """Return the running statistics of gradients, with their covariance."""
        return Running(context.state, f"{name}/gradients", full=True)

    def normalised(self, running: Running, gradients: Tensor, context: MethodContext) -> Tensor:
        """Return gradients in units of their spread in every direction."""
        config: StableEdit.Config = context.config
        return running.whitened(gradients, config.shrinkage)
