"""What a run was made by, beside its result: the whole recipe, and the versions of what computed it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..weights.io import write_json
from .config import Recipe

RECIPE, VERSIONS = "recipe.yaml", "versions.json"
_PACKAGES = ("numpy", "safetensors", "tokenizers", "bitsandbytes")


def write_record(recipe: Recipe, folder: Path) -> None:
    """Write the recipe, defaults spelt out, in a form that `read_recipe` reads; and versions and devices."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    table = {"task": recipe.TASK, **_plain(dataclasses.asdict(recipe))}
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(text, encoding="utf-8")
    versions = {"llama-multimodal": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    write_json(folder / VERSIONS, {"versions": versions, "device": device})


def _plain(value: Any) -> Any:
    """Tables and lists: what YAML has."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
