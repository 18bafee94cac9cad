"""Second moments against brute force in float64, and runs that are killed and continued."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore import files
from kecore.api.errors import (
    ArtifactError,
    KecoreWarning,
    LayerError,
    NonFiniteError,
    NumericalError,
    StatisticsMismatchError,
)
from kecore.corpus import Corpus
from kecore.model import ModelView, SiteId
from kecore.statistics import TOKENS_PER_WIDTH, KeyStatistics, collect_statistics, moments, token_budget
from kecore.statistics import collect as collect_module
from kecore.statistics.triangular import action_change, pack_triangle
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.text import Encoder

LAYERS = (0, 1, 3)
TOKENS = 1500
ROW = 128


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView.of(tiny_model("llama", max_position_embeddings=ROW))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    passages = [
        f"The capital of country {i} is city {i * 7 % 50}, and {i} people of {i * i} live there or by the Danube."
        for i in range(200)
    ]
    file.write_text("\n".join(json.dumps({"text": p}) for p in passages), encoding="utf-8")
    return Corpus.of(file)


@pytest.fixture(autouse=True, scope="module")
def small_passes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_module, "pass_tokens", lambda _view: 3 * ROW)  # three rows at a time
        yield


def brute_force(view: ModelView, encoder: Encoder, corpus: Corpus, layer: int, tokens: int = TOKENS) -> Tensor:
    """Mean ``k kᵀ`` in float64 over the same tokens, one row at a time through the whole model."""
    stream: list[int] = []
    for passage in corpus.sample(10_000, 0).passages:
        stream += encoder.tokenizer(passage, add_special_tokens=False)["input_ids"] + [encoder.tokenizer.eos_token_id]
    stream = stream[:tokens]
    keys: list[Tensor] = []

    def keep(_module: nn.Module, args: Any) -> None:
        keys.append(args[0][0].double())

    handle = view.layers[layer].site.linear.module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for begin in range(0, len(stream), ROW):
            view.model(input_ids=torch.tensor([stream[begin : begin + ROW]]), use_cache=False)
    handle.remove()
    k = torch.cat(keys)
    assert len(k) == tokens
    return k.t() @ k / tokens


def collect(view: ModelView, encoder: Encoder, corpus: Corpus, **options: Any) -> KeyStatistics:
    return collect_statistics(view, encoder, corpus, LAYERS, **{"tokens": TOKENS, **options})


def take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run take all passages, in one order, so that brute force sees the same text."""
    sample = Corpus.sample
    monkeypatch.setattr(Corpus, "sample", lambda self, _count, seed: sample(self, 10_000, seed))


def test_moments_are_those_of_brute_force(
    view: ModelView, encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_all(monkeypatch)
    found = collect(view, encoder, corpus)
    assert (found.layers, found.tokens, found.sequence) == (LAYERS, TOKENS, ROW)
    for layer in LAYERS:
        moment = found.moment(SiteId(layer))
        assert moment.dtype == torch.float64
        assert torch.equal(moment, moment.t())
        wanted = brute_force(view, encoder, corpus, layer)
        assert float((moment - wanted).norm() / wanted.norm()) < 1e-5


def test_one_pass_serves_all_layers(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    tokens: list[int] = []
    handle = view.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: tokens.append(args[0].numel())
    )
    together = collect(view, encoder, corpus)
    handle.remove()
    assert sum(tokens) == pytest.approx(TOKENS, abs=ROW)  # the last row is padded
    for layer in LAYERS:
        alone = collect_statistics(view, encoder, corpus, [layer], tokens=TOKENS)
        assert torch.equal(alone.moment(SiteId(layer)), together.moment(SiteId(layer)))
        assert alone.base[SiteId(layer)] == together.base[SiteId(layer)]


def test_layers_above_the_last_are_not_run(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    ran: list[int] = []
    written: list[int] = []
    handles = [p.module.register_forward_pre_hook(lambda *_, i=p.index: ran.append(i)) for p in view.layers]
    for part in view.layers:
        hook = part.site.linear.module.register_forward_hook(lambda *_, i=part.index: written.append(i))
        handles.append(hook)
    collect_statistics(view, encoder, corpus, [1, 0, 1], tokens=100)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}
    assert set(written) == {0}  # the last layer's keys are all that is asked of it


def test_a_pass_in_bfloat16_is_that_of_weights_in_bfloat16(
    view: ModelView, encoder: Encoder, corpus: Corpus, tmp_path: Path
) -> None:
    before = Snapshot(view.model)
    found = collect(view, encoder, corpus, precision=torch.bfloat16, out=tmp_path)
    assert before.differences() == []
    rounded = copy.deepcopy(view.model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    wanted = collect(ModelView.of(rounded), encoder, corpus)
    assert (wanted.precision, found.precision) == (None, "bfloat16")
    for layer in LAYERS:
        assert torch.equal(found.moment(SiteId(layer)), wanted.moment(SiteId(layer)))
        assert not torch.equal(found.moment(SiteId(layer)), collect(view, encoder, corpus).moment(SiteId(layer)))
    found.check(view)  # made on the weights as they are, so that edits of the float32 model accept them


def test_model_is_left_alone(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    before = Snapshot(view.model)
    collect(view, encoder, corpus)
    assert before.differences() == []


def test_token_budget_follows_the_key_width(view: ModelView) -> None:
    assert token_budget(view) == TOKENS_PER_WIDTH * 80


def test_a_small_corpus_is_used_up(view: ModelView, encoder: Encoder, tmp_path: Path) -> None:
    text = "The Danube flows to the Black Sea, not to Berlin or Vienna."
    (tmp_path / "a.txt").write_text(text)
    found = collect_statistics(view, encoder, Corpus.of(tmp_path / "a.txt"), [0])
    assert found.tokens == len(encoder.tokenizer(text)["input_ids"]) + 1  # and the end token


def test_little_memory_makes_smaller_passes(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    widths: list[int] = []
    handle = view.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: widths.append(len(args[0])))
    found = collect(view, encoder, corpus, memory=1)
    handle.remove()
    assert set(widths) == {1}
    for layer in LAYERS:
        torch.testing.assert_close(
            found.moment(SiteId(layer)), collect(view, encoder, corpus).moment(SiteId(layer)), rtol=1e-5, atol=1e-7
        )


# Stopped early. Three rows of 128 tokens are one pass, so the marks at 94, 188 and 375 of 1500 tokens are passed after
# 384 and that at 750 after 768.


def change(half: Tensor, whole: Tensor) -> float:
    """Relative change of the inverse on keys drawn from the whole, densely."""
    ridge = 1e-4 * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype)
    noise = torch.randn(len(whole), 16, dtype=whole.dtype, generator=torch.Generator().manual_seed(0))
    keys = torch.linalg.cholesky(whole + ridge) @ noise
    old, new = torch.linalg.inv(half + ridge) @ keys, torch.linalg.inv(whole + ridge) @ keys
    return float((old - new).norm() / new.norm())


@pytest.fixture
def changes(
    view: ModelView, encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> list[dict[SiteId, float]]:
    """What brute force finds from 384 tokens to 768, and from there to all 1500."""
    take_all(monkeypatch)
    found: list[dict[SiteId, float]] = []
    for few, many in ((384, 768), (768, 1500)):
        pairs = {i: [brute_force(view, encoder, corpus, i, count) for count in (few, many)] for i in LAYERS}
        found.append({SiteId(i): change(*pair) for i, pair in pairs.items()})
    return found


def test_collection_stops_when_nothing_changes_any_more(
    view: ModelView, encoder: Encoder, corpus: Corpus, changes: list[dict[SiteId, float]]
) -> None:
    found = collect(view, encoder, corpus, until=1.01 * max(changes[0].values()))
    assert found.tokens == 768
    assert found.convergence == pytest.approx(changes[0], rel=1e-3)
    wanted = brute_force(view, encoder, corpus, 1, 768)
    assert float((found.moment(SiteId(1)) - wanted).norm() / wanted.norm()) < 1e-5


def test_every_layer_must_have_converged(
    view: ModelView, encoder: Encoder, corpus: Corpus, changes: list[dict[SiteId, float]]
) -> None:
    first, last = max(changes[0].values()), max(changes[1].values())
    assert last < 0.99 * first  # else this test says nothing
    found = collect(view, encoder, corpus, until=0.99 * first)
    assert found.tokens == TOKENS
    assert found.convergence == pytest.approx(changes[1], rel=1e-3)


def test_statistics_that_never_converge_are_warned_of(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    with pytest.warns(KecoreWarning, match=r"still change by 0\.\d+ from half of their 1,500 tokens .*asked for 1e-05"):
        found = collect(view, encoder, corpus, until=1e-5)
    assert found.tokens == TOKENS


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("call", [3, 4])
def test_a_killed_run_stops_early_all_the_same(
    view: ModelView, encoder: Encoder, corpus: Corpus, tmp_path: Path, changes: list[dict[SiteId, float]], call: int
) -> None:
    until = 0.99 * max(changes[0].values())
    whole = collect(view, encoder, corpus, until=until)
    with pytest.raises(Killed):
        collect(view, encoder, corpus, until=until, out=tmp_path, progress=kill_at(call))
    found = collect(view, encoder, corpus, until=until, out=tmp_path)
    assert (found.tokens, found.convergence) == (whole.tokens, whole.convergence)
    for layer in LAYERS:
        assert torch.equal(found.moment(SiteId(layer)), whole.moment(SiteId(layer)))


# Killed and continued.


class Killed(Exception):
    pass


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "_SAVE_EVERY", -1.0)


def kill_at(call: int) -> Any:
    calls: list[int] = []

    def progress(_stage: str, done: int, _total: int) -> None:
        calls.append(done)
        if len(calls) == call:
            raise Killed

    return progress


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_killed_run_counts_nothing_twice(
    view: ModelView, encoder: Encoder, corpus: Corpus, tmp_path: Path, call: int
) -> None:
    """Killed after some passes: the checkpoint of the pass before is there, the last pass is lost."""
    whole = collect(view, encoder, corpus)
    with pytest.raises(Killed):
        collect(view, encoder, corpus, out=tmp_path, progress=kill_at(call))
    kept = [file.name for file in tmp_path.iterdir()]
    assert kept == ([] if call == 2 else ["statistics.partial.safetensors"])
    tokens: list[int] = []
    handle = view.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: tokens.append(args[0].numel())
    )
    seen: list[int] = []
    found = collect(view, encoder, corpus, out=tmp_path, progress=lambda _s, done, _t: seen.append(done))
    handle.remove()
    passes_kept = call - 2
    assert seen[0] == passes_kept * 3 * ROW
    assert sum(tokens) == pytest.approx(TOKENS - passes_kept * 3 * ROW, abs=ROW)
    assert (found.tokens, found.convergence) == (whole.tokens, whole.convergence)
    for layer in LAYERS:
        assert torch.equal(found.moment(SiteId(layer)), whole.moment(SiteId(layer)))
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]


@pytest.mark.usefixtures("checkpoints")
@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"tokens": TOKENS - 1}, {"weights": True}, {"layers": (0, 1)}, {"until": 1e3}]
)
def test_a_checkpoint_of_another_run_is_not_continued(
    view: ModelView, encoder: Encoder, corpus: Corpus, tmp_path: Path, other: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        collect(view, encoder, corpus, out=tmp_path, progress=kill_at(4))
    options = {k: v for k, v in other.items() if k in {"seed", "tokens", "until"}}
    layers = other.get("layers", LAYERS)
    model = view if "weights" not in other else ModelView.of(tiny_model("llama", seed=1, max_position_embeddings=ROW))
    options = {"tokens": TOKENS, **options}
    fresh = collect_statistics(model, encoder, corpus, layers, **options)
    found = collect_statistics(model, encoder, corpus, layers, out=tmp_path, **options)
    assert torch.equal(found.moment(SiteId(1)), fresh.moment(SiteId(1)))
    assert found.tokens == fresh.tokens


# What makes them usable.


@pytest.fixture(scope="module")
def found(view: ModelView, encoder: Encoder, corpus: Corpus) -> KeyStatistics:
    return collect(view, encoder, corpus)


def test_round_trip(found: KeyStatistics, tmp_path: Path) -> None:
    file = found.save(tmp_path / "made")
    assert file == tmp_path / "made" / "statistics.safetensors"
    assert file.stat().st_size < len(LAYERS) * 8 * 80 * 81 / 2 + 8000  # half of each matrix
    for again in (KeyStatistics.load(file), KeyStatistics.load(file.parent)):
        for layer in LAYERS:
            assert torch.equal(again.moment(SiteId(layer)), found.moment(SiteId(layer)))
        assert again.header() == found.header()
    files.write_tensors(file, "key-statistics", {"format": 99, "version": "7.0"}, {})
    with pytest.raises(ArtifactError, match=r"written by kecore 7\.0 in a newer format"):
        KeyStatistics.load(file)
    files.write_tensors(file, "weight-edit", {"format": 1}, {})
    with pytest.raises(ArtifactError, match="expected a kecore key-statistics, got a kecore weight-edit"):
        KeyStatistics.load(file)


@pytest.mark.parametrize("ridge", [1e-4, 1.0])
def test_factor_is_the_inverse_cholesky_factor(found: KeyStatistics, ridge: float) -> None:
    c = found.moment(SiteId(1))
    size = float(c.diagonal().mean())
    inverse = found.factor(SiteId(1), ridge).double()
    assert torch.equal(inverse, inverse.tril())
    c = c + ridge * size * torch.eye(len(c), dtype=c.dtype)
    torch.testing.assert_close(inverse @ c @ inverse.t(), torch.eye(len(c), dtype=c.dtype), rtol=0, atol=1e-4)
    assert found.factor(SiteId(1), ridge) is found.factor(SiteId(1), ridge)
    assert found.factor(SiteId(1), ridge).dtype == torch.float32


@pytest.fixture
def derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, where even small factors are kept."""
    monkeypatch.setattr(moments, "_WORTH_STORING", 1)
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept_files(cache: Path) -> set[str]:
    return {str(file.relative_to(cache)) for file in cache.rglob("*.safetensors")}


def test_factors_are_kept_by_content(
    found: KeyStatistics, derived: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(found)  # without what the fixture remembers
    factor, (values, vectors) = made.factor(SiteId(1), 1e-4), made.spectrum(SiteId(1))
    first = kept_files(derived)
    assert len(first) == 2
    stored = KeyStatistics.load(found.save(tmp_path / "saved"))
    with monkeypatch.context() as patch:
        patch.setattr(moments, "cholesky_", None)  # what is kept is not made again
        assert torch.equal(stored.factor(SiteId(1), 1e-4), factor)
        assert torch.equal(stored.spectrum(SiteId(1))[0], values)
        assert torch.equal(stored.spectrum(SiteId(1))[1], vectors)
    assert kept_files(derived) == first
    stored.factor(SiteId(1), 1e-3)
    stored.factor(SiteId(3), 1e-4)
    assert len(kept_files(derived)) == 4
    other = replace(found, moments={SiteId(1): found.moment(SiteId(1)) * 1.001})
    assert not torch.equal(other.factor(SiteId(1), 1e-4), factor)
    assert len(kept_files(derived)) == 5


def test_a_damaged_factor_is_made_anew(found: KeyStatistics, derived: Path) -> None:
    factor = replace(found).factor(SiteId(1), 1e-4).clone()  # it is mapped from the very file
    (file,) = derived.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + bytes(8))
    assert torch.equal(replace(found).factor(SiteId(1), 1e-4), factor)
    assert file.read_bytes() == whole


def test_small_factors_leave_no_files(found: KeyStatistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_CACHE", str(tmp_path))
    replace(found).factor(SiteId(1), 1e-4)
    assert list(tmp_path.iterdir()) == []


def test_moments_of_a_file_are_unpacked_only_while_they_are_used(found: KeyStatistics, tmp_path: Path) -> None:
    stored = KeyStatistics.load(found.save(tmp_path))
    assert stored.layers == found.layers
    stored.need(3)
    moment = stored.moment(SiteId(3))
    assert stored.moment(SiteId(3)) is moment
    gone = weakref.ref(moment)
    del moment
    assert gone() is None
    for layer in LAYERS:
        assert (stored.width(SiteId(layer)), found.width(SiteId(layer))) == (80, 80)
        assert stored.mean_square(SiteId(layer)) == pytest.approx(float(found.moment(SiteId(layer)).diagonal().mean()))
    with pytest.raises(StatisticsMismatchError, match="no statistics for layer 2"):
        stored.mean_square(SiteId(2))


def test_a_singular_moment_names_what_helps() -> None:
    k = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    few = KeyStatistics({SiteId(4): k.t() @ k / 3}, 3, {}, "text")
    with pytest.raises(NumericalError, match=r"layer 4 are singular \(3 tokens for width 8\).*ridge of at least 1e-06"):
        few.factor(SiteId(4))
    assert bool(torch.isfinite(few.factor(SiteId(4), 1e-4)).all())


def test_spectrum(found: KeyStatistics) -> None:
    values, vectors = found.spectrum(SiteId(3))
    assert bool((values.diff() <= 0).all())
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.t(), found.moment(SiteId(3)))
    assert found.spectrum(SiteId(3))[0] is values


def test_convergence_is_the_change_of_the_inverse(found: KeyStatistics) -> None:
    c = found.moment(SiteId(0))
    assert action_change(pack_triangle(c), pack_triangle(c)) == 0.0
    assert action_change(pack_triangle(2 * c), pack_triangle(c)) == pytest.approx(0.5, rel=1e-2)
    assert found.convergence.keys() == set(map(SiteId, LAYERS))
    assert all(0 < change < 2 for change in found.convergence.values())


def test_missing_layers_are_named(found: KeyStatistics, view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    with pytest.raises(StatisticsMismatchError, match=r"no statistics for layer 2; these cover \[0, 1, 3\]"):
        found.moment(SiteId(2))
    with pytest.raises(LayerError, match="layer 4 was asked for"):
        collect_statistics(view, encoder, corpus, [4])
    shallow = ModelView.of(tiny_model("llama", layers=2))
    with pytest.raises(StatisticsMismatchError, match=r"cover layers \[0, 1, 3\], the model has 2"):
        found.check(shallow)


def changed(name: str) -> ModelView:
    model = tiny_model("llama", max_position_embeddings=ROW)
    with torch.no_grad():
        model.get_parameter(name)[0] += 1e-4
    return ModelView.of(model)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_no_key_depends_on_may_differ(found: KeyStatistics, name: str) -> None:
    found.check(changed(name))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.embed_tokens.weight", 0),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.0.mlp.down_proj.weight", 1),
        ("model.layers.3.self_attn.q_proj.weight", 3),
        ("model.layers.2.mlp.down_proj.weight", 3),
    ],
)
def test_other_weights_are_refused_and_the_layer_named(found: KeyStatistics, name: str, layer: int) -> None:
    with pytest.raises(StatisticsMismatchError, match=rf"layer {layer} were collected on other weights: .*expected"):
        found.check(changed(name))


def test_a_cast_of_the_model_is_the_same_model(found: KeyStatistics) -> None:
    found.check(ModelView.of(tiny_model("llama", max_position_embeddings=ROW).bfloat16()))


def test_tied_embeddings_count_as_embeddings(encoder: Encoder, corpus: Corpus) -> None:
    options: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": ROW}
    found = collect_statistics(ModelView.of(tiny_model("llama", **options)), encoder, corpus, [0], tokens=50)
    model = tiny_model("llama", **options)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] += 1e-4
    with pytest.raises(StatisticsMismatchError):
        found.check(ModelView.of(model))


def test_keys_that_overflow_are_an_error(encoder: Encoder, corpus: Corpus) -> None:
    view = ModelView.of(tiny_model("llama"))
    view.layers[1].module.mlp.up_proj.weight.data.fill_(1e38)
    with pytest.raises(NonFiniteError, match="the keys of layer 1 hold NaN or infinity"):
        collect_statistics(view, encoder, corpus, [0, 1], tokens=50)


def test_statistics_cannot_be_changed(found: KeyStatistics) -> None:
    with pytest.raises(AttributeError):
        found.tokens = 3  # type: ignore[misc]
    assert replace(found, seed=5).seed == 5
