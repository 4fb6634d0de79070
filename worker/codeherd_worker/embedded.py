"""Where the model that comes with this package lies. Does not load it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

EMBEDDED_FOLDER: Final = Path(__file__).parent / "tiny"
