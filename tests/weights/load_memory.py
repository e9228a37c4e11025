"""Make a synthetic checkpoint, or load one and report peak memory; each in a process of its own.

python load_memory.py make FOLDER hf|meta MEGABYTES
python load_memory.py load FOLDER float32|bfloat16
python load_memory.py quantize FOLDER TARGET
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from pathlib import Path

import torch

from llama_multimodal import load, quantize
from llama_multimodal.config import ModelConfig, TextConfig, TiledVisionConfig
from llama_multimodal.weights.checkpoint import parameter_shapes
from llama_multimodal.weights.io import TensorInfo
from llama_multimodal.weights.mllama import hf_rules, meta_cross_attention_layers, meta_rules
from llama_multimodal.weights.save import Weights, write_weights


def config_of(megabytes: int) -> ModelConfig:
    """A model of about this size in bfloat16, whose embedding is a large part of it, as in the real ones."""
    num_self = max(1, (megabytes - 150) // 30)
    num_cross = -(-num_self // 4)
    return ModelConfig(
        vision=TiledVisionConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_global_layers=1, num_attention_heads=16,
            image_size=112, intermediate_layers_indices=(0, 1),
        ),
        text=TextConfig(
            vocab_size=32768, hidden_size=1024, intermediate_size=4096, num_hidden_layers=num_self + num_cross,
            num_attention_heads=16, num_key_value_heads=4,
            cross_attention_layers=meta_cross_attention_layers(num_self, num_cross), bos_token_id=0,
            eos_token_ids=(), pad_token_id=0,
        ),
        image_token_id=32768,
    )  # fmt: skip


def make(folder: Path, layout: str, megabytes: int) -> None:
    config = config_of(megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in parameter_shapes(config).items()}

    def get(name: str) -> torch.Tensor:
        if "tile" in name and "gate" not in name:
            return torch.zeros(infos[name].shape, dtype=torch.bfloat16)
        return torch.randn(infos[name].shape[-1], dtype=torch.bfloat16).expand(infos[name].shape)

    rules = hf_rules(config) if layout == "hf" else meta_rules(config)
    write_weights(folder, layout, config, rules, Weights(infos, get), megabytes * 10**6 // 3)  # type: ignore[arg-type]


def status(key: str) -> int:
    """Bytes, from the kernel."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Peak memory above what the process had before, over the size of the weights."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.perf_counter()
    model, _ = load(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "peak": peak, "ratio": peak / weights, "seconds": seconds}


def measure_quantize(folder: Path, target: Path) -> dict[str, float]:
    """Peak memory above what the process had before, and the sizes of the files."""
    # What torch imports for itself once tensors are joined on the meta device, a hundred MB.
    importlib.import_module("torch._dynamo")

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    done = quantize(folder, target, "int4", lm_head="int4", keep=())
    return {"peak": status("VmHWM") - before, "plain": done.bytes_before, "packed": done.bytes_after}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "quantize":
        print(json.dumps(measure_quantize(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
