"""The recipes: each is a plan that could run, and the small one runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kecore import models
from kecore.api.line import MethodLine
from kecore.cli import app
from kecore.evaluate.formats import default
from kecore.hub import is_reference
from kecore_bench.plan import BenchPlan, read_plan

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        "memit-counterfact", "alphaedit-sequential", "knowedit", "knowedit-convsent", "knowedit-sanitation", "qaedit",
        "smollm2-counterfact", "smollm2-quick",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_could_run(path: Path) -> None:
    plan = BenchPlan.make(read_plan(path))
    for entry in plan.rows:
        method = MethodLine.of(entry.name)
        assert method.make_config(entry.set, preset=entry.preset).to_json()
        assert not method.capabilities.needs_training
    for data in plan.facts:
        assert data.format is None or data.format in default().all()
        assert is_reference(data.path) or data.path.endswith((".json", ".jsonl"))
    run = {entry.title for entry in plan.rows} | {"unedited"}
    for table in plan.published:
        assert table.arxiv, "whose figures these are"
        assert table.table
        assert table.data, "on which data"
        assert run & table.rows.keys()
        percent = [value for row in table.rows.values() for key, value in row.items() if key != "fluency"]
        assert all(0 <= value <= 100 for value in percent)
        assert any(table.data.casefold() in data.path.casefold() for data in plan.facts)
    assert "kecore bench recipes/" in path.read_text(encoding="utf-8")


@pytest.mark.real_model
def test_the_small_recipe_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its one command, as it stands."""
    if models.demo_file() is None:
        pytest.skip(models.DEMO_MISSING)
    (tmp_path / "kecore").symlink_to(root / "kecore")
    (tmp_path / "recipes").symlink_to(root / "recipes")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "recipes/smollm2-quick.yaml", "--json"])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "smollm2-quick.sqlite").is_file()
    (table,) = json.loads(done.stdout)["tables"]
    rows = {row["method"]: row["scores"] for row in table["rows"]}
    assert list(rows) == ["unedited", "memit", "ice", "retrieval", "ft-m"]
    for name in ("memit", "ft-m"):
        assert rows[name]["edit_success"]["value"] == 1.0
        assert rows[name]["edit_magnitude"]["value"] > rows["unedited"]["edit_magnitude"]["value"]
    assert rows["memit"]["strict_accuracy"]["value"] == 1.0
    assert table["published"][0]["rows"]["memit"]["edit_success"] == 98.9
