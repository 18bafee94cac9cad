"""Neurons beside a block: the same as a wider block, and found where blocks begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kecore.api.errors import UnsupportedModelError
from kecore.model import ModelView
from kecore.testing import tiny_model
from kecore_methods.memory.neurons import Block, Neurons, read_queries

IDS = torch.tensor([[7, 33, 104, 21, 80, 9], [5, 6, 77, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def test_neurons_are_a_wider_block() -> None:
    """In a block without a gate: further columns of its first matrix, and further rows of its second."""
    model = tiny_model("gpt2", activation_function="relu")
    view = ModelView.of(model)
    blocks = [Block.of(view, layer) for layer in (1, 3)]
    keys, biases, values = drawn(2, 5, 32), drawn(2, 5, seed=1), drawn(2, 5, 32, seed=2)
    plain = logits(model)
    with Neurons.at(blocks, keys, biases, values, "relu").on(model):
        found = logits(model)
    assert torch.equal(logits(model), plain)
    for i, block in enumerate(blocks):
        first, second = model.get_submodule(block.reader), model.get_submodule(block.projection)
        first.weight = nn.Parameter(torch.cat([first.weight, keys[i].t()], 1))
        first.bias = nn.Parameter(torch.cat([first.bias, biases[i]]))
        first.nf = first.weight.shape[1]
        second.weight = nn.Parameter(torch.cat([second.weight, values[i]]))
        second.nx = second.weight.shape[0]
    wanted = logits(model)
    assert float((wanted - plain).norm()) > 0.1 * float(plain.norm())
    assert torch.allclose(found, wanted, atol=1e-4)


def test_neurons_beside_a_gated_block_add_to_its_output() -> None:
    """Against the block's own forward with the sum over neurons and tokens written out."""
    model = tiny_model("llama")
    block = Block.of(ModelView.of(model), 2)
    keys, biases, values = drawn(1, 3, 32), drawn(1, 3, seed=1), drawn(1, 3, 32, seed=2)
    with Neurons.at([block], keys, biases, values, "gelu").on(model):
        found = logits(model)

    def after(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        more = torch.zeros_like(output)
        for row in range(output.shape[0]):
            for token in range(output.shape[1]):
                for k, b, v in zip(keys[0], biases[0], values[0], strict=True):
                    read = args[0][row, token] @ k + b
                    more[row, token] += 0.5 * read * (1 + torch.erf(read / 2**0.5)) * v
        return output + more

    handle = model.get_submodule("model.layers.2.mlp").register_forward_hook(after)
    wanted = logits(model)
    handle.remove()
    assert torch.allclose(found, wanted, atol=1e-4)


def test_silent_neurons_change_nothing() -> None:
    model = tiny_model("gemma2")
    block = Block.of(ModelView.of(model), 3)
    plain = logits(model)
    with Neurons.at([block], drawn(1, 2, 32), torch.full((1, 2), -1e4), drawn(1, 2, 32), "relu").on(model):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("architecture", "reader"),
    [
        ("gpt2", "mlp.c_fc"),
        ("llama", "mlp.up_proj"),
        ("phi3", "mlp.gate_up_proj"),
        ("gptj", "mlp.fc_in"),
        ("opt", "fc1"),
        ("bloom", "mlp.dense_h_to_4h"),
        ("falcon", "mlp.dense_h_to_4h"),
        ("rwkv", "feed_forward.key"),
        ("mamba", "mixer.in_proj"),
    ],
)
def test_block_begins_where_its_input_is_read(architecture: str, reader: str) -> None:
    model = tiny_model(architecture)
    view = ModelView.of(model)
    with view.frozen():
        block = Block.of(view, 1)
    name = view.layers[1].name
    assert block.reader == f"{name}.{reader}"
    seen: list[Any] = []
    handle = model.get_submodule(block.reader).register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    logits(model)
    handle.remove()
    assert block.d_in == seen[0].shape[-1]


def test_queries_are_what_the_block_reads() -> None:
    model = tiny_model("llama")
    view = ModelView.of(model)
    block = Block.of(view, 1)
    seen: list[Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    from kecore.text import Rows

    rows = Rows(IDS, MASK, torch.zeros(2, dtype=torch.long))
    found = read_queries(view, rows, block)
    real = MASK.bool()
    assert torch.allclose(found[real], seen[0][real], atol=1e-5)


def test_layer_without_a_reader_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block whose input no linear map reads: here the first map is hidden from whoever looks for one."""
    model = tiny_model("gpt2")
    view = ModelView.of(model)
    monkeypatch.setattr("kecore_methods.memory.neurons._key_depends_on", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="the block's input was not found"):
        Block.of(view, 1)
