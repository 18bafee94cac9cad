"""The names that tools of the field give to the fields of a fact, in one table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from kecore.api.errors import DataFormatError
from kecore.evaluate.own_layout import FIELDS
from kecore_datasets import own_shapes as shapes

__all__ = ["TABLE", "OwnField", "fold_name", "refuse_slips"]


@dataclass(frozen=True)
class OwnField:
    """A field of kecore's own layout, and how others write it.

    Args:
        name: in kecore's own layout.
        others: names that others give it, the surest first.
        rather: names that it has where no field is named for it: ``answer`` is the target where nothing else is.
        shape: brings a value into the shape that the own layout has; raises ValueError with what was expected.
    """

    name: str
    others: tuple[str, ...] = ()
    rather: tuple[str, ...] = ()
    shape: Callable[[Any], Any] = shapes.as_it_is

    @property
    def names(self) -> tuple[str, ...]:
        """Names that mean this field whatever else is there."""
        return (self.name, *self.others)


_FIELDS = (
    OwnField("id", ("case_id", "fact_id", "record_id", "edit_id")),
    OwnField(
        "prompt",
        ("prompts", "question", "query", "src", "edit_prompt", "requested_prompt"),
        rather=("input", "text"),
    ),
    OwnField("subject", ("subjects", "entity", "subject_name"), shape=shapes.one_text),
    OwnField(
        "target",
        (
            "target_new", "new_target", "targets", "new_answer", "answer_new", "edit_target", "alt", "desired_answer",
            "correct_answer", "new", "chosen",
        ),
        rather=("answer", "answers", "output", "response", "completion", "label"),
        shape=shapes.answers,
    ),
    OwnField(
        "ground_truth",
        (
            "ground_truths", "target_true", "target_old", "old_target", "old_answer", "answer_old", "original_answer",
            "wrong_answer", "old", "rejected",
        ),
        rather=("answer",),
        shape=shapes.answers,
    ),
    OwnField(
        "rephrases",
        (
            "rephrase", "rephrase_prompt", "rephrase_prompts", "rephrased_prompt", "rephrased_prompts", "paraphrase",
            "paraphrases", "paraphrase_prompt", "paraphrase_prompts", "paraphrased_question", "paraphrased_questions",
            "ood_rephrase",
        ),
        shape=shapes.split_cell,
    ),
    OwnField(
        "neighbourhood",
        ("neighborhood", "neighborhood_prompts", "neighbourhood_prompts", "neighbors", "neighbours"),
        rather=("neighborhood_prompt",),
        shape=shapes.split_cell,
    ),
    OwnField("generation_prompts", ("generation_prompt",), shape=shapes.split_cell),
    OwnField("target_aliases", ("target_alias", "aliases", "answer_aliases"), shape=shapes.split_cell),
    OwnField("truth_aliases", shape=shapes.split_cell),
    OwnField("references", shape=shapes.split_cell),
    OwnField("relation", ("relation_id",)),
    OwnField("locality", ("locality_inputs",), shape=shapes.locality),
    OwnField("portability", ("portability_inputs",), shape=shapes.portability),
)  # fmt: skip
TABLE: Mapping[str, OwnField] = {
    **{name: OwnField(name) for name in FIELDS if name != "target_new"},  # which is a name of the target
    **{field.name: field for field in _FIELDS},
}
"""Every field of kecore's own layout by its name there; what is read, recognised and said follows from this table."""

_ALIKE = 0.84  # a name at least so like a known one is taken for a slip of the pen
_NOTES = ("sources", "reference", "relations", "categories", "subject_id", "subjectid", "subject_ids")
"""Names that are like a known one and mean something else."""


def fold_name(name: object) -> str:
    """Return a field's name in small letters, with one ``_`` for what is neither letter nor digit."""
    return re.sub(r"[\W_]+", "_", str(name).casefold()).strip("_")


def refuse_slips(unread: Mapping[str, str], read: Mapping[str, Any], where: str) -> None:
    """Refuse a field that is probably meant for a known one, which would silently drop probes.

    Args:
        unread: the fields that mean nothing, by their folded names.
        read: the fields of the own layout that were read.
        where: the record's place, for the message.

    Raises:
        DataFormatError: a name is much like that of a field that was not read.
    """
    for folded, name in unread.items():
        slip = _likely_slip(folded)
        if slip is not None and slip.field not in read:
            raise DataFormatError(
                f"{where}: unknown field '{name}'; did you mean '{slip.meant}'? If it is a note of yours, give it "
                "a name that is less like that"
            )


@dataclass(frozen=True)
class _Slip:
    """A name that is probably misspelt.

    Args:
        meant: the known name that it is like.
        field: the field of the own layout that has this name.
    """

    meant: str
    field: str


@cache
def _likely_slip(folded: str) -> _Slip | None:
    """Return what a name that means nothing is probably meant for; None where it is a name by itself."""
    fields = {name: field.name for field in TABLE.values() if field.name != "notes" for name in field.names}
    close = difflib.get_close_matches(folded, fields, n=1, cutoff=_ALIKE)
    if not close or folded in _NOTES or folded.startswith(f"{close[0]}_") or folded.endswith(f"_{close[0]}"):
        return None
    return _Slip(close[0], fields[close[0]])
