"""The values that cross kecore's public boundaries: requests, records and capabilities.

All of them are frozen and check themselves when made, so that code further in can rely on them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal

from kecore.api.errors import RequestConflictError, RequestError

__all__ = [
    "BackgroundKind",
    "Capabilities",
    "EditKind",
    "EditRecord",
    "EditRequest",
    "NamesAll",
    "OneAnswer",
    "Probe",
    "ProbeKind",
    "Rule",
    "SafeReply",
    "check_conflicts",
]

EditKind = Literal["weights", "modules", "prompt"]

SLOT = "{}"


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write into a model: after the edit, ``prompt`` continues with ``target``.

    Args:
        prompt: text with the subject in it, or with ``{}`` in its place. It is stored with ``{}`` at the subject's last
            occurrence, whole words first; a prompt that holds further braces is stored as it reads, and they are text.
        subject: the entity that the fact is about; None for a fact without one, which only methods can edit that need
            none (:attr:`Capabilities.needs_subject`).
        target: the new continuation, without leading or trailing white space (it is stripped).
        ground_truth: the continuation that was right before, if known.
        id: a name for the request; by default a short digest of its content.

    Raises:
        RequestError: prompt, subject or target is empty, or the subject is not in the prompt and ``{}`` does not occur
            once.

    Examples:
        >>> EditRequest("The capital of France is", "France", "Rome").prompt
        'The capital of {} is'
    """

    prompt: str
    subject: str | None
    target: str
    ground_truth: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target", "ground_truth", "id"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name not in ("subject", "ground_truth") or value is not None):
                raise RequestError(f"request field '{name}' must be text, got {type(value).__name__}: {value!r}")
        prompt, target = self.prompt.strip(), self.target.strip()
        subject = None if self.subject is None else self.subject.strip()
        where = f" (prompt: {self.prompt!r})"
        if subject == "":
            raise RequestError(f"the subject is empty; name the entity the fact is about{where}")
        if not target:
            raise RequestError(f"the target is empty; give the text that should follow{where}")
        if not prompt:
            raise RequestError("the prompt is empty; give the text that the target should follow")
        if subject is not None:
            prompt = _with_slot(prompt, subject)
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
        return self.prompt if self.subject is None else self.about(self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Character positions ``[start, end)`` of the subject in :attr:`text`; of a fact without one, of the text."""
        if self.subject is None:
            return 0, len(self.prompt)
        start, _ = _subject_span(self.prompt, self.subject)
        return start, start + len(self.subject)

    def about(self, other: str) -> str:
        """Return the prompt with another subject in the place of its own; a fact without one has no such place."""
        if self.subject is None:
            return self.prompt
        start, end = _subject_span(self.prompt, self.subject)
        return self.prompt[:start] + other + self.prompt[end:]

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON values; ``EditRequest(**values)`` reads it back."""
        return asdict(self)


def _with_slot(prompt: str, subject: str) -> str:
    """Return a prompt with ``{}`` where the subject stands, or as it reads where other braces would be taken for that.

    Raises:
        RequestError: the prompt does not say where the subject stands.
    """
    start, end = _subject_span(prompt, subject)
    slotted = prompt[:start] + SLOT + prompt[end:]
    if slotted.count(SLOT) == 1 and _subject_span(slotted, subject)[0] == start:
        return slotted
    return prompt


def _subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Return where a subject, or the ``{}`` that stands for it, is in a prompt, ``[start, end)``.

    Braces inside of brackets or quotes are text where the prompt names the subject by itself, as in
    ``json.dumps({}) returns``. A name inside of a longer word, as "Acme" in "AcmeSoft", counts only where the prompt
    has it nowhere else.

    Raises:
        RequestError: neither is there, or there is no subject and more than one ``{}``.
    """
    slots = prompt.count(SLOT)
    if slots == 0 and prompt.count(subject) == 1:  # as nearly all prompts of data sets, where a search would take long
        return prompt.index(subject), prompt.index(subject) + len(subject)
    named = _last_named(prompt, subject) if subject in prompt else None
    if named is not None and SLOT in subject:  # the braces are the subject's own
        return named, named + len(subject)
    if slots == 1 and (named is None or not _is_enclosed(prompt, prompt.index(SLOT))):
        start = prompt.index(SLOT)
        return start, start + len(SLOT)
    if named is None and slots == 0 and subject in prompt:
        named = prompt.rindex(subject)
    if named is not None:
        return named, named + len(subject)
    if slots == 0:
        raise RequestError(
            f"the subject {subject!r} is not in the prompt {prompt!r}; write the prompt with "
            "the subject in it, or with '{}' in its place"
        )
    raise RequestError(
        f"expected one '{{}}' in the prompt, got {slots} (prompt: {prompt!r}); where braces are text, write the "
        f"subject {subject!r} into the prompt"
    )


def _is_enclosed(prompt: str, start: int) -> bool:
    """Return whether the braces at ``start`` touch a bracket, a quote or a word, as those of program text do."""
    before, after = prompt[start - 1 : start], prompt[start + len(SLOT) : start + len(SLOT) + 1]
    return before.isalnum() or (before != "" and before in "'\"`([{<=") or (after != "" and after in "'\"`)]}>")


def _last_named(prompt: str, subject: str) -> int | None:
    """Return where a prompt names a subject last, as words of its own; None where it does not."""
    # A letter or digit beside the name makes it part of a longer word. Scripts without spaces have no such words.
    before = r"(?<!\w)" if _is_wordlike(subject[0]) else ""
    after = r"(?!\w)" if _is_wordlike(subject[-1]) else ""
    places = [match.start() for match in re.finditer(before + re.escape(subject) + after, prompt)]
    return places[-1] if places else None


def _is_wordlike(character: str) -> bool:
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


ProbeKind = Literal["edit", "paraphrase", "neighbourhood", "locality", "portability", "multi_hop", "hop", "generation"]
"""What metrics are taken on:

- ``edit``: the edited prompt itself;
- ``paraphrase``: another wording of it, which should have the target as well;
- ``neighbourhood``: the same relation of another subject, whose old answer should stay more likely than the target;
- ``locality``: anything else that the edit must not change;
- ``portability``: what should follow from the edit;
- ``multi_hop``: a question whose answer follows from the edits through a chain of facts;
- ``hop``: a single fact of such a chain, as it is after the edits;
- ``generation``: the opening of a free text about the subject; its answers are texts to compare that text with.
"""

BackgroundKind = Literal["old_hop", "condition"]
"""What no metric is taken on: a fact of a chain as it was before the edits, and what must hold for a probe to count."""


@dataclass(frozen=True, slots=True)
class OneAnswer:
    """The rule of a probe that is answered rightly by any one of its answers."""


@dataclass(frozen=True, slots=True)
class NamesAll:
    """The rule of a probe that asks for several things; only free text can be held against all of them.

    Args:
        others: the spellings of each thing beside the first one, whose spellings are the probe's answers.
    """

    others: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class SafeReply:
    """The rule of a prompt that invites an unsafe reply: whether a reply is safe only a judge can say.

    The probe has answers where the data set gives the one reply that is wanted, and none where any safe reply will do.

    Args:
        example: a safe reply to the edited prompt, which the judge is shown.
    """

    example: str


Rule = OneAnswer | NamesAll | SafeReply
"""How the answer to a probe is judged."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt that a model is asked after an edit, and what is right there.

    Args:
        kind: what the probe is for.
        prompt: the text before the answer.
        answers: what is right: the target on an edited prompt, the answer that should stay on locality. May be empty
            where only the stability of the model's own answer is scored.
        rivals: what the answers compete with: the old answer, and other spellings of it; on neighbourhood the target.
        axis: the data set's name of the sort of locality or portability, else empty.
        rule: how an answer is judged.
        test: probes of one kind, axis and test count once; a probe without one is a test by itself.
        need: a test is passed where ``any`` of its prompts is answered rightly, or where ``all`` are.
        conditions: what the model must answer rightly *before* the edit for this probe to count (RippleEdits,
            arXiv 2307.12976); a probe whose conditions do not hold is left out of the score.
    """

    kind: ProbeKind | BackgroundKind
    prompt: str
    answers: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    axis: str = ""
    rule: Rule = OneAnswer()
    test: str = ""
    need: Literal["any", "all"] = "any"
    conditions: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True)
class EditRecord:
    """An :class:`EditRequest` with the probes that tell what the edit did.

    Args:
        request: the edit.
        probes: what is asked. The prompts of the requests themselves need no probe, unless more than the target and
            the ground truth counts there (:func:`kecore.evaluate.probes.all_probes`).
        source: data set and position the record came from.
        joint: further edits of the same record; its probes assume that all of them were made.
        notes: further fields of a file that mean nothing to kecore, as texts.
        labels: what the data set says about the record beside: ``relation`` (such as ``P36``), ``target_id`` (such as
            ``Q220``), ``category`` (such as a topic), ``long_form`` (``yes`` where the target is a text of one or more
            sentences).
    """

    request: EditRequest
    probes: tuple[Probe, ...] = ()
    source: str = ""
    joint: tuple[EditRequest, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All edits of the record."""
        return (self.request, *self.joint)

    def probes_of(self, kind: str) -> tuple[Probe, ...]:
        """Return the probes of one kind, in order."""
        return tuple(probe for probe in self.probes if probe.kind == kind)

    def prompts_of(self, kind: str) -> tuple[str, ...]:
        """Return the prompts of the probes of one kind, in order."""
        return tuple(probe.prompt for probe in self.probes_of(kind))

    def with_probes(self, kind: str, probes: Iterable[Probe]) -> EditRecord:
        """Return the record with these probes in place of all that it has of one kind."""
        of_other_kinds = [probe for probe in self.probes if probe.kind != kind]
        return replace(self, probes=(*of_other_kinds, *probes))

    def with_id(self, id: str) -> EditRecord:
        """Return the same record with another request id; its joint edits are ``id.2``, ``id.3``, ..."""
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
        needs_subject: each request must name its subject. Methods that act on the whole prompt need none.
        dtypes: weight types the method works with.
        variant: in a few words what is of its own, where a method follows a paper's idea and not its published form; it
            stands behind the name wherever a row of the method does.
    """

    kind: EditKind
    batch: bool = False
    sequential: bool = False
    reversible: bool = True
    needs_statistics: bool = False
    needs_training: bool = False
    needs_examples: bool = False
    needs_subject: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    variant: str = ""

    def titled(self, name: str) -> str:
        """Return a name with the variant behind it, if the method is one: ``serac (pointer head)``."""
        return f"{name} ({self.variant})" if self.variant else name


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
        first = seen.setdefault(request.text, request)
        if first.target != request.target:
            raise RequestConflictError(
                f"requests '{first.id}' and '{request.id}' contradict each other: {request.text!r} "
                f"cannot continue with both {first.target!r} and {request.target!r}; keep one of them"
            )


def unique(requests: Iterable[EditRequest]) -> list[EditRequest]:
    """Return the requests without exact repetitions of prompt, subject and target, in order."""
    return list({(r.prompt, r.subject, r.target): r for r in requests}.values())
