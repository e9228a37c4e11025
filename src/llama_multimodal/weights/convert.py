"""Hugging Face ↔ Meta, without building a model: every tensor keeps its bits and its dtype."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Layout, Progress, open_checkpoint
from .families import hf_rules, meta_rules
from .io import SafetensorsFile, TensorInfo
from .rules import Rename, Rule, TileGrid
from .save import LEFTOVERS, Weights, copy_tokenizer, write_weights, writing


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    max_shard_size: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint in folder `source` to folder `target` in the other layout (or in the same one, anew).

    Going back gives every tensor bit for bit. Meta's tile grids have cells that no image uses and that Hugging Face's
    layout has no place for; they are kept in `meta/unused_tiles.safetensors` for the way back.

    Raises:
        CheckpointError: the source is damaged, the layout cannot hold it, or the target cannot be written.
        ConfigError: the source's configuration is damaged.
    """
    if layout not in ("hf", "meta"):
        raise CheckpointError(f'unknown layout "{layout}"; choose hf or meta')
    source, target = Path(source), Path(target)
    if target.exists() and target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is the source itself; choose another folder for the result")
    checkpoint = open_checkpoint(source)
    if checkpoint.packed:
        raise CheckpointError(f"{source} holds packed weights; convert the checkpoint that it was made from")
    written = hf_rules(checkpoint.config, checkpoint.shapes) if layout == "hf" else meta_rules(checkpoint.config)
    by_name = {rule.ours: rule for rule in checkpoint.rules}
    infos = {name: TensorInfo(shape, _dtype(checkpoint, by_name[name])) for name, shape in checkpoint.shapes.items()}
    total = sum(info.num_bytes for info in infos.values())
    done = 0

    def get(name: str) -> Tensor:
        nonlocal done
        value = _read(checkpoint, by_name[name], infos[name], mapped=layout == "meta")
        done += infos[name].num_bytes
        if progress is not None:
            progress(done, total)
        return value

    with writing(target, layout) as aside:
        weights = Weights(infos, get, _leftovers(checkpoint))
        write_weights(aside, layout, checkpoint.config, written, weights, max_shard_size)
        copy_tokenizer(source, aside)


def _dtype(checkpoint: Checkpoint, rule: Rule) -> torch.dtype:
    dtypes = [checkpoint.store.entries[name].dtype for name in rule.theirs]
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _read(checkpoint: Checkpoint, rule: Rule, info: TensorInfo, mapped: bool) -> Tensor:
    """One parameter of ours. Meta's writer needs all of them at once: then those that are stored as they are stay in
    the source's pages rather than in memory."""
    sources = checkpoint.sources(rule)
    if mapped and isinstance(rule, Rename) and len(sources) == 1 and not rule.reshaped:
        return sources[0].tensor().reshape(info.shape)
    value = torch.empty(info.shape, dtype=info.dtype)
    rule.read(sources, value)
    return value


def _leftovers(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The unused cells of Meta's tile grids, by Meta's names."""
    grids = [rule for rule in meta_grids(checkpoint) if rule.unused_cells()[0]]
    if checkpoint.layout == "meta":
        return {rule.theirs[0]: checkpoint.store.tensor(rule.theirs[0])[rule.unused_cells()] for rule in grids}
    path = checkpoint.folder / LEFTOVERS
    if not path.exists():
        return {}
    file, found = SafetensorsFile(path), {}
    for rule in grids:
        name, shape = rule.theirs[0], rule.shapes(checkpoint.shapes[rule.ours])[0]
        wanted = TensorInfo((len(rule.unused_cells()[0]), *shape[2:]), infos_dtype(checkpoint, rule.ours))
        if file.entries.get(name) != wanted:
            raise CheckpointError(f"{path} is of another checkpoint ({name}); remove it to convert without it")
        found[name] = file.tensor(name)
    return found


def meta_grids(checkpoint: Checkpoint) -> list[TileGrid]:
    """The rules of Meta's tile grids."""
    if checkpoint.layout == "meta":
        return [rule for rule in checkpoint.rules if isinstance(rule, TileGrid)]
    try:
        return [rule for rule in meta_rules(checkpoint.config) if isinstance(rule, TileGrid)]
    except CheckpointError:  # not a model that could be stored in Meta's layout
        return []


def infos_dtype(checkpoint: Checkpoint, ours: str) -> torch.dtype:
    return next(_dtype(checkpoint, rule) for rule in checkpoint.rules if rule.ours == ours)
