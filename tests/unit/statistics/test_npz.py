"""The field's files of key statistics: read, compared with the model, and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from kecore import Corpus, KeyStatistics, ModelView, collect_statistics, export_statistics, import_statistics
from kecore.api import errors
from kecore.model import SiteId
from kecore.statistics.npz import find_files
from kecore.statistics.spot import spot_check
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder

NAME = "model.layers.{}.mlp.down_proj_float32_mom2_100000.npz"
WORDS = ["tower", "city", "Paris", "Rome", "Anna", "Berlin", "speaks", "river", "Danube", "Greek"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    lines: list[str] = []
    for _ in range(300):
        chosen = torch.randint(len(WORDS), (12,), generator=generator).tolist()
        lines.append(" ".join(WORDS[index] for index in chosen))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines))
    return Corpus.of(file)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView.of(tiny_model("llama"))


def field_sums(view: ModelView, encoder: Encoder, corpus: Corpus) -> tuple[dict[str, Tensor], int]:
    """Sum keys as the field's tools do: text by text with its opening token, in float32, by a hook on the module."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            keys = inputs[0].flatten(0, 1).float()
            sums[name] = sums.get(name, torch.zeros(keys.shape[1], keys.shape[1])) + keys.T @ keys

        return hook

    modules = {name: module for name, module in view.model.named_modules() if name.endswith("down_proj")}
    handles = [module.register_forward_pre_hook(add(name)) for name, module in modules.items()]
    with torch.no_grad():
        for passage in list(corpus.passages())[:100]:
            ids = encoder.tokenizer(passage, return_tensors="pt")["input_ids"]
            view.model(input_ids=ids)
            count += ids.numel()
    for handle in handles:
        handle.remove()
    return sums, count


@pytest.fixture(scope="module")
def sums(view: ModelView, encoder: Encoder, corpus: Corpus) -> tuple[dict[str, Tensor], int]:
    return field_sums(view, encoder, corpus)


@pytest.fixture
def files(tmp_path: Path, sums: tuple[dict[str, Tensor], int]) -> Path:
    """A folder as ``layer_stats`` fills it."""
    for layer in (0, 1, 2):
        matrix = sums[0][f"model.layers.{layer}.mlp.down_proj"]
        write(tmp_path / "npz" / NAME.format(layer), matrix, sums[1])
    return tmp_path / "npz"


def write(file: Path, matrix: Tensor, count: int = 1000, **more: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    arrays = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "mom2.mom2": matrix.numpy()}
    numpy.savez(file, **{**arrays, "sample_size": 100000, **more})
    return file


def test_a_folder_becomes_statistics(
    view: ModelView, encoder: Encoder, corpus: Corpus, files: Path, sums: tuple[dict[str, Tensor], int], tmp_path: Path
) -> None:
    imported = import_statistics(view, encoder, files, text=corpus)
    assert imported.layers == (0, 1, 2)
    assert imported.tokens == sums[1]
    for layer in (0, 1, 2):
        mean = sums[0][f"model.layers.{layer}.mlp.down_proj"].double() / sums[1]
        assert torch.allclose(imported.moment(SiteId(layer)), mean, rtol=1e-5)
        origin = imported.origins[SiteId(layer)]
        assert (origin.file, origin.dtype, origin.tokens) == (NAME.format(layer), "float32", sums[1])
        assert len(origin.sha256) == 64
        assert origin.difference < 0.4
    imported.check(view)
    again = KeyStatistics.load(imported.save(tmp_path / "saved"))
    assert again.origins == imported.origins
    assert again.moment(SiteId(1)).equal(imported.moment(SiteId(1)))
    with pytest.raises(errors.StatisticsMismatchError, match="collected on other weights"):
        again.check(ModelView.of(tiny_model("llama", seed=5)))


def test_what_is_exported_is_imported(view: ModelView, encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    ours = collect_statistics(view, encoder, corpus, [1, 2], tokens=1500)
    written = export_statistics(ours, view, tmp_path / "out")
    assert [file.name for file in written] == [NAME.format(1), NAME.format(2)]
    with numpy.load(written[0]) as arrays:
        assert int(arrays["mom2.count"]) == ours.tokens
        assert int(arrays["sample_size"]) == 100000
        assert arrays["mom2.mom2"].dtype == numpy.float32
        mean = torch.from_numpy(arrays["mom2.mom2"]).double() / int(arrays["mom2.count"])
        assert torch.allclose(mean, ours.moment(SiteId(1)), rtol=1e-5)
    back = import_statistics(view, encoder, tmp_path / "out", text=corpus)
    assert torch.allclose(back.moment(SiteId(2)), ours.moment(SiteId(2)), rtol=1e-5)
    with pytest.raises(errors.StatisticsMismatchError, match="collected on other weights"):
        export_statistics(ours, ModelView.of(tiny_model("llama", seed=5)), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_strangers_are_refused_with_measure_and_bound(
    view: ModelView, encoder: Encoder, corpus: Corpus, files: Path, sums: tuple[dict[str, Tensor], int], tmp_path: Path
) -> None:
    matrix = sums[0]["model.layers.1.mlp.down_proj"]
    shuffled = matrix[torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0))]
    shuffled = shuffled[:, torch.randperm(len(matrix), generator=torch.Generator().manual_seed(0))]
    strangers = {
        "another layer": (matrix, sums[1], 2),
        "other neurons": (shuffled, sums[1], 1),
        "a sum for a mean": (matrix, 1, 1),
    }
    for name, (stranger, count, layer) in strangers.items():
        file = write(tmp_path / name / NAME.format(layer), stranger, count)
        with pytest.raises(errors.StatisticsMismatchError, match=r"rank correlation .* \(at most 0.6\)"):
            import_statistics(view, encoder, file, text=corpus)
    other = ModelView.of(tiny_model("llama", seed=5))
    with pytest.raises(errors.StatisticsMismatchError, match="3 of 3 files are refused"):
        import_statistics(other, encoder, files, text=corpus)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda m: m[:8, :8], "StatisticsMismatchError", "is 8 x 8, the keys of layer 1 are"),
        (lambda m: m[:16, :16], "StatisticsMismatchError", "as wide as the outputs of the module"),
        (lambda m: m + torch.triu(m, 1), "ArtifactError", "differs from its transpose"),
        (lambda m: m * float("nan"), "NonFiniteError", "holds NaN"),
        (lambda m: m[0], "ArtifactError", "expected a matrix of real numbers"),
        (lambda m: m.long(), "ArtifactError", "got int64"),
    ],
)
def test_bad_matrices(
    view: ModelView,
    encoder: Encoder,
    sums: tuple[dict[str, Tensor], int],
    tmp_path: Path,
    change: Any,
    error: str,
    match: str,
) -> None:
    matrix = change(sums[0]["model.layers.1.mlp.down_proj"])
    if "outputs" in match:
        matrix = torch.eye(view.width)
    file = write(tmp_path / "x" / NAME.format(1), matrix)
    with pytest.raises(getattr(errors, error), match=match):
        import_statistics(view, encoder, file)


def test_bad_files(view: ModelView, encoder: Encoder, files: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ArtifactError, match="no such file"):
        find_files([tmp_path / "nothing.npz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ArtifactError, match=r"holds no \.npz files"):
        find_files([tmp_path / "empty"])
    cut = tmp_path / NAME.format(1)
    cut.write_bytes((files / NAME.format(1)).read_bytes()[:500])
    with pytest.raises(errors.ArtifactError, match="cut short"):
        find_files([cut])
    numpy.savez(tmp_path / "mean.npz", **{"mean.mean": numpy.ones(4)})
    (tmp_path / "mean.npz").rename(tmp_path / NAME.format(2))
    with pytest.raises(errors.ArtifactError, match=r"expected the arrays mom2.mom2 and mom2.count, got mean.mean"):
        import_statistics(view, encoder, tmp_path / NAME.format(2))
    pickled = tmp_path / "p" / NAME.format(2)
    pickled.parent.mkdir()
    numpy.savez(pickled, **{"mom2.mom2": numpy.array([{}], dtype=object), "mom2.count": 3})
    with pytest.raises(errors.ArtifactError, match="cannot be read"):
        import_statistics(view, encoder, pickled)
    twice = write(tmp_path / "y" / NAME.replace("100000", "500").format(1), torch.eye(3))
    with pytest.raises(errors.StatisticsMismatchError, match="are both of layer 1"):
        import_statistics(view, encoder, [files, twice])
    stranger = write(tmp_path / "z" / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz", torch.eye(3))
    with pytest.raises(errors.StatisticsMismatchError, match=r"such a module of it is called model.layers.0.mlp"):
        import_statistics(view, encoder, stranger)


def test_outer_modules_of_a_name_do_not_matter(
    view: ModelView, encoder: Encoder, corpus: Corpus, files: Path, tmp_path: Path
) -> None:
    for name in ("language_model." + NAME.format(1), "layers.1.mlp.down_proj_float64_mom2_t512.npz"):
        renamed = tmp_path / name
        renamed.write_bytes((files / NAME.format(1)).read_bytes())
        assert import_statistics(view, encoder, renamed, text=corpus).layers == (1,)


def test_neurons_that_never_fire_agree() -> None:
    from kecore.statistics.spot import _compare

    there = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0])
    assert _compare(there, there * 1.1).difference == pytest.approx(0, abs=1e-6)
    assert _compare(there, there.flip(0)).difference > 1
    assert not _compare(there, torch.full((6,), float("nan"))).holds()


def test_ours_pass_their_own_check(view: ModelView, encoder: Encoder, corpus: Corpus) -> None:
    ours = collect_statistics(view, encoder, corpus, [0, 2], tokens=1500)
    checks = spot_check(view, encoder, ours.moments, text=corpus, tokens=1000, seed=3)
    assert all(check.holds() for check in checks.values())
    assert checks.keys() == {SiteId(0), SiteId(2)}
