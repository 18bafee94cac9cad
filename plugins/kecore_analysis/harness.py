"""Tasks of the Language Model Evaluation Harness on a model as it is in memory, edited or not.

Two ways lead through it. :func:`harness_scores` runs tasks that the harness brings as the harness runs them, by its own
model class. :func:`ask_tasks` runs tasks over local documents and asks the model by kecore's scoring and generation,
which apply edits of prompts too and keep within a memory budget.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kecore.api.errors import ConfigError, HubError, MissingDependencyError
from kecore.api.progress import Progress, quiet_logger, silent
from kecore.inference.generation import generate
from kecore.inference.scoring import BATCH_TOKENS, score_continuations
from kecore.text import Encoder

if TYPE_CHECKING:
    from kecore.model import ModelView

__all__ = ["ask_tasks", "check_tasks", "fit_prompt", "harness_scores", "make_task"]

_NEEDED = "tasks are worded and judged by lm-eval, which is not installed: pip install 'kecore[eval]'"


def check_tasks(tasks: Sequence[str], folder: str | Path | None = None) -> None:
    """Refuse tasks that cannot be had, before any model is run; fetches their data sets.

    Args:
        tasks: names of harness tasks.
        folder: folder with further task files.

    Raises:
        MissingDependencyError: there are tasks and lm-eval is not installed.
        ConfigError: the harness has no such task.
        HubError: a task's data set cannot be fetched.
    """
    if tasks:
        _task_manager(tuple(tasks), None if folder is None else str(folder))


@cache
def _task_manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Return lm-eval's manager of tasks, these ones loaded; they are read once, since there are thousands of files."""
    try:
        from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports] - of lm-eval
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDependencyError(_NEEDED) from error
    manager: Any = TaskManager(include_path=folder)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists its tasks")
    try:
        manager.load(list(tasks))
    except (OSError, cast("type[Exception]", DatasetsError)) as error:
        raise HubError(
            f"the data of lm-eval's {', '.join(tasks)} cannot be had: {type(error).__name__}: {error}; check the "
            "connection, or fetch it into the hub's cache where there is one"
        ) from error
    return manager


def harness_scores(
    view: ModelView,
    encoder: Encoder,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    task_folder: str | None = None,
) -> dict[str, dict[str, float]]:
    """Take each document's score on harness tasks, so that two models can be compared document by document.

    An edit of prompts is not seen by the harness, which builds its prompts itself; edits of weights and modules are.

    Args:
        view: the model.
        encoder: its tokenizer; with ``chat`` the harness applies the chat template.
        tasks: names of harness tasks.
        limit: only so many documents of each task.
        num_fewshot: examples before each question; None for the task's own number.
        batch_size: rows of one batch.
        task_folder: folder with further task files.

    Returns:
        ``task.metric`` (``task.metric,filter`` where the task filters answers in several ways) to document id and
        value. Metrics that are no number of a document, such as perplexities of whole corpora, are not in it.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        ConfigError: the harness has no such task.
        HubError: a task's data set cannot be fetched.
    """
    manager = _task_manager(tuple(tasks), task_folder)
    # By name: an extra whose functions hide their parameters behind decorators.
    evaluate: Any = import_module("lm_eval").simple_evaluate
    hflm: Any = import_module("lm_eval.models.huggingface").HFLM

    with view.frozen():
        # The harness sets padding tokens on the tokenizer it is given.
        model = hflm(pretrained=view.model, tokenizer=copy.deepcopy(encoder.tokenizer), batch_size=batch_size)
        results: Any = evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=encoder.chat,
            bootstrap_iters=0,
            log_samples=True,
        )
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for task, samples in results["samples"].items():
        filters = {sample["filter"] for sample in samples}
        for sample in samples:
            suffix = f",{sample['filter']}" if len(filters) > 1 else ""
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, bool | int | float):
                    scores[f"{task}.{metric}{suffix}"][str(sample["doc_id"])] = float(value)
    return dict(scores)


class _Documents(list[Any]):
    """Documents of a task, with the names of their fields, which lm-eval asks a data set for."""

    @property
    def features(self) -> dict[str, None]:
        """The names of the fields."""
        names: dict[str, None] = {}
        for document in self:
            names |= dict.fromkeys(document)
        return names


def make_task(name: str, config: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]) -> Any:
    """Make a task of lm-eval over documents that are at hand.

    Args:
        name: the task's name.
        config: fields of lm-eval's ``TaskConfig`` that word and judge a document.
        documents: at least one.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    try:
        task: Any = import_module("lm_eval.api.task").ConfigurableTask
    except ImportError as error:
        raise MissingDependencyError(_NEEDED) from error

    def load(**_: Any) -> dict[str, Any]:
        return {"test": _Documents(documents)}

    with quiet_logger("lm_eval"):
        return task(config={"task": name, "custom_dataset": load, "test_split": "test", **copy.deepcopy(dict(config))})


def ask_tasks(
    view: ModelView,
    encoder: Encoder,
    tasks: Mapping[str, Any],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask a model all documents of tasks, and let lm-eval judge the answers.

    Args:
        view: the model.
        encoder: decides spaces, special tokens and template.
        tasks: name to what :func:`make_task` gave.
        batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
        progress: called after each micro-batch.

    Returns:
        Name to lm-eval's samples: a mapping for each document, with its ``doc_id``, the metrics, and
        ``filtered_resps``, which are the answers.
    """
    if not tasks:
        return {}
    evaluate: Any = import_module("lm_eval.evaluator").evaluate
    model = _language_model()(view, encoder, batch_tokens, progress)
    with quiet_logger("lm_eval"):
        return evaluate(model, dict(tasks), bootstrap_iters=0, log_samples=True)["samples"]


@cache
def _language_model() -> Any:
    """Return the class of a model that lm-eval asks and kecore runs; its base class comes with lm-eval."""
    base: Any = import_module("lm_eval.api.model").LM

    class KecoreModel(base):
        def __init__(self, view: ModelView, encoder: Encoder, batch_tokens: int, progress: Progress) -> None:
            super().__init__()
            self.view, self.encoder = view, encoder
            self.options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Return the log-probability of each continuation, and whether greedy text is it."""
            pairs: list[tuple[str, str]] = []
            answers_of: dict[str, list[str]] = defaultdict(list)
            for request in requests:
                prompt, continuation = request.args
                answer = continuation.removeprefix(" ")  # the encoder puts the space between both itself
                pairs.append((prompt, answer))
                answers_of[prompt].append(answer)
            # All answers of a prompt have to follow the same text.
            texts = {prompt: fit_prompt(self.encoder, prompt, answers) for prompt, answers in answers_of.items()}
            fitted = [(texts[prompt], answer) for prompt, answer in pairs]
            scores = score_continuations(self.view, self.encoder, fitted, **self.options)
            return [(score.total, all(score.correct)) for score in scores]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Return the greedy continuation of each prompt, up to the texts that end it."""
            prompts: list[str] = []
            lengths: list[int] = []
            for request in requests:
                prompt, settings = request.args
                lengths.append(int(settings["max_gen_toks"]))
                prompts.append(fit_prompt(self.encoder, prompt, tokens=lengths[-1]))
            generations = generate(self.view, self.encoder, prompts, max_new_tokens=lengths, **self.options)
            texts: list[str] = []
            for request, generation in zip(requests, generations, strict=True):
                text = generation.text
                for end in request.args[1]["until"]:
                    text = text.partition(end)[0]
                texts.append(text)
            return texts

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError("perplexity of text is a figure of kecore's own")

    return KecoreModel


def fit_prompt(encoder: Encoder, prompt: str, answers: Sequence[str] = ("",), tokens: int = 0) -> str:
    """Return a prompt without so much of its beginning that it and what follows it fit the model's context.

    Args:
        encoder: its ``max_length`` is the context.
        prompt: the prompt.
        answers: what is put behind it.
        tokens: number of further tokens that have to fit.
    """
    context_length = encoder.max_length
    if context_length is None:
        return prompt
    unlimited = Encoder(encoder.tokenizer, chat=encoder.chat)  # refuses no text for its length
    while True:
        all_encoded = [unlimited.encode(prompt, answer) for answer in answers]
        longest = max(all_encoded, key=lambda encoded: len(encoded.ids))
        excess = len(longest.ids) + tokens - context_length
        if excess <= 0:
            return prompt
        # Characters of the prompt at which its tokens begin, without special tokens and those of the chat template.
        starts = [start - longest.shift for start, end in longest.spans if end > start >= longest.shift]
        prompt = prompt[starts[excess] :]  # a text that begins elsewhere may take other tokens, so look again
