"""Metrics of free text on cases worked out by hand, and libraries against their definitions."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
from hand_scores import probe
from make_records import make_record
from tiny_worlds import World, make_world

from kecore import data
from kecore.api.errors import MissingDependencyError, ModelLoadError
from kecore.api.types import EditRecord, EditRequest
from kecore.corpus import Corpus
from kecore.evaluate import Protocol, evaluate
from kecore_metrics import texts
from kecore_metrics.texts import CONSISTENCY, ROUGE, fluency, ngram_entropy, rouge_l, tfidf_similarity, words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Rome is big.", ["Rome", "is", "big", "."]),
        ("罗马在Italy", ["罗", "马", "在", "Italy"]),
        ("e\u0301te\u0301 42", ["été", "42"]),
        ("  ", []),
    ],
)
def test_words(text: str, parts: list[str]) -> None:
    assert words(text) == parts


def test_entropy_by_hand() -> None:
    # a b a b a: bigrams ab 2, ba 2: one bit; trigrams aba 2, bab 1.
    tokens = list("ababa")
    third = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(tokens, 2) == pytest.approx(1)
    assert ngram_entropy(tokens, 3) == pytest.approx(third)
    assert fluency("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * third) / 2)
    assert ngram_entropy(tokens[:1], 2) == ngram_entropy([], 3) == ngram_entropy(["a"] * 9, 2) == 0


def test_varied_text_is_more_fluent_than_a_loop_in_any_script() -> None:
    assert fluency("the capital of Italy lies on the Tiber") > fluency("Rome Rome Rome Rome Rome Rome Rome")
    assert fluency("意大利的首都位于台伯河畔") > fluency("罗马罗马罗马罗马罗马罗马")


def test_passages_are_measured_with_their_prompt() -> None:
    found = texts.FLUENCY.value(probe("generation", prompt="Rome is", text="a city"), Protocol())
    assert found == fluency("Rome is a city")
    assert texts.FLUENCY.value(probe("generation"), Protocol()) is None


def _tfidf(text: str, weights: dict[str, float], rarest: float) -> dict[str, float]:
    counts = Counter(words(text.casefold()))
    values = {word: n * weights.get(word, rarest) for word, n in counts.items()}
    length = math.sqrt(sum(v * v for v in values.values()))
    return {word: v / length for word, v in values.items()}


def test_tfidf_is_its_definition() -> None:
    pytest.importorskip("sklearn")
    passages = list(Corpus.of(data.path("wikipedia_sample.jsonl.gz")).passages())
    seen = Counter(word for passage in passages for word in {*words(passage.casefold())})
    weights = {word: math.log((1 + len(passages)) / (1 + n)) + 1 for word, n in seen.items()}
    rarest = math.log(1 + len(passages)) + 1
    one, other = "Darrieux speaks French in Paris, the capital", "The French actress Danielle Darrieux lived in Paris"
    a, b = (_tfidf(text, weights, rarest) for text in (one, other))
    assert tfidf_similarity(one, other) == pytest.approx(sum(v * b.get(w, 0) for w, v in a.items()), abs=1e-6)
    assert tfidf_similarity(one, one) == pytest.approx(1)
    assert tfidf_similarity("罗马", "东京") == 0
    assert tfidf_similarity("", other) == 0


def test_consistency_joins_passages_and_references() -> None:
    pytest.importorskip("sklearn")
    group = [probe("generation", prompt=f"{c} is", text="in Rome", answers=("It is Rome.", "Rome!")) for c in "ab"]
    bare = [probe("generation", prompt="c", text="d", answers=())]
    (one, two), (none,) = CONSISTENCY.whole([group, bare], Protocol())  # type: ignore[misc]
    assert one == two == tfidf_similarity("a is in Rome b is in Rome", "It is Rome. Rome!")
    assert none is None


def test_rouge_by_hand() -> None:
    pytest.importorskip("torchmetrics")
    # The longest common subsequence of 5 and 4 words has 3: precision 3/5, recall 3/4.
    assert rouge_l("the city of Rome fell", "The fall of Rome") == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert rouge_l("罗马是首都", "首都是罗马") == pytest.approx(2 / 5)
    assert rouge_l("", "Rome") == 0


def test_rouge_takes_the_best_answer() -> None:
    pytest.importorskip("torchmetrics")
    group = [probe("edit", text="Rome", answers=("Paris", "Rome")), probe("edit", text=None, answers=("Rome",))]
    assert ROUGE[0].whole([group], Protocol()) == [[1.0, None]]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("sklearn.feature_extraction.text", lambda: tfidf_similarity("a", "b")),
        ("torchmetrics.functional.text", lambda: rouge_l("a", "b")),
        ("torchmetrics.functional.text", lambda: texts.bert_score(["a"], ["b"])),
    ],
)
def test_missing_libraries_name_the_extra(monkeypatch: pytest.MonkeyPatch, module: str, call: object) -> None:
    texts._weights.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"kecore\[metrics\]"):
        call()  # type: ignore[operator]


def test_bertscore_without_its_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(texts, "BERTSCORE_MODEL", "nobody/has-no-such-encoder")
    with pytest.raises(ModelLoadError, match="nobody/has-no-such-encoder"):
        texts.bert_score(["a"], ["b"])


def test_bertscore_gives_each_probe_its_best_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {("Rome", "Paris"): 0.25, ("Rome", "Roma"): 0.75, ("b", "c"): -0.5}
    monkeypatch.setattr(texts, "bert_score", lambda a, b: [values[pair] for pair in zip(a, b, strict=True)])
    groups = [
        [probe("edit", text="Rome", answers=("Paris", "Roma")), probe("edit", text=None, answers=("x",))],
        [],
        [probe("edit", text="b", answers=("c",))],
    ]
    assert texts._bert_score(groups, Protocol()) == [[0.75, None], [], [-0.5]]


def test_bertscore_of_a_tiny_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    pytest.importorskip("torchmetrics")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "rome", "is", "a", "city", "paris"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))  # type: ignore[operator]
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)  # type: ignore[operator]
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocab), **small)).save_pretrained(tmp_path)
    monkeypatch.setattr(texts, "BERTSCORE_MODEL", str(tmp_path))
    same, other = texts.bert_score(["rome is a city", "rome"], ["rome is a city", "paris is a city"])
    assert same == pytest.approx(1, abs=1e-5)
    assert other < same


RECORD = make_record(
    EditRequest("The capital of {} is", "France", "Rome", "Paris", id="a"),
    generation_prompts=("France is", "The Danube"),
)


def test_records_without_references_are_counted() -> None:
    pytest.importorskip("sklearn")
    world: World = make_world("byte-level")
    with_one = make_record(RECORD.request, generation_prompts=("Rome is",), references=("Rome is the capital.",))
    found = evaluate(
        world.view, world.encoder, [RECORD, with_one.with_id("b")], Protocol(max_new_tokens=0, extra=("consistency",))
    )
    assert found.scores["consistency"].records == 1
    assert found.skipped["consistency"] == 1
    assert 0 < found.scores["consistency"].value < 1


def test_without_generation_prompts_the_edit_is_continued() -> None:
    world: World = make_world("byte-level")
    bare = EditRecord(RECORD.request)
    protocol = Protocol(max_new_tokens=0, extra=("fluency",))
    found = evaluate(world.view, world.encoder, [bare], protocol)
    (passage,) = [p for p in found.rows[0].probes if p.kind == "generation"]
    assert passage.prompt == "The capital of France is"
    assert found.scores["fluency"].value == fluency(f"{passage.prompt} {passage.text}") > 0
    assert "fluency" not in found.skipped


def test_passages_do_not_depend_on_the_batch_and_follow_the_seed() -> None:
    world: World = make_world("llama")

    def passages(records: list[EditRecord], seed: int, tokens: int) -> list[str | None]:
        protocol = Protocol(max_new_tokens=0, extra=("fluency",), seed=seed)
        found = evaluate(world.view, world.encoder, records, protocol, batch_tokens=tokens)
        return [p.text for p in found.rows[0].probes if p.kind == "generation"]

    other = make_record(RECORD.request, generation_prompts=("Paris", "Vienna is located in the city of")).with_id("b")
    assert passages([RECORD], 0, 1) == passages([RECORD, other], 0, 4096)
    assert passages([RECORD], 0, 4096) != passages([RECORD], 1, 4096)
