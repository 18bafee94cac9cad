"""Importing kecore costs little and touches nothing: no transformers, no CUDA, no method, no compiler."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
import torch
import {module}
print(json.dumps({{
    "cuda": torch.cuda.is_initialized(),
    "heavy": sorted({{
        "transformers", "huggingface_hub", "datasets", "matplotlib", "gguf", "torch.utils.cpp_extension",
        "kecore_methods", "torch._dynamo", "pydantic",
    }} & set(sys.modules)),
}}))
"""


def probe(module: str) -> dict[str, object]:
    command = [sys.executable, "-c", PROBE.format(module=module)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    "module",
    [
        "kecore",
        "kecore.editor",
        "kecore.api.registry",
        "kecore.statistics",
        "kecore.models",
        "kecore.doctor",
        "kecore.cli",
    ],
)
def test_import_is_lean(module: str) -> None:
    seen = probe(module)
    assert seen["heavy"] == []
    assert seen["cuda"] is False


def test_listing_names_imports_no_method() -> None:
    code = (
        "import sys; from kecore.api import registry; names = registry.default_registry().names(); "
        "assert 'memit' in names, names; "
        "assert not {'kecore_methods', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
