"""A tiny model with its encoder, requests and records for the tests of the methods that are trained."""

from __future__ import annotations

from typing import Any

import torch
from make_records import ask, make_record
from torch import nn

from kecore import EditRequest, Encoder, MethodContext, ModelView, Schedule, WeightEdit
from kecore.batch import RequestBatch
from kecore.testing import tiny_model, tiny_tokenizer

REQUESTS = [
    EditRequest("The capital of {}", "France", "Rome"),
    EditRequest("The company of {} is", "Tim Cook", "Danube Apple"),
    EditRequest("{} lies by", "Rome", "Europe"),
]
RECORDS = [
    make_record(
        EditRequest("The city of {} is", f"land {i}", ("Rome", "Apple", "Danube")[i % 3]),
        (f"land {i} has a city named",),
        locality={"unrelated": (ask(f"The tower number {i} is in", "Paris"),)},
    )
    for i in range(12)
]
SHORT = Schedule(steps=6, batch_size=4, held_out=4, evaluate_every=3)


def setting(architecture: str = "llama") -> tuple[ModelView, Encoder]:
    kind = "byte-bpe" if architecture == "gpt2" else "llama-like"
    return ModelView.of(tiny_model(architecture)), Encoder(tiny_tokenizer(kind))


def planned(method: Any, setting: tuple[ModelView, Encoder], requests: list[EditRequest], trained: Any) -> WeightEdit:
    """The edit of a trained method."""
    view, encoder = setting
    config = method.Config.make(trained.config)
    edit = method().plan(view, RequestBatch.of(requests, encoder), MethodContext(config, encoder, trained=trained))
    assert isinstance(edit, WeightEdit)
    return edit


def shaken(network: Any) -> Any:
    """A network whose parameters and statistics are all moved at random, so that each has a say."""
    assert isinstance(network, nn.Module)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in network.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            buffer.copy_(0.1 * noise if "mean" in name else 0.5 + noise)
    return network
