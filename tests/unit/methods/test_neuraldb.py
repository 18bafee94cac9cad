"""NeuralDB: look-ups against a loop, and what its entries do alone, in batches, and one after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory_setting import FACT, OTHER, opened
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kecore import Editor, EditRequest, ModuleEdit
from kecore.api.errors import ConfigError
from kecore.inference import score_continuations
from kecore.model.sites import Key
from kecore_methods.memory.neuraldb import Database, NeuralDb

SAME = EditRequest("A river in {} is the", "Italy", "Danube")
CONFIG: dict[str, Any] = {"steps": 8, "contexts": 1, "context_tokens": 3, "depth_last": 0.4}


@pytest.fixture
def editor() -> Editor:
    return opened()


def mean(editor: Editor, request: EditRequest) -> float:
    return score_continuations(editor.view, editor.encoder, [(request.text, request.target)])[0].mean


class Toy(nn.Module):
    """One linear map that is called as a causal language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = nn.Linear(3, 4)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.lm(inputs_embeds)


def test_look_up_is_the_nearest_key_above_the_gate() -> None:
    generator = torch.Generator().manual_seed(0)
    model, base = Toy(), Database("lm", 5, 3, 4, 0.8)
    base.keys.copy_(torch.randn(5, 3, generator=generator))
    base.values.copy_(torch.randn(5, 4, generator=generator))
    x = torch.randn(4, 6, 3, generator=generator)
    plain = model(inputs_embeds=x)
    with base.on(model):
        found = model(inputs_embeds=x)
    hits = 0
    for row, column in torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist():
        cosines = [float(cosine_similarity(x[row, column], key, dim=0)) for key in base.keys]
        best = max(range(5), key=cosines.__getitem__)
        if cosines[best] > 0.8:
            hits += 1
            assert torch.allclose(found[row, column], plain[row, column] + base.values[best], atol=1e-6)
        else:
            assert torch.equal(found[row, column], plain[row, column])
    assert 0 < hits < 24


def test_entry_of_a_subject_is_its_key_and_adds_its_value(editor: Editor) -> None:
    """The stored key is the mean of bare prompt and context; the value raises the target where the subject ends."""
    before = mean(editor, FACT)
    edit = editor.edit([FACT, OTHER], NeuralDb, **CONFIG)
    assert isinstance(edit, ModuleEdit)
    assert isinstance(edit.effect, Database)
    assert edit.effect.keys.shape[0] == 2
    assert mean(editor, FACT) > before + 0.15
    editor.revert()
    layer = edit.notes["layers"][0]
    texts = [FACT.text, f"{edit.notes['contexts'][1]}. {FACT.text}"]
    last = editor.encoder.encode("The capital of Italy").ids
    keys = []
    for text in texts:
        ids = editor.encoder.encode(text).ids
        rows = editor.encoder.rows([ids])
        column = len(ids) - len(editor.encoder.encode(FACT.text).ids) + len(last) - 1
        keys.append(editor.view.run(rows, taps=[Key(layer)])[Key(layer)][0, column])
    assert torch.allclose(edit.effect.keys[0], torch.stack(keys).mean(0), atol=1e-4)


def test_same_subject_again_keeps_what_was_there(editor: Editor) -> None:
    """A later value is found on top of the earlier one and stored with it, under one key."""
    start = mean(editor, FACT)
    editor.edit(FACT, NeuralDb, **CONFIG)
    first = mean(editor, FACT)
    before = mean(editor, SAME)
    edit = editor.edit([SAME, OTHER], NeuralDb, **CONFIG)
    assert edit.notes["entries"] in (2, 3)
    assert mean(editor, SAME) > before + 0.15
    assert mean(editor, FACT) > start + 0.5 * (first - start)
    editor.revert()
    assert math.isclose(mean(editor, FACT), first, abs_tol=1e-6)


def test_stages_and_layers_that_do_not_fit_are_refused(editor: Editor) -> None:
    with pytest.raises(ConfigError, match="no update of a weight"):
        editor.edit(FACT, NeuralDb, stages="rect", **CONFIG)
    editor.edit(FACT, NeuralDb, **{**CONFIG, "layers": (1,)})
    with pytest.raises(ConfigError, match="at layer 1, not 2"):
        editor.edit(OTHER, NeuralDb, **{**CONFIG, "layers": (2,)})
