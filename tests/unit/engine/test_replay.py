"""How a model is driven, and that a model that cannot be driven fast is driven right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kecore.api.errors import KecoreWarning
from kecore.engine.replay import Replay
from kecore.model import ModelView
from kecore.model.sites import Output, Value
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.text import Encoder

IDS = [[30, 210, 77, 401, 5, 99], [8, 450, 63], [17, 23, 40, 5, 6]]
LOOKUPS = [4, 0, 2]
ROW, PLACE = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([4, 5, 0, 2, 4])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


def logits_of(view: ModelView, encoder: Encoder, delta: Tensor, mode: str | None, layer: int = 1) -> tuple[Tensor, str]:
    with view.frozen(), torch.no_grad():
        replay = Replay(view, encoder, IDS, LOOKUPS, layer, mode)
        return replay.logits(delta, ROW, PLACE), replay.mode


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_all_modes_give_the_same(architecture: str, layer: int, encoder: Encoder) -> None:
    view = ModelView.of(tiny_model(architecture))
    delta = torch.randn(3, view.width, generator=torch.Generator().manual_seed(0))
    full, _ = logits_of(view, encoder, delta, "full", layer)
    for mode in (None, "cached", "upper"):
        got, used = logits_of(view, encoder, delta, mode, layer)
        assert used == (mode or "cached")
        torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-5)
    zero, _ = logits_of(view, encoder, torch.zeros_like(delta), "full", layer)
    assert float((zero - full).abs().max()) > 1e-2


# Two openings of three and two tokens; a row that is all opening, one that has none, one that ends before its opening.
SHARED = [[30, 210, 77, 401, 5, 99], [8, 450, 63], [30, 210, 77, 40, 5], [8, 450, 12, 6], [30, 210, 77, 9], [51, 7]]
OPENING, SHARED_LOOKUPS = [0, 1, 0, 1, 0, 2], [4, 2, 3, 3, 3, 0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "granite", "bloom"])
def test_openings_are_run_once(architecture: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ModelView.of(tiny_model(architecture))
    places = [(r, c) for r, ids in enumerate(SHARED) for c in range(SHARED_LOOKUPS[r], len(ids))]
    row, place = torch.tensor(places).t()
    delta = torch.randn(len(SHARED), view.width, generator=torch.Generator().manual_seed(0))
    tokens: list[int] = []
    original = ModelView.run

    def counting(self: ModelView, rows: Any, **more: Any) -> Any:
        tokens.append(int(rows.attention_mask.sum()) if more.get("use_cache") else 0)
        return original(self, rows, **more)

    monkeypatch.setattr(ModelView, "run", counting)
    found: dict[str, Tensor] = {}
    run: dict[str, int] = {}
    with view.frozen(), torch.no_grad():
        for mode in ("full", "cached", "shared"):
            tokens.clear()
            replay = Replay(view, encoder, SHARED, SHARED_LOOKUPS, 1, mode, opening=OPENING)
            run[mode] = sum(tokens)
            found[mode] = replay.logits(delta, row, place)
            torch.testing.assert_close(found[mode], found["full"], rtol=1e-4, atol=1e-5)
            some = replay.select(torch.tensor([4, 3]))
            chosen = torch.cat([(row == r).nonzero().flatten() for r in (4, 3)])
            got = some.logits(delta[[4, 3]], (row[chosen] == 3).long(), place[chosen])
            torch.testing.assert_close(got, found["full"][chosen], rtol=1e-4, atol=1e-5)
        assert Replay(view, encoder, SHARED, SHARED_LOOKUPS, 1, opening=OPENING).mode == "shared"
        assert Replay(view, encoder, SHARED, SHARED_LOOKUPS, 1, opening=range(6)).mode == "cached"
    assert run == {"full": 0, "cached": sum(SHARED_LOOKUPS), "shared": sum(SHARED_LOOKUPS) - 2 * 3 - 2}


def test_no_row_has_anything_before_its_lookup_token(encoder: Encoder) -> None:
    """As a later micro-batch may, once an earlier one has found that openings can be shared."""
    view = ModelView.of(tiny_model("llama"))
    with view.frozen(), torch.no_grad():
        row, place, delta = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.ones(2, view.width)
        full, shared = (
            Replay(view, encoder, [IDS[1], IDS[2]], [0, 0], 1, mode, opening=[0, 0]).logits(delta, row, place)
            for mode in ("full", "shared")
        )
    torch.testing.assert_close(shared, full, rtol=1e-4, atol=1e-5)


def test_openings_without_a_token_in_common(encoder: Encoder) -> None:
    view = ModelView.of(tiny_model("llama"))
    with view.frozen(), torch.no_grad():
        row, place, delta = torch.tensor([0, 1, 2]), torch.tensor([4, 2, 3]), torch.ones(3, view.width)
        full, shared = (
            Replay(view, encoder, IDS, [4, 1, 2], 1, mode, opening=[0, 0, 0]).logits(delta, row, place)
            for mode in ("full", "shared")
        )
    torch.testing.assert_close(shared, full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["cached", "upper", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3_5_text"])
def test_some_rows_give_what_they_gave_and_the_others_stay(architecture: str, mode: str, encoder: Encoder) -> None:
    view = ModelView.of(tiny_model(architecture))
    delta = torch.randn(3, view.width, generator=torch.Generator().manual_seed(0))
    with view.frozen(), torch.no_grad():
        replay = Replay(view, encoder, IDS, LOOKUPS, 1, mode)
        every = replay.logits(delta, ROW, PLACE)
        for rows in ([2, 0], [1]):
            some = replay.select(torch.tensor(rows))
            chosen = torch.cat([(row == ROW).nonzero().flatten() for row in rows])
            place = torch.tensor([rows.index(int(row)) for row in ROW[chosen]])
            for _ in range(2):  # the second run, because a cache may keep the first
                got = some.logits(delta[rows], place, PLACE[chosen])
                torch.testing.assert_close(got, every[chosen], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(replay.logits(delta, ROW, PLACE), every, rtol=1e-4, atol=1e-5)


def test_a_cache_that_keeps_what_it_should_not_is_found_out(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear attention writes its states in place: the first run is right and the second is not."""
    import kecore.engine.replay as replay_module

    view = ModelView.of(tiny_model("qwen3_5_text"))
    delta = torch.randn(3, view.width, generator=torch.Generator().manual_seed(0))
    full, _ = logits_of(view, encoder, delta, "full")
    got, used = logits_of(view, encoder, delta, None)
    assert used == "cached"
    torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(replay_module, "_make_read_only", lambda cache: cache)
    with pytest.warns(KecoreWarning, match=r"Qwen3_5ForCausalLM is driven in mode 'upper'.*cached: "):
        got, used = logits_of(view, encoder, delta, None)
    assert used == "upper"
    torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-5)


def test_nothing_works_but_the_whole_pass(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ModelView.of(tiny_model("llama"))
    delta = torch.randn(3, view.width, generator=torch.Generator().manual_seed(0))
    full, _ = logits_of(view, encoder, delta, "full")

    def broken(*_args: Any) -> None:
        raise NotImplementedError("no pieces today")

    monkeypatch.setattr(Replay, "_set_up", broken)
    with pytest.warns(KecoreWarning, match=r"mode 'full'.*no pieces today.*upper: NotImplementedError"):
        got, used = logits_of(view, encoder, delta, None)
    assert used == "full"
    assert torch.equal(got, full)


def test_wrong_logits_are_noticed(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DynamicCache.update

    def spoiled(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, keys, 1.01 * values, *args, **kwargs)

    view = ModelView.of(tiny_model("llama"))
    assert view.continues  # found out before anything is spoiled
    monkeypatch.setattr(DynamicCache, "update", spoiled)
    with pytest.warns(KecoreWarning, match=r"cached: logits differ by"):
        assert logits_of(view, encoder, torch.zeros(3, view.width), None)[1] == "upper"


def test_reference_is_the_layers_output_in_units_of_the_projection(encoder: Encoder) -> None:
    for architecture in ("llama", "granite", "gemma2"):
        view = ModelView.of(tiny_model(architecture))
        norms = {}
        with view.frozen(), torch.no_grad():
            rows = encoder.rows(IDS)
            out = view.run(rows, taps=[Output(1), Value(1)])
            for mode in ("cached", "upper", "full"):
                norms[mode] = Replay(view, encoder, IDS, LOOKUPS, 1, mode).lookup_norm(torch.tensor([2, 0]))[:, 0]
        scale = view.layers[1].residual_scale
        reference = out[Value(1)] if scale is None else out[Output(1)]
        wanted = reference[torch.tensor([2, 0]), torch.tensor([2, 4])]
        torch.testing.assert_close(norms["cached"], wanted.norm(dim=1) / (scale or 1.0))
        for mode in ("upper", "full"):
            torch.testing.assert_close(norms[mode], norms["cached"])


def test_model_is_left_alone(encoder: Encoder) -> None:
    view = ModelView.of(tiny_model("gpt2"))
    before = Snapshot(view.model)
    logits_of(view, encoder, torch.ones(3, view.width), None)
    assert before.differences() == []


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("architecture", ["mistral", "gpt_neo"])
def test_padding_behind_an_opening_is_noticed_in_whatever_row(architecture: str, place: int, encoder: Encoder) -> None:
    """A window of attention takes it for tokens, which only a row shows that is padded and shorter than the window."""
    view = ModelView.of(tiny_model(architecture))
    head, rest = [30, 210, 77, 41], [[60 + 7 * row + i for i in range(6)] for row in range(6)]
    rest[place] = rest[place][:1]
    ids, lookups = [[*head, *row, 9] for row in rest], [len(head) + len(row) - 1 for row in rest]
    row, last = torch.arange(6), torch.tensor([len(row) - 1 for row in ids])
    with view.frozen(), torch.no_grad():
        delta = torch.ones(6, view.width)
        full, found = (
            Replay(view, encoder, ids, lookups, 1, mode, opening=[0] * 6).logits(delta, row, last)
            for mode in ("full", None)
        )
    torch.testing.assert_close(found, full, rtol=1e-4, atol=1e-5)
