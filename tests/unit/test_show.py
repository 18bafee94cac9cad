"""What a notebook shows: a line for each value, and a table of a few rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from kecore import Editor, load_records
from kecore.api.show import html_table, shorten
from kecore.testing.bench import FACTS
from kecore.testing.models import tiny_model, tiny_tokenizer


def test_texts_are_cut_and_escaped() -> None:
    assert shorten("a\n b") == "a b"
    assert shorten("a" * 100) == "a" * 45 + "..."
    table = html_table("<t>", ("a",), [("<b>",)] * 12)
    assert "&lt;t&gt;" in table
    assert table.count("&lt;b&gt;") == 10
    assert "... and 2 more" in table


def test_sessions_edits_records_and_scores_are_short(tmp_path: Path) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer("llama-like"))
    assert repr(editor) == "<Editor on LlamaForCausalLM, 4 layers, float32 on cpu: no edits>"
    edit = editor.edit(FACTS[0], "ft-m", steps=1)
    assert repr(edit).startswith("<WeightEdit by ft-m: 'The continent of Vinson Massif' -> 'Danube', for weights ")
    assert repr(replace(edit, requests=FACTS)).startswith("<WeightEdit by ft-m: 4 facts, for weights ")
    assert "<td style='text-align:left'>Danube</td>" in edit._repr_html_()
    assert len(repr(editor.history)) < 400
    assert repr(editor).endswith(": ft-m>")
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "{} is", "subject": "Ann", "target": "x"}] * 30), encoding="utf-8")
    records = load_records(path)
    assert repr(records) == f"<RecordSet of 30 records from {path}, layout 'kecore'>"
    assert "... and 20 more" in records._repr_html_()
    scores = editor.evaluate(FACTS[0])
    assert repr(scores).startswith("<Evaluation of 1 records by protocol ")
    assert len(repr(scores)) < 300
    assert "strict_accuracy" in scores._repr_html_()


def test_a_session_is_asked() -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer("llama-like"))
    fact = FACTS[3]
    editor.edit(fact, "ft-m", steps=40)
    assert editor.ask(fact.text, max_new_tokens=4).startswith(fact.target)
