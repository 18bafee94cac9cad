"""The slow reference of the unit tests, for the real model."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone; the reference is imported by name.
sys.path.append(str(Path(__file__).parents[2] / "unit" / "evaluate"))
