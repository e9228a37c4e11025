"""Writing checkpoints: aside, flushed to disk, then renamed, so that a crash never leaves a mixture of old and new."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import ops
from ..config import AnyModelConfig, ModelConfig, config_to_hf
from ..errors import CheckpointError
from ..models import LanguageModel
from ..ops import PackedWeight
from ..quant.nf4 import Nf4Linear
from ..quant.pack import LM_HEAD, PackedLinear
from .checkpoint import INDEX, SINGLE, Layout, find_layout, parameter_shapes
from .families import hf_rules, meta_rules
from .io import TensorInfo, flush, write_json, write_safetensors
from .meta_params import config_to_meta
from .nf4 import StoredNf4, nf4_config, stored_nf4
from .packed import StoredPacked, is_linear, quantization_config, stored_as
from .rules import Rule, TileGrid

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "tokenizer.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What is copied along with the weights."""

LEFTOVERS = "meta/unused_tiles.safetensors"
"""Beside a model that came from Meta's layout: the cells of its tile grids that no aspect ratio uses. Nothing reads
them but the way back."""


@dataclass(frozen=True)
class Weights:
    """What to write: our parameters, one at a time, and the unused cells of Meta's tile grids by Meta's names.

    packed: those of the parameters that are written packed; `infos` and `get` leave them out. fp8_activations: whether
    what goes into fp8 layers is rounded too. nf4: the layers of those of `packed` that are `StoredNf4`.
    """

    infos: Mapping[str, TensorInfo]
    get: Callable[[str], Tensor]
    leftovers: Mapping[str, Tensor] = field(default_factory=dict)
    packed: Mapping[str, StoredPacked | StoredNf4] = field(default_factory=dict)
    get_packed: Callable[[str], PackedWeight] | None = None
    fp8_activations: bool = False
    nf4: Mapping[str, Nf4Linear] = field(default_factory=dict)


def save_checkpoint(
    model: LanguageModel,
    folder: str | Path,
    layout: Layout = "hf",
    *,
    unpacked: bool = False,
    tokenizer_from: str | Path | None = None,
    beside: Callable[[Path], None] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a model so that it, transformers (`hf`) or Meta's reference (`meta`) can load it.

    A checkpoint of the same layout that lies in the folder is replaced; other files there are left alone. int8 and int4
    layers of a packed model are written as they are (`weights/packed.py`) and load that way.

    unpacked: write the plain numbers that packed layers stand for, in the model's dtype
    tokenizer_from: a folder whose tokenizer and processor files are copied along
    beside: writes such files itself, into the folder that it is given
    max_shard_size: bytes; a larger model becomes several safetensors files and an index

    Raises:
        CheckpointError: the layout cannot hold this model, or the folder cannot be written.
    """
    if layout == "gguf":
        raise CheckpointError("GGUF files are read and not written; save in the layout hf")
    rules = hf_rules(model.config, parameter_shapes(model.config)) if layout == "hf" else meta_rules(model.config)
    weights = _weights_of(model, rules, unpacked)
    if weights.infos.keys() | weights.packed.keys() != {rule.ours for rule in rules}:
        raise CheckpointError(
            "this model's layers were changed by adapters; save these alone with save_adapter, or merge or remove them"
            " before saving the model"
        )
    if any(value.is_meta for value in model.parameters()):
        raise CheckpointError("this model was built without weights, so there is nothing to save")
    if weights.packed and layout == "meta":
        raise CheckpointError("Meta's layout holds no packed weights; save this model in the Hugging Face layout")
    with writing(folder, layout) as aside:
        write_weights(aside, layout, model.config, rules, weights, max_shard_size)
        copy_tokenizer(tokenizer_from, aside)
        if beside is not None:
            beside(aside)


def _weights_of(model: LanguageModel, rules: Sequence[Rule], unpacked: bool) -> Weights:
    """A model's parameters, and its packed layers' weights by the names of the plain layers' parameters."""
    plain = {name: value.detach() for name, value in model.named_parameters()}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in plain.items()}
    theirs = {rule.ours: rule.theirs[0] for rule in rules}
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    if model.config.text.tie_word_embeddings:
        layers.pop(LM_HEAD, None)  # files hold the embedding it was packed from
    places: dict[str, tuple[str, str]] = {}  # of a layer, and of the parameter within it
    packed: dict[str, StoredPacked | StoredNf4] = {}
    nf4 = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, Nf4Linear)}
    for name, linear in nf4.items():
        if unpacked:
            infos[name] = TensorInfo(linear.weight.shape, model.dtype)
        elif name in theirs:
            packed[name] = stored_nf4(theirs[name], linear)
    for path, layer in layers.items():
        for part, shape in layer.shapes.items():
            name = f"{path}.{part}"
            places[name] = path, part
            if layer.format == "bf16":
                infos[name] = TensorInfo(shape, torch.bfloat16)
            elif unpacked:
                infos[name] = TensorInfo(shape, model.dtype)
            else:
                packed[name] = stored_as(theirs[name], replace(layer.weight, shape=shape))

    @functools.lru_cache(maxsize=1)  # what is cut from one layer is asked for in a row
    def weights_in(path: str) -> dict[str, PackedWeight]:
        return layers[path].weights()

    def get_packed(name: str) -> PackedWeight:
        path, part = places[name]
        return weights_in(path)[part]

    def get(name: str) -> Tensor:
        if name in plain:
            return plain[name]
        return (nf4[name].dense() if name in nf4 else ops.unpack_weight(get_packed(name))).to(infos[name].dtype)

    rounds = any(layer.fp8_activations for layer in layers.values())
    return Weights(infos, get, packed=packed, get_packed=get_packed, fp8_activations=rounds, nf4=nf4)


@contextmanager
def writing(folder: str | Path, kind: Layout | Literal["adapter"]) -> Iterator[Path]:
    """A scratch folder whose files move into `folder` when the block ends well, in the place of what is of their kind.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or holds a checkpoint of the other layout.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kind != "adapter" and find_layout(folder) not in (None, kind):
            raise CheckpointError(f"{folder} already holds a checkpoint in another layout; choose another folder")
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            _replace(folder, new, old, kind)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"the disk of {folder} is full; free some space and try again") from error
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error


_KEY_FILES = {  # without these a folder is no checkpoint
    "hf": ("config.json", INDEX),
    "meta": ("params.json",),
    "adapter": ("adapter_config.json",),
}
_STALE = {
    "hf": ("model*.safetensors", LEFTOVERS),
    "meta": ("consolidated*.pth",),
    "adapter": ("adapter_model*",),
}


def _replace(folder: Path, new: Path, old: Path, kind: str) -> None:
    """Move a checkpoint's files to `old` and finished files from `new` into their place.

    What makes a folder a checkpoint leaves first and comes last, so that a folder half done is none. An interruption is
    undone; after a kill, all files are still in the scratch folder.
    """
    keys = _KEY_FILES[kind]
    coming = sorted((path.relative_to(new) for path in new.rglob("*") if path.is_file()), key=lambda p: p.name in keys)
    stale = [path.relative_to(folder) for pattern in _STALE[kind] for path in folder.glob(pattern)]
    going = sorted({path for path in (*map(Path, keys), *stale, *coming) if (folder / path).exists()})
    moves = [(folder / path, old / path) for path in sorted(going, key=lambda p: p.name not in keys)]
    moves += [(new / path, folder / path) for path in coming]
    done = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_weights(
    folder: Path,
    layout: Layout,
    config: AnyModelConfig,
    rules: Sequence[Rule],
    weights: Weights,
    max_shard_size: int,
) -> None:
    """Configuration and tensors into an empty folder."""
    if layout == "hf":
        _write_hf(folder, config, rules, weights, max_shard_size)
    else:
        assert isinstance(config, ModelConfig)
        _write_meta(folder, config, rules, weights)


def _write_hf(
    folder: Path,
    config: AnyModelConfig,
    rules: Sequence[Rule],
    weights: Weights,
    max_shard_size: int,
) -> None:
    placed: dict[str, tuple[TensorInfo, Callable[[], Tensor]]] = {}  # by their name
    for rule in rules:  # in this layout every plain parameter is one tensor
        if rule.ours in weights.packed:
            for name, info in weights.packed[rule.ours].infos().items():
                placed[name] = info, functools.partial(_packed_tensor, weights, rule.ours, name)
        else:
            info = weights.infos[rule.ours]
            info = TensorInfo(rule.shapes(info.shape)[0], info.dtype)
            placed[rule.theirs[0]] = info, functools.partial(_their_tensor, rule, weights.get)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(placed, key=lambda name: -placed[name][0].dtype.itemsize):  # stable: model order within a width
        num_bytes = placed[name][0].num_bytes
        if shards[-1] and size + num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    many = len(shards)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = SINGLE if many == 1 else f"model-{i:05d}-of-{many:05d}.safetensors"
        tensors = ((name, placed[name][1]()) for name in names)
        write_safetensors(folder / file, {name: placed[name][0] for name in names}, tensors)
        weight_map |= dict.fromkeys(names, file)
    if many > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if any(value.any() for value in weights.leftovers.values()):
        (folder / LEFTOVERS).parent.mkdir()
        infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in weights.leftovers.items()}
        write_safetensors(folder / LEFTOVERS, infos, weights.leftovers.items())
    raw: dict[str, Any] = config_to_hf(config)
    dtypes = {info.dtype for info in weights.infos.values()}
    if len(dtypes) == 1:
        raw["torch_dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if weights.packed:
        kept = [rule.theirs[0] for rule in rules if _is_kept(rule.ours, weights)]
        if weights.nf4:
            raw["quantization_config"] = nf4_config(weights.nf4.values(), kept)
        else:
            stored = [one for one in weights.packed.values() if not isinstance(one, StoredNf4)]
            raw["quantization_config"] = quantization_config(stored, kept, fp8_activations=weights.fp8_activations)
    write_json(folder / "config.json", raw)
    write_json(folder / "generation_config.json", _generation(config))


def _is_kept(ours: str, weights: Weights) -> bool:
    return ours not in weights.packed and is_linear(ours, weights.infos[ours].shape)


def _their_tensor(rule: Rule, get: Callable[[str], Tensor]) -> Tensor:
    return rule.write(get(rule.ours))[0]


def _packed_tensor(weights: Weights, ours: str, theirs: str) -> Tensor:
    stored = weights.packed[ours]
    if isinstance(stored, StoredNf4):
        return stored.write(weights.nf4[ours])[theirs]
    assert weights.get_packed is not None
    return stored.write(weights.get_packed(ours))[theirs]


def _generation(config: AnyModelConfig) -> dict[str, Any]:
    text = config.text
    return {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": list(text.eos_token_ids),
        "pad_token_id": text.pad_token_id,
    }


def _write_meta(folder: Path, config: ModelConfig, rules: Sequence[Rule], weights: Weights) -> None:
    params = config_to_meta(config)
    state: dict[str, Tensor] = {}
    for rule in rules:
        for name, value in zip(rule.theirs, rule.write(weights.get(rule.ours)), strict=True):
            if isinstance(rule, TileGrid) and name in weights.leftovers:
                value[rule.unused_cells()] = weights.leftovers[name]
            state[name] = own_storage(value.cpu())
    with open(folder / "consolidated.00.pth", "wb") as file:
        torch.save(state, file)
        flush(file)
    write_json(folder / "params.json", params)


def own_storage(value: Tensor) -> Tensor:
    """The tensor, copied if it is only a part of a storage or not in order: `torch.save` writes whole storages."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone(memory_format=torch.contiguous_format)


def copy_tokenizer(source: str | Path | None, folder: Path) -> None:
    """Copy tokenizer and processor files, where there are any."""
    for name in TOKENIZER_FILES if source is not None else ():
        path = Path(source or "") / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
