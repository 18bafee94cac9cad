"""The bench of a method under test: a tiny model with all that a plan is given, and one plan that was watched."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kecore.api.errors import KecoreWarning
from kecore.api.line import MethodLine
from kecore.api.method import EditMethod, MethodContext
from kecore.api.progress import Progress, silent
from kecore.api.types import EditRecord, EditRequest, Probe
from kecore.batch import RequestBatch
from kecore.corpus import Corpus
from kecore.edit import Edit, Reader, written
from kecore.editor import Editor
from kecore.evaluate.probes import edit_probe, paraphrases
from kecore.inference import score_continuations
from kecore.model import ModelView
from kecore.statistics import KeyStatistics, collect_statistics
from kecore.testing.models import tiny_model, tiny_tokenizer
from kecore.testing.snapshot import Snapshot
from kecore.testing.watch import watch_side_effects
from kecore.text import Encoder
from kecore.trained import TrainedEditor
from kecore.training import Schedule, train

__all__ = [
    "FACTS",
    "MODELS",
    "NEIGHBOURS",
    "SHARED",
    "Bench",
    "NonConformance",
    "Session",
    "Trial",
    "parameters",
]

MODELS = ("gpt2", "llama", "gptj", "gemma2")
"""One tiny model a kind: ``Conv1D`` and a tied head; gated ``Linear``; a parallel block; norms behind blocks."""

# In a tiny random model a change at the subject hardly reaches tokens far behind it, so the prompts end soon after it.
FACTS = (
    EditRequest("The continent of {}", "Vinson Massif", "Danube"),
    EditRequest("The company of {}", "Tim Cook", "French"),
    EditRequest("{}的首都是", "日本", "Berlin"),
    EditRequest("The capital of {}", "Italy", "Apple"),
)
"""Requests about four subjects."""

SHARED = (EditRequest("The capital of {}:", "France", "Rome"), EditRequest("A river in {}:", "France", "Paris"))
"""Two requests about one more subject."""

NEIGHBOURS = ("The mother tongue of Danielle", "Where does the Danube", "Antarctica is", "The iPhone", "It flows to")
"""Prompts that no request is about."""

_SUBJECTS = ("Germany", "Rome", "Anna", "Paris", "Steve Jobs", "London", "Spain", "the Rhine")
_RELATIONS = (
    ("The city of {} is", "{} has a city named"),
    ("A friend of {}:", "Who knows {}?"),
    ("{} lies by", "By {}:"),
)
_ANSWERS = ("Berlin", "Apple", "Danube", "Madrid", "French", "Europe", "Microsoft")
_TEXT = "The tower number {} is in the city of Paris, and Anna, who is {} years old, speaks the language of the people."
_TOKENS = 4000
_SHORT = Schedule(steps=40, batch_size=4, held_out=4, evaluate_every=20)


class NonConformance(AssertionError):
    """A method does not do what its class says or what kecore asks of every method."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A method and how it is to be tested.

    Args:
        method: the class, or a line of a class and stages.
        config: fields of its configuration, for methods whose defaults take long.
        models: architectures of the tiny models; see :data:`MODELS`.
        schedule: how a method that needs training is trained here, on a few made-up records.
        expected_failures: name of a check to the reason why the method does not pass it. Such a check must fail:
            one that passes after all is reported as well.
        label: tells trials of one method apart in the ids of tests.
    """

    method: type[Any] | MethodLine
    config: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = MODELS
    schedule: Schedule = _SHORT
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, slots=True)
class Watched:
    """A plan and what it did beside planning.

    Args:
        edit: what came back, which should be an :class:`Edit`.
        requests: what was asked for.
        model: what changed in the model and the process; see :class:`Snapshot`.
        arguments: what changed in the statistics and the trained tensors.
        notes: output, files and connections; see :func:`kecore.testing.watch.watch_side_effects`.
        stages: what it told its progress, in order.
    """

    edit: Any
    requests: tuple[EditRequest, ...]
    model: list[str]
    arguments: list[str]
    notes: list[str]
    stages: list[str]


class Bench:
    """One tiny model for one method; each model that it hands out is a fresh copy.

    Args:
        trial: the method.
        architecture: which tiny model.
    """

    def __init__(self, trial: Trial, architecture: str) -> None:
        self.trial, self.architecture = trial, architecture
        self.line = trial.method if isinstance(trial.method, MethodLine) else MethodLine(trial.method)
        self.method, self.capabilities = self.line.method, self.line.capabilities

    def view(self) -> ModelView:
        """Return a view of a fresh copy of the unedited model."""
        return copy.deepcopy(_read(self.architecture))

    def model(self) -> nn.Module:
        """Return a fresh copy of the unedited model."""
        return self.view().model

    def encoder(self, view: ModelView) -> Encoder:
        """Return an encoder over the model's tokenizer."""
        return Encoder(_tokenizer(self.architecture), max_length=view.max_length, handover=view.handover_ids)

    def statistics(self) -> KeyStatistics | None:
        """Return key statistics, for methods that declare a need of them."""
        return self._statistics if self.capabilities.needs_statistics else None

    @cached_property
    def _statistics(self) -> KeyStatistics:
        return copy.deepcopy(_statistics(self.architecture))  # a method that spoils its own spoils nobody else's

    def trained(self) -> TrainedEditor | None:
        """Return the result of a short training, for methods that declare a need of it."""
        return self._trained if self.capabilities.needs_training else None

    @cached_property
    def _trained(self) -> TrainedEditor:
        key = (self.method, json.dumps(dict(self.trial.config), sort_keys=True), self.trial.schedule, self.architecture)
        if key not in _TRAINED:
            view = self.view()
            config = self.method.Config.make(self.trial.config)
            with _quietly():
                _TRAINED[key] = train(
                    self.method, view, self.encoder(view), _records(), config, schedule=self.trial.schedule
                )
        return copy.deepcopy(_TRAINED[key])  # as above

    def examples(self) -> tuple[EditRecord, ...]:
        """Return a few made-up records, for methods that declare a need of examples."""
        return _records() if self.capabilities.needs_examples else ()

    def requests(self) -> tuple[EditRequest, ...]:
        """Return as many requests as the method plans together."""
        return (*FACTS, *SHARED) if self.capabilities.batch else FACTS[:1]

    def plan(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        *,
        method: type[EditMethod] | None = None,
        instance: EditMethod | None = None,
        seed: int = 0,
        progress: Progress = silent,
        **context: Any,
    ) -> Edit:
        """Plan an edit in a context of its own; ``context`` holds further fields of it."""
        line = MethodLine(method or self.method, self.line.stages)
        needed = {"statistics": self.statistics(), "trained": self.trained(), "examples": self.examples()}
        fields: dict[str, Any] = {**needed, "seed": seed, "progress": progress, **context}
        encoder = self.encoder(view)
        batch = RequestBatch.of(requests, encoder)
        method_context = MethodContext(line.make_config(self.trial.config), encoder, **fields)
        with _quietly():
            return line.sign((instance or line.method()).plan(view, batch, method_context))

    @contextmanager
    def session(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[Session]:
        """Open a session over a fresh model."""
        with _quietly():
            editor = Editor(
                self.model().to(device, dtype),
                _tokenizer(self.architecture),
                trained=self.trained() or (),
                examples=self.examples(),
                progress=None,
            )
            if dtype == torch.float32:
                editor.statistics = self.statistics()
            elif self.capabilities.needs_statistics:  # those of the float32 weights belong to other weights
                editor.statistics = _collect(editor.view, editor.encoder)
            yield Session(editor, self)

    @cached_property
    def watched(self) -> Watched:
        """Plan once on a model in an unusual state; every later check reads this plan instead of planning again."""
        view = self.view()
        model = view.model
        _make_unusual(model)
        statistics = self.statistics()
        moments = {site: moment.clone() for site, moment in statistics.moments.items()} if statistics else {}
        trained = self.trained()
        tensors = {name: t.clone() for name, t in trained.tensors.items()} if trained else {}
        stages: list[str] = []
        before = Snapshot(model)
        with watch_side_effects() as notes:
            edit = self.plan(view, self.requests(), progress=lambda stage, _done, _total: stages.append(stage))
        arguments: list[str] = []
        if statistics:
            now = statistics.moments
            changed = [site for site, moment in moments.items() if not torch.equal(moment, now[site])]
            arguments += [f"the statistics of layer {site}" for site in changed]
        if trained:
            now = trained.tensors
            arguments += [f"the trained tensor {name}" for name, t in tensors.items() if not torch.equal(t, now[name])]
        return Watched(edit, self.requests(), before.differences(), arguments, notes, stages)

    def outcome(self, edit: Edit) -> dict[str, Tensor]:
        """Return what a fresh model becomes with the edit on it: parameters, and log-probabilities on all prompts."""
        model = self.model()
        edit.attach(model)
        return {**parameters(model), "log-probabilities": self.answers(model)}

    def answers(self, model: nn.Module, texts: Sequence[str] | None = None) -> Tensor:
        """Score next tokens: log-probabilities, ``[texts, vocab]`` float64; by default all requests and neighbours."""
        encoder = Encoder(_tokenizer(self.architecture))
        prompts = [request.text for request in (*FACTS, *SHARED)] + list(NEIGHBOURS)
        if texts:
            prompts = list(texts)
        if self.capabilities.kind == "prompt":
            prompts = written(model, prompts, Reader(ModelView.of(model), encoder))
        device = next(model.parameters()).device
        last_logits: list[Tensor] = []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.tensor([encoder.encode(prompt).ids], device=device)  # [1, tokens]
                last_logits.append(model(input_ids=ids, use_cache=False).logits[0, -1])  # [vocab]
        return torch.stack(last_logits).double().log_softmax(-1).cpu()


@dataclass(frozen=True, slots=True)
class Session:
    """An editor with the method under test."""

    editor: Editor
    bench: Bench

    def edit(self, *requests: EditRequest) -> Edit:
        """Edit with the method under test."""
        return self.editor.edit(requests, self.bench.line, **self.bench.trial.config)

    def likelihood(self, *requests: EditRequest) -> list[float]:
        """Return the mean log-probability of each request's target tokens.

        A random model cannot take a fact from its prompt. Of a method that changes prompts, this is 0 where what the
        model reads names the target, and minus 1 where it does not.
        """
        if self.bench.capabilities.kind == "prompt":
            reader = Reader(self.editor.view, self.editor.encoder)
            texts = written(self.editor.model, [request.text for request in requests], reader)
            return [float(r.target in text) - 1 for r, text in zip(requests, texts, strict=True)]
        pairs = [(request.text, request.target) for request in requests]
        return [score.mean for score in score_continuations(self.editor.view, self.editor.encoder, pairs)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep kecore's warnings back: tiny random models are unusual, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        yield


def _make_unusual(model: nn.Module) -> None:
    """Set flags, modes, hooks and gradients that a plan has to put back."""
    model.train()
    first, *_, last = model.parameters()
    last.requires_grad_(False)
    first.grad = torch.ones_like(first)
    model.register_forward_hook(_seen)


def _seen(_module: nn.Module, _args: Any, _output: Any) -> None:
    """Do nothing; somebody else's hook."""


@cache
def _read(architecture: str) -> ModelView:
    """Read a tiny model, once: those that hand out models copy it with what was read of it."""
    return ModelView.of(tiny_model(architecture))


@cache
def _tokenizer(architecture: str) -> Any:
    return tiny_tokenizer("byte-bpe" if architecture in ("gpt2", "gptj") else "llama-like")


@cache
def _statistics(architecture: str) -> KeyStatistics:
    return _collect(copy.deepcopy(_read(architecture)), Encoder(_tokenizer(architecture)))


_TRAINED: dict[Any, TrainedEditor] = {}


@cache
def _records() -> tuple[EditRecord, ...]:
    """Make records to train on and to take examples from, about other subjects than the facts."""
    records: list[EditRecord] = []
    for i, (subject, (prompt, rephrase)) in enumerate(itertools.product(_SUBJECTS, _RELATIONS)):
        request = EditRequest(prompt, subject, _ANSWERS[i % len(_ANSWERS)])
        text, answer = _TEXT.format(i, i % 90)[: 40 + i], _ANSWERS[(i + 3) % len(_ANSWERS)]
        unrelated = Probe("locality", text, (answer,), axis="unrelated")
        rephrases = paraphrases(edit_probe(request), [rephrase.replace("{}", subject)])
        records.append(EditRecord(request, (*rephrases, unrelated)))
    return tuple(records)


def _collect(view: ModelView, encoder: Encoder) -> KeyStatistics:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(_TEXT.format(i, i % 90) for i in range(400)), encoding="utf-8")
        return collect_statistics(view, encoder, Corpus.of(text), range(len(view.layers)), tokens=_TOKENS)
