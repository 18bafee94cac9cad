"""What the layouts of facts to forget have in common.

An edit has a target, so what forgetting means is said by the variant: what the edited model is to answer instead. The
old answer is the ground truth, and so the rival of the target. What the sets want to stay known is locality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kecore.api.types import Probe
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Part
from kecore_datasets.shared import deal_out

__all__ = ["REFUSAL", "kept_probes", "objects_of", "with_kept"]

REFUSAL = "I don't know."
"""What a model is to answer where the set publishes no refusal of its own."""


def with_kept(objects: Sequence[tuple[str, Any]], kept: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return objects to forget, each with its share of the questions whose answers stay known."""
    shares = deal_out(kept, len(objects))
    return [(where, {**value, "keep": share}) for (where, value), share in zip(objects, shares, strict=True)]


def kept_probes(fields: Fields) -> list[Probe]:
    """Make locality probes of the questions that a folder's other files ask with this record."""
    probes: list[Probe] = []
    for item in fields.objects_or_none("keep"):
        probe = item.probe("locality", "question", "answer", item.text("axis"))
        probes.append(replace(probe, rivals=item.texts("perturbed_answer")))
    return probes


def objects_of(part: Part) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a file, each with its place.

    Raises:
        DataFormatError: one is no object; names its place.
    """
    return [(where, dict(Fields(value, where).values)) for where, value in part.objects]
