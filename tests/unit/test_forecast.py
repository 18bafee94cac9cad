"""A stage says how much it computes, and a pace of this machine makes seconds of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kecore import Editor, EditRecord, EditRequest, Protocol
from kecore.api.types import Probe
from kecore.corpus import TextSample
from kecore.evaluate.runner import evaluate, evaluation_work
from kecore.forecast import Pace, forecast_seconds, measure_pace
from kecore.memory import Need, Work
from kecore.model import ModelView
from kecore.statistics import collect_statistics, collection_need

REQUEST = EditRequest("{} is the capital of", "Paris", "Italy")


class Count:
    """Passes of a model and their tokens."""

    passes = tokens = layers = 0


@contextmanager
def counted(view: ModelView, monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    count, run = Count(), ModelView.run

    def counting(self: ModelView, rows: Any, **options: Any) -> Any:
        count.passes += 1
        count.tokens += rows.input_ids.numel()
        last = options.get("last")
        count.layers = len(view.layers) if last is None else last + 1
        return run(self, rows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ModelView, "run", counting)
        yield count


def test_statistics_compute_what_they_say(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passage = "Paris is the capital of France and Rome is the capital of Italy. " * 40
    text = TextSample(passages=(passage,) * 10, digest="digest", sources=(), seed=0)
    with counted(small.view, monkeypatch) as count:
        statistics = collect_statistics(small.view, small.encoder, text, [0, 1], tokens=1024)
    work = collection_need(small.view, [0, 1], 1024).work
    assert work is not None
    assert (work.tokens, work.layers) == (statistics.tokens, count.layers)
    assert abs(work.passes - count.passes) <= 1
    widths = [small.view.layer(layer).site.linear.d_in for layer in (0, 1)]
    assert work.operations == 1024 * sum(width**2 for width in widths)


def test_scores_compute_no_more_than_they_say(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbour = Probe("neighbourhood", "Rome is the capital of", ("Italy",), rivals=("France",))
    records = [EditRecord(REQUEST, (neighbour,))]
    protocol = Protocol(max_new_tokens=4)
    with counted(small.view, monkeypatch) as count:
        evaluate(small.view, small.encoder, records, protocol)
    work = evaluation_work(small.view, small.encoder, records, protocol)
    assert count.tokens <= 2 * work.tokens  # padded, and a letter may be a token of this small vocabulary
    assert work.layers == len(small.view.layers)
    unwritten = evaluation_work(small.view, small.encoder, records, Protocol(max_new_tokens=0))
    assert unwritten.tokens < work.tokens


def test_more_steps_and_facts_take_longer(small: Any) -> None:
    editor = Editor(small.view.model, small.encoder.tokenizer)

    def work(method: str, facts: int = 1, **config: Any) -> Work:
        requests = [EditRequest("{} is the capital of", name, "Italy") for name in ("Paris", "Rome", "Oslo")[:facts]]
        needs = editor.preflight(requests, method, **config).needs
        assert needs[0].work is not None
        return needs[0].work

    for method in ("memit", "ft-m", "lora"):
        assert work(method, steps=20).tokens == 2 * work(method, steps=10).tokens, method
        assert work(method, facts=3).tokens > 2 * work(method).tokens, method


def test_seconds() -> None:
    pace = Pace(per_pass=0.5, per_token=0.25, per_operation=0.125, unembedding=8)
    assert pace.seconds(Work(passes=2, tokens=4, layers=3, logits=2, operations=16)) == 3 * (1 + 1) + 2 + 2
    known, unknown = Need("a", work=Work(operations=8)), Need("b")
    assert forecast_seconds(pace, [known, known]) == 2
    assert forecast_seconds(pace, [known, unknown]) is None


def test_pace_is_measured_and_leaves_the_model_alone(small: Any) -> None:
    before = {name: tensor.clone() for name, tensor in small.view.model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pace = measure_pace(small.view)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(pace.per_token, pace.per_operation) > 0
    assert pace.per_pass >= 0
    assert all(torch.equal(before[name], tensor) for name, tensor in small.view.model.state_dict().items())
    seconds = Editor(small.view.model, small.encoder.tokenizer).forecast(REQUEST, "ft-m")
    assert seconds is not None
    assert 0 < seconds < math.inf
    assert Editor(small.view.model, small.encoder.tokenizer).forecast(REQUEST, "ice") is None
