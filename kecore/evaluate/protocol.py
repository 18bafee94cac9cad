"""The protocol of a score: everything that could change the number without changing the edit."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["METRIC_VERSION", "ProbeKind", "Protocol"]

METRIC_VERSION = 1
"""Rises when a metric's definition changes, so that old and new numbers have different hashes."""

ProbeKind = Literal["edit", "paraphrase", "neighbourhood", "locality", "portability"]


class Protocol(BaseModel):
    """How scores are taken; frozen, and part of every result.

    Numbers whose :meth:`hash` differs do not belong into one table.

    Examples:
        >>> Protocol(form="chat").hash() == Protocol().hash()
        False
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    form: Literal["plain", "chat"] = Field(
        default="plain",
        description="prompts as bare text, or as the user's message in the model's chat template",
    )
    when: Literal["single", "batch", "sequential-at-edit", "at-end"] = Field(
        default="batch",
        description="single: each edit alone on the base model; batch: after one joint edit; "
        "sequential-at-edit: each edit right after it was made; at-end: all edits after the last one",
    )
    probability: Literal["mean", "sum"] = Field(
        default="mean",
        description="P of an answer: exp of the mean log-probability of its tokens (as the official "
        "CounterFact code), or of their sum (the product)",
    )
    generate: tuple[ProbeKind, ...] = Field(
        default=("edit", "paraphrase", "portability"),
        description="probes that are also answered by free generation",
    )
    max_new_tokens: int = Field(default=32, ge=0, description="length of free generation; 0 for none")
    stop_at_newline: bool = Field(default=True, description="a line break ends a generated answer")
    match: Literal["prefix", "contains", "exact"] = Field(
        default="prefix",
        description="when generated text is right: it begins with the answer, holds it as whole words, or equals it",
    )
    normalise: bool = Field(
        default=True, description="match without regard to case, punctuation, English articles and spacing"
    )
    seed: int = Field(default=0, description="seed of the edit; the evaluation itself draws nothing at random")
    metrics: int = Field(default=METRIC_VERSION, description="version of the metric definitions")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return sha256(text.encode()).hexdigest()[:12]
