"""Checks of what kecore asks of an editing method, one function a promise.

A check is given a :class:`~kecore.testing.bench.Bench` and raises
:class:`~kecore.testing.bench.NonConformance` where the promise is not kept. Which checks a method has to pass
follows from the capabilities that it declares.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kecore.api import registry
from kecore.api.config import MethodConfig
from kecore.api.errors import (
    ArtifactMismatchError,
    ConfigError,
    KecoreError,
    PromptTooLongError,
    RequestConflictError,
    RequestError,
    StatisticsMismatchError,
    UnsupportedCapabilityError,
)
from kecore.api.identity import DTYPES, Fingerprint
from kecore.api.types import Capabilities, EditRequest
from kecore.edit import Edit, LowRank, ModuleEdit, PromptEdit, WeightEdit, load_edit
from kecore.statistics import KeyStatistics
from kecore.testing.bench import FACTS, NEIGHBOURS, Bench, NonConformance, Session, parameters
from kecore.testing.fresh import reimport
from kecore.testing.snapshot import Snapshot
from kecore.testing.watch import watch_side_effects

__all__ = ["CHECKS", "Check"]

GAIN = 0.15
"""Nats per token by which a target must become more likely on a tiny random model."""

SPILL = 0.5
"""Largest movement (KL) of other prompts' answers, as a share of the edited prompt's own."""

KEPT = 0.5
"""Share of that gain that must be left after one more edit."""

ORDER = 1e-2
"""Largest relative change of log-probabilities by the order of a batch: rounding, amplified by an optimiser."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise that a method makes.

    Args:
        name: of the function; part of the test's id.
        run: raises where the promise is broken.
        every_model: run on every tiny model, not only on the first.
        applies: whether a method with these capabilities has to keep it.
    """

    name: str
    run: Callable[[Bench], None]
    every_model: bool
    applies: Callable[[Capabilities], bool]

    @property
    def promise(self) -> str:
        """The promise in one sentence."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]


CHECKS: list[Check] = []
"""All checks, in the order they run."""


def _check(
    *, every_model: bool = False, applies: Callable[[Capabilities], bool] = lambda _: True
) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    def add(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CHECKS.append(Check(run.__name__, run, every_model, applies))
        return run

    return add


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise NonConformance(message)


def _same(a: dict[str, Tensor], b: dict[str, Tensor], message: str) -> None:
    different = [name for name in a if name not in b or not torch.equal(a[name], b[name])]
    _require(not different, f"{message}: {', '.join(different[:4])} differ")


def _refuses(error: type[KecoreError], call: Callable[[], object], what: str) -> None:
    try:
        call()
    except error:
        return
    except Exception as other:
        raise NonConformance(f"{what}: expected {error.__name__}, got {type(other).__name__}: {other}") from other
    raise NonConformance(f"{what}: expected {error.__name__}, and nothing was raised")


# The class.


@_check()
def class_fulfils_the_contract(bench: Bench) -> None:
    """The class has a name, a configuration, capabilities, a reference and a ``plan`` that can be called."""
    cls = bench.method
    registry.check_contract(cls, cls.name)
    _require(cls.name == cls.name.strip().lower() != "", f"the name {cls.name!r} is not in plain lower case")
    try:
        inspect.signature(cls().plan).bind("view", "batch", "context")
    except TypeError as error:
        raise NonConformance(f"plan(view, batch, context) cannot be called: {error}") from error
    trains = callable(getattr(cls, "prepare", None))
    _require(trains or not cls.capabilities.needs_training, "a method that needs training has no 'prepare'")


@_check()
def config_is_described_strict_and_portable(bench: Bench) -> None:
    """The configuration has defaults, refuses unknown keys, describes each field, and survives JSON."""
    cls: type[MethodConfig] = bench.method.Config
    default = cls.make({})
    _refuses(ConfigError, lambda: cls.make({"no_such_field_": 1}), "an unknown key")
    bare = [name for name, entry in cls.model_fields.items() if not entry.description]
    _require(not bare, f"fields without a description: {', '.join(bare)}")
    for config in (default, *(cls.make(cls.preset(name)) for name in cls.presets())):
        again = cls.make(json.loads(json.dumps(config.to_json())))
        _require(again == config, f"the configuration is another one after JSON: {config} became {again}")


@_check()
def import_is_quiet(bench: Bench) -> None:
    """Importing the method's package prints nothing, opens nothing and leaves torch as it was."""
    before = Snapshot(torch.nn.Module())
    cuda = torch.cuda.is_initialized()
    with watch_side_effects() as notes:
        reimport(bench.method)
    _require(not notes, f"at import the package {'; '.join(notes)}")
    _require(not before.differences(), f"importing the package changes {', '.join(before.differences())}")
    _require(torch.cuda.is_initialized() == cuda, "importing the package initialises CUDA")


# A plan.


@_check(every_model=True)
def plan_leaves_the_model_as_it_was(bench: Bench) -> None:
    """After a plan every tensor, gradient, flag, mode, hook and random state is bitwise what it was."""
    _require(not bench.watched.model, f"the plan leaves behind: {', '.join(bench.watched.model)}")


@_check()
def plan_leaves_its_arguments_as_they_were(bench: Bench) -> None:
    """A plan changes neither the statistics nor the trained tensors that it is given."""
    _require(not bench.watched.arguments, f"the plan changes {', '.join(bench.watched.arguments)}")


@_check()
def plan_is_quiet(bench: Bench) -> None:
    """A plan prints nothing, writes no files outside caches and asks no network."""
    _require(not bench.watched.notes, f"the plan {'; '.join(bench.watched.notes)}")


@_check()
def interrupted_plan_leaves_the_model_as_it_was(bench: Bench) -> None:
    """A plan that is interrupted half-way, as by Ctrl-C, leaves the model as it was."""
    view = bench.view()
    model = view.model
    model.train()
    stages = bench.watched.stages
    before = Snapshot(model)
    calls_left = len(stages) // 2

    def interrupt(stage: str, _done: int, _total: int) -> None:
        nonlocal calls_left
        if calls_left == 0:
            raise KeyboardInterrupt(stage)
        calls_left -= 1

    try:
        bench.plan(view, bench.requests(), progress=interrupt)
    except KeyboardInterrupt as stop:
        _require(not before.differences(), f"a plan interrupted in {stop} leaves {', '.join(before.differences())}")
    else:
        _require(not stages, "a plan that is interrupted goes on")


@_check()
def same_seed_same_edit(bench: Bench) -> None:
    """The same requests and seed give the same edit, bit for bit, whatever was planned or drawn before."""
    view = bench.view()
    instance = bench.method()
    first = bench.outcome(bench.plan(view, bench.requests(), instance=instance, seed=7))
    torch.rand(3)
    again = bench.outcome(bench.plan(view, bench.requests(), instance=instance, seed=7))
    _same(first, again, "the same object plans another edit the second time")
    _same(first, bench.outcome(bench.plan(view, bench.requests(), seed=7)), "another object plans another edit")


@_check()
def two_models_do_not_mix(bench: Bench) -> None:
    """What was planned for one model has no influence on a plan for another one in the same process."""
    architectures = [name for name in bench.trial.models if name != bench.architecture]
    second_bench = Bench(bench.trial, architectures[0] if architectures else bench.architecture)
    bench.plan(bench.view(), bench.requests())
    after = second_bench.outcome(second_bench.plan(second_bench.view(), second_bench.requests()))
    fresh_method = reimport(bench.method)  # with none of the module's variables filled
    edit = second_bench.plan(second_bench.view(), second_bench.requests(), method=fresh_method)
    _same(second_bench.outcome(edit), after, "a plan depends on which models were planned for before")


# An edit.


@_check(every_model=True)
def edit_says_what_it_is(bench: Bench) -> None:
    """An edit is of the declared kind and names method, requests, configuration, seed and base as they were."""
    edit = bench.watched.edit
    if not isinstance(edit, Edit):
        raise NonConformance(f"plan returns {type(edit).__name__}, which is no Edit")
    kind = {"weights": WeightEdit, "modules": ModuleEdit, "prompt": PromptEdit}[bench.capabilities.kind]
    if not isinstance(edit, kind):
        raise NonConformance(f"kind '{bench.capabilities.kind}' promises a {kind.__name__}, got {type(edit).__name__}")
    _require_base(edit, bench)
    _require_portable(edit)
    shown = edit.inspect()
    json.dumps(shown)
    _require(shown.get("method") == bench.line.name, f"the edit names the method {shown.get('method')!r}")
    _require(shown.get("seed") == 0, f"the edit was planned with seed 0 and names {shown.get('seed')!r}")
    config = bench.line.make_config(bench.trial.config)
    _require(bench.line.make_config(shown.get("config", {})) == config, "the edit names another configuration")
    ids = {request.id for request in bench.watched.requests}
    named = {request["id"] for request in shown.get("requests", [])}
    _require(named == ids, f"the edit names requests {sorted(named)}, asked were {sorted(ids)}")


def _require_base(edit: WeightEdit | ModuleEdit | PromptEdit, bench: Bench) -> None:
    view = bench.view()
    difference = edit.base.differs(view.identity(), view.dtype)
    _require(not difference, f"the edit names another base model: fingerprint {difference}")


def _require_portable(edit: WeightEdit | ModuleEdit | PromptEdit) -> None:
    if not isinstance(edit, WeightEdit):
        for name, tensor in edit.effect.tensors().items():
            _require(
                tensor.device.type == "cpu", f"the edit's tensor {name} must be on the CPU, it is on {tensor.device}"
            )
        json.dumps(edit.effect.settings())
        return
    for name, update in edit.updates.items():
        tensors = (update.U, update.V) if isinstance(update, LowRank) else (update.delta,)
        kinds = {(tensor.dtype, tensor.device.type, tensor.requires_grad) for tensor in tensors}
        _require(
            kinds == {(torch.float32, "cpu", False)},
            f"the update of {name} must be float32 tensors on the CPU that ask for no gradient; got {kinds}",
        )


@_check(every_model=True)
def edit_changes_only_what_it_names(bench: Bench) -> None:
    """An attached edit changes the parameters that it names and no other; one of another kind changes none."""
    edit, model = bench.watched.edit, bench.model()
    before = parameters(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    answers = bench.answers(model)
    now = dict(model.named_parameters())
    edit.attach(model)
    changed = {name for name, data in before.items() if not torch.equal(now[name], data)}
    named = set(edit.parameters) if isinstance(edit, WeightEdit) else set[str]()
    _require(changed <= named, f"the edit changes {', '.join(sorted(changed - named))} and does not name it")
    _require(named <= changed, f"the edit names {', '.join(sorted(named - changed))} and does not change it")
    buffers_now = dict(model.named_buffers())
    moved = [
        name for name, data in buffers.items() if name not in buffers_now or not torch.equal(buffers_now[name], data)
    ]
    _require(not moved, f"the edit changes the buffers {', '.join(moved)}")
    _require(not torch.equal(bench.answers(model), answers), "the edit changes no answer at all")


@_check(every_model=True, applies=lambda can: can.reversible)
def reverting_is_exact(bench: Bench) -> None:
    """Taking the edit off leaves every tensor, hook and flag bitwise what it was."""
    edit, model = bench.watched.edit, bench.model()
    before = Snapshot(model)
    edit.attach(model)
    edit.revert(model)
    # The same values may come back in other storage.
    differences = [name for name in before.differences() if not name.startswith("identity")]
    _require(not differences, f"attached and taken off, the edit leaves {', '.join(differences)}")


@_check(every_model=True)
def saved_edit_is_the_same_edit(bench: Bench) -> None:
    """An edit that was saved and loaded does to a fresh model exactly what the first one does."""
    edit = bench.watched.edit
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_edit(edit.save(Path(folder) / "edit"), bench.method)
        _same(bench.outcome(edit), bench.outcome(loaded), "with the loaded edit")
    # Figures of the updates are computed anew, in another order of summation.
    first, second = edit.inspect(), loaded.inspect()
    first.pop("updates", None)
    second.pop("updates", None)
    _require(first == second, "the loaded edit describes itself otherwise than the saved one")


# What it is for.


@_check(every_model=True)
def targets_become_likelier(bench: Bench) -> None:
    """A single edit makes its target clearly more likely and moves other prompts' answers far less than its own."""
    moved: list[Tensor] = []
    for request in FACTS[:2]:
        with bench.session() as session:
            texts = [request.text, *NEIGHBOURS]
            before = bench.answers(session.editor.model, texts)
            _require_gains(session, (request,), lambda session, request=request: session.edit(request))
            after = bench.answers(session.editor.model, texts)
            moved.append((before.exp() * (before - after)).sum(-1))  # KL divergence of each text, [texts]
    divergence = torch.stack(moved)  # [edits, texts], the edited prompt first
    edited, neighbours = divergence[:, 0].mean(), divergence[:, 1:].mean()
    _require(
        bool(neighbours < SPILL * edited),
        f"other prompts' answers move by a KL of {float(neighbours):.2f}, the edited ones' by {float(edited):.2f}",
    )


@_check(every_model=True, applies=lambda can: can.batch)
def every_request_of_a_batch_counts(bench: Bench) -> None:
    """Requests that are planned together all take effect."""
    with bench.session() as session:
        _require_gains(session, FACTS, lambda session: session.edit(*FACTS))


def _require_gains(session: Session, requests: Sequence[EditRequest], act: Callable[[Session], object]) -> list[float]:
    """Act, require that every target became more likely, and return by how much: nats per token."""
    before = session.likelihood(*requests)
    act(session)
    after = session.likelihood(*requests)
    gains = [new - old for old, new in zip(before, after, strict=True)]
    too_small: list[str] = []
    for request, gain in zip(requests, gains, strict=True):
        if gain < GAIN:
            too_small.append(f"{request.text!r} {request.target!r}: {gain:+.2f}")
    _require(not too_small, f"targets must gain at least {GAIN} nats per token, got {'; '.join(too_small)}")
    return gains


@_check(applies=lambda can: can.batch)
def order_of_a_batch_does_not_matter(bench: Bench) -> None:
    """The same requests in another order give the same edit, up to rounding."""
    view = bench.view()
    forward = bench.outcome(bench.plan(view, FACTS))["log-probabilities"]
    reversed_order = bench.outcome(bench.plan(view, FACTS[::-1]))["log-probabilities"]
    error = float((forward - reversed_order).norm() / forward.norm())
    _require(error < ORDER, f"the order of the requests changes log-probabilities by {error:.1e}, relative")


@_check(applies=lambda can: can.sequential and not can.batch)
def several_requests_are_written_or_refused(bench: Bench) -> None:
    """Several requests are written one after another, or refused as a capability."""
    with bench.session() as session:
        try:
            _require_gains(session, FACTS[:2], lambda session: session.edit(*FACTS[:2]))
        except UnsupportedCapabilityError:
            _require(not session.editor.history, "a refused batch leaves an edit behind")


@_check(applies=lambda can: not (can.batch or can.sequential))
def several_requests_are_refused(bench: Bench) -> None:
    """Several requests in one call are refused as a capability, by the plan as by the editor."""
    view = bench.view()
    _refuses(UnsupportedCapabilityError, lambda: bench.plan(view, FACTS[:2]), "a plan of two requests")
    with bench.session() as session:
        _refuses(UnsupportedCapabilityError, lambda: session.edit(*FACTS[:2]), "an edit of two requests")


@_check()
def facts_without_a_subject_are_edited_or_refused(bench: Bench) -> None:
    """A fact that names no subject is written by a method that needs none, and refused by every other."""
    request = replace(FACTS[0], prompt=FACTS[0].text, subject=None)
    with bench.session() as session:
        if bench.capabilities.needs_subject:
            _refuses(UnsupportedCapabilityError, lambda: session.edit(request), "an edit of a fact without a subject")
            _require(not session.editor.history, "a refused fact leaves an edit behind")
        else:
            _require_gains(session, (request,), lambda session: session.edit(request))


@_check(applies=lambda can: can.sequential)
def second_edit_keeps_the_first(bench: Bench) -> None:
    """A further edit takes effect, leaves most of the one before, and comes off alone, bit for bit."""
    first, second = FACTS[0], FACTS[1]
    with bench.session() as session:
        base = session.likelihood(first)[0]
        (gain,) = _require_gains(session, (first,), lambda session: session.edit(first))
        middle = parameters(session.editor.model)
        _require_gains(session, (second,), lambda session: session.edit(second))
        remaining = session.likelihood(first)[0] - base
        _require(remaining >= KEPT * gain, f"of a gain of {gain:.2f} nats, {remaining:.2f} is left after one more edit")
        session.editor.revert()
        _same(middle, parameters(session.editor.model), "after the second edit was taken off")


@_check()
def declared_types_work(bench: Bench) -> None:
    """Models in every declared weight type are edited, and stay in that type."""
    for name in bench.capabilities.dtypes:
        with bench.session(DTYPES[name]) as session:
            _require_gains(session, FACTS[:1], lambda session: session.edit(FACTS[0]))
            kinds = {parameter.dtype for parameter in session.editor.model.parameters()}
            _require(kinds == {DTYPES[name]}, f"a model in {name} has parameters in {kinds} after the edit")


@_check(applies=lambda _: torch.cuda.is_available())
def works_on_cuda(bench: Bench) -> None:
    """A model on the accelerator is edited there, and the edit's tensors come back to the CPU."""
    with bench.session(device="cuda") as session:
        _require_gains(session, FACTS[:1], lambda session: session.edit(FACTS[0]))
        for entry in session.editor.history:
            if isinstance(entry.edit, WeightEdit | ModuleEdit | PromptEdit):
                _require_portable(entry.edit)
        kinds = {parameter.device.type for parameter in session.editor.model.parameters()}
        _require(kinds == {"cuda"}, f"after the edit the model is on {kinds}")


# What it refuses.


@_check()
def bad_requests_are_refused(bench: Bench) -> None:
    """No requests, requests that contradict each other and prompts that are too long are refused, each by its error."""
    fact = FACTS[0]
    long = EditRequest("word " * 3000 + "{}", fact.subject, fact.target)
    contradiction = [fact, EditRequest(fact.prompt, fact.subject, FACTS[1].target)]
    view = bench.view()
    before = Snapshot(view.model)
    bad: list[tuple[type[KecoreError], list[EditRequest], str]] = [
        (RequestError, [], "no requests"),
        (PromptTooLongError, [long], "a prompt longer than the model's context"),
    ]
    if bench.capabilities.batch:
        bad.append((RequestConflictError, contradiction, "two targets for one prompt"))
    for error, requests, what in bad:
        _refuses(error, lambda requests=requests: bench.plan(view, requests), what)
    _require(not before.differences(), f"refused requests leave {', '.join(before.differences())}")


@_check(applies=lambda can: can.needs_statistics or can.needs_training or can.needs_examples)
def what_is_missing_is_asked_for(bench: Bench) -> None:
    """Statistics, training or examples that are needed and not there are asked for by the right error."""
    view = bench.view()

    def planning(**context: Any) -> Callable[[], object]:
        return lambda: bench.plan(view, bench.requests(), **context)

    nothing = planning(statistics=None, trained=None, examples=())
    _refuses(UnsupportedCapabilityError, nothing, "a plan without what the method needs")
    trained = bench.trained()
    if trained is not None:
        foreign_base = Fingerprint(trained.base.dtype, dict.fromkeys(trained.base.digests, "other"))
        foreign = replace(trained, base=foreign_base)
        _refuses(ArtifactMismatchError, planning(trained=foreign), "an editor that was trained for another model")
    if bench.capabilities.needs_statistics:
        none = KeyStatistics({}, 0, {}, "")
        _refuses(StatisticsMismatchError, planning(statistics=none), "statistics of other layers")
