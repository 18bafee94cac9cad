"""Every causal language model of transformers: what the probe finds, and that pieces of a pass equal the whole."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kecore.api.errors import KecoreWarning, LayerError
from kecore.engine.replay import Replay
from kecore.inference.decoding import Decoding
from kecore.inference.openings import open_batches
from kecore.model import ModelView
from kecore.model.sites import Key, Output, Start, Value
from kecore.testing import Snapshot, architectures, tiny_model, tiny_tokenizer
from kecore.text import Encoder, Rows

DOCS = Path(__file__).resolve().parents[2] / "docs"
IDS = [[30, 210, 77, 401, 5, 99, 360, 12, 44, 45, 300, 8], [8, 450, 63, 17, 280], [300, 41, 41, 509, 66, 120, 7]]
LOOKUPS = [6, 1, 4]
EDITED_LAYER = 1
TIGHT = 1e-5  # relative, float32


def _load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kecore_docs_tables", DOCS / "_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load_tables()
WRITTEN: dict[str, list[str]] = tables.written()
# Of layers with experts a few stand for all: around them, these models are run in pieces as dense ones are.
_EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3", "zaya")
EDITED = [
    name for name, row in WRITTEN.items() if row[2] == tables.EDITED and ("stacked" not in row[4] or name in _EXPERTS)
]
same_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in tables.PAGE.read_text(encoding="utf-8"),
    reason="docs/architectures.md was written for another version of transformers",
)


@same_version
@pytest.mark.parametrize("architecture", architectures())
def test_page_says_what_the_probe_finds(architecture: str) -> None:
    assert tables.row(architecture).text() in tables.PAGE.read_text(encoding="utf-8").splitlines()


@same_version
@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("encoder-decoder", "t5"),
        ("encoder-decoder", "bart"),
        ("encoder-decoder", "prophetnet"),
        ("image-text", "llava"),
        ("image-text", "gemma3"),
        ("image-text", "qwen2_5_vl"),
        ("image-text", "instructblip"),
    ],
)
def test_page_says_what_the_probe_finds_in_a_sample_of_other_families(family: Any, architecture: str) -> None:
    """One of each kind: their models are larger, and some of them take half a minute to be made."""
    text = tables.row(architecture, family).text()
    assert tables.written(family)[architecture] == text.strip("| ").split(" | ")


@same_version
def test_page_lists_each_architecture_and_counts_them() -> None:
    rows: dict[str, list[Any]] = {}
    for family in ("causal", "encoder-decoder", "image-text"):
        cells = tables.written(family)
        assert list(cells) == list(architectures(family))
        rows[family] = [tables.Row(*row) for row in cells.values()]
    assert tables.page(rows) == tables.PAGE.read_text(encoding="utf-8")


def test_forty_dense_architectures_are_edited() -> None:
    assert len(EDITED) >= 40


@pytest.mark.parametrize(
    "architecture",
    ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "granitemoe", "phimoe", "glm4_moe"],
)
def test_experts_are_edited(architecture: str) -> None:
    assert WRITTEN[architecture][2] == tables.EDITED
    assert "stacked" in WRITTEN[architecture][4]


@dataclass
class Plain:
    """What one unpadded row gives, by hooks of the test's own."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    hidden: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def on_layer(self, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self.hidden[index] = (output if isinstance(output, Tensor) else output[0])[0].clone()

    def on_projection(self, index: int, _module: nn.Module, args: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        self.keys[index] = args[0].reshape(-1, args[0].shape[-1]).clone()
        self.values[index] = value.reshape(-1, value.shape[-1]).clone()


def added(delta: Tensor, place: int, _module: nn.Module, _args: Any, output: Any) -> Any:
    """A hook that adds a vector to one token of an unpadded row."""
    value = output if isinstance(output, Tensor) else output[0]
    flat = value.reshape(-1, value.shape[-1])
    change = torch.zeros_like(flat).index_add(0, torch.tensor([place]), delta[None])
    new = (flat + change).reshape(value.shape)
    return new if isinstance(output, Tensor) else (new, *output[1:])


def plain(view: ModelView, row: int, delta: Tensor | None = None) -> Plain:
    """Run one row alone, with ``delta`` added to the projection's output at its lookup token."""
    out, ids = Plain(), torch.tensor([IDS[row]])
    with ExitStack() as stack:
        for part in view.layers:
            projection = part.block.module
            if delta is not None and part.index == EDITED_LAYER:
                stack.callback(projection.register_forward_hook(partial(added, delta, LOOKUPS[row])).remove)
            stack.callback(part.module.register_forward_hook(partial(out.on_layer, part.index)).remove)
            stack.callback(projection.register_forward_hook(partial(out.on_projection, part.index)).remove)
        out.logits = view.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return out


def difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


@pytest.mark.parametrize("architecture", EDITED)
def test_pieces_of_a_pass_equal_the_whole(architecture: str, encoder: Encoder) -> None:
    model = tiny_model(architecture)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = Snapshot(model)
    view = ModelView.of(model)
    assert len(view.layers) == (3 if architecture == "mllama" else 4)  # a text never reaches its cross-attention
    with view.frozen(), torch.no_grad():
        expected = [plain(view, row) for row in range(len(IDS))]
        for rows in (encoder.rows(IDS), encoder.rows(IDS, LOOKUPS)):
            check_pieces(view, rows, expected)
    assert before.differences() == []


def check_pieces(view: ModelView, rows: Rows, expected: list[Plain]) -> None:
    every = range(len(view.layers))
    whole = view.run(rows, taps=[site(layer) for site in (Output, Key, Value) for layer in every])
    places = [(r, c) for r, ids in enumerate(IDS) for c in range(len(ids))]
    row = torch.tensor([r for r, _ in places])
    column = torch.tensor([c for _, c in places]) + rows.offset[row]
    logits = torch.cat([one.logits for one in expected])
    assert difference(whole.logits[row, column], logits) < TIGHT
    for site, kind in ((Output, "hidden"), (Key, "keys"), (Value, "values")):
        for layer in every:
            wanted = torch.cat([getattr(one, kind)[layer] for one in expected])
            assert difference(whole[site(layer)][row, column], wanted) < TIGHT, (kind, layer)
    assert difference(view.logits_at(rows, row, column), logits) < TIGHT
    some = torch.tensor([3, 0, len(row) - 1])
    for layer in every[1:]:
        first, key, output = Start(layer, whole[Output(layer - 1)]), Key(layer), Output(layer)
        again = view.run(rows, taps=[key], first=first, at=(row[some], column[some]))
        assert difference(again.logits, logits[some]) < TIGHT
        assert difference(again[key][row, column], whole[key][row, column]) < TIGHT
        upto = view.run(rows, taps=[output], first=first, last=layer)
        with pytest.raises(LayerError, match="before the logits"):
            _ = upto.logits
        assert difference(upto[output][row, column], whole[output][row, column]) < TIGHT


@pytest.mark.parametrize("architecture", EDITED)
def test_replay_equals_the_whole_pass(architecture: str, encoder: Encoder) -> None:
    """Logits and their gradient with respect to the added vector; run twice, then with a row dropped."""
    view = ModelView.of(tiny_model(architecture))
    places = [(r, c) for r, ids in enumerate(IDS) for c in range(LOOKUPS[r], len(ids))]
    row, place = torch.tensor(places).t()
    generator = torch.Generator().manual_seed(1)
    delta = 2 * torch.randn(len(IDS), view.width, generator=generator)
    weight = torch.randn(len(places), 512, generator=generator)
    with view.frozen(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)  # says in which slower mode a model is driven; see the page
        wanted, slope = with_gradient(
            lambda d: torch.cat([plain(view, r, d[r]).logits[c][None] for r, c in places]), delta, weight
        )
        replay = Replay(view, encoder, IDS, LOOKUPS, EDITED_LAYER)
        assert replay.mode != "full"
        assert difference(wanted, replay.logits(torch.zeros_like(delta), row, place).detach()) > 1e-3
        for _ in range(2):
            got, gradient = with_gradient(lambda d: replay.logits(d, row, place), delta, weight)
            assert difference(got, wanted) < TIGHT
            assert difference(gradient, slope) < 1e-4
        chosen = row != 1
        some = replay.select(torch.tensor([0, 2]))
        got = some.logits(delta[[0, 2]], row[chosen] // 2, place[chosen])
        assert difference(got.detach(), wanted[chosen]) < TIGHT


@pytest.mark.parametrize("architecture", EDITED)
def test_the_context_holds_as_many_tokens_as_is_said(architecture: str) -> None:
    view = ModelView.of(tiny_model(architecture))
    ids = torch.randint(5, 200, (1, view.max_length or 600), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    with view.frozen(), torch.no_grad():
        assert view.run(rows).logits.shape[:2] == ids.shape


_PAST_ITS_WINDOW = pytest.mark.xfail(
    reason="transformers' own: over its cache, moshi writes on otherwise once a text is longer than the window",
)


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=_PAST_ITS_WINDOW) if name == "moshi" else name for name in EDITED]
)
def test_writing_on_equals_the_whole_pass(architecture: str, encoder: Encoder) -> None:
    """Tokens one at a time, in a batch of padded rows, over a cache where the model goes on from one as it should.

    After the first, one row is taken out.
    """
    view = ModelView.of(tiny_model(architecture))
    ids = [list(row) for row in IDS]
    with view.frozen(), torch.no_grad():
        decoding = Decoding(view, encoder.rows(ids, [len(row) - 1 for row in ids]))
        for token in (17, 40, 5):
            wanted = [view.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in ids]
            assert difference(decoding.logits(), torch.stack(wanted)) < TIGHT
            decoding.append(torch.full((len(ids),), token))
            ids = [[*row, token] for row in ids]
            if token == 17:
                assert decoding.keep([2, 1])
                ids = [ids[2], ids[1]]


@pytest.mark.parametrize("architecture", EDITED)
def test_rows_behind_what_they_share_equal_the_whole_pass(architecture: str, encoder: Encoder) -> None:
    """Longer than any window; a model that would read it in another way has to be found out."""
    view = ModelView.of(tiny_model(architecture))
    shared = [(7 * i) % 50 + 3 for i in range(24)]
    rows = [[*shared, *IDS[0]], [*shared, 5], [*shared, *IDS[1]]]
    with view.frozen(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KecoreWarning)
        for at_ends in (False, True):
            (whole,) = open_batches(view, encoder, rows, [1] * 3, [0] * 3, 128, at_ends=at_ends)
            opening, batch, tails = whole
            wanted = [view.model(input_ids=torch.tensor([rows[i]]), use_cache=False).logits[0, -1] for i in batch]
            found = [opening.logits_at(view, tails, torch.arange(3), tails.ends - 1)]
            found += [Decoding(view, tails, opening).logits()] if at_ends else []
            for logits in found:
                # Recurrent layers sum in chunks, which begin elsewhere.
                assert difference(logits, torch.stack(wanted)) < 3 * TIGHT
            if architecture in ("llama", "qwen3") or (architecture == "gemma3_text" and not at_ends):
                assert list(opening.ids) == shared


def with_gradient(function: Callable[[Tensor], Tensor], delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    delta = delta.clone().requires_grad_(True)
    logits = function(delta)
    (gradient,) = torch.autograd.grad((logits * weight).sum(), delta)
    return logits.detach(), gradient
