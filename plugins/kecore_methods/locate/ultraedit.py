"""UltraEdit: one backward pass, normalised over the session, and a ridge regression; no subject, no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import LowRank, Update, WeightEdit
from kecore.engine.layers import at_depth
from kecore.memory import Need, backward_bytes, logits_bytes
from kecore.model import ModelView
from kecore.ops import kv_solve
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.lifelong import (
    Features,
    Matrix,
    Running,
    features,
    named_matrices,
    value_matrices,
)
from kecore_methods.presets import Published

__all__ = ["Lifelong", "UltraEdit"]


class Lifelong:
    """The base of UltraEdit and StableEdit, which differ in how gradients are normalised."""

    class Config(Published):
        """Configuration; lengths are relative, so defaults carry over to any model."""

        preset_file: ClassVar[str] = "ultraedit"
        hparams_table: ClassVar[HparamsTable | None] = hparams.ULTRAEDIT

        layers: tuple[int, ...] | None = Field(
            default=None, description="Edited layers; None takes the layers between depth_first and depth_last."
        )
        matrices: tuple[str, ...] | None = Field(
            default=None,
            min_length=1,
            description="Edited matrices instead of the layers' value projections, by the ends of their names, such as "
            "layers.11.mlp.gate_proj.",
        )
        depth_first: float = Field(default=0.85, ge=0, le=1, description="Depth of the first edited layer.")
        depth_last: float = Field(default=0.95, ge=0, le=1, description="Depth of the last edited layer.")
        rate: float = Field(
            default=1.0,
            gt=0,
            description="Length of a step at each matrix, relative to the mean norm of its outputs. At 1 an update is "
            "some thousands of times as long as the published one: a fact is written in one step, not in many edits.",
        )
        learning_rate: float | None = Field(
            default=None, gt=0, description="The same as the paper's absolute eta (1e-6 in all released set-ups)."
        )
        ridge: float = Field(
            default=0.1, ge=0, description="Weight of the update's own norm, relative to the mean squared norm of keys."
        )
        ridge_lambda: float | None = Field(
            default=None, ge=0, description="The same as an absolute number (1 in the released code)."
        )
        start: Literal["zero", "empty"] = Field(
            default="zero",
            description="What the running statistics begin with: a zero, so that a lone token has a spread; or "
            "nothing, as released, so that an edit of one token is refused.",
        )
        share_statistics: bool = Field(
            default=False,
            description="Matrices of one shape share their running statistics, as released; False gives each its own.",
        )

        def edited_layers(self, view: ModelView) -> tuple[int, ...]:
            """Return the edited layers, chosen by depth unless given."""
            if self.layers is None:
                return at_depth(view, self.depth_first, self.depth_last)
            if not self.layers:
                raise ConfigError("'layers' is empty; name at least one layer, or leave it out")
            return tuple(sorted({view.layer(i).index for i in self.layers}))

        def edited_matrices(self, view: ModelView) -> list[Matrix]:
            """Return the edited matrices: those that are named, or the value projections of the edited layers.

            Raises:
                ConfigError: the model has no such matrix.
            """
            if self.matrices is not None:
                return named_matrices(view, self.matrices)
            return value_matrices(view, self.edited_layers(view))

        def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
            """Return the memory of one backward pass, and of the features of every predicted token."""
            matrices = self.edited_matrices(view)
            items = batch.encodings
            tokens = sum(len(item.ids) for item in items)
            target_tokens = sum(len(item.ids) - item.start for item in items)
            longest = max(len(item.ids) for item in items)
            widths = sum(matrix.linear.d_in + matrix.linear.d_out for matrix in matrices)
            lowest = min(matrix.layer for matrix in matrices)
            token = backward_bytes(view, lowest) + target_tokens * logits_bytes(view) // tokens
            return [Need("gradients", {"features": 2 * 4 * target_tokens * widths}, token, tokens, longest)]

    name: ClassVar[str]
    full: ClassVar[bool] = False
    """Whether gradients are accumulated with their whole covariance."""

    capabilities = Capabilities(kind="weights", batch=True, sequential=True, needs_subject=False)
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Plan the edit; running statistics of all edits so far travel in ``context.state``.

        Raises:
            RequestError: without a zero at their start, statistics of one token have no spread.
        """
        config: Lifelong.Config = context.config
        matrices = config.edited_matrices(view)
        with view.frozen():
            self.prepare_statistics(view, matrices, context)
            with context.stages("gradients"):
                of_matrices = features(
                    view, context.encoder, batch.encodings, matrices, context.memory, context.progress
                )
        updates: dict[str, Update] = {}
        with context.stages("solve"):
            # All matrices of a batch count before any is normalised: where they share statistics it matters.
            for matrix, tokens in zip(matrices, of_matrices, strict=True):
                self.add(matrix, tokens, context)
            for matrix, tokens in zip(matrices, of_matrices, strict=True):
                ridge = config.ridge_lambda
                if ridge is None:
                    ridge = config.ridge * float(tokens.keys.double().square().sum(1).mean())
                steps = self.steps(matrix, tokens, context)
                solution = kv_solve(tokens.keys.t(), steps.t().float(), ridge)
                updates[matrix.linear.name] = LowRank(solution.U, solution.V)
        layers = sorted({matrix.layer for matrix in matrices})
        return WeightEdit(
            updates=updates,
            base=context.fingerprint(view),
            method=self.name,
            transposed=frozenset(matrix.linear.name for matrix in matrices if matrix.linear.transposed),
            config=config.to_json(),
            requests=batch.requests,
            seed=context.seed,
            notes={"layers": layers, "tokens": len(of_matrices[0].keys)},
            state=dict(context.state),
        )

    def prepare_statistics(self, view: ModelView, matrices: Sequence[Matrix], context: MethodContext) -> None:
        """Prepare the running statistics before the first edit of a session; UltraEdit needs nothing."""

    def add(self, matrix: Matrix, tokens: Features, context: MethodContext) -> None:
        """Take keys and gradients of some tokens into a matrix's running statistics."""
        self.key_statistics(matrix, context).add(tokens.keys)
        self.gradient_statistics(matrix, context).add(tokens.gradients)

    def steps(self, matrix: Matrix, tokens: Features, context: MethodContext) -> Tensor:
        """Return the outputs' changes to be written, ``v = -eta |h^|^2 g^`` with normalised features, ``[n, d_out]``.

        Args:
            matrix: whose running statistics have these tokens in them.
            tokens: keys ``h`` and gradients ``g``.
            context: of the edit.
        """
        config: Lifelong.Config = context.config
        normal_keys = self.key_statistics(matrix, context).normalised(tokens.keys)
        length = normal_keys.square().sum(1, keepdim=True)  # [n, 1]
        eta = config.learning_rate
        if eta is None:
            # Normalised coordinates are about 1, so |h^|^2 is about d_in and |g^| about sqrt(d_out).
            eta = config.rate * tokens.size / (tokens.keys.shape[1] * tokens.gradients.shape[1] ** 0.5)
        gradients = self.gradient_statistics(matrix, context)
        return -eta * length * self.normalised(gradients, tokens.gradients, context)

    def key_statistics(self, matrix: Matrix, context: MethodContext) -> Running:
        """Return the running statistics of a matrix's keys."""
        config: Lifelong.Config = context.config
        return Running(context.state, f"{_statistics_name(matrix, config)}/keys", zero=config.start == "zero")

    def gradient_statistics(self, matrix: Matrix, context: MethodContext) -> Running:
        """Return the running statistics of a matrix's gradients."""
        config: Lifelong.Config = context.config
        name = f"{_statistics_name(matrix, config)}/gradients"
        return Running(context.state, name, full=self.full, zero=config.start == "zero")

    def normalised(self, running: Running, gradients: Tensor, context: MethodContext) -> Tensor:
        """Return gradients in units of their spread."""
        return running.normalised(gradients)


def _statistics_name(matrix: Matrix, config: Lifelong.Config) -> str:
    """Return the name of the statistics that a matrix has, or shares with all of its shape."""
    if config.share_statistics:
        return f"running/{matrix.linear.d_out}x{matrix.linear.d_in}"
    return f"running/{matrix.name}"


class UltraEdit(Lifelong):
    """Training-, subject- and memory-free lifelong editing."""

    name = "ultraedit"
    reference = (
        "Gu et al., UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models, TMLR 2026, "
        "arXiv:2505.14679"
    )
