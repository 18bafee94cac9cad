"""Methods with one fault each, and the check that must catch it."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from kecore.api.config import MethodConfig, Preset
from kecore.api.errors import ConfigError, NonFiniteError, PluginError, PromptTooLongError, UnsupportedCapabilityError
from kecore.api.identity import Fingerprint
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import Edit, LowRank, WeightEdit
from kecore.engine.closed_form import ClosedForm
from kecore.engine.keys import Keys
from kecore.engine.value_steps import ValueSettings
from kecore.model import ModelView, SiteId
from kecore.ops import Solution, kv_solve
from kecore.testing import NonConformance

ALONE = Capabilities("weights", batch=False, sequential=True)
INFORMED = Capabilities("weights", batch=True, sequential=True, needs_statistics=True)


class Good:
    """A method without a fault; the others differ from it in one place."""

    class Config(MethodConfig):
        steps: int = Field(15, ge=1, description="evaluations of the loss of a value")

    name = "good"
    capabilities = Capabilities("weights", batch=True, sequential=True)
    reference = "nobody, nowhere"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        values = ValueSettings(steps=context.config.steps)
        form = ClosedForm(layers=(1,), contexts=0, context_tokens=0, values=values, solve=self.solve)
        return form.plan(view, batch, context, self.name)

    def solve(self, site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        return kv_solve(keys.mean(), residuals, 1e-3)


FAULTS: list[tuple[str, type[Good], type[Exception]]] = []
"""Name of a check, a method that it must catch, and the error that says so."""


def caught_by(check: str, error: type[Exception] = NonConformance) -> Callable[[type[Any]], type[Any]]:
    def add(cls: type[Any]) -> type[Any]:
        FAULTS.append((check, cls, error))
        return cls

    return add


def changed(edit: Edit, change: Callable[[LowRank], LowRank]) -> WeightEdit:
    """The edit with its updates changed."""
    assert isinstance(edit, WeightEdit)
    return replace(edit, updates={n: change(u) for n, u in edit.updates.items() if isinstance(u, LowRank)})


def of_kind(edit: Edit, kind: type[WeightEdit]) -> WeightEdit:
    """The edit as one of a class with a fault."""
    assert isinstance(edit, WeightEdit)
    return kind(**{field.name: getattr(edit, field.name) for field in fields(edit)})


# The class.


@caught_by("class_fulfils_the_contract", PluginError)
class NamesNoPaper(Good):
    reference = " "


@caught_by("class_fulfils_the_contract")
class AsksForMore(Good):
    def plan(self, view: Any, batch: Any, context: Any, more: Any) -> Any:  # type: ignore[override]
        return super().plan(view, batch, context)


@caught_by("class_fulfils_the_contract")
class CannotBeTrained(Good):
    capabilities = Capabilities("weights", needs_training=True)


@caught_by("config_is_described_strict_and_portable")
class TakesAnyKey(Good):
    class Config(Good.Config):
        model_config = ConfigDict(frozen=True, extra="ignore")


@caught_by("config_is_described_strict_and_portable", ConfigError)
class HasNoDefaults(Good):
    class Config(Good.Config):
        rate: float = Field(description="learning rate")


@caught_by("config_is_described_strict_and_portable")
class DescribesNothing(Good):
    class Config(Good.Config):
        rate: float = 0.1


@caught_by("config_is_described_strict_and_portable")
class IsLostInJson(Good):
    class Config(Good.Config):
        rate: float = Field(0.1, exclude=True, description="learning rate")

        @classmethod
        def presets(cls) -> dict[str, Preset]:
            return {"published": Preset({"rate": 0.5}, "a paper")}


# A plan.


@caught_by("plan_leaves_the_model_as_it_was")
class RestoresRoughly(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        weight = view.layers[1].site.linear.parameter.data
        noise = torch.full_like(weight, 0.1)
        weight += noise
        edit = super().plan(view, batch, context)
        weight -= noise
        return edit


@caught_by("plan_leaves_the_model_as_it_was")
class LeavesAHook(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        view.layers[0].module.register_forward_hook(lambda *_: None)
        return super().plan(view, batch, context)


@caught_by("plan_leaves_the_model_as_it_was")
class LeavesFlags(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        view.model.requires_grad_(False)
        return super().plan(view, batch, context)


@caught_by("plan_leaves_the_model_as_it_was")
class LeavesTheMode(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        view.model.eval()
        return super().plan(view, batch, context)


@caught_by("plan_leaves_the_model_as_it_was")
class LeavesGradients(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        view.model.zero_grad()
        return super().plan(view, batch, context)


@caught_by("plan_leaves_the_model_as_it_was")
class Seeds(Good):
    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        torch.manual_seed(context.seed)
        return super().plan(view, batch, context)


@caught_by("plan_leaves_the_model_as_it_was")
class DrawsFromNumpy(Good):
    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        np.random.rand()
        return super().plan(view, batch, context)


@caught_by("plan_leaves_its_arguments_as_they_were")
class ScalesStatistics(Good):
    capabilities = INFORMED

    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        for moment in context.need_statistics([1], self.name).moments.values():
            moment *= 2
        return super().plan(view, batch, context)


@caught_by("plan_is_quiet")
class Prints(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        sys.stdout.write("planning\n")
        return super().plan(view, batch, context)


@caught_by("plan_is_quiet")
class Writes(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        Path("planned.txt").write_text("planned")
        return super().plan(view, batch, context)


@caught_by("plan_is_quiet")
class Connects(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        socket.getaddrinfo("localhost", 80)
        return super().plan(view, batch, context)


@caught_by("interrupted_plan_leaves_the_model_as_it_was")
class RestoresInTheEnd(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        was = view.model.training
        view.model.eval()
        edit = super().plan(view, batch, context)
        view.model.train(was)
        return edit


@caught_by("interrupted_plan_leaves_the_model_as_it_was")
class GoesOn(Good):
    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        try:
            return super().plan(view, batch, context)
        except BaseException:  # noqa: BLE001 - the fault
            return WeightEdit(updates={}, base=context.fingerprint(view), method=self.name)


@caught_by("same_seed_same_edit")
class IgnoresTheSeed(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        with torch.random.fork_rng(devices=[]):
            return changed(super().plan(view, batch, context), lambda u: LowRank(u.U * torch.rand(1), u.V))


@caught_by("same_seed_same_edit")
class CountsItsPlans(Good):
    plans = 0

    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        self.plans += 1
        return changed(super().plan(view, batch, context), lambda u: LowRank(u.U / self.plans, u.V))


# An edit.


@caught_by("edit_says_what_it_is")
class SaysItWrapsModules(Good):
    capabilities = Capabilities("modules", batch=True, sequential=True)


@caught_by("edit_says_what_it_is")
class NamesAnotherMethod(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return replace(super().plan(view, batch, context), method="better")  # type: ignore[type-var]


@caught_by("edit_says_what_it_is")
class NamesAnotherSeed(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return replace(super().plan(view, batch, context), seed=1)  # type: ignore[type-var]


@caught_by("edit_says_what_it_is")
class NamesAnotherConfig(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return replace(super().plan(view, batch, context), config={"steps": 3})  # type: ignore[type-var]


@caught_by("edit_says_what_it_is")
class NamesNoRequests(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return replace(super().plan(view, batch, context), requests=())  # type: ignore[type-var]


@caught_by("edit_says_what_it_is")
class NamesAnotherBase(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        other = Fingerprint("float32", {"float32": "0" * 32})
        return replace(super().plan(view, batch, context), base=other)  # type: ignore[type-var]


@caught_by("edit_says_what_it_is")
class ReturnsDoubles(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return changed(super().plan(view, batch, context), lambda u: LowRank(u.U.double(), u.V.double()))


@caught_by("edit_says_what_it_is")
class ReturnsAGraph(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return changed(super().plan(view, batch, context), lambda u: LowRank(u.U.requires_grad_(), u.V))


@caught_by("edit_says_what_it_is")
class ReturnsTensorsOfAnotherDevice(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        edit = super().plan(view, batch, context)
        assert isinstance(edit, WeightEdit)
        meta = {n: LowRank(u.U.to("meta"), u.V.to("meta")) for n, u in edit.updates.items() if isinstance(u, LowRank)}
        object.__setattr__(edit, "updates", meta)
        return edit


@caught_by("edit_says_what_it_is", NonFiniteError)
class ReturnsNan(Good):
    def solve(self, site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        solution = super().solve(site, keys, residuals)
        return solution._replace(U=solution.U / 0)


class WritesTheEmbedding(WeightEdit):
    def attach(self, model: nn.Module, *, base: Any = None) -> None:
        super().attach(model, base=base)
        model.get_input_embeddings().weight.data += 1e-3  # type: ignore[operator, union-attr]


@caught_by("edit_changes_only_what_it_names")
class WritesAForeignParameter(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return of_kind(super().plan(view, batch, context), WritesTheEmbedding)


@caught_by("edit_changes_only_what_it_names")
class DoesNothing(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return changed(super().plan(view, batch, context), lambda u: LowRank(0 * u.U, u.V))


class Subtracts(WeightEdit):
    def revert(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, update in self.updates.items():
                matrix = update.matrix()
                dict(model.named_parameters())[name] -= matrix.t() if name in self.transposed else matrix


@caught_by("reverting_is_exact")
class ComesOffRoughly(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return of_kind(super().plan(view, batch, context), Subtracts)


class SavesHalves(WeightEdit):
    def save(self, path: str | Path) -> Path:
        rounded = changed(self, lambda u: LowRank(u.U.half().float(), u.V.half().float()))
        return of_kind(rounded, WeightEdit).save(path)


@caught_by("saved_edit_is_the_same_edit")
class LosesDigitsWhenSaved(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return of_kind(super().plan(view, batch, context), SavesHalves)


# What it is for.


@caught_by("targets_become_likelier")
class HardlyWrites(Good):
    def solve(self, site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        return super().solve(site, keys, 1e-4 * residuals)


@caught_by("targets_become_likelier")
class WrecksNeighbours(Good):
    def solve(self, site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        solution = super().solve(site, keys, residuals)
        k = keys.mean()
        noise = torch.randn(len(k), 8, generator=torch.Generator().manual_seed(0))
        noise -= k @ torch.linalg.lstsq(k, noise).solution  # nothing that the edited keys would notice
        push = torch.randn(len(residuals), 8, generator=torch.Generator().manual_seed(1))
        return solution._replace(U=torch.cat([solution.U, 1000 * push], 1), V=torch.cat([solution.V, noise], 1))


@caught_by("every_request_of_a_batch_counts")
class WritesTheFirstOnly(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        edit = super().plan(view, batch.select([0]), context)
        return replace(edit, requests=batch.requests)  # type: ignore[type-var]


@caught_by("several_requests_are_written_or_refused")
class DropsWhatItCannotDo(WritesTheFirstOnly):
    capabilities = ALONE


class RefusesASecond(Good):
    """Not a fault: what a method without ``batch`` may do."""

    capabilities = ALONE

    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        if len(batch) > 1:
            raise UnsupportedCapabilityError("this method takes one request at a time; edit once for each")
        return super().plan(view, batch, context)


@caught_by("several_requests_are_refused")
class WritesWhatItDoesNotClaim(Good):
    capabilities = Capabilities("weights")


@caught_by("order_of_a_batch_does_not_matter")
class FavoursTheFirst(Good):
    def solve(self, site: SiteId, keys: Keys, residuals: Tensor) -> Solution:
        return super().solve(site, keys, residuals / torch.arange(1, residuals.shape[1] + 1))


@caught_by("facts_without_a_subject_are_edited_or_refused")
class ForgetsFactsWithoutASubject(Good):
    capabilities = replace(Good.capabilities, needs_subject=False)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        edit = super().plan(view, batch, context)
        if any(request.subject is None for request in batch.requests):
            return changed(edit, lambda update: replace(update, U=0 * update.U))
        return edit


@caught_by("second_edit_keeps_the_first")
class UndoesTheFirst(Good):
    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        edit = super().plan(view, batch, context)
        before = dict(context.state)
        assert isinstance(edit, WeightEdit)
        (update,) = edit.updates.values()
        assert isinstance(update, LowRank)
        context.state |= {"U": update.U, "V": update.V}
        if not before:
            return edit
        back = (torch.cat([update.U, -before["U"]], 1), torch.cat([update.V, before["V"]], 1))
        return changed(edit, lambda _: LowRank(*back))


@caught_by("declared_types_work", RuntimeError)
class KnowsOneType(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        view.layers[1].site.linear.weight @ torch.eye(view.layers[1].site.linear.d_in)
        return super().plan(view, batch, context)


@caught_by("declared_types_work")
class OverwritesTheType(Good):
    class Edit(WeightEdit):
        def attach(self, model: nn.Module, *, base: Any = None) -> None:
            super().attach(model, base=base)
            model.float()

    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        return of_kind(super().plan(view, batch, context), self.Edit)


# What it refuses.


@caught_by("bad_requests_are_refused")
class CutsLongPrompts(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        try:
            return super().plan(view, batch, context)
        except PromptTooLongError:
            short = [replace(r, prompt=r.prompt[-50:]) for r in batch.requests]
            return super().plan(view, RequestBatch.of(short, context.encoder), context)


@caught_by("bad_requests_are_refused")
class AssertsShortPrompts(Good):
    def plan(self, view: ModelView, batch: Any, context: Any) -> Edit:
        assert all(len(r.text) < 1000 for r in batch.requests)
        return super().plan(view, batch, context)


@caught_by("what_is_missing_is_asked_for")
class DoesWithout(Good):
    capabilities = INFORMED


@caught_by("what_is_missing_is_asked_for")
class FailsWithout(Good):
    capabilities = INFORMED

    def plan(self, view: ModelView, batch: Any, context: MethodContext) -> Edit:
        assert context.statistics is not None
        return super().plan(view, batch, context)
