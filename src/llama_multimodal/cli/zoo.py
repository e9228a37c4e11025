"""`llama-mm zoo`: the known checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..zoo.registry import Checkpoint, checkpoints
from . import common

_NOTES = (
    "",
    "bf16 and fp32: the size of the weights, on disk and in memory. Keys and values come on top; in bf16 a picture of",
    "four tiles takes 0.2 GiB and 1,000 tokens 0.1 GiB with the 11B models, 0.5 and 0.3 GiB with the 90B models.",
    "Any other Llama 3.2 Vision or Llama checkpoint, a folder or a repository, works with --model too.",
    "Gated models: accept the licence on the model's page at huggingface.co, then run: hf auth login",
)


def zoo(as_json: common.AsJson = False) -> None:
    """List known checkpoints: their size, the memory they need, their licence."""
    known = checkpoints()
    if as_json:
        print(json.dumps([_as_dict(checkpoint) for checkpoint in known], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    wide = console.width >= 120  # a name is 40 characters long, and is no use when it is broken
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for title in ("parameters", "bf16", *(("fp32", "tiles") if wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("where", *(("licence",) if wide else ())):
        table.add_column(title, no_wrap=True)
    for c in known:
        weights = [size(c.num_bytes(width)) if c.parameters else "" for width in (2, 4)]
        row = [c.name, _count(c.parameters), weights[0], _where(c)]
        if wide:
            row[3:3] = [weights[1], f"{c.max_tiles} x {c.tile_size} px" if c.tile_size else "-"]
            row.append(_license(c))
        table.add_row(*row)
    console.print(table)
    console.print()
    for c in known:
        console.print(f"{c.name}: {c.summary}. {_license(c)}.", markup=False, highlight=False, soft_wrap=True)
    for line in _NOTES:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for url in sorted({c.license_url for c in known if c.license_url}):
        console.print(f"Licence: {url}", markup=False, highlight=False, soft_wrap=True)


def _as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        **asdict(checkpoint),
        "bytes_bf16": checkpoint.num_bytes(2),
        "bytes_fp32": checkpoint.num_bytes(4),
        "available": checkpoint.available,
        "in_cache": in_cache(checkpoint),
    }


def _license(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.license}, gated" if checkpoint.gated else checkpoint.license


def _where(checkpoint: Checkpoint) -> str:
    if checkpoint.embedded:
        return "embedded" if checkpoint.available else "not built in"
    return "downloaded" if in_cache(checkpoint) else "hub"


def in_cache(checkpoint: Checkpoint) -> bool:
    """Whether the hub's cache holds the checkpoint's weights or the list of their shards."""
    if checkpoint.embedded:
        return False
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors.index.json", "model.safetensors")
    return any(isinstance(try_to_load_from_cache(checkpoint.name, file), str) for file in files)


def _count(parameters: int) -> str:
    if not parameters:
        return ""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.1f} {name}"
    return str(parameters)


def size(num_bytes: float) -> str:
    """Bytes for people: 19.9 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1024 and len(units) > 1:
        num_bytes /= 1024
        units.pop(0)
    return f"{num_bytes:.0f} {units[0]}" if num_bytes >= 100 or units[0] == "B" else f"{num_bytes:.1f} {units[0]}"
