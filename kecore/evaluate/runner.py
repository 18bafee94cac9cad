"""Asking a model everything that a set of records asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kecore.errors import ConfigError
from kecore.evaluate.generation import generate
from kecore.evaluate.metrics import AnsweredProbe
from kecore.evaluate.protocol import ProbeKind, Protocol
from kecore.evaluate.result import Evaluation, RecordResult
from kecore.evaluate.scoring import BATCH_TOKENS, score_continuations
from kecore.method import Progress, silent
from kecore.types import EditRecord

if TYPE_CHECKING:
    from kecore.model_view import ModelView
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

    @property
    def pairs(self) -> list[tuple[str, str]]:
        rivals = () if self.rival is None else (self.rival,)
        return [(self.prompt, answer) for answer in (*self.answers, *rivals)]

    def generates(self, protocol: Protocol) -> bool:
        # Of a probe without answers only the model's own answer can be compared.
        return protocol.max_new_tokens > 0 and (self.kind in protocol.generate or not self.answers)


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
        progress: called as ``progress(stage, done, total)`` with stages ``score`` and ``generate``.

    Raises:
        ConfigError: the encoder's prompt form is not the protocol's, or there are no records.
        RequestError: a probe's prompt or answer has no tokens.
        PromptTooLongError: a probe does not fit the encoder's ``max_length``.
    """
    protocol = Protocol() if protocol is None else protocol
    if encoder.chat != (protocol.form == "chat"):
        raise ConfigError(
            f"the protocol asks for {protocol.form} prompts, the encoder writes "
            f"{'chat' if encoder.chat else 'plain'} ones; make it with Encoder(..., chat={not encoder.chat})"
        )
    if not records:
        raise ConfigError("no records were given; pass at least one")
    asked = [list(_questions(record)) for record in records]
    every = [question for questions in asked for question in questions]
    pairs = list(dict.fromkeys(pair for question in every for pair in question.pairs))
    found = score_continuations(view, encoder, pairs, batch_tokens=batch_tokens, progress=progress)
    scores = dict(zip(pairs, found, strict=True))
    prompts = list(dict.fromkeys(q.prompt for q in every if q.generates(protocol)))
    texts: dict[str, str] = {}
    if prompts:
        written = generate(
            view,
            encoder,
            prompts,
            max_new_tokens=protocol.max_new_tokens,
            stop_at_newline=protocol.stop_at_newline,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        texts = {prompt: item.text for prompt, item in zip(prompts, written, strict=True)}

    def answer(q: _Question) -> AnsweredProbe:
        rival = None if q.rival is None else scores[q.prompt, q.rival]
        text = texts[q.prompt] if q.generates(protocol) else None
        own = tuple(scores[q.prompt, a] for a in q.answers)
        return AnsweredProbe(q.kind, q.axis, q.prompt, q.answers, own, rival, text)

    rows = (
        RecordResult(record.request.id, record.source, tuple(map(answer, questions)))
        for record, questions in zip(records, asked, strict=True)
    )
    return Evaluation(protocol, tuple(rows))


def _questions(record: EditRecord) -> Iterator[_Question]:
    request = record.request
    target, truth = request.target, request.ground_truth
    yield _Question("edit", request.text, (target,), truth)
    for prompt in record.rephrases:
        yield _Question("paraphrase", prompt, (target,), truth)
    for prompt in record.neighbourhood:
        # Without the old answer a neighbour can only be asked for its stability.
        answers = () if truth is None else (truth,)
        yield _Question("neighbourhood", prompt, answers, target if answers else None)
    for axis, probes in record.locality.items():
        for probe in probes:
            yield _Question("locality", probe.prompt, probe.answers, axis=axis)
    for axis, probes in record.portability.items():
        for probe in probes:
            yield _Question("portability", probe.prompt, probe.answers, axis=axis)
