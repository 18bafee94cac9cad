"""Progress: a bar where a person watches, nothing elsewhere, and lines in the log."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch
from tiny_worlds import make_world

import kecore
from kecore import Editor, EditRequest
from kecore.api.progress import STAGES, ProgressBar, choose_progress, log_stage, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_where_a_person_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert choose_progress("auto") is silent
    assert choose_progress(None) is silent
    assert choose_progress(print) is print
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(choose_progress("auto"), ProgressBar)
    assert kecore.ProgressBar is ProgressBar


def test_bar_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    class ZMQInteractiveShell:
        pass

    class IPython:
        get_ipython = ZMQInteractiveShell

    monkeypatch.setitem(sys.modules, "IPython", IPython)  # type: ignore[arg-type]
    assert isinstance(choose_progress("auto"), ProgressBar)


def test_stages_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    bar = ProgressBar(delay=0)
    bar("loading demo", 0, 0)
    assert "loading demo ..." in terminal.getvalue()
    for done in range(3):
        bar("values", done, 2)
    bar("keys", 1, 4)
    bar("keys", 0, 4)  # begins anew
    bar.close()
    bar.close()
    shown = terminal.getvalue()
    assert shown.index("loading demo") < shown.index("values:") < shown.index("keys:")


def test_log_of_a_session(caplog: pytest.LogCaptureFixture) -> None:
    fact = EditRequest("{} is the capital of", "Paris", "Italy")
    world = make_world("byte-level", torch.float32)
    editor = Editor(world.view.model, world.encoder.tokenizer)
    with caplog.at_level(logging.INFO, STAGES):
        editor.edit(fact, "ft-m", steps=1)
        editor.revert()
    begin, end = (record.message for record in caplog.records)
    assert begin == "editing 1 fact with ft-m"
    assert end.startswith("done editing 1 fact with ft-m in ")
    with caplog.at_level(logging.INFO, STAGES), pytest.raises(ValueError, match="broken"), log_stage("breaking"):
        raise ValueError("broken")
    assert caplog.records[-1].message == "breaking"
