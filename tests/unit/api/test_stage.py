"""Stages that strangers install are found, described, and refused by name where they break the contract."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kecore.api.errors import ConfigError, IncompatiblePluginError, PluginError
from kecore.api.stage import STAGE_API, Stages, check_stage, installed_stages

GOOD = """
from pydantic import Field
from kecore.api.config import StageSettings

class MyStage:
    \"\"\"Do what mine does.

    And more.\"\"\"

    class Settings(StageSettings):
        strength: float = Field(default=0.5, ge=0, description="How much of it.")

    name = "my-stage"
    reference = "nobody, nowhere"
    api = (1, 1)

    def apply(self, form, settings):
        return form
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    (tmp_path / "my_stage_module.py").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_stage_module", raising=False)
    names = {"my-stage": "my_stage_module:MyStage", "broken": "my_stage_module:Nothing"}
    return Stages(EntryPoint(name, value, "kecore.stages") for name, value in names.items())


def test_a_stage_is_described(stages: Stages, recwarn: pytest.WarningsRecorder) -> None:
    broken, mine = stages.describe()
    assert "cannot be imported" in broken.error
    assert (mine.name, mine.summary, mine.reference) == ("my-stage", "Do what mine does.", "nobody, nowhere")
    assert mine.settings == {"my_stage_strength": "How much of it."}
    assert mine.to_json()["target"] == "my_stage_module:MyStage"


def test_a_setting_belongs_to_the_stage_whose_name_it_begins_with(stages: Stages) -> None:
    stage = stages.get("My_Stage")
    assert stages.owner_of("my_stage_strength") is stage
    assert stages.owner_of("my_stage_length") is None
    assert stages.owner_of("strength") is None
    with pytest.raises(ConfigError, match="no stage 'my-stag'; did you mean 'my-stage'"):
        stages.get("my-stag")


def test_built_in_stages_fulfil_the_contract() -> None:
    described = installed_stages().describe()
    assert {"blue", "merge", "nas", "prune", "rect", "simie", "sphere"} <= {stage.name for stage in described}
    for stage in described:
        assert not stage.error
        assert stage.summary.endswith(".")
        assert all(stage.settings.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "other"}, PluginError, "MyStage.name must be the entry point's name 'my-stage'; got 'other'"),
        ({"Settings": dict}, PluginError, "MyStage.Settings must be a StageSettings subclass"),
        ({"reference": " "}, PluginError, "MyStage.reference must be the paper as text"),
        ({"apply": None}, PluginError, r"MyStage.apply must be a function apply\(self, form, settings\)"),
        ({"api": 1}, PluginError, "api must be the lowest and highest STAGE_API"),
        ({"api": (STAGE_API + 1, STAGE_API + 1)}, IncompatiblePluginError, "update kecore"),
        ({"api": (0, STAGE_API - 1)}, IncompatiblePluginError, "update the plugin"),
    ],
)
def test_a_broken_contract_is_named(
    stages: Stages, change: dict[str, object], error: type[Exception], message: str
) -> None:
    changed = type("MyStage", (stages.get("my-stage"),), change)
    with pytest.raises(error, match=message):
        check_stage(changed, "my-stage")
    with pytest.raises(PluginError, match="must lead to a class"):
        check_stage(5, "my-stage")
