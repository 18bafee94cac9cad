"""Lets the tests import the helper modules beside this file by name."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone.
sys.path.append(str(Path(__file__).parent))
