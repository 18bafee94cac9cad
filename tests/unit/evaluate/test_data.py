"""The bundled samples."""

from __future__ import annotations

import gzip
import json

import pytest

from kecore import data
from kecore.api.errors import DataFormatError
from kecore.api.types import check_conflicts
from kecore.evaluate import load_records


def test_counterfact_sample() -> None:
    path = data.path("counterfact_sample.jsonl")
    records = load_records(path)
    assert len(records) == 60
    assert path.stat().st_size < 150_000
    check_conflicts(records.requests)
    assert len({record.request.subject for record in records}) == 60
    for record in records:
        assert len(record.prompts_of("paraphrase")) == 2
        assert len(record.prompts_of("neighbourhood")) == 10
        assert record.request.ground_truth
        assert record.prompts_of("generation")


def test_wikipedia_sample() -> None:
    path = data.path("wikipedia_sample.jsonl.gz")
    assert path.stat().st_size < 400_000
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        articles = [json.loads(line) for line in lines]
    assert len(articles) == 442
    assert all(set(article) == {"title", "text"} and len(article["text"]) > 100 for article in articles)
    assert sum(len(article["text"]) for article in articles) > 700_000


def test_unknown_name() -> None:
    with pytest.raises(DataFormatError, match="there are: counterfact_sample"):
        data.path("counterfact.jsonl")
