"""Tasks of the Language Model Evaluation Harness on a model as it is in memory, edited or not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kecore.api.errors import ConfigError, HubError, MissingDependencyError

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["check_tasks", "harness_scores"]


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
        _checked(tuple(tasks), None if folder is None else str(folder))


@cache
def _checked(tasks: tuple[str, ...], folder: str | None) -> Any:
    """What finds the tasks; they are read once, since there are thousands of files."""
    try:
        from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports] - of lm-eval
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise MissingDependencyError("harness tasks need lm-eval: pip install 'kecore[eval]'") from error
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
    """Each document's score on harness tasks, so that two models can be compared document by document.

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
    manager = _checked(tuple(tasks), task_folder)
    # By name: an extra whose functions hide their parameters behind decorators.
    evaluate: Any = import_module("lm_eval").simple_evaluate
    hflm: Any = import_module("lm_eval.models.huggingface").HFLM

    with view.frozen():
        # The harness sets padding tokens on the tokenizer it is given.
        model = hflm(pretrained=view.model, tokenizer=copy.deepcopy(encoder.tokenizer), batch_size=batch_size)
        found: Any = evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=encoder.chat,
            bootstrap_iters=0,
            log_samples=True,
        )
    scores: dict[str, dict[str, float]] = {}
    for task, samples in found["samples"].items():
        filters = {sample["filter"] for sample in samples}
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, bool | int | float):
                    name = f"{task}.{metric}" + (f",{sample['filter']}" if len(filters) > 1 else "")
                    scores.setdefault(name, {})[str(sample["doc_id"])] = float(value)
    return scores
