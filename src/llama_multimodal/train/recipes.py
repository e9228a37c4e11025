"""Reading a recipe: a YAML file, checked key by key, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import from_dict, nearest
from ..errors import ConfigError
from .chat.recipe import ChatRecipe
from .config import Recipe, read_table
from .world.config import WorldRecipe

TASKS: dict[str, type[Recipe]] = {cls.TASK: cls for cls in (ChatRecipe, WorldRecipe)}
"""What a recipe's `task` may be: fine-tuning on conversations, or the embedded model's world."""


def read_recipe(path: str | Path) -> Recipe:
    """Raises:
    ConfigError: no such file, not YAML, an unknown or missing key, or a value of the wrong type.
    """
    return recipe_from_dict(read_table(path), str(path))


def recipe_from_dict(raw: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from a table. Without `task` it is one for fine-tuning.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    given = dict(raw)
    task = given.pop("task", ChatRecipe.TASK)
    if task not in TASKS:
        raise ConfigError(f'{where}: there is no task "{task}"; known: {", ".join(TASKS)}{nearest(str(task), TASKS)}')
    cls = TASKS[task]
    missing = [field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in given]
    unknown = [key for key in given if key not in {field.name for field in dataclasses.fields(cls)}]
    if missing and not unknown:
        raise ConfigError(f'{where}: "{missing[0]}" is missing')
    return _build(cls, given, where, cls.SECTIONS)


def _build(cls: type[Any], raw: Mapping[str, Any], where: str, sections: Mapping[str, Any]) -> Any:
    """A configuration from a table whose keys in `sections` are tables of other configurations."""
    given = dict(raw)
    for key, inner in sections.items():
        if "." in key or given.get(key) is None:
            continue
        if not isinstance(inner, type):  # reads its table by itself
            given[key] = inner(given[key], f"{where}: {key}")
            continue
        if not isinstance(given[key], Mapping):
            raise ConfigError(f"{where}: {key} must be a table")
        below = {name.removeprefix(f"{key}."): c for name, c in sections.items() if name.startswith(f"{key}.")}
        given[key] = _build(inner, given[key], f"{where}: {key}", below)
    return from_dict(cls, given, where)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
