"""`llama-mm zoo`: the known checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from ..zoo.registry import Checkpoint, checkpoints
from . import common


def zoo(as_json: common.AsJson = False) -> None:
    """List known checkpoints: their size, the memory they need, their licence."""
    known = checkpoints()
    if as_json:
        print(json.dumps([_as_dict(checkpoint) for checkpoint in known], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("model", "left"), ("parameters", "right"), ("bf16 weights", "right"), ("fp32 weights", "right"),
        ("tiles", "right"), ("where", "left"), ("licence", "left"),
    ):  # fmt: skip
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for c in known:
        table.add_row(
            c.name,
            _count(c.parameters),
            size(c.num_bytes(2)) if c.parameters else "",
            size(c.num_bytes(4)) if c.parameters else "",
            f"{c.max_tiles} x {c.tile_size} px",
            _where(c),
            f"{c.license} (gated)" if c.gated else c.license,
        )
    console = Console()
    console.print(table)
    console.print()
    for c in known:
        console.print(f"{c.name}: {c.summary}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        "\nWeights are held in memory once; an answer needs about 10 % more. Any other Llama 3.2 Vision checkpoint, a"
        " folder or a repository, works with --model too.\nGated models: accept the licence on the model's page at"
        " huggingface.co, then run: hf auth login",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
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


def _where(checkpoint: Checkpoint) -> str:
    if checkpoint.embedded:
        return "embedded" if checkpoint.available else "not built into this copy"
    return "downloaded" if in_cache(checkpoint) else "hub"


def in_cache(checkpoint: Checkpoint) -> bool:
    """Whether the hub's cache holds the checkpoint's list of shards."""
    if checkpoint.embedded:
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(checkpoint.name, "model.safetensors.index.json"), str)


def _count(parameters: int) -> str:
    if not parameters:
        return ""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.1f} {name}"
    return str(parameters)


def size(num_bytes: float) -> str:
    """Bytes for people: 19.9 GiB."""
    for name in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            break
        num_bytes /= 1024
    else:
        name = "TiB"
    return f"{num_bytes:.0f} {name}" if num_bytes >= 100 or name == "B" else f"{num_bytes:.1f} {name}"
