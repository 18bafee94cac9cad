"""Making the probes of a record: what published data sets have in common, and what is asked of every record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kecore.api.errors import DataFormatError, RequestError
from kecore.api.types import EditRecord, EditRequest, OneAnswer, Probe, Rule
from kecore.evaluate.fields import Fields
from kecore.evaluate.spelling import spelt_in, stands_alone

__all__ = [
    "Chain",
    "all_probes",
    "chain_probes",
    "chains_of",
    "edit_probe",
    "make_request",
    "make_test",
    "neighbours",
    "on_axes",
    "openings",
    "paraphrases",
]

# Questions are asked in this order; a chain's hops follow its questions.
_ORDER = {
    "edit": 0, "paraphrase": 1, "neighbourhood": 2, "locality": 3, "portability": 4, "multi_hop": 5, "hop": 5,
    "old_hop": 5, "generation": 6, "condition": 7,
}  # fmt: skip


def make_request(
    fields: Fields, prompt: str, subject: str | None, target: str, truth: str | None = None, id: str = ""
) -> EditRequest:
    """Make a request whose subject is spelt as in the prompt, should only case, accents or punctuation marks differ.

    Args:
        fields: the object it is made from, for error messages.
        prompt: with ``{}`` or the subject in it.
        subject: None where the data set names none: the whole prompt then, so that a method which edits at
            the subject's last token edits at the prompt's.
        target: the new answer.
        truth: the old one.
        id: by default a digest.

    Raises:
        DataFormatError: they make no request; names the place.
    """
    name = prompt if subject is None else subject.strip()
    # A whole prompt is spelt as itself; to look for it takes a tenth of a second where it is a passage.
    if subject is not None and "{}" not in prompt and name and not stands_alone(prompt, name):
        name = spelt_in(prompt, name) or name
    try:
        return EditRequest(prompt, name, target, truth, id)
    except RequestError as error:
        raise DataFormatError(f"{fields.where}: {error}") from None


def edit_probe(
    request: EditRequest,
    aliases: Iterable[str] = (),
    old_aliases: Iterable[str] = (),
    rule: Rule = OneAnswer(),  # noqa: B008 - frozen
) -> Probe:
    """Make the probe that asks an edited prompt.

    Args:
        request: the edit.
        aliases: other spellings of the target that count as right.
        old_aliases: other spellings of the old answer, and further old answers; without a ground truth none counts.
        rule: how an answer is judged.
    """
    rivals: tuple[str, ...] = ()
    if request.ground_truth is not None:
        rivals = (request.ground_truth, *old_aliases)
    return Probe("edit", request.text, (request.target, *aliases), rivals, rule=rule)


def paraphrases(edit: Probe, prompts: Iterable[str]) -> tuple[Probe, ...]:
    """Make the probes that ask an edit in other words; what counts there is what counts on the edited prompt."""
    return tuple(replace(edit, kind="paraphrase", prompt=prompt) for prompt in prompts)


def neighbours(edit: Probe, prompts: Iterable[str]) -> tuple[Probe, ...]:
    """Make the probes of other subjects with an edit's relation, where its old answer is right and its target wrong.

    Without an old answer a neighbour can only be asked for its stability.
    """
    rivals = edit.answers[:1] if edit.rivals else ()
    return tuple(Probe("neighbourhood", prompt, edit.rivals, rivals) for prompt in prompts)


def openings(prompts: Iterable[str], references: Sequence[str] = ()) -> tuple[Probe, ...]:
    """Make the probes that open free texts about the subject.

    Args:
        prompts: the openings.
        references: texts about the target, with which the free texts should agree.
    """
    return tuple(Probe("generation", prompt, tuple(references)) for prompt in prompts)


def make_test(probes: Iterable[Probe], number: int) -> tuple[Probe, ...]:
    """Make several prompts of one axis one test, which counts once.

    Args:
        probes: of one kind and axis; a single one is a test by itself.
        number: of the test on its axis.
    """
    prompts = tuple(probes)
    if len(prompts) < 2:
        return prompts
    return tuple(replace(probe, test=f"{probe.axis} {number}") for probe in prompts)


def on_axes(probes: Iterable[Probe]) -> dict[str, tuple[Probe, ...]]:
    """Return probes by axis, in the order in which the axes appear."""
    axes: dict[str, tuple[Probe, ...]] = {}
    for probe in probes:
        axes[probe.axis] = (*axes.get(probe.axis, ()), probe)
    return axes


@dataclass(frozen=True, slots=True)
class Chain:
    """A question whose answer follows from a record's edits through a chain of facts (MQuAKE, arXiv 2305.14795).

    Args:
        questions: wordings of the one question; it is answered where one of them is.
        hops: the single facts of the chain as they are after the edits, in order; a chain is answered hop by
            hop where every one of them is. Empty where the data set does not publish them.
        old_hops: the same before the edits.
    """

    questions: tuple[Probe, ...]
    hops: tuple[Probe, ...] = ()
    old_hops: tuple[Probe, ...] = ()

    @property
    def probes(self) -> tuple[Probe, ...]:
        """All probes of the chain."""
        return (*self.questions, *self.hops, *self.old_hops)


def chain_probes(
    number: int,
    questions: Iterable[str],
    answers: Sequence[str],
    old_answers: Sequence[str] = (),
    hops: Iterable[Probe] = (),
    old_hops: Iterable[Probe] = (),
) -> tuple[Probe, ...]:
    """Make the probes of a chain of facts.

    Args:
        number: of the chain in its record.
        questions: wordings of the question over all hops.
        answers: what is right after the edits, aliases included.
        old_answers: what was right before.
        hops: prompts and answers of the single facts after the edits.
        old_hops: the same before the edits.
    """
    test = str(number)
    chain = Chain(
        tuple(Probe("multi_hop", prompt, tuple(answers), tuple(old_answers), test=test) for prompt in questions),
        tuple(replace(hop, kind="hop", test=test, need="all") for hop in hops),
        tuple(replace(hop, kind="old_hop", test=test, need="all") for hop in old_hops),
    )
    return chain.probes


def chains_of(record: EditRecord) -> list[Chain]:
    """Return the chains of a record, in order."""
    chains: dict[str, Chain] = {}
    for probe in record.probes_of("multi_hop"):
        chain = chains.get(probe.test, Chain(()))
        chains[probe.test] = replace(chain, questions=(*chain.questions, probe))
    for probe in record.probes_of("hop"):
        chain = chains.get(probe.test, Chain(()))
        chains[probe.test] = replace(chain, hops=(*chain.hops, probe))
    for probe in record.probes_of("old_hop"):
        chain = chains.get(probe.test, Chain(()))
        chains[probe.test] = replace(chain, old_hops=(*chain.old_hops, probe))
    return list(chains.values())


def all_probes(record: EditRecord) -> list[Probe]:
    """Return everything that is asked of a record, in the order of asking.

    Each request's own prompt is asked, by the record's probe of kind ``edit`` where it has one for it, else for the
    target against the ground truth. A record without an opening of free text is given the edited prompt as one.
    """
    own_edits = {(probe.prompt, probe.answers[:1]): probe for probe in record.probes_of("edit")}
    edits: list[Probe] = []
    for request in record.requests:
        # One probe stands for one request, also where two of them are alike.
        probe = own_edits.pop((request.text, (request.target,)), None)
        edits.append(edit_probe(request) if probe is None else probe)
    others = [probe for probe in record.probes if probe.kind != "edit"]
    if not record.probes_of("generation"):
        others += openings([record.request.text])
    # Sorting keeps the order of the record among probes of one rank.
    return sorted([*edits, *own_edits.values(), *others], key=lambda probe: _ORDER[probe.kind])
