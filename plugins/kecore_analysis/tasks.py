"""Small task sets that tell whether an edited model still does what it did: tasks of lm-eval over local files.

Prompts and answers are zero-shot, in the wording of the Language Model Evaluation Harness where it has the task (GLUE,
BoolQ, PIQA, MMLU, GSM8K, natural questions), but for white space around a field, which the harness keeps: here it is
taken off sentences of SST-2, choices of MMLU, and goals and solutions of PIQA, many of which end in a space. The
harness words the prompts and judges the answers; the model is asked by kecore (:mod:`kecore_analysis.harness`), so that
edits of prompts take part, micro-batches keep within the session's budget, and nothing is fetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from kecore.api.errors import ConfigError, DataFormatError, MissingDependencyError
from kecore.api.progress import Progress, silent
from kecore.evaluate.matching import normalise
from kecore.evaluate.sources import open_source
from kecore.inference.scoring import BATCH_TOKENS
from kecore_analysis.harness import ask_tasks, make_task

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["TASKS", "Item", "TaskResult", "TaskSet", "load_task", "make_task_set", "run_tasks", "spread", "task_files"]

_PUBLISHED = {"natural_questions": "nq", "piqa_valid": "piqa"}
"""Names of published files that are not their task's."""

T = TypeVar("T")

Fields = Mapping[str, Any]


def _choose(text: str, choices: str | list[str], target: str, metric: str = "acc") -> Fields:
    """Return lm-eval's configuration of a task whose answers are chosen by log-probability.

    Args:
        text: template of the prompt.
        choices: the answers, or a template of them.
        target: template of the right one's index.
        metric: ``acc`` compares sums; ``acc_norm`` sums per character, for sentences of different lengths.
    """
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": target,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }


def _write(text: str, target: str, tokens: int, until: str, **judging: Any) -> Fields:
    """Return lm-eval's configuration of a task whose answers are free text of at most so many tokens."""
    return {
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": target,
        "generation_kwargs": {"until": [until], "max_gen_toks": tokens, "do_sample": False},
        **judging,
    }


def _match_question(doc: Fields, results: Sequence[str]) -> dict[str, float]:
    """Judge a free answer: equal to a right one, after kecore's normalisation of both."""
    answer, right = normalise(results[0]), doc["answer"]
    spellings = [right] if isinstance(right, str) else right
    return {"exact_match": float(any(answer == normalise(spelling) for spelling in spellings))}


_EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
_LAST_NUMBER = {
    "metric_list": [{**_EXACT, "regexes_to_ignore": [",", r"\.0+$"]}],
    "filter_list": [
        {
            "name": "last-number",
            "filter": [
                {"function": "regex", "regex_pattern": r"(-?\d[\d,]*(?:\.\d+)?)", "group_select": -1},
                {"function": "take_first"},
            ],
        }
    ],
}
_NO_YES = ["no", "yes"]
_ENTAILMENT = "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:"
_SENTIMENT = _choose(
    "{{sentence.strip()}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
    ["negative", "positive"],
    "{{label}}",
)
_LETTERS = "'ABCDEFGHIJ'"

TASKS: Mapping[str, Fields] = {
    "cola": _choose("{{sentence}}\nQuestion: Does this sentence make sense?\nAnswer:", _NO_YES, "{{label}}"),
    "mrpc": _choose(
        "Sentence 1: {{sentence1}}\nSentence 2: {{sentence2}}\n"
        "Question: Do both sentences mean the same thing?\nAnswer:",
        _NO_YES,
        "{{label}}",
    ),
    "rte": _choose(_ENTAILMENT, ["True", "False"], "{{label}}"),
    "nli": _choose(_ENTAILMENT, ["True", "False"], "{{['entailment', 'not_entailment'].index(label)}}"),
    "sst2": _SENTIMENT,
    "sentiment_analysis": _SENTIMENT,
    "dialogue": _choose("{{article}}", "{{options}}", f"{{{{{_LETTERS}.index(answers)}}}}", "acc_norm"),
    "mmlu": _choose(
        "{{question.strip()}}\n"
        f"{{% for choice in choices %}}{{{{{_LETTERS}[loop.index0]}}}}. {{{{choice.strip()}}}}\n{{% endfor %}}Answer:",
        f"{{{{{_LETTERS}[:choices|length]|list}}}}",
        "{{answer}}",
    ),
    "boolq": _choose("{{passage}}\nQuestion: {{question}}?\nAnswer:", _NO_YES, "{{[False, True].index(answer)}}"),
    "piqa": _choose("Question: {{goal.strip()}}\nAnswer:", "{{[sol1.strip(), sol2.strip()]}}", "{{label}}", "acc_norm"),
    "gsm8k": _write(
        "Question: {{question}}\nAnswer:", "{{answer.rpartition('####')[2].strip()}}", 256, "\n\n", **_LAST_NUMBER
    ),
    "nq": _write(
        "Q: {{question.strip().rstrip('?')}}?\nA:",
        "{{answer}}",
        32,
        "\n",
        process_results=_match_question,
        metric_list=[_EXACT],
    ),
}
"""Name to lm-eval's configuration. ``cola``, ``mrpc``, ``rte``, ``nli``, ``sst2``, ``sentiment_analysis`` (all of
SST-2's validation set, most of which ``sst2`` has too), ``dialogue`` and ``mmlu`` have the layout of the
unified-model-editing repository's GLUE sets, ``boolq``, ``gsm8k`` and ``nq`` that of the editing-attack repository,
``piqa`` the published one with its labels in a file ``NAME-labels.lst`` beside it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a task set, as the model is asked.

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


@dataclass(frozen=True)
class TaskSet:
    """The questions of one task.

    Args:
        name: of the task, a key of :data:`TASKS`.
        items: the questions.
        task: lm-eval's task over them.
    """

    name: str
    items: tuple[Item, ...]
    task: Any


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A model's answers to a task set.

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
        hits = Counter(gold for gold, chosen in zip(self.gold, self.chosen, strict=True) if gold == chosen)
        for label, support in Counter(self.gold).items():
            total += support * 2 * hits[label] / (self.chosen.count(label) + support)
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
        MissingDependencyError: lm-eval is not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"no task '{name}'; known: {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    records: list[tuple[str, Any]] = []  # each with its place, for messages
    for document in open_source(path, None):
        records += document.objects()
    if name == "piqa":
        records = _with_labels(records, path)
    if not records:
        raise DataFormatError(f"{path} holds no records")
    documents: list[Any] = []
    origins: list[str] = []
    for origin, document in spread(records, limit):
        documents.append(document)
        origins.append(origin)
    return make_task_set(name, documents, origins)


def make_task_set(name: str, records: Sequence[Fields], places: Sequence[str] = ()) -> TaskSet:
    """Make a task set of records that are at hand.

    Args:
        name: a key of :data:`TASKS`.
        records: at least one, with the fields of the task's layout.
        places: how messages name each record; by its number where none are given.

    Raises:
        DataFormatError: a record lacks a field, or its right answer is none of its choices; names the record.
        MissingDependencyError: lm-eval is not installed.
    """
    places = places or [f"record {number}" for number in range(1, len(records) + 1)]
    documents = [_without_nulls(record) for record in records]
    try:
        task = make_task(name, TASKS[name], documents)
    except MissingDependencyError:
        raise
    except Exception as error:  # it words the first document when it is made: see _word
        raise _cannot_word(places[0], error) from error
    items = [_word(task, document, place) for document, place in zip(documents, places, strict=True)]
    return TaskSet(name, tuple(items), task)


def _without_nulls(record: Fields) -> Fields:
    """Return the fields that have a value: lm-eval's templates refuse what is missing, and word what is null."""
    return {name: value for name, value in record.items() if value is not None}


def _with_labels(records: Sequence[tuple[str, Any]], path: Path) -> list[tuple[str, Any]]:
    """Join PIQA's records with the file of labels beside them."""
    labels = path.with_name(path.name.partition(".")[0] + "-labels.lst")
    if not labels.is_file():
        raise DataFormatError(f"{path}: the labels are expected beside it, in {labels.name}")
    values = labels.read_text(encoding="ascii").split()
    if len(values) != len(records):
        raise DataFormatError(f"{labels}: {len(values)} labels for {len(records)} records")
    return [(where, {**record, "label": label}) for (where, record), label in zip(records, values, strict=True)]


def _cannot_word(where: str, error: Exception) -> DataFormatError:
    """Return the error of a record that lm-eval cannot word as a question."""
    missing, is_undefined, _ = str(error).partition(" is undefined")  # jinja's words for a field that is not there
    if is_undefined:
        return DataFormatError(f"{where}: {missing} is missing")
    return DataFormatError(f"{where}: a field is missing or holds something unexpected: {error}")


def _word(task: Any, doc: Fields, where: str) -> Item:
    """Return a question as lm-eval words it.

    Raises:
        DataFormatError: a field is missing, or the right answer is none of the choices; names the record.
    """
    try:
        prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
        choices = tuple(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else ()
    except Exception as error:  # jinja's about a field, Python's about a value
        raise _cannot_word(where, error) from error
    if not choices:
        return Item(prompt, answers=tuple(target) if isinstance(target, list) else (str(target),))
    if not isinstance(target, int) or not 0 <= target < len(choices):
        raise DataFormatError(f"{where}: the right answer must be one of {', '.join(choices)}, got {target!r}")
    return Item(prompt, choices, target)


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Return at most ``limit`` of some items, at even distances."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def task_files(source: str | Path) -> dict[str, Path]:
    """Find the tasks that a file or a folder stands for.

    Args:
        source: ``NAME=FILE``; a file whose name tells its task, such as ``cola.jsonl`` or ``piqa_valid.jsonl``; or a
            folder of such files, of which others are not read.

    Returns:
        Task to file, sorted by task.

    Raises:
        ConfigError: no such task, a name that tells none, or two files of one task in a folder.
        DataFormatError: no such file or folder.
    """
    path = Path(source)
    if "=" in str(source) and not path.exists():
        name, _, file_name = str(source).partition("=")
        if name not in TASKS:
            raise ConfigError(f"no task '{name}'; known: {', '.join(TASKS)}")
        return {name: Path(file_name)}
    if not path.exists():
        raise DataFormatError(f"{path}: no such file or folder; give a task file, a folder of them, or NAME=FILE")
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        stem = file.name.partition(".")[0]
        task = _PUBLISHED.get(stem, stem)
        if task not in TASKS:
            continue
        if task in files:
            raise ConfigError(f"{files[task]} and {file} are both of the task '{task}'; give one as {task}=FILE")
        files[task] = file
    if not files:
        raise ConfigError(f"{path}: no file name tells a task; give NAME=FILE with one of {', '.join(TASKS)}")
    return dict(sorted(files.items()))


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
    harness_tasks = {task.name: task.task for task in tasks}
    samples = ask_tasks(view, encoder, harness_tasks, batch_tokens=batch_tokens, progress=progress)
    return {task.name: _result(task, samples[task.name]) for task in tasks}


def _result(task: TaskSet, samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    """Return a task's result from lm-eval's samples."""
    metric = TASKS[task.name]["metric_list"][0]["metric"]
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    correct = [float(sample[metric]) for sample in ordered]
    chosen: list[int] = []
    for item, sample in zip(task.items, ordered, strict=True):
        if not item.choices:
            chosen.append(-1)
            continue
        scores = [log_probability for log_probability, _ in sample["filtered_resps"]]
        if metric == "acc_norm":
            scores = [score / len(choice) for score, choice in zip(scores, item.choices, strict=True)]
        chosen.append(scores.index(max(scores)))
    return TaskResult(task.name, tuple(correct), tuple(chosen), tuple(item.gold for item in task.items))
