"""MEMIT-Merge: requests about one subject share key and value."""

from __future__ import annotations

from dataclasses import replace

from kecore.api.config import StageSettings
from kecore.engine.closed_form import ClosedForm, by_subject

__all__ = ["Merge"]


class Merge:
    """Let requests about one subject share key and value."""

    name = "merge"
    Settings = StageSettings
    reference = (
        "Dong et al., MEMIT-Merge: Addressing MEMIT's Key-Value Conflicts in Same-Subject Batch Editing for LLMs, "
        "2025, arXiv:2502.07322"
    )
    api = (1, 1)

    def apply(self, form: ClosedForm, settings: StageSettings) -> ClosedForm:
        """Return the form with this stage in it."""
        return replace(form, grouping=by_subject)
