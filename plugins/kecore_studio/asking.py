"""Asks a model with and without its edits, so that what an edit changed can be seen side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kecore.edit import without_edits
from kecore.inference import generate, score_continuations
from kecore.inference.scoring import next_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.api.types import EditRecord
    from kecore.editor import Editor
    from kecore_studio.stack import Stack

__all__ = ["Asker", "Question", "compare_answers", "related_questions"]

TOP = 8
"""Tokens of each distribution that are shown."""

ANSWER_TOKENS = 10
"""Tokens of an answer to a paraphrase, a neighbour or a canary."""

_ASKED_FACTS = 12
"""Facts of the session that are asked beside the one in view."""

_PROBES = 8
"""Paraphrases, and neighbours, of a fact that are asked."""

Side = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt beside the edited one.

    Args:
        kind: ``fact``, ``paraphrase``, ``neighbour`` or ``canary``.
        prompt: the text.
        target: what it should answer after the edit; empty where its own answer should stay.
    """

    kind: str
    prompt: str
    target: str = ""

    @property
    def should_change(self) -> bool:
        """Whether the answer is to be another one after the edit."""
        return self.kind in ("fact", "paraphrase")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model says.

    Args:
        text: its most probable continuation.
        first: its most probable next token, as text.
        probability: probability of the question's target; None where it has none.
    """

    text: str
    first: str
    probability: float | None


@dataclass
class Asker:
    """Asks the model of a session with its edits, and without them.

    What the unedited model says never changes, so it is remembered.

    Args:
        editor: the session.
    """

    editor: Editor
    _distributions: dict[str, Tensor] = field(default_factory=dict[str, Any])
    _texts: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    _answers: dict[Question, Answer] = field(default_factory=dict[Question, Answer])

    def distributions(self, prompt: str, target: str = "") -> dict[str, Any]:
        """Return the most probable next tokens of both models, the likeliest first.

        Args:
            prompt: the text.
            target: its first token is shown in any case; empty for none.

        Returns:
            ``tokens``, each with its text and its probability ``before`` and ``after``; ``divergence``, the KL
            divergence from the first to the second distribution in nats (None where one of them is not finite).
        """
        if prompt not in self._distributions:
            with self._side("before"):
                self._distributions[prompt] = self._next(prompt)
        before, after = self._distributions[prompt], self._next(prompt)
        ids = dict.fromkeys([*after.topk(TOP).indices.tolist(), *before.topk(TOP).indices.tolist()])
        target_id = self._first_token(prompt, target) if target else None
        if target_id is not None:
            ids[target_id] = None
        tokens: list[dict[str, Any]] = []
        for id in ids:
            p_before, p_after = _probability(before, id), _probability(after, id)
            tokens.append({"text": self._decode(id), "before": p_before, "after": p_after, "target": id == target_id})
        tokens.sort(key=lambda token: -max(token["before"], token["after"]))
        gaps = before.exp() * (before - after)  # [vocab]; a token of probability 0 adds nothing
        divergence = float(gaps[before > -math.inf].sum())
        return {
            "tokens": tokens,
            "divergence": max(0.0, divergence) if math.isfinite(divergence) else None,
        }

    def write(self, side: Side, prompt: str, tokens: int, watch: Callable[[str], None]) -> str:
        """Let one of the models go on with a prompt, and show how the text grows.

        Args:
            side: which model.
            prompt: the text.
            tokens: most tokens to write.
            watch: called with the text so far after each token; what it raises ends the writing.

        Raises:
            PromptTooLongError: the prompt does not fit.
        """
        known = self._texts.get((prompt, tokens))
        if side == "before" and known is not None:
            watch(known)
            return known
        with self._side(side):
            (written,) = generate(
                self.editor.view, self.editor.encoder, [prompt], max_new_tokens=tokens,
                batch_tokens=self.editor.batch_tokens, watch=lambda _prompt, text: watch(text),
            )  # fmt: skip
        watch(written.text)
        if side == "before":
            self._texts[prompt, tokens] = written.text
        return written.text

    def answers(self, questions: Sequence[Question], check: Callable[[], None]) -> list[dict[str, Any]]:
        """Return what both models answer, and what changed.

        Args:
            questions: the prompts.
            check: called between the two models; what it raises ends the asking.
        """
        if not questions:
            return []
        unknown = [question for question in dict.fromkeys(questions) if question not in self._answers]
        if unknown:
            with self._side("before"):
                self._answers.update(zip(unknown, self._answer(unknown), strict=True))
        check()
        results: list[dict[str, Any]] = []
        for question, after in zip(questions, self._answer(questions), strict=True):
            results.append(compare_answers(question, self._answers[question], after))
        return results

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        view, encoder, batch_tokens = self.editor.view, self.editor.encoder, self.editor.batch_tokens
        prompts = [question.prompt for question in questions]
        options: dict[str, Any] = {"batch_tokens": batch_tokens}
        texts = generate(view, encoder, prompts, max_new_tokens=ANSWER_TOKENS, stop_at_newline=True, **options)
        targeted = [(question.prompt, question.target) for question in questions if question.target]
        scores = iter(score_continuations(view, encoder, targeted, **options) if targeted else [])
        answers: list[Answer] = []
        for question, written in zip(questions, texts, strict=True):
            probability = math.exp(next(scores).total) if question.target else None
            first = self._decode(written.ids[0]) if written.ids else ""
            answers.append(Answer(written.text, first, probability))
        return answers

    def _next(self, prompt: str) -> Tensor:
        """Return the log-probabilities of the next token, ``[vocab]``."""
        (row,) = next_tokens(self.editor.view, self.editor.encoder, [prompt], batch_tokens=self.editor.batch_tokens)
        return row.double()

    def _first_token(self, prompt: str, target: str) -> int | None:
        encoded = self.editor.encoder.encode(prompt, target)
        return encoded.ids[encoded.start] if encoded.start < len(encoded.ids) else None

    def _decode(self, id: int) -> str:
        return str(self.editor.encoder.tokenizer.decode([id]))

    def _side(self, side: Side) -> AbstractContextManager[None]:
        return without_edits(self.editor.model) if side == "before" else nullcontext()


def related_questions(
    stack: Stack, record: EditRecord | None, prompt: str, target: str, canaries: Sequence[str]
) -> list[Question]:
    """Return what is asked beside a prompt: its own paraphrases and neighbours, the edited facts, the canaries.

    Args:
        stack: the edits.
        record: the fact of the prompt, with its probes; None where it is of no fact.
        prompt: the text.
        target: what is expected of the edited model; empty for none.
        canaries: prompts that no edit should change.
    """
    questions: list[Question] = []
    if target:
        questions.append(Question("fact", prompt, target))
    if record is not None:
        questions += [Question("paraphrase", text, target) for text in record.prompts_of("paraphrase")[:_PROBES]]
        neighbours = [*record.prompts_of("neighbourhood"), *record.prompts_of("locality")]
        questions += [Question("neighbour", text) for text in neighbours[:_PROBES]]
    requests = [request for item in stack.on for request in item.edit.requests]
    for request in requests[-_ASKED_FACTS:]:
        questions.append(Question("fact", request.text, request.target))
    questions += [Question("canary", text) for text in canaries]
    return list(dict.fromkeys(questions))


def compare_answers(question: Question, before: Answer, after: Answer) -> dict[str, Any]:
    """Return both answers and what became of the question, as JSON values.

    Returns:
        The question; ``before`` and ``after``; ``change``: ``same`` text, another text that begins alike (``drift``),
        or another first token (``changed``); ``good``: the change is what the question asks for.
    """
    if before.text == after.text:
        change = "same"
    elif before.first == after.first:
        change = "drift"
    else:
        change = "changed"
    good = change != "changed"
    if question.should_change:
        good = _begins_with(after.text, question.target)
    return {**asdict(question), "before": asdict(before), "after": asdict(after), "change": change, "good": good}


def _begins_with(text: str, target: str) -> bool:
    return text.strip().casefold().startswith(target.strip().casefold())


def _probability(log_probs: Tensor, id: int) -> float:
    value = float(log_probs[id].exp())
    return value if math.isfinite(value) else 0.0
