"""Surroundings of a plan's runs: models, key statistics, trained editors, and functions that are told what goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kecore import data
from kecore.api.errors import ConfigError
from kecore.api.line import MethodLine
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus
from kecore.editor import Editor
from kecore.environment import environment
from kecore.evaluate.held_out import Drift, HeldOutText, drift
from kecore.models import load_model
from kecore.statistics_source import Provision, StatisticsSource
from kecore.trained import TrainedEditor
from kecore_bench.cells import examples_of
from kecore_bench.plan import BenchPlan

__all__ = ["Log", "Notice", "Stage", "Workplace", "log_nothing", "note_nothing", "time_nothing"]

Log = Callable[[str], None]
"""Called with a line of text about what is done."""

Stage = Callable[[str, str], AbstractContextManager[None]]
"""Called as ``stage(name, doing)``, where ``doing`` is what is done in words; what it returns is held meanwhile."""


Notice = Callable[[str], None]
"""Called when there may be news in the store: with the key of a run that ended, or an empty text."""


def note_nothing(ended: str) -> None:
    """Tell nobody: the :data:`Notice` of who follows nothing."""


def log_nothing(text: str) -> None:
    """Show nothing: the :data:`Log` of who asks for none."""


@contextmanager
def time_nothing(name: str, doing: str) -> Iterator[None]:
    """Show nothing: the :data:`Stage` of who asks for none."""
    yield


@dataclass(frozen=True)
class Workplace:
    """Opens the models of a plan, gives methods what they need, and tells what goes on.

    Args:
        plan: the plan.
        device: where models are loaded, in place of the plan's device; empty for that.
        progress: called while long stages advance.
        log: told what became of each run.
        stage: told when models are loaded and runs begin and end.
        note: called when there may be news in the store.
    """

    plan: BenchPlan
    device: str = ""
    progress: Progress = silent
    log: Log = log_nothing
    stage: Stage = time_nothing
    note: Notice = note_nothing

    @property
    def statistics(self) -> StatisticsSource:
        """Source of the key statistics of the plan's methods."""
        return StatisticsSource(self.plan.stats, self.plan.text, self.plan.tokens)

    def open(self, model: str) -> Editor:
        """Load a model and open a session on it, with the editors of the plan that were trained for it.

        Raises:
            ModelLoadError: the reference leads nowhere.
            ConfigError: two trained editors of one method belong to the model.
        """
        plan = self.plan
        torch.manual_seed(plan.protocol.seed)
        with self.stage("load", f"loading {model}"):
            loaded = load_model(
                model,
                device=self.device or plan.device,
                dtype=plan.dtype,
                trust_remote_code=plan.trust_remote_code,
            )
        with self.stage("read", "reading the model's structure and fingerprint"):
            editor = Editor(
                loaded.model,
                loaded.tokenizer,
                statistics=self.statistics,
                examples=examples_of(plan),
                chat=plan.protocol.form == "chat",
                seed=plan.protocol.seed,
                memory=plan.memory,
                progress=self.progress,
            )
        # A plan may name several models, and for each the editors that were trained for it.
        fitting = [trained for trained in self._load_trained() if trained.fits(editor.base)]
        _check_one_each(fitting)
        editor.trained = fitting
        return editor

    def watch(self, editor: Editor) -> Callable[[Editor], Drift] | None:
        """Let the unedited model read the plan's held-out text, and return what compares an edited one with it.

        Returns:
            From the session, as it is by then, to how far it is from now; None where the plan names no such text.

        Raises:
            DataFormatError: the text cannot be read.
        """
        entry = self.plan.held_out
        if entry is None:
            return None
        sources = entry.text or (str(data.path(data.TEXT)),)
        passages = Corpus.of(*sources).sample(entry.passages, self.plan.protocol.seed).passages
        text = HeldOutText.of(editor.encoder, passages, entry.window)
        base = text.read(editor.view, editor.encoder)

        def compare(session: Editor) -> Drift:
            return drift(base, text.read(session.view, session.encoder))

        return compare

    def prepare(self, editor: Editor, method: str, config: Mapping[str, Any]) -> None:
        """Give a session the key statistics that a method reads.

        Raises:
            ArtifactMismatchError: the editor that was trained for the method is one of another model.
            StatisticsMismatchError: the plan's statistics are of other weights, or do not cover a layer.
        """
        needs = MethodLine.of(method).capabilities
        if needs.needs_training and method not in {trained.method for trained in editor.trained}:
            for trained in self._load_trained():
                if trained.method == method:
                    trained.check(editor.view, method, editor.base)
        layers = editor.statistics_layers(method, **config)
        if not layers:
            return
        names = ", ".join(map(str, layers))
        with self.stage("statistics", f"key statistics of layers {names} from {self.statistics.text_name}"):
            editor.provide_statistics(layers, self._announce)

    def describe(self, editor: Editor) -> Mapping[str, Any]:
        """Return what results were made on: ``versions``, ``hardware``, and ``base`` with digests of the weights."""
        return {
            **environment(editor.view.device),
            "base": {"dtype": editor.base.dtype, **editor.base.digests},
            "parameters": sum(parameter.numel() for parameter in editor.model.parameters()),
        }

    def _load_trained(self) -> list[TrainedEditor]:
        return [TrainedEditor.load(path) for path in self.plan.trained]

    def _announce(self, provision: Provision) -> None:
        if provision.cached:
            self.log(f"they were collected before, from {provision.tokens:,} tokens: {provision.folder}")
        else:
            self.log(f"collecting them in one pass over {provision.tokens:,} tokens; kept in {provision.folder}")


def _check_one_each(editors: Sequence[TrainedEditor]) -> None:
    """Refuse two trained editors of one method.

    Raises:
        ConfigError: names the method.
    """
    methods = [editor.method for editor in editors]
    for method in methods:
        if methods.count(method) > 1:
            raise ConfigError(f"two trained editors of '{method}' belong to one model; name one of them")
