"""Asking a model everything that a set of records asks."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from kecore.api.errors import ConfigError
from kecore.api.progress import Progress, silent
from kecore.api.types import EditRecord, Probe
from kecore.evaluate.answers import AnsweredProbe, RecordResult
from kecore.evaluate.metrics import free_generation, metrics_of, strict_accuracy, writes
from kecore.evaluate.probes import all_probes
from kecore.evaluate.protocol import Protocol
from kecore.evaluate.result import Evaluation
from kecore.inference.generation import generate
from kecore.inference.scoring import BATCH_TOKENS, ContinuationScore, next_tokens, score_continuations
from kecore.memory import Work

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["PASSAGE_TOKENS", "PASSAGE_TOP_K", "evaluate", "evaluation_work"]

PASSAGE_TOKENS = 100
"""Tokens of a passage written after a generation prompt, the prompt's own included, as in ROME's code."""

PASSAGE_TOP_K = 5
"""A passage's tokens are drawn from so many of the most probable ones, as in ROME's code."""

_CHARACTERS_PER_TOKEN = 3  # fewer than in most texts of the Latin script


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
    metrics = metrics_of(protocol)
    kinds = {metric.kind for metric in metrics}
    groups = [_probes_of_kinds(record, kinds) for record in records]
    probes = list(chain.from_iterable(groups))
    answers = _Answers(view, encoder, protocol, batch_tokens, progress)
    answers.ask(probes)
    rows = tuple(
        RecordResult(record.request.id, record.source, tuple(map(answers.answer, group)))
        for record, group in zip(records, groups, strict=True)
    )
    compared = {metric.kind for metric in metrics if metric.distribution}
    prompts = list(dict.fromkeys(probe.prompt for probe in probes if probe.kind in compared))
    logs = next_tokens(view, encoder, prompts, batch_tokens=batch_tokens, progress=progress) if prompts else []
    return Evaluation(
        protocol, _with_joint_metrics(rows, protocol), distributions=dict(zip(prompts, logs, strict=True))
    )


def evaluation_work(view: ModelView, encoder: Encoder, records: Sequence[EditRecord], protocol: Protocol) -> Work:
    """Return how much :func:`evaluate` with the same arguments computes at the most, for a forecast of its time.

    Tokens are estimated from characters, and what several records ask alike counts each time.
    """
    kinds = {metric.kind for metric in metrics_of(protocol)}
    answers = _Answers(view, encoder, protocol, BATCH_TOKENS, silent)
    scored = written = logits = passes = 0
    for probe in chain.from_iterable(_probes_of_kinds(record, kinds) for record in records):
        for prompt, text in answers.pairs(probe):
            scored += _estimate_tokens(prompt) + _estimate_tokens(text)
            logits += _estimate_tokens(text)
        for prompt in answers.written_prompts(probe):
            scored += _estimate_tokens(prompt)
            written += protocol.max_new_tokens
    if written:
        passes = protocol.max_new_tokens * math.ceil((scored + written) / BATCH_TOKENS)
    return Work(
        passes=passes + math.ceil(scored / BATCH_TOKENS),
        tokens=scored + written,
        layers=len(view.layers),
        logits=logits + written,
    )


def _estimate_tokens(text: str) -> int:
    return len(text) // _CHARACTERS_PER_TOKEN + 1


def _probes_of_kinds(record: EditRecord, kinds: Container[str]) -> list[Probe]:
    return [probe for probe in all_probes(record) if probe.kind in kinds]


class _Answers:
    """What a model says to the probes of all records, each prompt and each pair asked once."""

    def __init__(
        self, view: ModelView, encoder: Encoder, protocol: Protocol, batch_tokens: int, progress: Progress
    ) -> None:
        self._view, self._encoder, self._protocol = view, encoder, protocol
        self._options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
        metrics = metrics_of(protocol)
        self._with_rival = {metric.kind for metric in metrics if "rival" in metric.reads}
        self._with_rivals = {metric.kind for metric in metrics if "rivals" in metric.reads}
        self._scores: dict[tuple[str, str], ContinuationScore] = {}
        self._texts: dict[str, str] = {}
        self._passages: dict[str, str] = {}

    def ask(self, probes: Sequence[Probe]) -> None:
        """Run the model."""
        pairs = list(dict.fromkeys(chain.from_iterable(map(self.pairs, probes))))
        scores = score_continuations(self._view, self._encoder, pairs, **self._options)
        self._scores = dict(zip(pairs, scores, strict=True))
        self._texts = self._write_answers(probes)
        self._passages = self._write_passages(probes)

    def _rivals(self, probe: Probe) -> tuple[str, ...]:
        """Return the rivals that some metric of the probe's kind reads."""
        if probe.kind in self._with_rivals:
            return probe.rivals
        return probe.rivals[:1] if probe.kind in self._with_rival else ()

    def pairs(self, probe: Probe) -> list[tuple[str, str]]:
        """Return prompts with the continuations whose probability is asked for."""
        if probe.kind == "generation":  # its answers are texts to compare with, not continuations
            return []
        pairs = [(probe.prompt, text) for text in (*probe.answers, *self._rivals(probe))]
        for condition in probe.conditions:
            pairs += [(condition.prompt, answer) for answer in condition.answers]
        return pairs

    def written_prompts(self, probe: Probe) -> list[str]:
        """Return prompts that are answered in free text; an opening is continued by a passage instead."""
        if probe.kind == "generation" or self._protocol.max_new_tokens == 0:
            return []
        prompts = [condition.prompt for condition in probe.conditions]
        # Of a probe without answers only the model's own answer can be compared.
        if writes(probe.kind, self._protocol) or not probe.answers:
            prompts = [probe.prompt, *prompts]
        return prompts

    def _write_answers(self, probes: Sequence[Probe]) -> dict[str, str]:
        """Continue the prompts that are answered freely, conditions included."""
        protocol = self._protocol
        prompts = chain.from_iterable(map(self.written_prompts, probes))
        full = {prompt: protocol.ask(prompt) for prompt in prompts}
        texts = self._write(
            full.values(),
            max_new_tokens=protocol.max_new_tokens,
            stop_at_newline=protocol.stop_at_newline,
            stop=protocol.stop,
        )
        return {prompt: texts[full_prompt] for prompt, full_prompt in full.items()}

    def _write_passages(self, probes: Sequence[Probe]) -> dict[str, str]:
        """Continue the openings of free texts to the length of a passage."""
        prompts = list(dict.fromkeys(probe.prompt for probe in probes if probe.kind == "generation"))
        lengths = [len(self._encoder.encode(prompt).ids) for prompt in prompts]
        return self._write(
            prompts,
            max_new_tokens=[max(PASSAGE_TOKENS - length, 1) for length in lengths],
            top_k=PASSAGE_TOP_K,
            seed=self._protocol.seed,
        )

    def _write(self, prompts: Iterable[str], **options: Any) -> dict[str, str]:
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return {}
        generated = generate(self._view, self._encoder, unique, **options, **self._options)
        return {prompt: item.text for prompt, item in zip(unique, generated, strict=True)}

    def answer(self, probe: Probe) -> AnsweredProbe:
        """Return a probe with what the model says to it."""
        bare_probe = replace(probe, conditions=())
        if probe.kind == "generation":
            return AnsweredProbe(bare_probe, text=self._passages[probe.prompt])
        holds = None
        if probe.conditions:
            holds = all(self._is_right(condition) for condition in probe.conditions)
        return AnsweredProbe(
            bare_probe,
            scores=tuple(self._scores[probe.prompt, answer] for answer in probe.answers),
            rival_scores=tuple(self._scores[probe.prompt, rival] for rival in self._rivals(probe)),
            text=self._texts[probe.prompt] if probe.prompt in self.written_prompts(probe) else None,
            holds=holds,
        )

    def _is_right(self, condition: Probe) -> bool:
        """Return whether a condition is answered rightly: in free text where texts are written, else token by token."""
        text = self._texts.get(condition.prompt)
        scores = tuple(self._scores[condition.prompt, answer] for answer in condition.answers)
        answered = AnsweredProbe(condition, scores, text=text)
        if text is not None:
            return free_generation(answered, self._protocol) == 1
        return strict_accuracy(answered, self._protocol) == 1


def _with_joint_metrics(rows: tuple[RecordResult, ...], protocol: Protocol) -> tuple[RecordResult, ...]:
    """Return the rows with the values of the metrics that take all probes at once."""
    for metric in metrics_of(protocol):
        if metric.whole is None or not metric.applies(protocol, compared=False):
            continue
        groups = [row.probes_of(metric.kind) for row in rows]
        measured: list[RecordResult] = []
        for row, values in zip(rows, metric.whole(groups, protocol), strict=True):
            remaining = iter(values)
            probes: list[AnsweredProbe] = []
            for probe in row.probes:
                value = next(remaining) if probe.kind == metric.kind else None
                probes.append(_with_value(probe, metric.key, value))
            measured.append(replace(row, probes=tuple(probes)))
        rows = tuple(measured)
    return rows


def _with_value(probe: AnsweredProbe, key: str, value: float | None) -> AnsweredProbe:
    return probe if value is None else replace(probe, measured={**probe.measured, key: value})
