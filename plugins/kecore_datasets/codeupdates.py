"""Changes of program libraries: CodeUpdateArena."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from kecore.api.types import EditRecord, EditRequest, Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request
from kecore_datasets.shared import known

__all__ = ["CODEUPDATEARENA"]

# Names in the published table, and in the example beside it.
_NAMES = {
    "function": ("function_path", "api_path"),
    "signature": ("signature", "new_function_signature"),
    "docstring": ("docstring", "update_docstring"),
}


def _has_parts(values: Mapping[str, Any]) -> bool:
    return isinstance(values["update"], Mapping) and isinstance(values["prog_syn"], Mapping)


def _text(update: Fields, part: str) -> str:
    """Read a part of an update, by whichever of its names is there."""
    name = next((name for name in _NAMES[part] if name in update), _NAMES[part][0])
    return update.text(name).strip()


def _problem(task: Fields) -> str:
    """Return the task that a program solves: scenario, problem and signature."""
    parts = [task.text_or_none("scenario"), task.text("problem").strip(), task.text("solution_signature").strip()]
    return "\n".join(part for part in parts if part)


def _request(update: Fields, task: Fields, edited: str, id: str) -> EditRequest:
    function = _text(update, "function")
    if edited == "solution":
        return make_request(task, _problem(task), None, task.text("ref_solution"), None, id)
    if edited == "docstring":
        prompt = f"What does {_text(update, 'signature')} do?"
        subject = function if function in prompt else None
        return make_request(update, prompt, subject, _text(update, "docstring"), None, id)
    prompt, target = f"The signature of {function} is", _text(update, "signature")
    return make_request(update, prompt, function, target, update.text_or_none("old_signature"), id)


def _codeupdatearena(fields: Fields, edited: str) -> EditRecord:
    """Read an update of CodeUpdateArena (arXiv 2407.06249), with the task that a program with it solves.

    The reference program is the answer to the task. The paper runs the program that a model writes on unit tests; here
    nothing is run, so what is scored is the reference program's likelihood, and the text beside it can be read.

    Args:
        fields: an update with a task.
        edited: what is edited: ``signature``, the fact of the new signature instead of the old one; ``docstring``, the
            text about the change; ``solution``, the task with its reference program.
    """
    update, task = fields.object("update"), fields.object("prog_syn")
    id = fields.id("prog_syn_id" if "prog_syn_id" in fields else "specific_update_id")
    request = _request(update, task, edited, id)
    program = Probe("portability", _problem(task), (task.text("ref_solution").strip(),), axis="program")
    return EditRecord(
        request,
        (edit_probe(request), *([program] if edited != "solution" else [])),
        labels=known(
            category=update.text_or_none("package") or fields.text_or_none("package"),
            relation=update.text_or_none("update_type"),
            long_form=None if edited == "signature" else "yes",
        ),
    )


CODEUPDATEARENA = Layout(
    "codeupdatearena",
    ("update", "prog_syn"),
    "update{function_path, signature, docstring}, prog_syn{problem, solution_signature, ref_solution}",
    {name: partial(_codeupdatearena, edited=name) for name in ("signature", "docstring", "solution")},
    ("category", "relation", "long_form", "portability: program"),
    (
        Published(
            "CodeUpdateArena", "invented updates of Python functions, with tasks that need them", "670 tasks", "MIT",
            "hf:leo-liuzy/CodeUpdateArena", "2407.06249",
        ),
    ),
    detect=_has_parts,
)  # fmt: skip
