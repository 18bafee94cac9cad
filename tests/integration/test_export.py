"""What is exported of a real edit does what the edit does, in peft, transformers and llama.cpp alone.

The demo model is itself unpacked from a GGUF file of four-bit matrices.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kecore import Editor, EditRequest, WeightEdit, load_model, models
from kecore.models import LoadedModel
from kecore.serving import Verification, export_edits, verify_export
from kecore.serving.adapter import reduced

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(models.demo_file() is None, reason=models.DEMO_MISSING),
]

FACTS = (
    EditRequest("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    EditRequest("The capital of {} is", "Japan", "Kyoto", "Tokyo"),
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def edit(demo: LoadedModel) -> WeightEdit:
    """A real edit in eight columns."""
    with Editor(demo.model, demo.tokenizer, statistics=None) as editor:
        full = editor.edit(FACTS, "ft-m")
    assert isinstance(full, WeightEdit)
    assert full.model == "demo"
    return reduced(full, 8)


@pytest.mark.parametrize(
    ("to", "package", "program"),
    [("peft", "peft", "peft"), ("merged", "transformers", "transformers"), ("gguf", "xllamacpp", "llama.cpp")],
)
def test_the_other_program_says_what_the_edit_says(
    demo: LoadedModel, edit: WeightEdit, tmp_path: Path, to: str, package: str, program: str
) -> None:
    pytest.importorskip(package)
    exported = export_edits([edit], tmp_path / "out", to)
    found = verify_export(demo, [edit], exported)
    said = {"prompts": 2, "same_text": 2, "changed_text": 2, "said_target": 2}
    assert found == Verification(program, difference=found.difference, **said)
    assert found.holds
