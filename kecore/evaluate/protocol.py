"""The protocol of a score: everything that could change the number without changing the method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from itertools import permutations
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kecore.api.config import validate_config
from kecore.api.errors import ProtocolMismatchError
from kecore.api.types import ProbeKind

__all__ = ["AFTER", "AT_EDIT", "AT_END", "METRIC_VERSION", "Protocol", "same_protocol"]

METRIC_VERSION = 2
"""Rises when a metric's definition changes, so that old and new numbers have different hashes."""

AFTER, AT_EDIT, AT_END = "after", "at-edit", "at-end"
"""Moments of scoring: after the one edit there is; of a sequence, right after a fact's own step, and after all."""


class Protocol(BaseModel):
    """What is edited and how scores are taken; frozen, and part of every result.

    Numbers whose :meth:`hash` differs do not belong into one table.

    Examples:
        >>> Protocol(form="chat").hash() == Protocol().hash()
        False
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    edits: Literal["single", "batch", "sequential"] = Field(
        default="batch",
        description="single: each fact alone on the base model, which is restored before the next; batch: all facts "
        "by one edit; sequential: one step after another on the same model",
    )
    step: int = Field(default=1, ge=1, description="facts of one step of a sequence")
    when: tuple[Literal["at-edit", "at-end"], ...] = Field(
        default=("at-edit", "at-end"),
        min_length=1,
        description="when the facts of a sequence are scored: each right after its own step, all after the last step",
    )
    retention: int = Field(
        default=0,
        ge=0,
        description="how often, at even distances along a sequence, all facts edited so far are scored again",
    )
    sample: int = Field(
        default=0,
        ge=0,
        description="most facts of a sequence that are scored at each moment, drawn once for all moments; 0 for all",
    )
    form: Literal["plain", "chat"] = Field(
        default="plain",
        description="prompts as bare text, or as the user's message in the model's chat template",
    )
    instruction: str = Field(
        default="",
        description="text around a prompt that is answered by free generation, with {} in the prompt's place, such as "
        "'Please answer the question: {}'; none if empty. Edits, and scores of given answers, keep the bare prompt",
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
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="further texts that end a generated answer, and do not belong to it, such as a full stop",
    )
    match: Literal["prefix", "contains", "exact"] = Field(
        default="prefix",
        description="when generated text is right: it begins with the answer, holds it as whole words, or equals it",
    )
    normalise: bool = Field(
        default=True, description="match without regard to case, punctuation, English articles and spacing"
    )
    seed: int = Field(default=0, description="seed of the edit, and of the passages of fluency and consistency")
    metrics: int = Field(default=METRIC_VERSION, description="version of the metric definitions")
    extra: tuple[str, ...] = Field(
        default=(),
        description="metric families that are taken beside the standard ones; they change no other number, so they "
        "are not in the hash",
    )
    judge: str = Field(
        default="local",
        description="who judges where the family 'judge' is taken: local, local:MODEL, or hosted:MODEL",
    )

    @field_validator("instruction")
    @classmethod
    def _names_the_prompts_place(cls, text: str) -> str:
        if text and (text.count("{}") != 1 or text == "{}"):
            raise ValueError(f"expected '{{}}' once, in the prompt's place, and text around it, or none; got {text!r}")
        return text

    @model_validator(mode="after")
    def _no_field_without_effect(self) -> Protocol:
        # A field without effect must not give two hashes to one protocol.
        if self.edits != "sequential":
            for name in ("step", "when", "retention", "sample"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"'{name}' is of sequential editing only; leave it out, or set edits: sequential")
        for name in ("instruction", "stop"):
            if getattr(self, name) and not self.max_new_tokens:
                raise ValueError(f"'{name}' is of free generation only; leave it out, or raise max_new_tokens above 0")
        ends = [*self.stop, *["\n"] * self.stop_at_newline]
        if "\n" in self.stop or any(one in other for one, other in permutations(ends, 2)):
            raise ValueError("no text of 'stop' holds another one, or is a line break, which 'stop_at_newline' is for")
        if tuple(sorted(self.stop)) != self.stop:
            raise ValueError(f"'stop' names texts in order: {sorted(self.stop)}")
        if tuple(sorted(set(self.when))) != self.when:
            raise ValueError("'when' names moments once, in the order at-edit, at-end")
        return self

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Protocol:
        """Validate ``values``.

        Raises:
            ConfigError: names each bad key, what was expected and what came.
        """
        return validate_config(cls, values)

    @property
    def moments(self) -> tuple[str, ...]:
        """When an edited fact is scored: :data:`AFTER`, or :data:`AT_EDIT` and :data:`AT_END` of a sequence."""
        return self.when if self.edits == "sequential" else (AFTER,)

    def checkpoints(self, records: int) -> dict[int, str]:
        """Steps of a sequence after which all facts so far are scored again, and what that moment is called.

        Args:
            records: facts of the whole sequence.

        Returns:
            Number of steps done to the moment's name, which tells the facts edited by then; the last step is not
            among them, it is :data:`AT_END`.

        Examples:
            >>> Protocol(edits="sequential", step=10, retention=2).checkpoints(60)
            {2: 'after-20', 4: 'after-40'}
        """
        steps = -(-records // self.step)
        at = [round(i * steps / (self.retention + 1)) for i in range(1, self.retention + 1)]
        return {step: f"after-{step * self.step}" for step in at if 0 < step < steps}

    def drawn(self, records: int) -> list[int]:
        """Return the positions of the facts that are scored of the first ``records`` of a sequence.

        Each position has a place in one random order, and the first ones of that order are taken: what was drawn of
        few facts and is drawn of more is followed all along, and what is scored at the end was scored at its edit.

        Examples:
            >>> Protocol(edits="sequential", sample=3).drawn(20), Protocol(edits="sequential").drawn(4)
            ([6, 7, 14], [0, 1, 2, 3])
        """
        positions = range(records)
        if not 0 < self.sample < records:
            return list(positions)

        def place_in_order(position: int) -> bytes:
            return sha256(f"{self.seed}/{position}".encode()).digest()

        return sorted(sorted(positions, key=place_in_order)[: self.sample])

    def ask(self, prompt: str) -> str:
        """Return what the model is asked where it answers ``prompt`` freely: the prompt in :attr:`instruction`.

        Examples:
            >>> Protocol(instruction="Q: {} A:").ask("Who wrote Emma?")
            'Q: Who wrote Emma? A:'
        """
        return self.instruction.replace("{}", prompt) if self.instruction else prompt

    def describe(self) -> str:
        """Describe the protocol in words."""
        some = f"{self.step} facts" if self.step > 1 else "1 fact"
        how = {
            "single": "each fact edited alone on the base model, scored, and taken off again",
            "batch": "all facts edited together by one edit, then scored",
            "sequential": f"one edit of {some} after another on the same model, scored "
            + " and ".join({AT_EDIT: "right after each", AT_END: "after the last"}[moment] for moment in self.when),
        }[self.edits]
        if self.sample:
            how += f", {self.sample} facts drawn of those that there are"
        kinds = ", ".join(self.generate)
        ends = " or ".join([*["the end of the line"] * self.stop_at_newline, *map(repr, self.stop)])
        text = f"{how}; {self.form} prompts; P of an answer by the {self.probability} of its log-probabilities"
        if not self.max_new_tokens:
            return f"{text}; no free generation; seed {self.seed}"
        return (
            f"{text}; greedy generation of up to {self.max_new_tokens} tokens"
            f"{f', to {ends},' if ends else ''} on {kinds}"
            f"{f', asked by {self.instruction!r}' if self.instruction else ''}, right by {self.match} match"
            f"{' of normalised text' if self.normalise else ''}; seed {self.seed}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """Twelve hex digits of the SHA-256 of the canonical JSON."""
        values = self.to_json()
        extra = values.pop("extra")
        if "judge" not in extra:
            del values["judge"]
        for name in ("instruction", "stop", "sample"):  # protocols without them are older than the fields
            if not values[name]:
                del values[name]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return sha256(text.encode()).hexdigest()[:12]


def same_protocol(one: Protocol, other: Protocol, what: str) -> None:
    """Refuse to put numbers of two protocols side by side.

    Args:
        one: a protocol.
        other: another one.
        what: what the two are of, to begin the message with.

    Raises:
        ProtocolMismatchError: they differ; names the fields.
    """
    if one.hash() == other.hash():
        return
    mine, theirs = one.to_json(), other.to_json()
    fields = ", ".join(
        # What is empty would leave a gap in the sentence.
        f"{key} {mine[key] or repr(mine[key])} and {theirs[key] or repr(theirs[key])}"
        for key in mine
        if mine[key] != theirs[key]
    )
    raise ProtocolMismatchError(
        f"{what} follow different protocols, {one.hash()} and {other.hash()} ({fields}); their numbers do not belong "
        "into one table: run both by one protocol, or report them apart"
    )
