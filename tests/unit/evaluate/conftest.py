"""What the tests of records share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kecore.evaluate import RecordSet, load_records


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Write objects as one JSON file and read it back."""

    def read(*objects: Any, **options: Any) -> RecordSet:
        path = tmp_path / "facts.json"
        path.write_text(json.dumps(objects), encoding="utf-8")
        return load_records(path, **options)

    return read
