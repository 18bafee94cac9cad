"""A line of a method and stages means that method with these stages, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError, MethodNotFoundError, PluginError
from kecore.api.line import MethodLine, method_of
from kecore.api.types import Capabilities


class Plain:
    """A method without stages that is not installed."""

    name = "plain"
    Config = MethodConfig
    capabilities = Capabilities("weights", batch=True, sequential=True)
    reference = "nobody, nowhere"
    api = (1, 9)

    def plan(self, *_args: Any) -> Any:
        return "an edit"


@pytest.mark.parametrize("text", ["memit + blue + nas", "MEMIT+Blue+ nas", " memit  +blue +NAS "])
def test_a_line_is_read_whatever_its_blanks_and_letter_case(text: str) -> None:
    line = MethodLine.of(text)
    assert (line.method, line.stages) == (method_of("memit"), ("blue", "nas"))
    assert line.name == "memit + blue + nas"
    assert line.capabilities is line.method.capabilities
    assert MethodLine.of(line) is line


def test_a_class_need_not_be_installed() -> None:
    line = MethodLine.of(Plain)
    assert (line.method, line.stages, line.name) == (Plain, (), "plain")
    assert type(line.make_config({})) is MethodConfig
    edit: Any = line.plan(*[None] * 3)  # type: ignore[arg-type]
    assert edit == "an edit"  # without stages it is the method's own, as it came


def test_what_a_line_cannot_be_is_said() -> None:
    with pytest.raises(MethodNotFoundError, match="no method 'memt'; did you mean 'memit'"):
        MethodLine.of("memt + blue")
    with pytest.raises(ConfigError, match=r"method 'ft-m \+ blue': no stage can be added, got 'Blue': stages change"):
        MethodLine.of("ft-m + Blue")
    with pytest.raises(PluginError, match="must be a MethodConfig subclass"):
        MethodLine.of(type("Broken", (Plain,), {"Config": dict}))


def test_the_method_of_a_line_is_found_without_its_stages() -> None:
    """A file that a line made can be read where its stages are not installed."""
    assert method_of("neuraldb + no-such-stage") is method_of("neuraldb")
