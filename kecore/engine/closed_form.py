"""The engine of locate-then-edit: six stages, of which a method chooses or replaces some.

========== ============================================================ ==========================
stage      question                                                     where
========== ============================================================ ==========================
key        what does the projection read for this subject?              :mod:`kecore.engine.keys`
target     what should it write?                                        :mod:`kecore.engine.values`,
                                                                        :mod:`kecore.engine.target`
spread     which share of the residual does each layer take?            :class:`ClosedForm` ``spread``
preserve   which update writes it and keeps everything else?            :class:`ClosedForm` ``solve``
post       is the update changed before it is used?                     :mod:`kecore.engine.post`
accumulate what must the next edit know?                                ``context.state``
========== ============================================================ ==========================

ROME, MEMIT, EMMET and AlphaEdit are each a configuration and a choice of these.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kecore.api.errors import KecoreWarning
from kecore.api.method import MethodContext
from kecore.api.types import EditRequest, check_conflicts, unique
from kecore.edit import Update, WeightEdit, factored, updated
from kecore.engine import contexts as contexts_module
from kecore.engine import values as values_module
from kecore.engine.keys import KeyPass, Keys
from kecore.engine.locate import group_by_subject
from kecore.engine.post import Post, Site, untouched
from kecore.engine.target import ForwardReplay, Target, as_found
from kecore.engine.values import Values
from kecore.model import ModelView
from kecore.ops import Solution
from kecore_methods.locate.align import Alignment

__all__ = ["ClosedForm", "Solve", "by_square_root", "evenly"]

Solve = Callable[[int, Keys, Tensor], Solution]
"""``solve(layer, keys, residuals [d_out, u])`` to the update of that layer."""


def by_square_root(residual: Tensor, remaining: int) -> Tensor:
    """PMET's spread (arXiv 2308.08742): earlier layers take more than an equal share of what is left."""
    return residual / math.sqrt(remaining)


def evenly(residual: Tensor, remaining: int) -> Tensor:
    """MEMIT's spread (arXiv 2210.07229, eq. 20): an equal share for each layer still to come."""
    return residual / remaining


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """A choice of stages.

    Args:
        layers: edited layers, ascending; values are optimised for the last.
        contexts: number of sampled context prefixes.
        context_tokens: length of each.
        values: numbers of the target stage.
        solve: the preservation stage.
        projection: residuals are of the last layer's value projection, not of its output; see :class:`KeyPass`.
        align: from one key a group, ``[u, d_in]``, to what makes values lie to each other as the keys do (EAMET).
        target: changes the values before they are written; see :mod:`kecore.engine.target`.
        forward: values are optimised for the first layer, and what they make of each later layer's output is its
            target (MEMIT-FE); nothing is spread.
        apart: every layer has values of its own, which are optimised for it under the updates of the layers before,
            and writes all of them (BLUE); nothing is spread.
        spread: residual ``[u, d_model]`` and number of layers still to come, to this layer's share.
        post: changes an update before it is used; see :mod:`kecore.engine.post`.
        merge_subjects: requests about one subject share key and value.
        bare: weight of the bare prompt's key among its contexts'; see :class:`KeyPass`.
        gain: factor of the values, since a prompt whose key differs from the fitted ones receives a part only.
    """

    layers: tuple[int, ...]
    contexts: int
    context_tokens: int
    values: values_module.ValueSettings
    solve: Solve
    align: Callable[[Tensor], Alignment] | None = None
    target: Target = as_found
    forward: bool = False
    apart: bool = False
    spread: Callable[[Tensor, int], Tensor] = evenly
    post: Post = untouched
    merge_subjects: bool = True
    bare: float | None = 0.5
    projection: bool = False
    gain: float = 1.0

    def plan(self, view: ModelView, requests: Sequence[EditRequest], context: MethodContext, method: str) -> WeightEdit:
        """Run the stages; the model is bitwise as before when this returns.

        Raises:
            RequestConflictError: two requests contradict each other.
            NonFiniteError: something overflowed.
            NumericalError: a system has no usable solution.
        """
        check_conflicts(requests)
        asked = unique(requests)
        layers = self._usable(view)
        groups = group_by_subject(asked) if self.merge_subjects else list(range(len(asked)))
        with view.frozen(), torch.no_grad():
            with context.stages("contexts"):
                prefixes = contexts_module.of_session(view, context, self.contexts, self.context_tokens)
            updates: dict[int, Update] = {}
            solved: dict[str, dict[str, float]] = {}
            found: list[Values] = []
            for part in [(layer,) for layer in layers] if self.apart else [layers]:
                with view.overlay(self._overlay(view, updates)):
                    values, written, how = self._write(view, asked, groups, prefixes, part, context)
                updates, solved = updates | written, solved | how
                found.append(values)
        notes = {
            "solve": solved,
            "layers": list(layers),
            "contexts": list(prefixes),
            "value_steps": [steps for values in found for steps in values.steps.tolist()],
            "value_loss": [round(loss, 5) for values in found for loss in values.loss.tolist()],
            "replay": found[-1].mode,
        }
        return WeightEdit(
            updates={view.layers[i].value_projection.name: update for i, update in updates.items()},
            base=context.fingerprint(view),
            method=method,
            transposed=frozenset(
                view.layers[i].value_projection.name for i in updates if view.layers[i].value_projection.transposed
            ),
            config=context.config.to_json(),
            requests=tuple(asked),
            seed=context.seed,
            notes=notes,
            state=dict(context.state),
        )

    def _write(
        self,
        view: ModelView,
        asked: list[EditRequest],
        groups: list[int],
        prefixes: tuple[str, ...],
        layers: tuple[int, ...],
        context: MethodContext,
    ) -> tuple[Values, dict[int, Update], dict[str, dict[str, float]]]:
        """Optimise values and write them: the values, the layers' updates, and how each system was solved."""
        passes = partial(self._pass, view, context, asked, groups, prefixes)
        anchor = layers[0] if self.forward else layers[-1]
        with context.stages("values"), torch.enable_grad():
            found = values_module.optimise(
                view,
                context.encoder,
                asked,
                groups,
                anchor,
                prefixes,
                self.values,
                seed=context.seed,
                memory=context.memory,
                progress=context.progress,
                align=self.align and self.align(passes((anchor,)).advance(anchor)[0].mean().t()),
            )
        delta = self.target(anchor, lambda: passes((anchor,), projection=True).original, found.delta, context.state)
        return found, *self._insert(view, passes, layers, self.gain * delta, context)

    def _usable(self, view: ModelView) -> tuple[int, ...]:
        layers = tuple(sorted({view.layer(i).index for i in self.layers}))
        if len(layers) > 1 and not self.apart and any(view.layers[i].residual_scale is None for i in layers):
            # Behind a norm, a share of the residual stream's change has no fixed counterpart in an earlier
            # layer's projection, so the last layer writes all of it.
            warnings.warn(
                f"{type(view.model).__name__} puts a norm behind its feed-forward blocks; only layer {layers[-1]} of "
                f"{list(layers)} is edited",
                KecoreWarning,
                stacklevel=5,
            )
            return layers[-1:]
        return layers

    def _pass(
        self,
        view: ModelView,
        context: MethodContext,
        requests: list[EditRequest],
        groups: list[int],
        prefixes: tuple[str, ...],
        layers: tuple[int, ...],
        *,
        projection: bool = False,
    ) -> KeyPass:
        return KeyPass(
            view, context.encoder, requests, groups, prefixes, layers, context.memory, self.bare, projection=projection
        )

    def _insert(
        self,
        view: ModelView,
        passes: Callable[..., KeyPass],
        layers: tuple[int, ...],
        delta: Tensor,
        context: MethodContext,
    ) -> tuple[dict[int, Update], dict[str, dict[str, float]]]:
        updates: dict[int, Update] = {}
        solved: dict[str, dict[str, float]] = {}
        with context.stages("keys"):
            if self.forward:
                advance = ForwardReplay(view, passes, layers, delta).advance
            else:
                advance = self._backward(view, passes(layers, projection=self.projection), layers, delta)
        for place, layer in enumerate(layers):
            context.progress("layers", place, len(layers))
            with context.stages("keys"), view.overlay(self._overlay(view, updates)):
                key, share = advance(layer)
            weight = view.layers[layer].value_projection.weight
            with context.stages("solve"):
                solution = self.solve(layer, key, share.t())
                site = Site(layer, weight, key, context.state)
                updates[layer] = self.post(site, factored(solution.U, solution.V))
            solved[str(layer)] = {
                "edit_residual": solution.edit_residual,
                "condition": solution.condition,
                "relative_norm": updates[layer].norm() / float(weight.norm()),
            }
        context.progress("layers", len(layers), len(layers))
        return updates, solved

    def _backward(
        self, view: ModelView, keys: KeyPass, layers: tuple[int, ...], delta: Tensor
    ) -> Callable[[int], tuple[Keys, Tensor]]:
        """A function of a layer: its keys under the updates in place, and its share of what the last one misses."""
        last = view.layers[layers[-1]].residual_scale

        def advance(layer: int) -> tuple[Keys, Tensor]:
            key, moved = keys.advance(layer)
            share = self.spread(delta - moved, len(layers) - layers.index(layer))
            own = view.layers[layer].residual_scale
            return key, share * (last / own) if last is not None and own is not None else share

        return advance

    @staticmethod
    def _overlay(view: ModelView, updates: dict[int, Update]) -> dict[torch.nn.Parameter, Tensor]:
        projections = {i: view.layers[i].value_projection for i in updates}
        return {
            p.parameter: updated(p.name, p.parameter.data, [updates[i]], p.transposed) for i, p in projections.items()
        }
