"""stub"""

from pathlib import Path
from typing import Any


def write_page(result: dict[str, Any], out: Path) -> list[Path]:
    return []
