"""The values that cross kecore's public boundaries: requests, records and capabilities.

All of them are frozen and check themselves when made, so that code further in can rely on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal

from kecore.api.errors import RequestConflictError, RequestError

__all__ = [
    "Capabilities",
    "EditKind",
    "EditRecord",
    "EditRequest",
    "MultiHop",
    "Probe",
    "check_conflicts",
]

EditKind = Literal["weights", "modules", "prompt"]

SLOT = "{}"


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into a model: after the edit, ``prompt`` continues with ``target``.

    Args:
        prompt: text with one ``{}`` where the subject stands. A prompt without ``{}`` that contains the
            subject is accepted and split at the subject's last occurrence.
        subject: the entity that the fact is about.
        target: the new continuation, without leading or trailing white space (it is stripped).
        ground_truth: the continuation that was right before, if known.
        id: a name for the request; by default a short digest of its content.

    Raises:
        RequestError: the subject is empty or not in the prompt, the target is empty, or ``{}`` occurs
            more than once.

    Examples:
        >>> EditRequest("The capital of France is", "France", "Rome").prompt
        'The capital of {} is'
    """

    prompt: str
    subject: str
    target: str
    ground_truth: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target", "ground_truth", "id"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name != "ground_truth" or value is not None):
                raise RequestError(f"request field '{name}' must be text, got {type(value).__name__}: {value!r}")
        subject, target = self.subject.strip(), self.target.strip()
        where = f" (prompt: {self.prompt!r})"
        if not subject:
            raise RequestError(f"the subject is empty; name the entity the fact is about{where}")
        if not target:
            raise RequestError(f"the target is empty; give the text that should follow{where}")
        prompt = self.prompt.strip()
        slots = prompt.count(SLOT)
        if slots == 0:
            before, found, after = prompt.rpartition(subject)
            if not found:
                raise RequestError(
                    f"the subject {subject!r} is not in the prompt {prompt!r}; write the prompt with "
                    "the subject in it, or with '{}' in its place"
                )
            prompt = before + SLOT + after
        elif slots > 1:
            raise RequestError(f"expected one '{{}}' in the prompt, got {slots}{where}")
        truth = self.ground_truth.strip() if self.ground_truth else None
        for name, value in (
            ("prompt", prompt),
            ("subject", subject),
            ("target", target),
            ("ground_truth", truth or None),
        ):
            object.__setattr__(self, name, value)
        if not self.id:
            digest = sha256(json.dumps([prompt, subject, target]).encode()).hexdigest()[:12]
            object.__setattr__(self, "id", digest)

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character positions ``[start, end)`` of the subject in :attr:`text`."""
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values; ``EditRequest(**d)`` reads it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt that a model is asked after an edit, and the answers that count.

    Args:
        prompt: the text before the answer.
        answers: what is right on this probe: for locality the answer that should stay, for
            portability the one that should follow from the edit. May be empty where only the
            stability of the model's own answer is scored.
        conditions: what the model must answer rightly *before* the edit for this probe to count
            (RippleEdits, arXiv 2307.12976); a probe whose conditions do not hold is left out of the score.
        others: further prompts of the same test; one test is one unit of the score, however many prompts it has.
        need: ``any``: the test is passed where one of its prompts is answered rightly; ``all``: where all are.
        also: further things that the answer to ``prompt`` must name, each with its spellings; only free text
            can be held against them.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    conditions: tuple[Probe, ...] = ()
    others: tuple[Probe, ...] = ()
    need: Literal["any", "all"] = "any"
    also: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class MultiHop:
    """A question whose answer follows from the record's edits through a chain of facts (MQuAKE, arXiv 2305.14795).

    Args:
        questions: wordings of the one question; it is answered where one of them is.
        answers: what is right after the edits, aliases included.
        old_answers: what was right before.
        hops: the single facts of the chain as they are after the edits, in order; a chain is answered hop by
            hop where every one of them is. Empty where the data set does not publish them.
        old_hops: the same before the edits.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    old_answers: tuple[str, ...] = ()
    hops: tuple[Probe, ...] = ()
    old_hops: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True)
class EditRecord:
    """An :class:`EditRequest` with the probes that tell what the edit did.

    Args:
        request: the edit.
        rephrases: other wordings of the edited prompt; the target should follow them as well.
        neighbourhood: prompts about other subjects with the same relation; the answer that was right
            before (``request.ground_truth``) should stay more likely than the target.
        locality: axis name to probes that the edit must not change.
        portability: axis name to probes whose answers should follow from the edit.
        generation_prompts: openings for free text about the subject.
        source: data set and position the record came from.
        joint: further edits of the same record; its probes assume that all of them were made.
        multi_hop: questions that chain the edits with other facts.
        target_aliases: other spellings of the target that count as right.
        truth_aliases: other spellings of the old answer, and further old answers.
        long_form: the target is a text of one or more sentences, to be compared by overlap, not token by token.
        relation: the data set's name of the edited relation, such as ``P36``.
        target_id: the data set's name of the target, such as ``Q220``.
        category: the data set's name of the kind of record, such as a topic.
        references: texts about the target, with which free text about the subject should agree.
        safety: the target is a safe reply to a prompt that invites an unsafe one, and probes of portability without
            answers invite one too: whether a reply is safe only a judge can say.
    """

    request: EditRequest
    rephrases: tuple[str, ...] = ()
    neighbourhood: tuple[str, ...] = ()
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    generation_prompts: tuple[str, ...] = ()
    source: str = ""
    joint: tuple[EditRequest, ...] = ()
    multi_hop: tuple[MultiHop, ...] = ()
    target_aliases: tuple[str, ...] = ()
    truth_aliases: tuple[str, ...] = ()
    long_form: bool = False
    relation: str = ""
    category: str = ""
    references: tuple[str, ...] = ()
    target_id: str = ""
    safety: bool = False

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All edits of the record."""
        return (self.request, *self.joint)

    def with_id(self, id: str) -> EditRecord:
        """The same record with another request id; its joint edits are ``id.2``, ``id.3``, ..."""
        joint = tuple(replace(request, id=f"{id}.{i}") for i, request in enumerate(self.joint, 2))
        return replace(self, request=replace(self.request, id=id), joint=joint)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an editing method can do and needs; everything that treats methods differently reads this.

    Args:
        kind: what the edit changes: base weights, modules around them, or only the prompt.
        batch: many requests are solved together. Without it, several requests of one call are a sequence: written one
            after another where the method is ``sequential``, and refused where it is not.
        sequential: further edits may follow on an edited model by design.
        reversible: the edit can be taken off bit-exactly.
        needs_statistics: key second moments (:class:`kecore.KeyStatistics`) must be at hand.
        needs_training: ``prepare`` must have run.
        needs_examples: a pool of examples must be given.
        dtypes: weight types the method works with.
    """

    kind: EditKind
    batch: bool = False
    sequential: bool = False
    reversible: bool = True
    needs_statistics: bool = False
    needs_training: bool = False
    needs_examples: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")


def check_conflicts(requests: Sequence[EditRequest]) -> None:
    """Refuse a batch in which one prompt is given two different targets.

    Raises:
        RequestConflictError: names both requests.
        RequestError: the batch is empty.
    """
    if not requests:
        raise RequestError("no edit requests were given; pass at least one")
    seen: dict[str, EditRequest] = {}
    for request in requests:
        other = seen.setdefault(request.text, request)
        if other.target != request.target:
            raise RequestConflictError(
                f"requests '{other.id}' and '{request.id}' contradict each other: {request.text!r} "
                f"cannot continue with both {other.target!r} and {request.target!r}; keep one of them"
            )


def unique(requests: Iterable[EditRequest]) -> list[EditRequest]:
    """The requests without exact repetitions of prompt, subject and target, in order."""
    return list({(r.prompt, r.subject, r.target): r for r in requests}.values())
