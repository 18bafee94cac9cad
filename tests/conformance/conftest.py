"""Lets the tests import the planted faults by name."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone; the helper module beside this file is imported by name.
sys.path.append(str(Path(__file__).parent))
