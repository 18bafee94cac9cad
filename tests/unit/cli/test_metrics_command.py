"""``kecore metrics`` lists what tables show, and every metric explains itself."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from kecore.cli import app
from kecore.evaluate.metrics import families


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, ["metrics", *words])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_every_metric_of_every_family_is_listed() -> None:
    listed = json.loads(invoke("--json"))
    expected = {metric.key for metrics in families().values() for metric in metrics}
    assert {metric["key"] for metric in listed["metrics"]} == expected
    assert [metric["key"] for metric in listed["metrics"] if metric["better"] == "lower"] == [
        "perplexity", "paraphrase_perplexity", "neighbourhood_kl", "locality_kl"
    ]  # fmt: skip
    assert [cost["heading"] for cost in listed["costs"]] == ["s/fact", "KiB/fact", "+ms/token", "peak GiB"]


def test_each_meaning_stands_alone() -> None:
    """A hover shows one meaning, so none may lean on that of another metric."""
    meanings = [metric.meaning for metrics in families().values() for metric in metrics]
    assert all(len(meaning) > 20 and "the same" not in meaning for meaning in meanings)
    assert len(set(meanings)) == len(meanings)


def test_one_metric_by_its_column_and_a_family() -> None:
    assert "share of edited prompts on which the target is more probable" in " ".join(invoke("ES").split())
    assert [metric["key"] for metric in json.loads(invoke("kl", "--json"))["metrics"]] == [
        "neighbourhood_kl", "locality_kl"
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "near"), [("edit_sucess", "edit_success"), ("fluencyy", "fluency")])
def test_unknown_names_have_a_nearest(name: str, near: str) -> None:
    done = CliRunner().invoke(app, ["metrics", name])
    assert done.exit_code != 0
    assert f"did you mean '{near}'" in done.stderr
