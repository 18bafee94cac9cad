"""Asking a model everything that a set of records asks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kecore.api.errors import ConfigError
from kecore.api.progress import Progress, silent
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.metrics import AnsweredProbe, free_generation, metrics_of, strict_accuracy, writes
from kecore.evaluate.protocol import ProbeKind, Protocol
from kecore.evaluate.result import Evaluation, RecordResult
from kecore.evaluate.texts import PASSAGE_TOKENS, PASSAGE_TOP_K
from kecore.inference.generation import generate
from kecore.inference.scoring import BATCH_TOKENS, ContinuationScore, next_tokens, score_continuations

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["evaluate"]


@dataclass(frozen=True, slots=True)
class _Question:
    """A probe before it is answered; ``rival`` is the answer that ``answers[0]`` competes with."""

    kind: ProbeKind
    prompt: str
    answers: tuple[str, ...]
    rival: str | None = None
    axis: str = ""
    test: str = ""
    need: Literal["any", "all"] = "any"
    also: tuple[tuple[str, ...], ...] = ()
    conditions: tuple[Probe, ...] = ()
    safe: str = ""
    rivals: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        if self.kind == "generation":  # its answers are texts to compare with, not continuations
            return []
        rival = () if self.rival is None else (self.rival,)
        own = [(self.prompt, answer) for answer in (*self.answers, *rival, *self.rivals)]
        return own + [(probe.prompt, answer) for probe in self.conditions for answer in probe.answers]

    def written(self, protocol: Protocol) -> list[str]:
        """Prompts that are continued freely."""
        if self.kind == "generation" or protocol.max_new_tokens == 0:
            return []
        # Of a probe without answers only the model's own answer can be compared.
        own = [self.prompt] if writes(self.kind, protocol) or not self.answers else []
        return own + [probe.prompt for probe in self.conditions]


def evaluate(
    view: ModelView,
    encoder: Encoder,
    records: Sequence[EditRecord],
    protocol: Protocol | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> Evaluation:
    """Score whatever the model is at this moment, edited or not, on all probes of the records.

    Args:
        view: the model.
        encoder: decides spaces, special tokens and template; its prompt form must be the protocol's.
        records: facts and their probes.
        protocol: how to score; by default ``Protocol()``.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called as ``progress(stage, done, total)`` with stages ``score``, ``generate`` and, where a
            metric compares them, ``distributions``.

    Raises:
        ConfigError: the encoder's prompt form is not the protocol's, there are no records, or the protocol asks for
            a metric that is not installed.
        RequestError: a probe's prompt or answer has no tokens.
        PromptTooLongError: a probe does not fit the encoder's ``max_length``.
        MissingDependencyError: a metric needs a package that is not installed.
        JudgeError: the judge cannot be asked.
    """
    protocol = Protocol() if protocol is None else protocol
    if encoder.chat != (protocol.form == "chat"):
        raise ConfigError(
            f"the protocol asks for {protocol.form} prompts, the encoder writes "
            f"{'chat' if encoder.chat else 'plain'} ones; make it with Encoder(..., chat={not encoder.chat})"
        )
    if not records:
        raise ConfigError("no records were given; pass at least one")
    kinds = {metric.kind for metric in metrics_of(protocol)}
    rivals = {metric.kind for metric in metrics_of(protocol) if metric.rivals}
    asked = [[q for q in _questions(record, rivals) if q.kind in kinds] for record in records]
    every = [question for questions in asked for question in questions]
    answers = _Answers(view, encoder, protocol, batch_tokens, progress)
    answers.ask(every)
    rows = tuple(
        RecordResult(record.request.id, record.source, tuple(map(answers.probe, questions)))
        for record, questions in zip(records, asked, strict=True)
    )
    compared = {metric.kind for metric in metrics_of(protocol) if metric.distribution}
    prompts = list(dict.fromkeys(q.prompt for q in every if q.kind in compared))
    found = next_tokens(view, encoder, prompts, batch_tokens=batch_tokens, progress=progress) if prompts else []
    return Evaluation(protocol, _measured(rows, protocol), distributions=dict(zip(prompts, found, strict=True)))


class _Answers:
    """What a model says to questions, each prompt and each pair asked once."""

    def __init__(
        self, view: ModelView, encoder: Encoder, protocol: Protocol, batch_tokens: int, progress: Progress
    ) -> None:
        self._view, self._encoder, self._protocol = view, encoder, protocol
        self._options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
        self._scores: dict[tuple[str, str], ContinuationScore] = {}
        self._texts: dict[str, str] = {}
        self._passages: dict[str, str] = {}

    def ask(self, questions: Sequence[_Question]) -> None:
        """Run the model."""
        pairs = list(dict.fromkeys(pair for q in questions for pair in q.pairs))
        scores = score_continuations(self._view, self._encoder, pairs, **self._options)
        self._scores = dict(zip(pairs, scores, strict=True))
        protocol = self._protocol
        limits = {name: getattr(protocol, name) for name in ("max_new_tokens", "stop_at_newline", "stop")}
        asked = {prompt: protocol.ask(prompt) for q in questions for prompt in q.written(protocol)}
        texts = self._written(asked.values(), **limits)
        self._texts = {prompt: texts[full] for prompt, full in asked.items()}
        openings = list(dict.fromkeys(q.prompt for q in questions if q.kind == "generation"))
        lengths = [len(self._encoder.encode(opening).ids) for opening in openings]
        self._passages = self._written(
            openings,
            max_new_tokens=[max(PASSAGE_TOKENS - length, 1) for length in lengths],
            top_k=PASSAGE_TOP_K,
            seed=protocol.seed,
        )

    def _written(self, prompts: Iterable[str], **options: Any) -> dict[str, str]:
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return {}
        found = generate(self._view, self._encoder, unique, **options, **self._options)
        return {prompt: item.text for prompt, item in zip(unique, found, strict=True)}

    def probe(self, q: _Question) -> AnsweredProbe:
        """One question with its answers."""
        if q.kind == "generation":
            return AnsweredProbe(q.kind, q.axis, q.prompt, q.answers, (), text=self._passages[q.prompt])
        return AnsweredProbe(
            q.kind,
            q.axis,
            q.prompt,
            q.answers,
            tuple(self._scores[q.prompt, answer] for answer in q.answers),
            None if q.rival is None else self._scores[q.prompt, q.rival],
            self._texts[q.prompt] if q.prompt in q.written(self._protocol) else None,
            test=q.test,
            need=q.need,
            also=q.also,
            holds=all(map(self._right, q.conditions)) if q.conditions else None,
            safe=q.safe,
            rivals=tuple(self._scores[q.prompt, answer] for answer in q.rivals),
        )

    def _right(self, condition: Probe) -> bool:
        """Whether a condition is answered rightly: in free text where texts are written, else token by token."""
        probe = self.probe(_Question("portability", condition.prompt, condition.answers, also=condition.also))
        if (text := self._texts.get(condition.prompt)) is not None:
            return free_generation(replace(probe, text=text), self._protocol) == 1
        return strict_accuracy(probe, self._protocol) == 1


def _measured(rows: tuple[RecordResult, ...], protocol: Protocol) -> tuple[RecordResult, ...]:
    """The rows with the values of the metrics that take all probes at once."""
    for metric in metrics_of(protocol):
        if metric.whole is None or not metric.applies(protocol, compared=False):
            continue
        groups = [[probe for probe in row.probes if probe.kind == metric.kind] for row in rows]
        values = metric.whole(groups, protocol)
        found: list[RecordResult] = []
        for row, own in zip(rows, values, strict=True):
            left = iter(own)
            probes = [_with(p, metric.key, next(left)) if p.kind == metric.kind else p for p in row.probes]
            found.append(replace(row, probes=tuple(probes)))
        rows = tuple(found)
    return rows


def _with(probe: AnsweredProbe, key: str, value: float | None) -> AnsweredProbe:
    return probe if value is None else replace(probe, measured={**probe.measured, key: value})


def _questions(record: EditRecord, rivals: Collection[str]) -> Iterator[_Question]:
    """What a record asks; further old answers compete as well on the kinds among ``rivals``."""
    target, truth = record.request.target, record.request.ground_truth
    wanted = (target, *record.target_aliases)
    old = () if truth is None else (truth, *record.truth_aliases)
    further = {kind: old[1:] for kind in rivals}
    safe = target if record.safety else ""
    yield _Question("edit", record.request.text, wanted, truth, safe=safe, rivals=further.get("edit", ()))
    for request in record.joint:
        yield _Question("edit", request.text, (request.target,), request.ground_truth)
    for prompt in record.rephrases:
        yield _Question("paraphrase", prompt, wanted, truth, safe=safe, rivals=further.get("paraphrase", ()))
    for prompt in record.neighbourhood:
        # Without the old answer a neighbour can only be asked for its stability.
        yield _Question("neighbourhood", prompt, old, target if old else None)
    axes: tuple[tuple[ProbeKind, Mapping[str, tuple[Probe, ...]]], ...] = (
        ("locality", record.locality),
        ("portability", record.portability),
    )
    for kind, groups in axes:
        for axis, probes in groups.items():
            for i, probe in enumerate(probes):
                for question in _test(kind, probe, axis, f"{axis} {i}" if probe.others else ""):
                    judged = kind == "portability" and not question.answers
                    yield replace(question, safe=safe) if safe and judged else question
    for i, chain in enumerate(record.multi_hop):
        for prompt in chain.questions:
            yield _Question("multi_hop", prompt, chain.answers, test=str(i))
        for hop in chain.hops:
            yield _Question("hop", hop.prompt, hop.answers, test=str(i), need="all")
    for prompt in record.generation_prompts or (record.request.text,):
        yield _Question("generation", prompt, record.references)


def _test(kind: ProbeKind, probe: Probe, axis: str, test: str) -> Iterator[_Question]:
    """The questions of one test: a probe, and the further prompts of the same test."""
    for one in (probe, *probe.others):
        yield _Question(kind, one.prompt, one.answers, None, axis, test, probe.need, one.also, probe.conditions)
