"""The kernels beside cv2 and the reference's augmentation: `gpuparse.bench.kernels`, as a part."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpuparse.bench.context import Context, NotRunError

__all__ = ["measure"]


def measure(context: Context) -> dict[str, Any]:
    """In a process of its own, since it holds OpenCV and torch to one thread."""
    if importlib.util.find_spec("cv2") is None:
        raise NotRunError("OpenCV (cv2) is not installed")
    context.tell("encode and augment")
    path = Path(context.data.scratch) / "kernels.json"
    settings = context.settings
    command = [sys.executable, "-m", "gpuparse.bench.kernels", "--json", str(path)]
    command += ["--size", str(settings.size), "--repeats", str(settings.kernel_repeats)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise NotRunError(f"it failed: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    del found["machine"]
    return found
