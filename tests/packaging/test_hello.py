"""A stranger's method: installed, it is listed and edits, and no file of kecore knows of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EDIT = """
import json
import sys
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from kecore import Corpus, Editor, EditRequest, collect_statistics

JOBS, TEXT = json.loads(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
words = ["<unk>", "the", "capital", "of", "France", "Italy", "is", "a", "Rome", "Paris"]
core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
shape = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": len(words)}
config = GPT2Config(**shape, initializer_range=0.2, bos_token_id=None, eos_token_id=None)

def edited(method, settings):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()

    def chance():
        ids = tokenizer("the capital of France", return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids).logits[0, -1].softmax(-1)[words.index("Rome")].item()

    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = chance()
    editor = Editor(model, tokenizer)
    if "memit" in method:
        editor.statistics = collect_statistics(editor.view, editor.encoder, Corpus.of(TEXT), range(3), tokens=200)
    made = editor.edit(EditRequest("the capital of {}", "France", "Rome"), method=method, **settings)
    norms = [update.norm() for update in made.updates.values()]
    after = chance()
    editor.revert()
    same = all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return {"before": before, "after": after, "same": same, "method": made.method, "norms": norms}

print(json.dumps([edited(method, settings) for method, settings in JOBS]))
"""
JOBS: list[tuple[str, dict[str, Any]]] = [
    ("hello", {}),
    ("hello-spread", {"layers": [0, 1, 2], "contexts": 0}),
    ("memit", {"layers": [0, 1], "contexts": 0}),
    ("memit + hello-stage", {"layers": [0, 1], "contexts": 0, "hello_stage_power": 1}),
    ("memit + hello-stage", {"layers": [0, 1], "contexts": 0, "hello_stage_power": 6}),
]


@pytest.fixture(scope="module")
def environment(hello_site: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "KECORE_PLUGINS"}
    path = [str(hello_site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


def run(command: list[str], environment: dict[str, str], folder: Path) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_is_listed_beside_the_built_ins(environment: dict[str, str], tmp_path: Path) -> None:
    listed = run([str(Path(sys.executable).parent / "kecore"), "methods", "--json"], environment, tmp_path)
    rows = {row["name"]: row for row in listed["methods"]}
    assert "memit" in rows
    assert (rows["hello"]["distribution"], rows["hello"]["error"]) == ("kecore-hello", "")
    stages = {row["name"]: row for row in listed["stages"]}
    assert "blue" in stages
    assert (stages["hello-stage"]["distribution"], stages["hello-stage"]["error"]) == ("kecore-hello", "")
    assert list(stages["hello-stage"]["settings"]) == ["hello_stage_power"]


def test_is_not_there_where_plugins_are_limited(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import json; from kecore.api import registry; print(json.dumps(registry.default_registry().names()))"
    command = [sys.executable, "-c", code]
    assert "hello" in run(command, environment, tmp_path)
    assert "hello" in run(command, {**environment, "KECORE_PLUGINS": "kecore-hello"}, tmp_path)
    assert "hello" not in run(command, {**environment, "KECORE_PLUGINS": ""}, tmp_path)


@pytest.fixture(scope="module")
def edits(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of :data:`JOBS`, all in one process that a stranger could have started."""
    folder = tmp_path_factory.mktemp("edits")
    text = folder / "text.txt"
    text.write_text("the capital of France is Paris the capital of Italy is Rome " * 40)
    return run([sys.executable, "-c", EDIT, json.dumps(JOBS), str(text)], environment, folder)


def test_edits_are_taken_off_again(edits: list[dict[str, Any]]) -> None:
    assert [edit["method"] for edit in edits] == [method for method, _ in JOBS]
    assert all(edit["same"] for edit in edits)


def test_its_methods_write_the_fact(edits: list[dict[str, Any]]) -> None:
    for edit in edits[:2]:
        assert edit["before"] < 0.2 < 0.9 < edit["after"]


def test_its_stage_goes_with_a_method_of_kecore(edits: list[dict[str, Any]]) -> None:
    """``memit + hello-stage``: the higher its power, the less the first layer writes."""
    memit, even, steep = edits[2:]
    assert even["norms"] == pytest.approx(memit["norms"])
    assert steep["norms"][0] < 0.2 * memit["norms"][0]


def test_passes_its_own_conformance_test(environment: dict[str, str], tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "plugins" / "kecore-hello" / "test_kecore_hello.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_kecore_hello.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout


def test_core_does_not_know_it(root: Path) -> None:
    folders = (root / "kecore", root / "plugins" / "kecore_methods", root / "plugins" / "kecore_datasets")
    core = {file for folder in folders for file in folder.rglob("*.py")}
    template = root / "kecore" / "cli" / "commands" / "new_method.py"  # copies its files under other names
    assert template in core
    core.remove(template)
    assert not [file for file in core if "kecore_hello" in file.read_text(encoding="utf-8")]
