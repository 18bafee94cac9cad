"""StableEdit: UltraEdit, with gradients whitened by their whole covariance, and statistics warmed up beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.engine import contexts
from kecore.model import ModelView
from kecore.text import Encoded, Encoder
from kecore_methods.locate.lifelong import Matrix, Running, features
from kecore_methods.locate.ultraedit import Lifelong

__all__ = ["StableEdit"]


class StableEdit(Lifelong):
    """Lifelong normalisation with a warm-up stage and full whitening."""

    class Config(Lifelong.Config):
        """Configuration of StableEdit."""

        preset_file: ClassVar[str] = "stableedit"

        warm_up: int = Field(
            default=20,
            ge=0,
            le=512,
            description="Texts sampled from the model that statistics begin with, where no examples are read.",
        )
        warm_up_tokens: int = Field(default=20, ge=1, le=512, description="Length of such a text in tokens.")
        warm_up_facts: int = Field(
            default=0,
            ge=0,
            description="Most of the session's examples that statistics begin with instead: facts of a training split "
            "with their answers, 2,000 in the released code. Few of them give a poorer start than sampled texts.",
        )
        shrinkage: float | None = Field(
            default=0.1,
            gt=0,
            description="Added to the gradients' covariance, relative to its mean diagonal; None whitens as released: "
            "only once more tokens were seen than gradients have coordinates.",
        )

    name = "stableedit"
    reference = (
        "Ma et al., More Edits, More Stable: Understanding the Lifelong Normalization in Sequential Model Editing, "
        "ICML 2026, arXiv:2605.11836"
    )

    full = True

    def prepare_statistics(self, view: ModelView, matrices: Sequence[Matrix], context: MethodContext) -> None:
        """Begin the statistics with the session's examples, or with texts of the model's own, before the first edit."""
        if context.state:
            return
        with context.stages("warm-up"):
            encoder, texts = self._warm_up_texts(view, context)
            if not texts:
                return
            of_matrices = features(view, encoder, texts, matrices, context.memory, context.progress)
            for matrix, tokens in zip(matrices, of_matrices, strict=True):
                self.add(matrix, tokens, context)

    @staticmethod
    def _warm_up_texts(view: ModelView, context: MethodContext) -> tuple[Encoder, list[Encoded]]:
        """Return the texts whose predicted tokens the statistics begin with, and how they are read."""
        config: StableEdit.Config = context.config
        requests = [record.request for record in context.examples[: config.warm_up_facts]]
        if requests:
            return context.encoder, [context.encoder.encode(request.text, request.target) for request in requests]
        plain = Encoder(context.encoder.tokenizer, max_length=context.encoder.max_length)
        sampled = contexts.sample(view, plain, config.warm_up, config.warm_up_tokens, context.seed)
        # Every token of a text but its first is one that the model had to predict.
        return plain, [replace(plain.encode(text), start=1) for text in sampled if text]

    def normalised(self, running: Running, gradients: Tensor, context: MethodContext) -> Tensor:
        """Return gradients in units of their spread in every direction."""
        config: StableEdit.Config = context.config
        if config.shrinkage is None:
            return running.whitened_once_full(gradients)
        return running.whitened(gradients, config.shrinkage)
