"""How options of several methods become entries of a plan."""

from __future__ import annotations

import pytest

from kecore.api.errors import ConfigError
from kecore_bench.commands.options import method_entries


def test_settings_of_methods() -> None:
    pairs = ["memit.steps=3", "MEMIT + blue.gain=0.5", "memit.layers=[4]"]
    assert method_entries(["memit", "memit+blue"], ["memit=gpt-j"], pairs) == [
        {"name": "memit", "preset": "gpt-j", "set": {"steps": 3, "layers": [4]}},
        {"name": "memit+blue", "preset": None, "set": {"gain": 0.5}},
    ]
    assert method_entries(["memit"], None, None) == [{"name": "memit", "preset": None, "set": {}}]


@pytest.mark.parametrize(
    ("presets", "pairs", "said"),
    [
        ([], ["gain=0.5"], r"--set takes METHOD.KEY=VALUE, METHOD one of 'memit' \(--methods\); got 'gain=0.5'"),
        ([], ["rome.gain=1"], "one of 'memit'"),
        ([], ["memit.gain"], "key=value"),
        ([], ["memit.gain=1", "memit.gain=2"], "gain is given twice"),
        (["gpt-j"], [], "--preset takes METHOD=NAME, METHOD one of 'memit'"),
        (["memit="], [], "--preset takes METHOD=NAME"),
        (["memit=gpt-j", "memit=gpt-j"], [], "--preset of 'memit' is given twice"),
    ],
)
def test_bad_settings_of_methods(presets: list[str], pairs: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_entries(["memit"], presets, pairs)
