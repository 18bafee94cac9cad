"""Where a session gets key statistics from: the cache, a text, a file, or the user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kecore import Corpus, Editor, EditRequest, KeyStatistics
from kecore._version import __version__
from kecore.api import errors, registry
from kecore.api.identity import Fingerprint
from kecore.api.requirements import statistics_layers
from kecore.files import cache_dir
from kecore.model import SiteId
from kecore.statistics_source import Provision, StatisticsSource
from kecore.testing import tiny_model, tiny_tokenizer

PARIS = EditRequest("{} is in the city of", "The tower", "Rome", "Paris")
FAST = {"steps": 2, "contexts": 1, "context_tokens": 2}
TOKENS = 1500


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(200)))
    return file


@pytest.fixture
def source(text: Path) -> StatisticsSource:
    return StatisticsSource(texts=(str(text),), tokens=TOKENS)


def session(**options: Any) -> Editor:
    return Editor(tiny_model("llama"), tiny_tokenizer(), **options)


def test_an_edit_needs_nothing_else() -> None:
    stages: list[tuple[str, int, int]] = []
    editor = session(progress=lambda *step: stages.append(step))
    assert editor.statistics is None
    editor.edit(PARIS, "memit", **FAST)
    assert editor.statistics is not None
    assert editor.statistics.layers == editor.statistics_layers("memit")
    assert [Path(name).name for name in editor.statistics.sources] == ["wikipedia_sample.jsonl.gz"]
    steps = [(done, total) for stage, done, total in stages if stage == "statistics"]
    assert steps[0] == (0, editor.statistics.tokens)
    assert steps[-1] == (editor.statistics.tokens, editor.statistics.tokens)


def test_the_same_statistics_are_collected_once(source: StatisticsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    provisions: list[Provision] = []
    first = session(statistics=source).provide_statistics([1, 2], provisions.append)
    monkeypatch.setattr("kecore.statistics.collect_statistics", lambda *_a, **_o: pytest.fail("collected again"))
    again = session(statistics=source).provide_statistics([2, 1], provisions.append)
    assert again.moment(SiteId(1)).equal(first.moment(SiteId(1)))
    assert [provision.cached for provision in provisions] == [False, True]
    assert {(provision.layers, provision.tokens) for provision in provisions} == {((1, 2), TOKENS)}


def test_the_cache_is_keyed_as_it_always_was(source: StatisticsSource, text: Path) -> None:
    """Whoever has statistics in the cache finds them there after an update of the code."""
    editor = session(statistics=source, seed=3)
    editor.provide_statistics([0, 2])
    weights = {"dtype": editor.base.dtype, **editor.base.digests}
    corpus = hashlib.sha256(text.read_text().replace("\n", "").encode()).hexdigest()[:32]
    identity = [weights, corpus, [0, 2], TOKENS, 3, __version__]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    assert [path.name for path in (cache_dir() / "statistics").iterdir()] == [key]


def test_the_text_is_read_once(source: StatisticsSource, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[Corpus] = []
    passages = Corpus.passages

    def counted(corpus: Corpus) -> Iterator[str]:
        readings.append(corpus)
        return passages(corpus)

    monkeypatch.setattr(Corpus, "passages", counted)
    session(statistics=source).provide_statistics([1])
    assert len(readings) == 1


def test_what_another_method_reads_beside_is_provided(source: StatisticsSource) -> None:
    editor = session(statistics=source)
    editor.edit(PARIS, "memit", layers=[1], **FAST)
    editor.edit(PARIS, "rome", layers=[2], **FAST)
    assert editor.statistics is not None
    assert editor.statistics.layers == (2,)
    assert editor.statistics_needs([2]) == []
    assert [need.stage for need in editor.statistics_needs([1, 2])] == ["statistics"]


def test_statistics_that_were_given_are_not_added_to(source: StatisticsSource) -> None:
    given = session(statistics=source).provide_statistics([1])
    editor = session(statistics=given)
    editor.edit(PARIS, "memit", layers=[1], **FAST)
    with pytest.raises(errors.StatisticsMismatchError, match=r"no statistics for layer 2; these cover \[1\]"):
        editor.edit(PARIS, "memit", layers=[2], **FAST)


def test_statistics_are_of_the_model_without_its_edits(source: StatisticsSource) -> None:
    untouched = session(statistics=source).provide_statistics([2])
    editor = session(statistics=source)
    editor.edit(PARIS, "ft-m", layer=1, steps=2)
    edited = {name: weight.clone() for name, weight in editor.model.named_parameters()}
    cached = next((cache_dir() / "statistics").iterdir()) / "statistics.safetensors"
    cached.unlink()
    assert editor.provide_statistics([2]).moment(SiteId(2)).equal(untouched.moment(SiteId(2)))
    assert all(weight.equal(edited[name]) for name, weight in editor.model.named_parameters())


def test_a_path_and_a_saved_source_are_read(source: StatisticsSource, tmp_path: Path) -> None:
    file = session(statistics=source).provide_statistics([1]).save(tmp_path / "saved")
    assert session(statistics=str(file)).statistics is not None
    editor = session(statistics=StatisticsSource(saved=file.parent))
    editor.edit(PARIS, "memit", layers=[1], **FAST)
    with pytest.raises(errors.StatisticsMismatchError, match="covers layers 1, the method edits 0, 1"):
        editor.edit(PARIS, "memit", layers=[0, 1], **FAST)
    other = Editor(tiny_model("llama", seed=1), tiny_tokenizer(), statistics=StatisticsSource(saved=file))
    with pytest.raises(errors.StatisticsMismatchError, match="other weights"):
        other.edit(PARIS, "memit", layers=[1], **FAST)


def test_files_that_are_not_there_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactError, match="no such file or directory"):
        StatisticsSource(saved=tmp_path / "nowhere").check()
    with pytest.raises(errors.DataFormatError, match="no such text file"):
        StatisticsSource(texts=(str(tmp_path / "nowhere.txt"),)).check()
    StatisticsSource().check()


def test_a_broken_cache_is_collected_anew(source: StatisticsSource) -> None:
    session(statistics=source).provide_statistics([1])
    file = next((cache_dir() / "statistics").iterdir()) / "statistics.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.warns(errors.KecoreWarning, match="cached key statistics cannot be read"):
        session(statistics=source).provide_statistics([1])
    assert KeyStatistics.load(file).tokens == TOKENS


def test_a_configuration_says_which_layers_it_reads() -> None:
    view = session(statistics=None).view

    def layers(method: str, **config: Any) -> tuple[int, ...]:
        cls = registry.default_registry().get(method)
        return statistics_layers(cls, cls.Config.make(config), view)

    assert layers("memit", layers=[2, 0, 1]) == (0, 1, 2)
    assert layers("emmet", layers=[0, 2]) == (0, 2)
    assert len(layers("emmet")) == 1
    assert layers("rome", layers=[0, 2]) == (2,)
    assert layers("rome", layers=[0, 2], second_moment=False) == ()
    assert layers("ft-m") == ()


def test_a_method_that_does_not_say_reads_every_layer() -> None:
    from kecore.api.config import MethodConfig

    assert MethodConfig().statistics_layers(session(statistics=None).view) == (0, 1, 2, 3)


def test_a_small_budget_is_kept_while_they_are_collected(source: StatisticsSource) -> None:
    editor = session(statistics=source, memory=1 << 40)
    (need,) = editor.statistics_needs([1])
    budget = sum(editor.memory_plan([]).held.values()) + need.bytes(0) - 1
    editor.memory = budget
    with pytest.raises(errors.MemoryBudgetError, match="statistics"):
        editor.provide_statistics([1])
    assert Fingerprint.of(editor.view.identity(), editor.view.dtype) == editor.base
