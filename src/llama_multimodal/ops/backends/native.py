"""Where the build of the native libraries (setup.py) leaves each one, and what its report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def library_path(backend: str) -> Path:
    """The file that holds a backend's kernels, whether or not it is there."""
    return _FOLDER / backend / f"libllama_mm_{backend}.so"


def build_report(backend: str) -> dict[str, Any] | None:
    """What setup.py wrote beside the library, if it did: `built`, and `why` not, or `archs`, `compiler`, `seconds`."""
    try:
        report = json.loads(library_path(backend).with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def why_not_built(backend: str) -> str | None:
    """Why there is no library for a backend, or None where there is one."""
    if library_path(backend).exists():
        return None
    report = build_report(backend)
    if report is None or not report.get("why"):
        return "its library is not built; pip install -e . in the source tree builds it"
    return f"its library is not built: {report['why']}"
