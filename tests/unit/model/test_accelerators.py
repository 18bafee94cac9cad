"""Accelerators: all that are installed act around each pass, those that a user names, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kecore.api.errors import ConfigError, PluginError
from kecore.model import ModelView, accelerators
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.text import Encoder


@pytest.fixture(autouse=True)
def found_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is switched on is found once a process."""
    monkeypatch.delenv("KECORE_ACCELERATORS", raising=False)
    switched_on = accelerators._switched_on
    switched_on.cache_clear()
    yield
    switched_on.cache_clear()


def names() -> list[str]:
    return [accelerator.__name__ for accelerator in accelerators._switched_on()]


def test_kecores_own_are_switched_on() -> None:
    assert names() == ["by_groups", "products"]


@pytest.mark.parametrize(("value", "expected"), [("", []), ("onednn", ["products"]), ("OneDNN, attention", None)])
def test_a_user_names_some_or_none(monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str] | None) -> None:
    monkeypatch.setenv("KECORE_ACCELERATORS", value)
    assert names() == (["products", "by_groups"] if expected is None else expected)


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KECORE_ACCELERATORS", "onedn")
    with pytest.raises(ConfigError, match="onednn"):
        names()


def test_what_cannot_be_called_is_no_accelerator() -> None:
    with pytest.raises(PluginError, match="an accelerator is a function of a model"):
        accelerators._check(3, "three", "accelerator 'three'")


def test_each_pass_runs_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def accelerator(model: nn.Module) -> Iterator[None]:
        log.append("in")
        hook = model.register_forward_hook(lambda *_: log.append("pass"))
        yield
        hook.remove()
        log.append("out")

    view = ModelView.of(tiny_model("llama"))
    monkeypatch.setattr(accelerators, "_switched_on", lambda: (accelerator,))
    with torch.no_grad():
        view.run(Encoder(tiny_tokenizer()).rows([[3, 4]]))
    assert log == ["in", "pass", "out"]
