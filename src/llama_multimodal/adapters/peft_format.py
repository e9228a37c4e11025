"""Adapters in files as PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

A layer's tensors are called by the module's name in transformers:

    base_model.model.<module>.lora_A.weight            [R, K]
    base_model.model.<module>.lora_B.weight            [N, R]
    base_model.model.<module>.lora_magnitude_vector    [N], with DoRA

Our text attention rotates halves of a head as transformers does, so no row moves. What decides the arithmetic is the
tensors, r, lora_alpha, the two patterns, use_rslora and use_dora; a key that would change it otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..models import LanguageModel
from ..weights.families import hf_modules
from ..weights.io import SafetensorsFile, TensorInfo, read_json, write_json, write_safetensors
from ..weights.save import writing
from .config import AdapterDtype, LoraConfig
from .layers import LowRank
from .lora import adapter_pairs, adapter_set, apply_lora, base_weight
from .targets import Place, places

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "bias", "layers_to_transform",
}  # fmt: skip
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Where the adapter came from, or where its layers lie, which the tensors say as well."""
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initial values that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and others move a part of it into the
adapter, which is then one of another base, unless PEFT has converted it (and says true here)."""
_BASE = "base_layer.weight"
"""PEFT stores an adapted LM head's own weight along with the adapter."""
_LISTED = 20  # problems named in one error


# --- writing ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: LanguageModel, folder: str | Path, name: str = "default", *, base_model: str | None = None
) -> None:
    """Write an adapter so that `load_adapter` and PEFT read it; all of it or nothing.

    base_model: the name or folder of the model that it belongs to, for the readers of the file

    Raises:
        ConfigError: the model has no such adapter.
        CheckpointError: the folder cannot be written.
    """
    config, pairs = adapter_set(model).configs, adapter_pairs(model, name)
    known = places(model)
    modules = {path: names[0] for path, names in hf_modules(model.config, known).items()}
    tensors = {
        f"{_PREFIX}{modules[path]}.{theirs}": getattr(pair, ours).detach()
        for path, pair in pairs.items()
        for theirs, ours in _PARTS.items()
        if getattr(pair, ours) is not None
    }
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    with writing(folder, "adapter") as aside:
        write_safetensors(aside / TENSORS, infos, tensors.items())
        write_json(aside / CONFIG, _config_to_peft(config[name], pairs, modules, base_model))


def _config_to_peft(
    config: LoraConfig, pairs: Mapping[str, LowRank], modules: Mapping[str, str], base_model: str | None
) -> dict[str, Any]:
    ranks = {path: pair.rank for path, pair in pairs.items() if pair.rank != config.rank}
    alphas = {path: pair.alpha for path, pair in pairs.items() if pair.alpha != config.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(pairs, modules),
        "rank_pattern": {_exactly(modules[path]): rank for path, rank in ranks.items()},
        "alpha_pattern": {_exactly(modules[path]): _number(alpha) for path, alpha in alphas.items()},
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _target_modules(pairs: Mapping[str, LowRank], modules: Mapping[str, str]) -> list[str]:
    """The last words of the modules' names, as people write them, where those mean these modules and no others."""
    leaves = {modules[path].rpartition(".")[2] for path in pairs}
    meant = {path for path, module in modules.items() if module.rpartition(".")[2] in leaves}
    return sorted(leaves if meant == pairs.keys() else (modules[path] for path in pairs))


def _number(alpha: float) -> float:
    """PEFT calls it a whole number, and others read it as one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}"


# --- reading ---------------------------------------------------------------------------------------------------------


def load_adapter(
    model: LanguageModel,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    dtype: AdapterDtype = "float32",
) -> LanguageModel:
    """Give a model an adapter that `save_adapter` or PEFT wrote; returns the model, which is frozen.

    trainable: go on training it. dtype: of its parameters, as in `LoraConfig`

    Raises:
        CheckpointError: no adapter there, damaged, or one for another base; one error lists what does not fit.
        ConfigError: a setting that is not implemented, or a name that is taken.
    """
    folder = Path(folder).expanduser()
    raw = read_adapter_config(folder)
    file = SafetensorsFile(folder / TENSORS)
    found = _fit(model, folder, raw, file)
    config = LoraConfig(
        rank=raw["r"],
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout") or 0.0,
        targets=tuple(found),
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        rank_pattern={path: layer.rank for path, layer in found.items()},
        alpha_pattern={path: layer.alpha for path, layer in found.items()},
        dtype=dtype,
    )
    apply_lora(model, config, name)
    with torch.no_grad():
        for path, pair in adapter_pairs(model, name).items():
            for ours, value in found[path].tensors.items():
                getattr(pair, ours).copy_(value.reshape(getattr(pair, ours).shape))
            pair.requires_grad_(trainable)
    return model


@dataclass
class _Layer:
    """What a file holds for one layer."""

    rank: int
    alpha: float
    tensors: dict[str, Tensor]  # A, B and with DoRA the magnitude


def _fit(model: LanguageModel, folder: Path, raw: Mapping[str, Any], file: SafetensorsFile) -> dict[str, _Layer]:
    """What is found for each of our layers, in the model's order.

    Raises:
        CheckpointError: what does not fit the model or the configuration.
    """
    known = places(model)
    by_name = {name: path for path, names in hf_modules(model.config, known).items() for name in names}
    keys: dict[str, dict[str, str]] = {}  # of our layers: their tensors' keys by part
    named: dict[str, str] = {}  # what they are called
    problems = []
    for key in file.entries:
        module, part = _split(key)
        path = by_name.get(module)
        if path is None:
            problems.append(f"{key}: this model has no such layer")
        elif part != _BASE:
            named[path] = module
            keys.setdefault(path, {})[part] = key
        elif not _same(file.tensor(key), base_weight(model, known[path]), model.dtype):
            problems.append(f"{key}: it belongs to a model with another {module}")
    found = {}
    for path in [path for path in known if path in keys]:
        rank = _by_pattern(raw.get("rank_pattern"), named[path], raw["r"])
        alpha = _by_pattern(raw.get("alpha_pattern"), named[path], raw.get("lora_alpha", 8))
        problems += _misfits(known[path], rank, bool(raw.get("use_dora")), named[path], keys[path], file)
        if not _is_chosen(raw, named[path]):
            problems.append(f"{named[path]}: not among layers_to_transform")
        found[path] = rank, alpha
    if not found and not problems:
        problems.append("it holds no tensors")
    if problems:
        rest = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        lines = "\n  ".join([*problems[:_LISTED], *rest])
        raise CheckpointError(f"the adapter in {folder} does not fit this model ({len(problems)} problems):\n  {lines}")
    layers = {}
    for path, (rank, alpha) in found.items():
        tensors = {part: file.tensor(key) for part, key in keys[path].items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise CheckpointError(f"{folder / TENSORS}: {named[path]} holds values that are not finite")
        layers[path] = _Layer(rank, alpha, tensors)
    return layers


def _misfits(
    place: Place, rank: int, dora: bool, module: str, keys: Mapping[str, str], file: SafetensorsFile
) -> list[str]:
    """What of a layer's tensors is missing, too much or of another shape."""
    outputs, inputs = place.shape
    wanted: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (outputs, rank)}
    if dora:
        wanted["magnitude"] = (outputs,)
    problems = [f"{module}: {part} is missing" for part in wanted if part not in keys]
    for part, key in keys.items():
        info = file.entries[key]
        if part not in wanted:
            problems.append(f"{key}: there without use_dora")
        elif info.shape != wanted[part]:
            problems.append(f"{key}: {list(info.shape)} found, {list(wanted[part])} expected")
        elif not info.dtype.is_floating_point:
            problems.append(f"{key}: {info.dtype} found, a floating-point dtype expected")
    return problems


def _same(stored: Tensor, ours: Tensor, dtype: torch.dtype) -> bool:
    return stored.shape == ours.shape and torch.equal(stored.to(ours.device, dtype), ours.to(dtype))


def _split(key: str) -> tuple[str, str]:
    """The module's name and the part of a tensor's key."""
    for theirs, part in {**_PARTS, _BASE: _BASE}.items():
        if key.startswith(_PREFIX) and key.endswith(f".{theirs}"):
            return key[len(_PREFIX) : -len(theirs) - 1], part
    return key, ""


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's patterns are regular expressions for the end of a name, and the first that fits counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_chosen(raw: Mapping[str, Any], module: str) -> bool:
    chosen = raw.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    number = re.match(r".*\.[^.]*\.(\d+)\.", module)
    return number is not None and int(number[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked.

    Raises:
        CheckpointError: the folder holds no adapter that is read.
        ConfigError: a setting that is not implemented.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG}")
    if not (folder / TENSORS).is_file():
        pickle = " (adapter_model.bin is a pickle and is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise CheckpointError(f"{folder} holds no {TENSORS}{pickle}; save it as safetensors")
    raw = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f'{where}: peft_type is {raw.get("peft_type")!r}; only "LORA" is read')
    if raw.get("bias", "none") != "none":
        raise ConfigError(f'{where}: bias is {raw["bias"]!r}; only "none" is implemented')
    if raw.get("init_lora_weights", True) not in _INITS:
        raise ConfigError(
            f"{where}: init_lora_weights is {raw['init_lora_weights']!r}, which changes the base too; let PEFT convert"
            " the adapter while saving it (path_initial_model_for_weight_conversion)"
        )
    for key, value in raw.items():
        if key not in _READ and key not in _HARMLESS and value not in (None, False, "", [], {}):
            raise ConfigError(f"{where}: {key} is {value!r}, which is not implemented; only plain LoRA and DoRA are")
    for key in ("rank_pattern", "alpha_pattern"):
        table = raw.get(key) or {}
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {key} must be a table, not {table!r}")
        for pattern in table:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{where}: {key}: {pattern!r} is no regular expression ({error})") from error
    for key, value in [("r", raw.get("r")), *(raw.get("rank_pattern") or {}).items()]:
        if type(value) is not int or value < 1:
            raise ConfigError(f"{where}: the rank {key} must be a whole number of at least 1, not {value!r}")
    for key, value in [("lora_alpha", raw.get("lora_alpha", 8)), *(raw.get("alpha_pattern") or {}).items()]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {key} must be a number, not {value!r}")
    return raw
