"""Published set-ups: what the files hold, and for which model each is."""

from __future__ import annotations

from typing import Any

import pytest

from kecore import Editor
from kecore.api import registry
from kecore.api.config import ModelShape, Preset
from kecore.testing import tiny_model, tiny_tokenizer
from kecore_methods.locate.memit import Memit

METHODS = registry.default_registry()
PRESETS = [
    pytest.param(name, preset_name, preset, id=f"{name}-{preset_name}")
    for name in METHODS.names()
    for preset_name, preset in METHODS.get(name).Config.presets().items()
]


@pytest.mark.parametrize(("method", "name", "preset"), PRESETS)
def test_a_preset_is_a_configuration_with_a_source(method: str, name: str, preset: Preset) -> None:
    config = METHODS.get(method).Config
    made = config.make(preset.fields).to_json()
    assert {key: made[key] for key in preset.fields} == preset.fields
    assert config.preset(name) == preset.fields
    assert preset.source
    assert all(difference.endswith(".") for difference in preset.differs)


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "pmet", "encore", "alphaedit", "nas"])
def test_presets_have_the_switches_of_the_released_code(method: str) -> None:
    switches: dict[str, Any] = {
        "optimizer": "adam", "kl_position": "subject", "merge_subjects": False, "noise": 0, "length_penalty": 0,
        "gain": 1, "statistics_ridge": 0,
    }  # fmt: skip
    for preset in METHODS.get(method).Config.presets().values():
        assert switches.items() <= preset.fields.items()
        assert (preset.fields.get("relative_to") == "projection") is (method == "rome")


def test_presets_are_matched_by_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    assert editor.presets("memit") == {}
    shape = ModelShape(layers=4, width=32, vocabulary=512)
    theirs = Preset({"steps": 5}, "a paper", ("All of it.",), shape)
    monkeypatch.setattr(Memit.Config, "presets", lambda: {"theirs": theirs, "other": Preset({}, "another paper")})
    assert editor.presets() == {"theirs": theirs}
