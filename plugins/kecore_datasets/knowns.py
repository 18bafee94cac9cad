"""The knowns: facts that GPT-2 XL answers correctly, for causal tracing."""

from __future__ import annotations

from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.probes import edit_probe, make_request
from kecore_datasets.shared import known

__all__ = ["KNOWNS"]


def _known(fields: Fields) -> EditRecord:
    """Read a record of ROME's knowns (arXiv 2202.05262), whose target is true already."""
    prompt, subject, attribute = fields.text("prompt"), fields.text("subject"), fields.text("attribute")
    request = make_request(fields, prompt, subject, attribute, None, fields.id("known_id"))
    return EditRecord(request, (edit_probe(request),), labels=known(relation=fields.text_or_none("relation_id")))


KNOWNS = Layout(
    "knowns",
    ("known_id", "prompt", "subject", "attribute"),
    "known_id, prompt, subject, attribute",
    _known,
    ("relation",),
    (
        Published(
            "knowns", "facts that GPT-2 XL knows, for causal tracing", "1,209", "MIT", "github.com/kmeng01/rome",
            "2202.05262",
        ),
    ),
)  # fmt: skip
