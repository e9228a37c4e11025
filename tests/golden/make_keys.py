"""Regenerate `keys.json`: every tensor of the 11B and 90B checkpoints, as the two reference implementations name them.

    hf/bin/python tests/golden/make_keys.py hf       # a virtual environment with torch and transformers 5
    meta/bin/python tests/golden/make_keys.py meta   # one with llama-models, fairscale and torchvision

Both build the full models without memory for their weights. Layer numbers are folded: a key whose numbers are `{}`
stands for every line of numbers listed with it. transformers' module names are turned into the names of the released
files by its own table, as its `save_pretrained` does.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

FILE = Path(__file__).parent / "keys.json"
SIZES = {
    "11b": {"dim": 4096, "layers": 32, "cross": 8, "heads": 32},
    "90b": {"dim": 8192, "layers": 80, "cross": 20, "heads": 64},
}


def hf(size: dict[str, int]) -> dict[str, list[int]]:
    """transformers' module names and shapes."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    total = size["layers"] + size["cross"]
    text = {
        "hidden_size": size["dim"], "num_hidden_layers": total, "num_attention_heads": size["heads"],
        "intermediate_size": size["dim"] * 7 // 2, "cross_attention_layers": list(range(3, total, 5)),
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config={"image_size": 560})
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def hf_released(internal: dict[str, list[int]]) -> dict[str, list[int]]:
    """The names in files, by transformers' own table of renamings, backwards."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamings = [
        (r.target_patterns[0].lstrip("^"), r.source_patterns[0].lstrip("^"))
        for r in get_checkpoint_conversion_mapping("mllama")
    ]

    def rename(name: str) -> str:
        for module, file in renamings:
            if name.startswith(module):
                return file + name.removeprefix(module)
        return name

    # "model.language_model.x" is "language_model.x" by the table; the released files say "language_model.model.x",
    # which the table reads because transformers strips the base model's prefix.
    released = {rename(name): shape for name, shape in internal.items()}
    return {re.sub(r"^language_model\.(?!lm_head|model\.)", "language_model.model.", n): s for n, s in released.items()}


def meta(size: dict[str, int]) -> dict[str, list[int]]:
    """Meta's names and shapes."""
    from fairscale.nn.model_parallel.initialize import initialize_model_parallel, model_parallel_is_initialized
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.multimodal.model import CrossAttentionTransformer

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not model_parallel_is_initialized():
        initialize_model_parallel(1)
    args = ModelArgs(
        dim=size["dim"], n_layers=size["layers"], n_heads=size["heads"], n_kv_heads=8, vocab_size=128256,
        ffn_dim_multiplier=1.3, multiple_of=1024, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True,
        vision_chunk_size=560, vision_max_num_chunks=4, vision_num_cross_attention_layers=size["cross"],
    )  # fmt: skip
    with torch.device("meta"):
        model = CrossAttentionTransformer(args)
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def fold(keys: dict[str, list[int]]) -> dict[str, dict[str, list]]:
    """Keys with `{}` for their numbers → shape and the numbers."""
    folded: dict[str, dict[str, list]] = {}
    for name, shape in keys.items():
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        template = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        entry = folded.setdefault(template, {"shape": shape, "numbers": []})
        assert entry["shape"] == shape, name
        entry["numbers"].append(numbers)
    return folded


def main(which: str) -> None:
    out = json.loads(FILE.read_text()) if FILE.exists() else {}
    for label, size in SIZES.items():
        if which == "hf":
            internal = hf(size)
            out[f"{label} hf internal"] = fold(internal)
            out[f"{label} hf"] = fold(hf_released(internal))
        else:
            out[f"{label} meta"] = fold(meta(size))
    lines = (
        f"  {json.dumps(part)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in out[part].items())
        + "\n  }"
        for part in sorted(out)
    )
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
