"""Encoder-decoders: a row of tokens is what the encoder reads, the handover, and what the decoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.editor import Editor
from kecore.inference.generation import generate
from kecore.inference.scoring import next_tokens, score_continuations
from kecore.model import ModelView
from kecore.model.handover import Handover
from kecore.model.sites import Key, ModuleInput, Output, Start, Value
from kecore.models import load_model, save_model
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.text import Encoder

SOURCES = [[30, 210, 77, 401, 5, 99], [8, 450], [300, 41, 41]]
TARGETS = [[45, 12], [63, 17, 280, 9], [7]]
LAYER = 1
FACTS = [
    EditRequest("The continent of {}", "Vinson Massif", "Danube"),
    EditRequest("The company of {}", "Apple", "Rome"),
]


@pytest.fixture(scope="module", params=["t5", "bart", "t5gemma"])
def view(request: pytest.FixtureRequest) -> ModelView:
    """One with relative positions, one that closes texts with the token that it starts with, one with norms behind."""
    # T5Gemma would take its padding token for padding wherever it stands.
    fields = {"decoder_start_token_id": {"t5": 0, "bart": 2, "t5gemma": 1}[request.param]}
    return ModelView.of(tiny_model(request.param, family="encoder-decoder", **fields))


def rows_of(view: ModelView) -> list[list[int]]:
    assert view.handover is not None
    return [[*source, *view.handover_ids, *target] for source, target in zip(SOURCES, TARGETS, strict=True)]


def plain(view: ModelView, row: int, delta: Tensor | None = None) -> dict[str, Tensor]:
    """Run one row alone as transformers' users do, by hooks of the test's own."""
    assert view.handover is not None
    states: dict[str, Tensor] = {}
    layer = view.layers[LAYER]

    def on_projection(_module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        states["key"] = args[0][0]
        if delta is None:
            return None
        changed = output.clone()
        changed[0, 0] += delta
        return changed

    def on_layer(_module: nn.Module, _args: Any, output: Any) -> None:
        states["output"] = (output if isinstance(output, Tensor) else output[0])[0].clone()

    handles = [layer.site.linear.module.register_forward_hook(on_projection)]
    handles.append(layer.module.register_forward_hook(on_layer))
    source = torch.tensor([[*SOURCES[row], view.handover.closing]])
    target = torch.tensor([[view.handover.start, *TARGETS[row]]])
    try:
        states["logits"] = view.model(input_ids=source, decoder_input_ids=target, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return states


def test_rows_are_read_as_source_and_target(view: ModelView) -> None:
    encoder = Encoder(tiny_tokenizer())
    ids = rows_of(view)
    begins = [len(source) + 1 for source in SOURCES]
    with view.frozen(), torch.no_grad():
        expected = [plain(view, row) for row in range(3)]
        for rows in (encoder.rows(ids), encoder.rows(ids, begins)):
            whole = view.run(rows, taps=[Key(LAYER), Output(LAYER), Output(LAYER - 1)])
            read = view.tokens_read(rows)
            for row, states in enumerate(expected):
                torch.testing.assert_close(whole.logits[row][read[row]], states["logits"])
                torch.testing.assert_close(whole[Key(LAYER)][row][read[row]], states["key"])
                torch.testing.assert_close(whole[Output(LAYER)][row][read[row]], states["output"])
            row = torch.arange(3)
            column = rows.ends - 1
            start = Start(LAYER, whole[Output(LAYER - 1)])
            resumed = view.run(rows, first=start, at=(row, column)).logits
            torch.testing.assert_close(resumed, torch.stack([states["logits"][-1] for states in expected]))


def test_change_at_the_decoders_first_token(view: ModelView) -> None:
    encoder = Encoder(tiny_tokenizer())
    begins = torch.tensor([len(source) + 1 for source in SOURCES])
    rows = encoder.rows(rows_of(view))
    deltas = 2 * torch.randn(3, view.width, generator=torch.Generator().manual_seed(0))

    def add(value: Tensor) -> Tensor:
        return value.index_put((torch.arange(3), begins), deltas, accumulate=True)

    with view.frozen(), torch.no_grad():
        logits = view.run(rows, patches={Value(LAYER): add}).logits
        for row in range(3):
            expected = plain(view, row, deltas[row])["logits"]
            torch.testing.assert_close(logits[row][view.tokens_read(rows)[row]], expected)


def test_module_input_stands_in_the_columns_of_the_rows(view: ModelView) -> None:
    rows = Encoder(tiny_tokenizer()).rows(rows_of(view))
    site = ModuleInput(view.layers[LAYER].site.linear.module)
    with view.frozen(), torch.no_grad():
        result = view.run(rows, taps=[site, Key(LAYER)], last=LAYER)
    assert torch.equal(result[site], result[Key(LAYER)])


def test_text_without_a_handover_is_read_by_the_decoder(view: ModelView) -> None:
    """The encoder has read an empty text."""
    assert view.handover is not None
    rows = Encoder(tiny_tokenizer()).rows([SOURCES[0], SOURCES[1]])
    empty = torch.tensor([[view.handover.closing]])
    with view.frozen(), torch.no_grad():
        logits = view.run(rows).logits
        for row, ids in enumerate(SOURCES[:2]):
            expected = view.model(input_ids=empty, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, : len(ids)], expected)


def test_prompt_ends_with_the_handover_and_the_target_is_a_text_of_its_own() -> None:
    tokenizer = tiny_tokenizer("llama-like")
    plain_encoder = Encoder(tokenizer)
    encoder = Encoder(tokenizer, handover=(2, 0))
    prompt = plain_encoder.encode("The capital of Italy is").ids
    encoded = encoder.encode("The capital of Italy is", "Rome")
    target = tuple(tokenizer("Rome", add_special_tokens=False)["input_ids"])
    assert encoded.ids == (*prompt, 2, 0, *target)
    assert encoded.ids[encoded.start :] == target
    assert encoded.spans[encoded.start][0] == len("The capital of Italy is ")
    assert encoder.encode("The capital of Italy is").ids == (*prompt, 2, 0)
    batch = RequestBatch.of([*FACTS, EditRequest("{} lies in", "Apple", "Oslo")], encoder)
    assert batch.groups == (0, 1, 2)  # two prompts about one subject have two keys
    assert [item.lookup for item in batch.located()] == [item.start - 1 for item in batch.located()]


def test_handover_is_read_from_the_model() -> None:
    model = tiny_model("t5", family="encoder-decoder")
    assert Handover.of(model) == Handover(closing=2, start=0)
    model.generation_config.forced_bos_token_id = 7
    assert Handover.of(model) == Handover(closing=2, start=0, forced=(7,))
    model.generation_config.forced_bos_token_id = None
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(UnsupportedModelError, match=r"no decoder_start_token_id.*set model\.config"):
        ModelView.of(model)
    assert Handover.of(tiny_model("llama")) is None


def test_scores_and_texts_are_those_of_the_model(view: ModelView) -> None:
    assert view.handover is not None
    tokenizer = tiny_tokenizer("llama-like")
    encoder = Encoder(tokenizer, handover=view.handover_ids)
    prompts = ["The capital of France is", "Where does the Danube flow?"]
    scores = score_continuations(view, encoder, [(prompt, "Rome") for prompt in prompts])
    distributions = next_tokens(view, encoder, prompts)
    texts = generate(view, encoder, prompts, max_new_tokens=5)
    target = list(encoder.encode(prompts[0], "Rome").ids[encoder.encode(prompts[0], "Rome").start :])
    with view.frozen(), torch.no_grad():
        for prompt, score, distribution, text in zip(prompts, scores, distributions, texts, strict=True):
            source = torch.tensor([[*Encoder(tokenizer).encode(prompt).ids, view.handover.closing]])
            read = torch.tensor([[view.handover.start, *target[:-1]]])
            log_probs = view.model(input_ids=source, decoder_input_ids=read).logits[0].log_softmax(-1)
            expected = [float(log_probs[i, token]) for i, token in enumerate(target)]
            assert score.log_probs == pytest.approx(expected, rel=1e-4)
            torch.testing.assert_close(distribution, log_probs[0])
            written = [view.handover.start]
            for _ in range(len(text.ids)):
                logits = view.model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits[0, -1]
                written.append(int(logits.argmax()))
            assert list(text.ids) == written[1:]


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("rome", {"steps": 8, "contexts": 2, "context_tokens": 3, "second_moment": False}),
        ("ft-m", {"steps": 12}),
        ("grace", {"steps": 25}),
        ("melo", {"contexts": 1, "context_tokens": 2, "steps": 12}),
    ],
)
def test_edits_of_an_encoder_decoder(method: str, config: dict[str, Any]) -> None:
    model = tiny_model("t5", family="encoder-decoder")
    before = Snapshot(model)
    editor = Editor(model, tiny_tokenizer("llama-like"), statistics=None)
    pairs = [(fact.text, fact.target) for fact in FACTS[:1]]
    unedited = score_continuations(editor.view, editor.encoder, pairs)[0].mean
    editor.edit(FACTS[:1], method, **config)
    assert score_continuations(editor.view, editor.encoder, pairs)[0].mean > unedited + 1
    editor.revert()
    assert before.differences() == []


def test_serac_says_why_it_does_not_edit_an_encoder_decoder() -> None:
    from kecore_methods.memory.serac import Serac

    view = ModelView.of(tiny_model("t5", family="encoder-decoder"))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder: serac compares"):
        Serac().prepare(view, [], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("architecture", "family", "class_name"),
    [
        ("bart", "encoder-decoder", "BartForConditionalGeneration"),
        ("bart", "causal", "BartForCausalLM"),
        ("t5", "encoder-decoder", "T5ForConditionalGeneration"),
        ("llava", "image-text", "LlavaForConditionalGeneration"),
    ],
)
def test_checkpoints_are_loaded_as_the_class_that_they_name(
    tmp_path: Path, architecture: str, family: Any, class_name: str
) -> None:
    model: Any = tiny_model(architecture, family=family)
    tokenizer = tiny_tokenizer("llama-like")
    loaded = load_model(str(save_model(model, tokenizer, tmp_path / "model")), device="cpu")
    assert type(loaded.model).__name__ == class_name
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_image_tower_stays_and_still_runs() -> None:
    """Text facts are edited inside the language tower of a model that reads images."""
    model: Any = tiny_model("llava", family="image-text", image_token_id=500)
    editor = Editor(model, tiny_tokenizer("llama-like"), statistics=None)
    vision = {name: p.clone() for name, p in model.named_parameters() if "language_model" not in name}
    assert any("vision" in name for name in vision)
    config = model.config
    size = config.vision_config.image_size
    images = (size // config.vision_config.patch_size) ** 2
    ids = torch.tensor([[30, *[config.image_token_id] * images, 41, 77]])
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    def look() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels).logits

    unedited = look()
    edit = editor.edit(FACTS, "ft-m", steps=12)
    assert {name.partition(".layers")[0] for name in edit.inspect()["updates"]} == {"model.language_model"}
    changed = dict(model.named_parameters())
    assert all(torch.equal(changed[name], tensor) for name, tensor in vision.items())
    assert not torch.equal(look(), unedited)
    editor.revert()
    assert torch.equal(look(), unedited)
