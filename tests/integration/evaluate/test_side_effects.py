"""Side effects on real files and through the real harness, as far as they are at hand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from slow_reference import log_probs
from tiny_worlds import World, edited, make_world

from kecore.api.errors import ConfigError, HubError
from kecore.corpus import Corpus
from kecore_analysis.harness import check_tasks, harness_scores
from kecore_analysis.health import Checkup, changes
from kecore_analysis.tasks import load_task, task_files

FILES = {
    "cola": ("glue_eval/cola.jsonl", 644, 0.5),
    "mrpc": ("glue_eval/mrpc.jsonl", 258, 0.5),
    "rte": ("glue_eval/rte.jsonl", 262, 0.5),
    "nli": ("glue_eval/nli.jsonl.gz", 2489, 1240 / 2489),
    "sst2": ("glue_eval/sst2.jsonl", 856, 428 / 856),
    "sentiment_analysis": ("glue_eval/sentiment_analysis.jsonl", 872, 444 / 872),
    "dialogue": ("glue_eval/dialogue.jsonl.gz", 886, None),
    "mmlu": ("glue_eval/mmlu.jsonl.gz", 1516, None),
    "boolq": ("general/boolq.jsonl.gz", 3267, 2031 / 3267),
    "piqa": ("general/piqa_valid.jsonl", 1838, None),
    "gsm8k": ("general/gsm8k.jsonl.gz", 1319, None),
    "nq": ("general/natural_questions.jsonl.gz", 3610, None),
}


@pytest.mark.parametrize("name", FILES)
def test_published_task_files(shared_data: Path, name: str) -> None:
    file, count, ones = FILES[name]
    items = load_task(name, shared_data / file).items
    assert len(items) == count
    assert all(item.prompt.strip() and (item.choices or item.answers) for item in items)
    assert all(0 <= item.gold < max(len(item.choices), 1) for item in items)
    if ones is not None:
        assert sum(item.gold for item in items) / count == pytest.approx(ones)
    assert len(load_task(name, shared_data / file, limit=7).items) == 7


def test_a_folder_of_task_files_leaves_none_out(shared_data: Path) -> None:
    folder = shared_data / "glue_eval"
    assert set(task_files(folder).values()) == set(folder.iterdir())


def test_texts_of_the_alarm_for_collapse(shared_data: Path) -> None:
    assert len(list(Corpus.of(shared_data / "general/ME-PPL_1k.json").passages())) == 1000


DOCUMENTS = [
    {"q": "The capital of France is", "a": ["Rome", "Paris"], "gold": 1},
    {"q": "The Danube flows to", "a": ["the Black Sea", "Berlin"], "gold": 0},
    {"q": "The mother tongue of Apollo is", "a": ["French", "Greek"], "gold": 1},
]
TASK = """\
task: kecore_capitals
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{a}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without the thousands of tasks that it brings, which take a dozen seconds to be listed."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.mark.usefixtures("harness")
def test_harness_task_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.format(file=tmp_path / "documents.jsonl"))
    world: World = make_world("byte-level", torch.float32)
    pads = world.encoder.tokenizer.pad_token
    looks = []
    for model in (world, edited(world)):
        found = harness_scores(
            model.view, model.encoder, ["kecore_capitals"], task_folder=str(tmp_path / "tasks"), batch_size=2
        )
        looks.append(found)
        tokenizer = model.encoder.tokenizer
        for i, document in enumerate(DOCUMENTS):
            totals = [sum(log_probs(model.view.model, tokenizer, document["q"], a)[0]) for a in document["a"]]
            assert found["kecore_capitals.acc"][str(i)] == (totals.index(max(totals)) == document["gold"])
    assert world.encoder.tokenizer.pad_token == pads
    change = changes(Checkup(harness=looks[0]), Checkup(harness=looks[1]))["kecore_capitals.acc"]
    assert change.items == 3


@pytest.mark.usefixtures("harness")
def test_harness_tasks_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task 'boolqq'"):
        check_tasks(["boolqq"])
    (tmp_path / "gone.yaml").write_text(TASK.format(file=tmp_path / "gone.jsonl"))
    with pytest.raises(HubError, match=r"lm-eval's kecore_capitals cannot be had: .*gone\.jsonl"):
        check_tasks(["kecore_capitals"], tmp_path)
