"""One model session behind the page: what every open page sees, and what changes it."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kecore.api.errors import ConfigError, EditStateError, RequestError
from kecore_studio.events import Events
from kecore_studio.jobs import Job, Jobs

if TYPE_CHECKING:
    from kecore.api.types import EditRecord
    from kecore.edit import Edit
    from kecore.editor import Editor
    from kecore_studio.facts import FactSheet
    from kecore_studio.opened import OpenModel
    from kecore_studio.settings import Settings
    from kecore_studio.stack import Stack

__all__ = ["CANARIES", "EditChoice", "Session"]

CANARIES = (
    "The capital of France is",
    "Water is made of hydrogen and",
    "The first president of the United States was",
    "Two plus two is",
)
"""Prompts that no edit should change; a user puts others in their place."""


@dataclass(frozen=True, slots=True)
class EditChoice:
    """How the facts are to be edited.

    Args:
        method: the method, with stages behind it or without.
        preset: a published set-up; empty for none.
        config: fields of the method's configuration.
        numbers: which facts of the sheet; all where None.
    """

    method: str
    preset: str = ""
    config: Mapping[str, Any] | None = None
    numbers: Sequence[int] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :meth:`kecore.Editor.edit`."""
        return {"method": self.method, "preset": self.preset or None, **(self.config or {})}


class Session:
    """The model, its edits, the facts and the canaries; every page sees the same.

    What touches the model runs as a job, one after another. What changes is told to all pages.

    Args:
        settings: how models are loaded.
        events: tells the pages.
    """

    def __init__(self, settings: Settings, events: Events) -> None:
        self.settings, self.events = settings, events
        self.jobs = Jobs(events.publish)
        self.sheet: FactSheet | None = None
        self.canaries: tuple[str, ...] = CANARIES
        self._opened: OpenModel | None = None
        self._records: dict[tuple[str, str], EditRecord] = {}
        self._lock = threading.Lock()
        self._revision = 0

    def close(self) -> None:
        """End all work."""
        self.events.close()
        self.jobs.close()

    # What pages see

    def to_json(self) -> dict[str, Any]:
        """Return everything that a page shows, as JSON values."""
        opened, sheet = self._opened, self.sheet
        values: dict[str, Any] = {
            "revision": self._revision,
            "model": None,
            "stack": [],
            "undo": "",
            "redo": "",
            "facts": None if sheet is None else sheet.to_json(),
            "canaries": list(self.canaries),
            "jobs": self.jobs.to_json(),
        }
        if opened is not None:
            from kecore_studio.describing import model_to_json, stack_to_json

            timeline = opened.timeline
            values |= {
                "model": model_to_json(opened.ref, opened.editor),
                "stack": stack_to_json(timeline.stack, opened.editor.view),
                "undo": timeline.undo_label,
                "redo": timeline.redo_label,
            }
        return values

    def publish(self, *, model_changed: bool = False) -> None:
        """Tell all pages how things are now.

        Args:
            model_changed: what the model said before may no longer hold.
        """
        with self._lock:
            if model_changed:
                self._revision += 1
            self.events.publish("state", self.to_json())

    # Facts and canaries: the model is not needed

    def set_sheet(self, sheet: FactSheet | None) -> None:
        """Let these be the facts to be edited."""
        self.sheet = sheet
        if sheet is not None:
            for record in sheet.records:
                for request in record.requests:
                    self._records[request.text, request.target] = record
        self.publish()

    def set_canaries(self, prompts: Sequence[str]) -> None:
        """Let these be the prompts that no edit should change; blank ones are left out.

        Raises:
            ConfigError: there are too many.
        """
        texts = tuple(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
        if len(texts) > 50:
            raise ConfigError(
                f"got {len(texts)} canaries, at most 50 are asked after each change; take the best of them"
            )
        self.canaries = texts
        self.publish()

    # Work on the model

    def load(self, ref: str) -> Job:
        """Load a model; the one that is open, with its edits, gives way once the new one is there.

        Raises:
            ConfigError: no model is named.
        """
        ref = ref.strip()
        if not ref:
            raise ConfigError("no model is named; give a Hub id, a folder, a .gguf file, or 'demo'")

        def work(job: Job) -> Any:
            job.report("importing the libraries", 0, 0)
            from kecore_studio.opened import OpenModel

            self._opened = OpenModel.load(ref, self.settings, job.report)
            self.publish(model_changed=True)
            return {"ref": ref}

        return self.jobs.submit("load", f"Loading {ref}", work, key="load", ends=("ask", "trace"))

    def plan(self, choice: EditChoice) -> Job:
        """Find out what an edit will take, and what would refuse it; nothing is changed."""
        records = self._chosen(choice)

        def work(job: Job) -> Any:
            from kecore_studio.describing import plan_to_json

            opened = self._need()
            self._report_to(job, opened)
            job.report("looking at the facts and the method", 0, 0)
            return plan_to_json(opened.editor, records, choice.arguments)

        return self.jobs.submit("plan", f"Planning an edit with {choice.method}", work, key="plan", ends=("ask",))

    def edit(self, choice: EditChoice) -> Job:
        """Edit the facts of the sheet."""
        records = self._chosen(choice)
        number = len(records)
        title = f"Editing {number} {'fact' if number == 1 else 'facts'} with {choice.method}"

        def work(job: Job) -> Any:
            from kecore_studio.stack import Item

            opened = self._need()
            self._report_to(job, opened)
            editor, timeline = opened.editor, opened.timeline
            job.report("getting ready", 0, 0)
            layers = editor.statistics_layers(**choice.arguments)
            if layers:
                job.report("statistics", 0, 0)
                editor.provide_statistics(layers)
            editor.edit(records, **choice.arguments)
            entry = editor.history[-1]
            item = Item(entry, editor.remembered(entry.method))
            timeline.push(f"edit with {entry.method}", timeline.stack.add(item))
            self.publish(model_changed=True)
            return {"edit": item.id, "stages": dict(entry.stages)}

        return self.jobs.submit("edit", title, work, ends=("ask", "trace", "plan"))

    def switch(self, on: Sequence[str]) -> Job:
        """Let these edits be on the model and all others of the list off."""

        def change(stack: Stack) -> Stack:
            return stack.switch(on)

        return self._change("switch edits", change)

    def remove(self, id: str) -> Job:
        """Take an edit off and out of the list; undo brings it back."""

        def change(stack: Stack) -> Stack:
            return stack.without(id)

        return self._change("take an edit off", change)

    def open_edit(self, content: bytes, name: str) -> Job:
        """Put an edit on that is in a file.

        Args:
            content: the file's bytes.
            name: what the page calls it.
        """

        def change(stack: Stack) -> Stack:
            from kecore.edit import load_edit
            from kecore.editor import HistoryEntry
            from kecore_studio.stack import Item

            with tempfile.TemporaryDirectory(prefix="kecore-studio-") as folder:
                path = Path(folder) / (name or "edit.safetensors")
                path.write_bytes(content)
                edit = load_edit(path)
            entry = HistoryEntry(edit, edit.method, {}, None)
            return stack.add(Item(entry, dict(edit.state), source=name))

        return self._change(f"open {name}", change)

    def undo(self) -> Job:
        """Go back to the list as it was before the last change."""
        return self._step(-1)

    def redo(self) -> Job:
        """Do again what was undone last."""
        return self._step(1)

    def _step(self, steps: int) -> Job:
        verb = "undo" if steps < 0 else "redo"

        def work(job: Job) -> Any:
            opened = self._need()
            self._report_to(job, opened)
            self._arrange(opened, opened.timeline.look(steps))
            opened.timeline.move(steps)
            self.publish(model_changed=True)
            return {}

        return self.jobs.submit("change", verb.capitalize(), work, ends=("ask",))

    def _change(self, label: str, change: Callable[[Stack], Stack]) -> Job:
        """Change the list of edits, and the model with it."""

        def work(job: Job) -> Any:
            opened = self._need()
            self._report_to(job, opened)
            stack = change(opened.timeline.stack)
            self._arrange(opened, stack)
            opened.timeline.push(label, stack)
            self.publish(model_changed=True)
            return {}

        return self.jobs.submit("change", label.capitalize(), work, ends=("ask",))

    def ask(self, prompt: str, target: str = "", *, tokens: int = 40, page: str = "") -> Job:
        """Ask both models: next tokens, texts, and the questions that go with the prompt.

        Args:
            prompt: the text.
            target: what is expected of the edited model; empty for none.
            tokens: most tokens that each model writes.
            page: which page asks; a new question takes the place of its last one.

        Raises:
            RequestError: there is no prompt.
        """
        if not prompt.strip():
            raise RequestError("there is no prompt to ask; type the beginning of a sentence")

        def work(job: Job) -> Any:
            from kecore_studio.asking import related_questions

            opened = self._need()
            self._report_to(job, opened)
            asker = opened.asker
            job.tell(revision=self._revision, distributions=asker.distributions(prompt, target))
            record = self._records.get((prompt, target))
            questions = related_questions(opened.timeline.stack, record, prompt, target, self.canaries)
            job.tell(answers=asker.answers(questions, job.check))
            asker.write("after", prompt, tokens, lambda text: job.tell(after=text))
            asker.write("before", prompt, tokens, lambda text: job.tell(before=text))
            return dict(job.partial)

        return self.jobs.submit("ask", "Asking both models", work, key=f"ask {page}")

    def trace(self, prompt: str, subject: str, *, edited: bool, samples: int = 3, page: str = "") -> Job:
        """Trace where a prompt's answer is recalled; see :mod:`kecore_analysis.trace`.

        Args:
            prompt: the text.
            subject: what it is about.
            edited: trace the model with its edits, not the unedited one.
            samples: noise samples.
            page: which page asks.
        """

        def work(job: Job) -> Any:
            from kecore_studio.describing import trace_to_json

            opened = self._need()
            self._report_to(job, opened)
            return trace_to_json(opened.editor, prompt, subject, edited=edited, samples=samples, progress=job.report)

        return self.jobs.submit("trace", f"Tracing '{prompt}'", work, key=f"trace {page}", ends=("ask",))

    def examine(self, passages: int = 24) -> Job:
        """Measure what the edits did beside their facts, and the edited matrices.

        Args:
            passages: passages of held-out text.
        """

        def work(job: Job) -> Any:
            from kecore_studio.describing import health_to_json

            opened = self._need()
            self._report_to(job, opened)
            revision = self._revision
            return {**health_to_json(opened.editor, passages, job.report), "revision": revision}

        return self.jobs.submit("health", "Examining the edited model", work, key="health", ends=("ask",))

    def export(self, out: Path, to: str, *, force: bool = False) -> Job:
        """Write the edits that are on as what other programs serve; see :func:`kecore.serving.export_edits`."""

        def work(job: Job) -> Any:
            from kecore.serving import export_edits

            opened = self._need()
            edits = self._edits_on(opened)
            job.report(f"writing {out}", 0, 0)
            exported = export_edits(edits, out, to, model=opened.ref, force=force)
            return {
                "folder": str(exported.folder),
                "files": list(exported.files),
                "commands": list(exported.commands),
                "warnings": list(exported.warnings),
            }

        return self.jobs.submit("export", f"Exporting to {out}", work)

    def edit_file(self, id: str = "") -> Path:
        """Write an edit, or all that are on as one, to a file in a folder of its own, which the caller removes.

        Args:
            id: which edit; empty for all that are on.

        Raises:
            EditStateError: there is no such edit, or none is on.
            UnsupportedCapabilityError: the edits cannot be one file.
        """
        from kecore.edit import merge

        opened = self._need()
        name = "edits"
        edits = self._edits_on(opened) if not id else [opened.timeline.stack.find(id).edit]
        if id:
            name = f"{edits[0].method.replace(' ', '')}-{id}"
        edit = edits[0] if len(edits) == 1 else merge(edits)
        folder = Path(tempfile.mkdtemp(prefix="kecore-studio-"))
        return edit.save(folder / f"{name}.safetensors")

    # Inside the thread of the jobs

    def adopt(self, editor: Editor, ref: str) -> None:
        """Take a session that is open already, such as one of a notebook.

        Args:
            editor: a session without edits.
            ref: what the page calls the model.

        Raises:
            EditStateError: it has edits.
        """
        from kecore_studio.opened import OpenModel

        if editor.history:
            raise EditStateError(f"the session has {len(editor.history)} edit(s) already; revert them first")
        self._opened = OpenModel.of(editor, ref)
        self.publish(model_changed=True)

    def _need(self) -> OpenModel:
        if self._opened is None:
            raise EditStateError("no model is open; load one first")
        return self._opened

    def _chosen(self, choice: EditChoice) -> list[EditRecord]:
        """Return the facts that an edit is of."""
        if self.sheet is None:
            raise RequestError("there are no facts to edit; type one, or drop a file")
        records = self.sheet.records
        if choice.numbers is None:
            return list(records)
        numbers = sorted(set(choice.numbers))
        if not numbers or numbers[0] < 0 or numbers[-1] >= len(records):
            raise RequestError(
                f"facts {list(choice.numbers)} were chosen of {len(records)}; choose at least one of them"
            )
        return [records[number] for number in numbers]

    def _report_to(self, job: Job, opened: OpenModel) -> None:
        """Let what the session does from now on report its progress to a job."""
        opened.editor.progress = job.report
        job.check()

    def _arrange(self, opened: OpenModel, stack: Stack) -> None:
        """Put the edits of a list on the model, and no others."""
        opened.editor.arrange([item.entry for item in stack.on], stack.states())

    def _edits_on(self, opened: OpenModel) -> list[Edit]:
        from kecore.edit import acting

        edits = acting(item.edit for item in opened.timeline.stack.on)
        if not edits:
            raise EditStateError("no edit is on the model; switch one on first")
        return edits
