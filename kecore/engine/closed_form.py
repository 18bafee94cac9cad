"""The engine of locate-then-edit: six stages, of which a method chooses or replaces some.

========== ============================================================ ==========================
stage      question                                                     where
========== ============================================================ ==========================
key        what does the projection read for this subject?              :mod:`kecore.engine.keys`
target     what should it write?                                        :mod:`kecore.engine.values`,
                                                                        :mod:`kecore.engine.target`
spread     which share of the residual does each layer take?            :mod:`kecore.engine.spread`
preserve   which update writes it and keeps everything else?            :class:`ClosedForm` ``solve``
post       is the update changed before it is used?                     :mod:`kecore.engine.post`
accumulate what must the next edit know?                                ``context.state``
========== ============================================================ ==========================

ROME, MEMIT, EMMET and AlphaEdit are each a configuration and a choice of these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from kecore.api.errors import EditStateError, KecoreWarning
from kecore.api.method import MethodContext
from kecore.batch import RequestBatch
from kecore.edit import Update, WeightEdit, factored, planned_updates
from kecore.engine import contexts as contexts_module
from kecore.engine.keys import Keys, Prompts
from kecore.engine.post import EditedSite, Post, chained, untouched
from kecore.engine.spread import Evenly, Spread
from kecore.engine.target import Target, as_found, in_turn
from kecore.engine.value_steps import Coupling, ValueSettings
from kecore.engine.values import Values, optimise_values
from kecore.model import ModelView, SiteId
from kecore.ops import Solution

__all__ = ["ClosedForm", "Grouping", "Solve", "by_subject", "each_alone", "unsolved"]

Solve = Callable[[SiteId, Keys, Tensor], Solution]
"""``solve(site, keys, residuals [d_out, u])`` to the update of that site."""


Grouping = Callable[[RequestBatch], RequestBatch]
"""From a batch, whose groups are the requests about one subject, to the same requests as they are to be grouped."""


def by_subject(batch: RequestBatch) -> RequestBatch:
    """Let requests about one subject share key and value (MEMIT-Merge, arXiv 2502.07322)."""
    return batch


def each_alone(batch: RequestBatch) -> RequestBatch:
    """Give each request a key and a value of its own, as MEMIT was published."""
    return batch.ungrouped()


def unsolved(site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
    """Refuse to solve: the solve stage of a form that is only asked which layers it edits.

    Raises:
        EditStateError: always.
    """
    raise EditStateError(f"layer {site} cannot be solved for: the method has not chosen how")


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """A choice of stages.

    Args:
        layers: layers that may be edited, ascending; the spread decides which of them are.
        contexts: number of sampled context prefixes.
        context_tokens: length of each, or several lengths that equal shares of them have.
        values: numbers of the target stage.
        solve: the preservation stage.
        spread: which layers share one optimised value, and what each of them writes of it.
        coupling: from one key a group, ``[u, d_in]``, to a further term of the values' loss; None for none.
        target: changes the values before they are written; see :mod:`kecore.engine.target`.
        post: changes an update before it is used; see :mod:`kecore.engine.post`.
        grouping: which requests share key and value.
        bare: weight of the bare prompt's key among its contexts'; see :class:`KeyPass`.
        gain: factor of the values, since a prompt whose key differs from the fitted ones receives a part only.
        bare_residual: what is left to write is measured on the bare prompts alone; see :class:`Prompts`.
    """

    layers: tuple[int, ...]
    contexts: int
    context_tokens: int | tuple[int, ...]
    values: ValueSettings
    solve: Solve
    spread: Spread = field(default_factory=Evenly)
    coupling: Callable[[Tensor], Coupling] | None = None
    target: Target = as_found
    post: Post = untouched
    grouping: Grouping = by_subject
    bare: float | None = 0.5
    gain: float = 1.0
    bare_residual: bool = False

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """Layers that the spread writes to, ascending."""
        return tuple(sorted(set(chain.from_iterable(self.spread.parts(self.layers)))))

    def with_target(self, target: Target) -> ClosedForm:
        """Return this form, of which a further stage changes the values before they are written."""
        return replace(self, target=target if self.target is as_found else in_turn(self.target, target))

    def with_post(self, post: Post) -> ClosedForm:
        """Return this form, of which a further stage changes each update before it is used."""
        return replace(self, post=post if self.post is untouched else chained([self.post, post]))

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext, method: str) -> WeightEdit:
        """Run the stages; the model is bitwise as before when this returns.

        Raises:
            NonFiniteError: something overflowed.
            NumericalError: a system has no usable solution.
        """
        parts = self._parts(view)
        batch = self.grouping(batch)
        with view.frozen(), torch.no_grad():
            with context.stages("contexts"):
                prefixes = contexts_module.of_session(view, context, self.contexts, self.context_tokens)
            updates: dict[SiteId, Update] = {}
            solved: dict[str, dict[str, float]] = {}
            values_of_parts: list[Values] = []
            for part in parts:
                with planned_updates(view, updates):
                    values, written, how = self._write(view, batch, prefixes, part, context)
                updates, solved = updates | written, solved | how
                values_of_parts.append(values)
        losses = torch.cat([values.loss for values in values_of_parts]).tolist()
        notes = {
            "solve": solved,
            "layers": sorted(set(chain.from_iterable(parts))),
            "contexts": list(prefixes),
            "value_steps": torch.cat([values.steps for values in values_of_parts]).tolist(),
            "value_loss": [round(loss, 5) for loss in losses],
            "replay": values_of_parts[-1].mode,
        }
        return WeightEdit.planned(view, updates, context, method=method, requests=batch.requests, notes=notes)

    def _write(
        self,
        view: ModelView,
        batch: RequestBatch,
        prefixes: tuple[str, ...],
        part: tuple[int, ...],
        context: MethodContext,
    ) -> tuple[Values, dict[SiteId, Update], dict[str, dict[str, float]]]:
        """Optimise values and write them: the values, the layers' updates, and how each system was solved."""
        prompts = Prompts(view, batch, prefixes, context.memory, self.bare, self.bare_residual)
        anchor = self.spread.anchor(part)
        with context.stages("values"), torch.enable_grad():
            coupling = None
            if self.coupling is not None:
                keys, _ = prompts.begin_pass((anchor,)).advance(anchor)
                coupling = self.coupling(keys.mean().t())  # [u, d_in]
            values = optimise_values(
                view,
                batch,
                anchor,
                prefixes,
                self.values,
                seed=context.seed,
                memory=context.memory,
                progress=context.progress,
                coupling=coupling,
            )

        def outputs() -> Tensor:
            return prompts.begin_pass((anchor,), projection=True).original

        delta = self.gain * self.target(anchor, outputs, values.delta, context.state)
        return values, *self._insert(prompts, part, delta, context)

    def _parts(self, view: ModelView) -> list[tuple[int, ...]]:
        """Return the spread's parts; of one with several layers, only the last where a norm stands behind one."""
        layers = tuple(sorted({view.layer(i).index for i in self.layers}))
        parts: list[tuple[int, ...]] = []
        for part in self.spread.parts(layers):
            # Behind a norm, a share of the residual stream's change has no fixed counterpart in an earlier
            # layer's projection, so the last layer writes all of it.
            behind_norm = any(view.layers[i].residual_scale is None for i in part)
            if len(part) > 1 and behind_norm:
                warnings.warn(
                    f"{type(view.model).__name__} puts a norm behind its feed-forward blocks; only layer {part[-1]} of "
                    f"{list(part)} is edited",
                    KecoreWarning,
                    stacklevel=5,
                )
                part = part[-1:]
            parts.append(part)
        return parts

    def _insert(
        self, prompts: Prompts, part: tuple[int, ...], delta: Tensor, context: MethodContext
    ) -> tuple[dict[SiteId, Update], dict[str, dict[str, float]]]:
        view = prompts.view
        updates: dict[SiteId, Update] = {}
        solved: dict[str, dict[str, float]] = {}
        with context.stages("keys"):
            residuals = self.spread.residuals(prompts, part, delta)
        for written, layer in enumerate(part):
            context.progress("layers", written, len(part))
            view.layers[layer].check_sites()
            with context.stages("keys"), planned_updates(view, updates):
                keys, missing = residuals.read(layer)
                share = self.spread.share(SiteId(layer), keys, missing, len(part) - written)  # [u, d_model]
                site_keys = keys.sites(layer)
            for item in site_keys:
                weight = view.site(item.site).linear.weight
                with context.stages("solve"):
                    solution = self.solve(item.site, item.keys, (share * item.share[:, None].to(share)).t())
                    edited = EditedSite(item.site, weight, item.keys, context.state)
                    updates[item.site] = self.post(edited, factored(solution.U, solution.V))
                solved[str(item.site)] = {
                    "edit_residual": solution.edit_residual,
                    "condition": solution.condition,
                    "relative_norm": updates[item.site].norm() / float(weight.norm()),
                }
        context.progress("layers", len(part), len(part))
        return updates, solved
