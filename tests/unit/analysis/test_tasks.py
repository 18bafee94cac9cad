"""Task sets: the published layouts, and answers against one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from slow_reference import greedy, log_probs
from tiny_worlds import World, make_world

from kecore.api.errors import ConfigError, DataFormatError
from kecore.evaluate.matching import normalise
from kecore.text import Encoder
from kecore_analysis.harness import fit_prompt
from kecore_analysis.tasks import TASKS, Item, TaskResult, TaskSet, load_task, run_tasks, task_files

RECORDS: dict[str, dict[str, Any]] = {
    "cola": {"sentence": "The jury was.", "label": 0, "idx": 1},
    "mrpc": {"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 1},
    "rte": {"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 1},
    "nli": {"index": "1", "sentence1": "A.", "sentence2": "B.", "label": "not_entailment"},
    "sst2": {"sentence": "good ", "label": 1, "idx": 3},
    "sentiment_analysis": {"sentence": "good ", "label": "1"},
    "dialogue": {"answers": "B", "options": ["f : yes", "f : no"], "article": "m : is it?"},
    "mmlu": {"question": "4 x 9? ", "subject": "maths", "choices": ["13 ", "36"], "answer": 1},
    "boolq": {"question": "is it", "title": "t", "answer": True, "passage": "It is."},
    "gsm8k": {"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 1,004"},
    "nq": {"question": "who was it?", "answer": ["Röntgen"], "output": [""]},
    "piqa": {"goal": "sit", "sol1": "chair ", "sol2": "wall"},
}
READ = {
    "cola": Item("The jury was.\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes"), 0),
    "mrpc": Item(
        "Sentence 1: A.\nSentence 2: B.\nQuestion: Do both sentences mean the same thing?\nAnswer:", ("no", "yes"), 1
    ),
    "rte": Item("A.\nQuestion: B. True or False?\nAnswer:", ("True", "False"), 1),
    "nli": Item("A.\nQuestion: B. True or False?\nAnswer:", ("True", "False"), 1),
    "sst2": Item("good\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive"), 1),
    "sentiment_analysis": Item(
        "good\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive"), 1
    ),
    "dialogue": Item("m : is it?", ("f : yes", "f : no"), 1),
    "mmlu": Item("4 x 9?\nA. 13\nB. 36\nAnswer:", ("A", "B"), 1),
    "boolq": Item("It is.\nQuestion: is it?\nAnswer:", ("no", "yes"), 1),
    "gsm8k": Item("Question: How many?\nAnswer:", answers=("1,004",)),
    "nq": Item("Q: who was it?\nA:", answers=("Röntgen",)),
    "piqa": Item("Question: sit\nAnswer:", ("chair", "wall"), 1),
}


def test_every_task_is_read(tmp_path: Path) -> None:
    assert set(RECORDS) == set(READ) == set(TASKS)
    (tmp_path / "piqa-labels.lst").write_text("1\n")
    for name, record in RECORDS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
        assert load_task(name, tmp_path / f"{name}.jsonl").items == (READ[name],)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cola", {"label": 2}, r"line 2: the right answer must be one of no, yes, got 2"),
        ("nli", {"label": "maybe"}, r"line 2: a field is missing or holds .*: 'maybe' is not in list"),
        ("boolq", {"passage": None}, r"line 2: 'passage' is missing"),
        ("mmlu", {"answer": 4}, r"line 2: the right answer must be one of A, B, got 4"),
    ],
)
def test_bad_records_name_place_and_field(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    lines = [json.dumps(record) for record in (RECORDS[name], {**RECORDS[name], **change})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataFormatError, match=message):
        load_task(name, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(lines[1])
    with pytest.raises(DataFormatError, match=r"line 1: .* (is missing|holds something unexpected)"):
        load_task(name, tmp_path / "a.jsonl")


def test_other_bad_input(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(json.dumps(RECORDS["piqa"]) + "\n")
    with pytest.raises(DataFormatError, match=r"piqa-labels\.lst"):
        load_task("piqa", tmp_path / "piqa.jsonl")
    (tmp_path / "piqa-labels.lst").write_text("1\n0\n")
    with pytest.raises(DataFormatError, match="2 labels for 1 records"):
        load_task("piqa", tmp_path / "piqa.jsonl")
    with pytest.raises(ConfigError, match="known: cola"):
        load_task("chess", tmp_path / "piqa.jsonl")
    with pytest.raises(ConfigError, match="limit"):
        load_task("piqa", tmp_path / "piqa.jsonl", limit=0)


def test_a_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    lines = [json.dumps({"sentence": str(i), "label": 0}) for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = load_task("sst2", tmp_path / "a.jsonl", limit=3).items
    assert [item.prompt[0] for item in found] == ["0", "3", "6"]


def test_files_tell_their_task(tmp_path: Path) -> None:
    for name in ("cola.jsonl", "natural_questions.jsonl.gz", "piqa_valid.jsonl", "piqa_valid-labels.lst", "notes.md"):
        (tmp_path / name).touch()
    found = {name: tmp_path / file for name, file in
             (("cola", "cola.jsonl"), ("nq", "natural_questions.jsonl.gz"), ("piqa", "piqa_valid.jsonl"))}  # fmt: skip
    assert task_files(tmp_path) == found
    assert task_files(str(found["nq"])) == {"nq": found["nq"]}
    assert task_files(f"sst2={found['cola']}") == {"sst2": found["cola"]}
    (tmp_path / "cola.json").touch()
    with pytest.raises(ConfigError, match="both of the task 'cola'"):
        task_files(tmp_path)
    for source, message in (("chess=a.jsonl", "known: cola"), (tmp_path / "notes.md", "no file name tells a task")):
        with pytest.raises(ConfigError, match=message):
            task_files(source)
    with pytest.raises(DataFormatError, match="no such file or folder"):
        task_files(tmp_path / "glue")


QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "mmlu": [
        {"question": f"The capital of {country} is", "choices": ["Rome", "Paris and Berlin"], "answer": 1}
        for country in ("France", "Italy")
    ],
    "dialogue": [
        {
            "article": "The Danube flows to",
            "options": ["the Black Sea, not to Berlin", "Rome", "Vienna"],
            "answers": "C",
        }
    ],
    "nq": [{"question": "where", "answer": ["Rome"]}, {"question": "The mother tongue of", "answer": "a"}],
}


def load_questions(folder: Path) -> list[TaskSet]:
    for name, records in QUESTIONS.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return [load_task(name, folder / f"{name}.json") for name in QUESTIONS]


@pytest.mark.parametrize("family", ["byte-level", "llama"])
def test_equals_one_prompt_at_a_time(family: str, tmp_path: Path) -> None:
    world: World = make_world(family)
    model, tokenizer = world.view.model, world.encoder.tokenizer
    sets = load_questions(tmp_path)
    found = run_tasks(world.view, world.encoder, sets, batch_tokens=64)
    for task in sets[:2]:
        for i, item in enumerate(task.items):
            values = [sum(log_probs(model, tokenizer, item.prompt, choice)[0]) for choice in item.choices]
            if task.name == "dialogue":
                values = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
            assert found[task.name].chosen[i] == values.index(max(values))
            assert found[task.name].correct[i] == (found[task.name].chosen[i] == item.gold)
    for item, right in zip(sets[2].items, found["nq"].correct, strict=True):
        text = tokenizer.decode(greedy(model, tokenizer, item.prompt, 32), skip_special_tokens=True)
        first = normalise(text.strip().partition("\n")[0])
        assert right == (first in [normalise(answer) for answer in item.answers])
    assert found["nq"].f1 is None


def test_long_prompts_lose_their_beginning() -> None:
    short = Encoder(make_world("llama").encoder.tokenizer, max_length=12)
    end = "the capital of France is"
    prompt = "Where does the Danube flow? It flows to the Black Sea, not to Vienna! " + end
    fitted = fit_prompt(short, prompt, ["Rome", "Paris"])
    assert prompt.endswith(fitted)
    assert fitted.endswith(end)
    assert len(fitted) < len(prompt)
    assert max(len(short.encode(fitted, answer).ids) for answer in ("Rome", "Paris")) <= 12


def judge(folder: Path, name: str, record: dict[str, Any], text: str) -> bool:
    """Whether lm-eval takes a text for the right answer of a task's only question."""
    (folder / f"{name}.json").write_text(json.dumps([record]))
    task = load_task(name, folder / f"{name}.json").task
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        instance.resps = [text]
    task.apply_filters()
    (key,) = task.instances[0].filtered_resps
    return bool(task.process_results(task.instances[0].doc, [task.instances[0].filtered_resps[key]])["exact_match"])


@pytest.mark.parametrize(
    ("text", "right"),
    [("2 and 2 are 4, so 1004.", True), ("$1,004", True), ("1004.0", True), ("1004 or 7", False), ("none", False)],
)
def test_the_last_number_counts(tmp_path: Path, text: str, right: bool) -> None:
    assert judge(tmp_path, "gsm8k", RECORDS["gsm8k"], text) is right


@pytest.mark.parametrize(("text", "right"), [("the Rome.", True), ("Rome, Italy", False), ("Roma", True)])
def test_free_answers_match_exactly_after_normalisation(tmp_path: Path, text: str, right: bool) -> None:
    assert judge(tmp_path, "nq", {"question": "where", "answer": ["Rome", "Roma"]}, text) is right


def test_scores_by_hand() -> None:
    found = TaskResult("x", (1.0, 1.0, 0.0, 0.0), (0, 1, 1, 1), (0, 1, 0, 0))
    assert found.accuracy == 0.5
    # Class 0: precision 1, recall 1/3, F1 1/2, share 3/4. Class 1: precision 1/3, recall 1, F1 1/2, share 1/4.
    assert found.f1 == pytest.approx(0.5)
    skewed = TaskResult("x", (1.0, 0.0, 1.0), (0, 1, 1), (0, 0, 1))
    assert skewed.f1 == pytest.approx(2 / 3 * (2 * 1 / 3) + 1 / 3 * (2 * 1 / 3))
