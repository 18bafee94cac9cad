"""Small task sets that tell whether an edited model still does what it did: read from files, asked in batches.

Prompts and answers are zero-shot, in the wording of the Language Model Evaluation Harness where it has the task (GLUE,
BoolQ, PIQA, MMLU, GSM8K, natural questions). A choice is made by log-probability: per character where the choices are
sentences of different lengths (the harness's ``acc_norm``), summed otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from kecore.api.errors import ConfigError, DataFormatError
from kecore.api.progress import Progress, silent
from kecore.evaluate.fields import Fields
from kecore.evaluate.matching import normalise
from kecore.evaluate.sources import open_source
from kecore.inference.generation import generate
from kecore.inference.scoring import BATCH_TOKENS, score_continuations
from kecore.text import Encoder

if TYPE_CHECKING:
    from kecore.model import ModelView

__all__ = ["TASKS", "Item", "TaskResult", "TaskSet", "load_task", "run_tasks", "spread", "task_files"]

LETTERS = "ABCDEFGHIJ"

_PUBLISHED = {"natural_questions": "nq", "piqa_valid": "piqa"}
"""Names of published files that are not their task's."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a task set.

    Args:
        prompt: what the model reads.
        choices: continuations to choose from; empty where the answer is free text.
        gold: index of the right choice.
        answers: right free answers.
    """

    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """How one task set is read and asked.

    Args:
        item: from a record of the file to a question.
        per_character: choices are compared by log-probability per character.
        tokens: length of a free answer.
        number: of a free answer only the last number counts.
    """

    item: Callable[[Fields], Item]
    per_character: bool = False
    tokens: int = 32
    number: bool = False


def _label(fields: Fields, names: Mapping[Any, int], name: str = "label") -> int:
    value: Any = fields.values.get(name)
    key = value if isinstance(value, bool | int) else str(value)
    if key not in names:
        raise fields.fail(name, f"one of {', '.join(map(repr, names))}")
    return names[key]


_BINARY: Mapping[Any, int] = {0: 0, 1: 1, "0": 0, "1": 1}


def _cola(f: Fields) -> Item:
    text = f"{f.text('sentence')}\nQuestion: Does this sentence make sense?\nAnswer:"
    return Item(text, ("no", "yes"), _label(f, _BINARY))


def _mrpc(f: Fields) -> Item:
    pair = f"Sentence 1: {f.text('sentence1')}\nSentence 2: {f.text('sentence2')}"
    return Item(f"{pair}\nQuestion: Do both sentences mean the same thing?\nAnswer:", ("no", "yes"), _label(f, _BINARY))


def _entailment(names: Mapping[Any, int]) -> Callable[[Fields], Item]:
    def item(f: Fields) -> Item:
        text = f"{f.text('sentence1')}\nQuestion: {f.text('sentence2')} True or False?\nAnswer:"
        return Item(text, ("True", "False"), _label(f, names))

    return item


def _sst(f: Fields) -> Item:
    text = f"{f.text('sentence').strip()}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    return Item(text, ("negative", "positive"), _label(f, _BINARY))


def _dialogue(f: Fields) -> Item:
    options = tuple(f.texts("options"))
    names = {letter: i for i, letter in enumerate(LETTERS[: len(options)])}
    return Item(f.text("article"), options, _label(f, names, "answers"))


def _mmlu(f: Fields) -> Item:
    choices = f.texts("choices")
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    letters = tuple(LETTERS[: len(choices)])
    gold = _label(f, {i: i for i in range(len(choices))}, "answer")
    return Item(f"{f.text('question').strip()}\n{lines}\nAnswer:", letters, gold)


def _boolq(f: Fields) -> Item:
    text = f"{f.text('passage')}\nQuestion: {f.text('question')}?\nAnswer:"
    return Item(text, ("no", "yes"), _label(f, {False: 0, True: 1}, "answer"))


def _piqa(f: Fields) -> Item:
    choices = (f.text("sol1").strip(), f.text("sol2").strip())
    return Item(f"Question: {f.text('goal').strip()}\nAnswer:", choices, _label(f, _BINARY))


def _gsm8k(f: Fields) -> Item:
    answer = f.text("answer").rpartition("####")[2].strip()
    return Item(f"Question: {f.text('question')}\nAnswer:", answers=(answer,))


def _questions(f: Fields) -> Item:
    return Item(f"Q: {f.text('question').strip().rstrip('?')}?\nA:", answers=f.answers("answer"))


TASKS: Mapping[str, Task] = {
    "cola": Task(_cola),
    "mrpc": Task(_mrpc),
    "rte": Task(_entailment(_BINARY)),
    "nli": Task(_entailment({"entailment": 0, "not_entailment": 1})),
    "sst2": Task(_sst),
    "sentiment_analysis": Task(_sst),
    "dialogue": Task(_dialogue, per_character=True),
    "mmlu": Task(_mmlu),
    "boolq": Task(_boolq),
    "piqa": Task(_piqa, per_character=True),
    "gsm8k": Task(_gsm8k, tokens=256, number=True),
    "nq": Task(_questions),
}
"""Name to task. ``cola``, ``mrpc``, ``rte``, ``nli``, ``sst2``, ``sentiment_analysis`` (all of SST-2's validation set,
most of which ``sst2`` has too), ``dialogue`` and ``mmlu`` have the layout of the unified-model-editing repository's
GLUE sets, ``boolq``, ``gsm8k`` and ``nq`` that of the editing-attack repository,
``piqa`` the published one with its labels in a file ``NAME-labels.lst`` beside it."""


@dataclass(frozen=True)
class TaskSet:
    """The questions of one task.

    Args:
        name: of the task, a key of :data:`TASKS`.
        items: the questions.
    """

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model made of a task set.

    Args:
        name: of the task.
        correct: 1 or 0 for each item.
        chosen: index of the chosen answer, -1 for free answers.
        gold: index of the right one.
    """

    name: str
    correct: tuple[float, ...]
    chosen: tuple[int, ...]
    gold: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return fmean(self.correct)

    @property
    def f1(self) -> float | None:
        """F1 of each class, weighted by its share; None where answers are free text."""
        if min(self.chosen) < 0:
            return None
        total = 0.0
        for label, support in Counter(self.gold).items():
            hits = sum(c == g == label for c, g in zip(self.chosen, self.gold, strict=True))
            total += support * 2 * hits / (self.chosen.count(label) + support)
        return total / len(self.gold)


def load_task(name: str, path: str | Path, *, limit: int | None = None) -> TaskSet:
    """Read a task set.

    Args:
        name: a key of :data:`TASKS`.
        path: JSON or JSONL, plain or gzipped.
        limit: only so many items, evenly spread over the file (whose parts may be sorted by class).

    Raises:
        ConfigError: no such task, or ``limit`` is below 1.
        DataFormatError: the file cannot be read, or a record lacks a field; names both.
    """
    if name not in TASKS:
        raise ConfigError(f"no task '{name}'; known: {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    records: list[tuple[str, Any]] = [entry for document in open_source(path, None) for entry in document.objects()]
    if name == "piqa":
        labels = path.with_name(path.name.partition(".")[0] + "-labels.lst")
        if not labels.is_file():
            raise DataFormatError(f"{path}: the labels are expected beside it, in {labels.name}")
        values = labels.read_text(encoding="ascii").split()
        if len(values) != len(records):
            raise DataFormatError(f"{labels}: {len(values)} labels for {len(records)} records")
        records = [(where, {**record, "label": v}) for (where, record), v in zip(records, values, strict=True)]
    if not records:
        raise DataFormatError(f"{path} holds no records")
    return TaskSet(name, tuple(TASKS[name].item(Fields(record, where)) for where, record in spread(records, limit)))


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` of some items, at even distances."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def task_files(source: str | Path) -> dict[str, Path]:
    """The tasks that a file or a folder stands for.

    Args:
        source: ``NAME=FILE``; a file whose name tells its task, such as ``cola.jsonl`` or ``piqa_valid.jsonl``; or a
            folder of such files, of which others are not read.

    Returns:
        Task to file, sorted by task.

    Raises:
        ConfigError: no such task, a name that tells none, or two files of one task in a folder.
        DataFormatError: no such file or folder.
    """
    name, equals, rest = str(source).partition("=")
    path = Path(source)
    if equals and not path.exists():
        if name not in TASKS:
            raise ConfigError(f"no task '{name}'; known: {', '.join(TASKS)}")
        return {name: Path(rest)}
    if not path.exists():
        raise DataFormatError(f"{path}: no such file or folder; give a task file, a folder of them, or NAME=FILE")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        stem = file.name.partition(".")[0]
        task = _PUBLISHED.get(stem, stem)
        if task not in TASKS:
            continue
        if task in found:
            raise ConfigError(f"{found[task]} and {file} are both of the task '{task}'; give one as {task}=FILE")
        found[task] = file
    if not found:
        raise ConfigError(f"{path}: no file name tells a task; give NAME=FILE with one of {', '.join(TASKS)}")
    return dict(sorted(found.items()))


def run_tasks(
    view: ModelView,
    encoder: Encoder,
    tasks: Sequence[TaskSet],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, TaskResult]:
    """Ask a model all items of task sets.

    Prompts that do not fit ``encoder.max_length`` are cut at their beginning, as the harness does.

    Args:
        view: the model.
        encoder: decides spaces, special tokens and template.
        tasks: the task sets.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called after each micro-batch.
    """
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    items = [(task, item, _fitted(encoder, item, TASKS[task.name].tokens)) for task in tasks for item in task.items]
    pairs = [(prompt, choice) for _, item, prompt in items for choice in item.choices]
    totals = {
        pair: score.total
        for pair, score in zip(pairs, score_continuations(view, encoder, pairs, **options), strict=True)
    }
    texts: dict[tuple[str, int], str] = {}
    for tokens in {TASKS[task.name].tokens for task, item, _ in items if not item.choices}:
        free = [p for task, item, p in items if not item.choices and TASKS[task.name].tokens == tokens]
        written = generate(view, encoder, free, max_new_tokens=tokens, **options)
        texts |= {(prompt, tokens): answer.text for prompt, answer in zip(free, written, strict=True)}
    found: dict[str, TaskResult] = {}
    for task in tasks:
        kind = TASKS[task.name]
        chosen: list[int] = []
        correct: list[float] = []
        for _, item, prompt in (entry for entry in items if entry[0] is task):
            if item.choices:
                scale = [len(choice) if kind.per_character else 1 for choice in item.choices]
                values = [totals[prompt, choice] / s for choice, s in zip(item.choices, scale, strict=True)]
                chosen.append(values.index(max(values)))
                correct.append(float(chosen[-1] == item.gold))
            else:
                chosen.append(-1)
                correct.append(float(_right(texts[prompt, kind.tokens], item.answers, kind.number)))
        gold = tuple(item.gold for item in task.items)
        found[task.name] = TaskResult(task.name, tuple(correct), tuple(chosen), gold)
    return found


def _fitted(encoder: Encoder, item: Item, tokens: int) -> str:
    """The prompt, without so much of its beginning that it and its answer fit the model's context."""
    prompt, room = item.prompt, encoder.max_length
    free = Encoder(encoder.tokenizer, chat=encoder.chat)
    while room is not None:
        encoded = max((free.encode(prompt, choice) for choice in item.choices or ("",)), key=lambda e: len(e.ids))
        excess = len(encoded.ids) + (0 if item.choices else tokens) - room
        if excess <= 0:
            break
        inside = [low - encoded.shift for low, high in encoded.spans if high > low >= encoded.shift]
        prompt = prompt[inside[excess] :]
    return prompt


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _right(text: str, answers: Sequence[str], number: bool) -> bool:
    if number:
        numbers = [_NUMBER.findall(each) for each in (text.partition("\n\n")[0], answers[0])]
        value, wanted = (float(found[-1].replace(",", "")) if found else None for found in numbers)
        return value is not None and value == wanted
    first = normalise(text.partition("\n")[0])
    return any(first == normalise(answer) for answer in answers)
