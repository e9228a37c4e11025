"""Regenerate the golden files of this folder from Meta's reference implementation.

    python -m venv meta && meta/bin/pip install torch torchvision llama-models fairscale tiktoken pillow blobfile
    meta/bin/python tests/golden/make_golden.py            # all; or name some of: mllama mllama_mp2 transform chat

The tests read the files and need none of this. It runs on the CPU in about a minute.

* ``mllama/`` and ``mllama_mp2/``: a small random checkpoint in Meta's own layout (one shard in bfloat16; two
  model-parallel shards in float32), every gate non-zero and every norm, bias and embedding random, so that no term of
  the model can be left out unseen. ``logits.npz``: float32 logits ``"<case>.<row>"`` [T, vocab] of the cases in
  `inputs.cases`. ``vision.npz``: features of real tiles. ``facts.json``: how it was made, and for each known fault how
  far it moves the logits, so that a test which stays within 1e-4 is known to exclude it.
* ``image_transform.json``: hashes of preprocessed tiles; ``image_tiles.npz``: a few in full, for debugging.
* ``chat_format.json``: token ids of dialogs, with the text pieces that were tokenised.

The reference builds the vision encoder with fixed sizes, so `small_encoder` replaces the arguments of its constructor;
nothing else of it is changed, except in `FAULTS`, on purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import inputs
import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent

MODELS = {
    "mllama": {
        "params": {
            "dim": 64, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 256, "ffn_dim_multiplier": 0.4,
            "multiple_of": 16, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
            "vision_chunk_size": 56, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2,
            "vision_model": {"num_attention_heads": 4, "intermediate_layers_indices": [1, 3, 4]},
        },
        "vision": {"width": 80, "layers": 5, "n_global_layers": 2},
        "shards": 1, "dtype": torch.bfloat16, "seed": 1,
    },
    "mllama_mp2": {
        "params": {
            "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "ffn_dim_multiplier": 0.5,
            "multiple_of": 16, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
            "vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2,
            "vision_model": {"num_attention_heads": 2, "intermediate_layers_indices": [0, 2]},
        },
        "vision": {"width": 32, "layers": 3, "n_global_layers": 1},
        "shards": 2, "dtype": torch.float32, "seed": 2,
        "cases": ["one_tile", "tiles_1x3", "adjacent_images", "mixed_batch", "text_only"],
    },
}  # fmt: skip


# ---------------------------------------------------------------- the model


def small_encoder(spec: dict):
    """Patch the reference so that its vision encoder has the sizes of `spec`; it fixes width, depth, heads, taps."""
    import llama_models.llama3.multimodal.model as meta

    original = meta.VisionEncoder
    size = {
        **spec["vision"],
        "heads": spec["params"]["vision_model"]["num_attention_heads"],
        "return_intermediate": spec["params"]["vision_model"]["intermediate_layers_indices"],
    }
    return mock.patch.object(meta, "VisionEncoder", lambda **arguments: original(**{**arguments, **size}))


def build(spec: dict):
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.multimodal.model import CrossAttentionTransformer

    args = ModelArgs(max_seq_len=1024, max_batch_size=8, **spec["params"])
    with small_encoder(spec):
        model = CrossAttentionTransformer(args)
    taps = len(spec["params"]["vision_model"]["intermediate_layers_indices"])
    model.vision_model.vision_projection = ColumnParallelLinear(
        spec["vision"]["width"] * (1 + taps), args.dim, bias=True, init_method=lambda x: x
    )
    model.setup_cache(args.max_batch_size, device=torch.device("cpu"), dtype=torch.float32)
    return model.eval()


def random_weights(model, spec: dict) -> dict[str, torch.Tensor]:
    """Random values for every parameter, none of them near the value that would hide its term."""
    generator = torch.Generator().manual_seed(spec["seed"])
    out = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "gate" in name and value.numel() == 1:
            value = torch.sign(noise) * (0.4 + 0.8 * torch.rand(value.shape, generator=generator))
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif value.ndim == 1 and "class_embedding" not in name:  # norms
            value = 1 + 0.3 * noise
        elif "embed" in name:  # tokens, class, positions, tiles
            value = (1.0 if "text_model" in name else 0.6) * noise
        elif name.endswith(("wq.weight", "wk.weight")):  # attention that prefers some keys
            value = 1.6 * noise / value.shape[1] ** 0.5
        elif name.endswith("output.weight"):
            value = 1.5 * noise / value.shape[1] ** 0.5
        else:
            value = noise / value.shape[1] ** 0.5
        out[name] = value.to(spec["dtype"])
    return out


def shard(model, weights: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """What rank `rank` of `world` holds, read off the kinds of fairscale's layers."""
    from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    dim = {}
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear):
            dim[f"{name}.weight"] = dim[f"{name}.bias"] = 0
        elif isinstance(module, RowParallelLinear):
            dim[f"{name}.weight"] = 1
        elif isinstance(module, VocabParallelEmbedding):
            dim[f"{name}.weight"] = 0
    return {
        name: (value.chunk(world, dim[name])[rank] if name in dim and world > 1 else value).clone()
        for name, value in weights.items()
    }


def run(model, spec: dict, case: dict, text_only: bool | None = None) -> list[np.ndarray]:
    """Logits of every row, computed as the reference's own generation computes them; [T, vocab] each."""
    from llama_models.llama3 import chat_format

    vocab = spec["params"]["vocab_size"]
    rows = [inputs.tokens(row, vocab) for row in case["rows"]]
    images = [[Image.fromarray(inputs.image(*size)) for size in row] for row in case["images"]]
    masks = [chat_format.create_vision_mask(row, vocab) for row in rows]  # by its module: FAULTS patches it
    total = max(map(len, rows))
    tokens = torch.zeros(len(rows), total, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    caches, xattn, full = model.compute_vision_tokens_masks(images, masks, total, torch.device("cpu"))
    if text_only is None:
        text_only = not any(images)
    steps = [(0, case.get("prompt", total)), *((p, p + 1) for p in range(case.get("prompt", total), total))]
    logits = torch.cat(
        [model(torch.arange(a, b), tokens, xattn, full, caches, text_only_inference=text_only) for a, b in steps], 1
    )
    return [logits[i, : len(row)].numpy()[-case.get("keep", 10**9) :] for i, row in enumerate(rows)]


# ---------------------------------------------------------------- known faults, to know that the goldens exclude them


def _faulty_taps(pick):
    """A vision transformer whose taps are `pick(states, taps)`; states[i] enters block i, states[-1] comes out."""
    from llama_models.llama3.multimodal import model as meta

    def forward(self, x, return_intermediate=None, mask=None):
        states = [x]
        for block in self.resblocks:
            states.append(block(states[-1], mask=mask))
        if return_intermediate is None:
            return states[-1]
        return states[-1], torch.stack(pick(states, return_intermediate), dim=-1)

    return mock.patch.object(meta.ImageTransformer, "forward", forward)


def _faulty_attention_rows():
    from llama_models.llama3.multimodal import model as meta

    original = meta.CrossAttention.forward

    def forward(self, x, xattn_mask, full_text_row_masked_out_mask, xattn_cache):
        return original(self, x, xattn_mask, torch.ones_like(full_text_row_masked_out_mask), xattn_cache)

    return mock.patch.object(meta.CrossAttention, "forward", forward)


def _faulty_block_rows():
    from llama_models.llama3.multimodal import model as meta

    original = meta.CrossAttentionTransformerBlock.forward

    def forward(self, x, xattn_mask, full_text_row_masked_out_mask, xattn_cache):
        return original(self, x, xattn_mask, torch.ones_like(full_text_row_masked_out_mask), xattn_cache)

    return mock.patch.object(meta.CrossAttentionTransformerBlock, "forward", forward)


def _faulty_encoder_mask(real_sees_padding: bool):
    from llama_models.llama3.multimodal import model as meta

    def build_mask(x, ar, ntok, num_chunks, n_heads):
        if real_sees_padding:  # no mask at all: padding sees padding too
            return torch.zeros(len(ar), 1, num_chunks * x.shape[2], num_chunks * x.shape[2])
        keys = torch.ones(len(ar), num_chunks, x.shape[2])
        for i, (rows, columns) in enumerate(ar.tolist()):
            keys[i, : rows * columns, :ntok] = 0
        return keys.view(len(ar), 1, 1, -1) * torch.finfo(x.dtype).min

    return mock.patch.object(meta, "build_encoder_attention_mask", build_mask)


def _faulty_zero_tokens():
    """The tokens that fill a tile up to a multiple of 8 do not get the tile's embedding before the global blocks."""
    from llama_models.llama3.multimodal import model as meta

    original = meta.TilePositionEmbedding.forward

    def forward(self, x, ar, num_tiles=None):
        out = original(self, x, ar, num_tiles)
        if x.shape[2] == 24:  # 16 patches, a class token, 7 zero tokens; before the encoder there are 16
            out[:, :, 17:] = x[:, :, 17:]
        return out

    return mock.patch.object(meta.TilePositionEmbedding, "forward", forward)


def _faulty_text_mask():
    """Text sees padding tiles too."""
    from llama_models.llama3.multimodal import model as meta

    original = meta._pad_masks

    def pad_masks(masks, num_chunks, total_len, max_num_chunks):
        num_chunks = [[max_num_chunks for _ in row] for row in num_chunks]
        return original(masks, num_chunks, total_len, max_num_chunks)

    return mock.patch.object(meta, "_pad_masks", pad_masks)


def _faulty_causal():
    """A fresh cross-attention that is causal over the vision tokens by their index, as a text decoder's would be."""
    from llama_models.llama3.multimodal import model as meta

    original = meta.CrossAttention.forward

    def forward(self, x, xattn_mask, full_text_row_masked_out_mask, xattn_cache):
        keys = torch.arange(xattn_mask.shape[-1])
        queries = torch.arange(xattn_mask.shape[-2])
        causal = (keys[None] > queries[:, None]) * torch.finfo(x.dtype).min
        return original(self, x, (xattn_mask + causal).clamp(min=-1e30), full_text_row_masked_out_mask, xattn_cache)

    return mock.patch.object(meta.CrossAttention, "forward", forward)


def _faulty_ranges():
    from llama_models.llama3 import chat_format

    def mask(row, image_token):
        at = [i for i, token in enumerate(row) if token == image_token]
        return [[a, b] for a, b in zip(at, [*at[1:], len(row)])]

    return mock.patch.object(chat_format, "create_vision_mask", mask)


@contextlib.contextmanager
def _unscaled_rope(model, spec):
    from llama_models.llama3.model import precompute_freqs_cis

    args, saved = model.params, model.text_model.freqs_cis
    model.text_model.freqs_cis = precompute_freqs_cis(args.dim // args.n_heads, 2048, args.rope_theta, False)
    yield
    model.text_model.freqs_cis = saved


FAULTS = {  # name: (context manager, a case that shows it)
    "1 taps: outputs of the blocks": (lambda m, s: _faulty_taps(lambda h, t: [h[i + 1] for i in t]), "tiles_2x1"),
    "1 taps: last state repeated": (lambda m, s: _faulty_taps(lambda h, t: [h[-1] for _ in t]), "tiles_2x1"),
    "2 masked rows: only the MLP zeroed": (lambda m, s: _faulty_attention_rows(), "text_before_image"),
    "2 masked rows: nothing zeroed": (lambda m, s: _faulty_block_rows(), "text_before_image"),
    "3 encoder: no mask": (lambda m, s: _faulty_encoder_mask(True), "tiles_1x3"),
    "3 encoder: padding hidden from all": (lambda m, s: _faulty_encoder_mask(False), "tiles_1x3"),
    "3 encoder: zero tokens without the post-tile embedding": (lambda m, s: _faulty_zero_tokens(), "one_tile"),
    "4 cross-attention: causal": (lambda m, s: _faulty_causal(), "tiles_2x1"),
    "4 cross-attention: sees padding tiles": (lambda m, s: _faulty_text_mask(), "tiles_1x2"),
    "5 adjacent images: not merged": (lambda m, s: _faulty_ranges(), "adjacent_images"),
    "rope: not scaled": (_unscaled_rope, "long"),
}


# ---------------------------------------------------------------- files


def vision_goldens(model, spec: dict, cases: dict) -> dict[str, np.ndarray]:
    """Projected features of the real tiles of each layout, and all states of the 2×1 case."""
    out = {}
    for name, case in cases.items():
        if name != "one_tile" and not name.startswith("tiles_"):
            continue
        tiles, (rows, columns) = model.image_transform(Image.fromarray(inputs.image(*case["images"][0][0])))
        n = rows * columns
        pixels = torch.zeros(1, 1, model.max_num_chunks, *tiles.shape[1:])
        pixels[0, 0, :n] = tiles
        ratio = torch.tensor([[[rows, columns]]])
        out[f"{name}.aspect_ratio"] = np.array([rows, columns])
        out[f"{name}.projected"] = model.vision_model(pixels, ratio)[0, 0, :n].numpy()
        if name == "tiles_2x1":
            states = encoder_states(model.vision_model.vision_encoder, pixels, ratio, n)
            chosen = states["states"][spec["params"]["vision_model"]["intermediate_layers_indices"]]
            assert np.array_equal(chosen, states["taps"]), "taps are the inputs of their blocks"
            out |= {f"{name}.pixels": tiles.numpy()} | {f"{name}.{key}": value for key, value in states.items()}
    return out


def encoder_states(encoder, pixels: torch.Tensor, ratio: torch.Tensor, n: int) -> dict[str, np.ndarray]:
    """What the encoder makes of `n` real tiles, without the projection.

    encoder: [n, tokens, width · (1 + taps)], the final state, then the taps dimension-major and tap-minor
    final: [n, tokens, width]; taps: [taps, n, tokens, width]
    states: [layers + 1, n, tokens, width], what enters each block, and what leaves the last
    """
    blocks, states = encoder.transformer.resblocks, []
    hooks = [block.register_forward_pre_hook(lambda _, given: states.append(given[0])) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, given, made: states.append(made)))
    features = encoder(pixels, ratio)[0, 0, :n]
    for hook in hooks:
        hook.remove()
    tokens, width = features.shape[1], encoder.class_embedding.shape[0]
    return {
        "encoder": features.numpy(),
        "final": features[..., :width].numpy(),
        "taps": features[..., width:].unflatten(-1, (width, -1)).permute(3, 0, 1, 2).numpy(),
        "states": torch.stack([s.view(pixels.shape[2], -1, width)[:n, :tokens] for s in states]).numpy(),
    }


def work(rank: int, world: int, name: str, init: str, exchange: str) -> None:
    """One rank: build, load, run the cases. The weights of several ranks come from one full random checkpoint."""
    import fairscale.nn.model_parallel.initialize as fs_init
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    fs_init.initialize_model_parallel(world)
    spec = MODELS[name]
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = build(spec)
    if world == 1:
        weights = random_weights(model, spec)
        torch.save(weights, exchange)
    else:
        weights = torch.load(exchange, weights_only=True)
    mine = shard(model, weights, rank, world)
    # The reference's load hooks resize position embeddings; at an equal size they must not change a bit.
    model.load_state_dict({k: v.float() for k, v in mine.items()}, strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, mine[key].float()), key
    if world == spec["shards"]:
        torch.save(mine, folder / f"consolidated.{rank:02d}.pth")

    cases = inputs.cases(spec["params"]["vocab_size"], spec["params"]["vision_chunk_size"])
    cases = {k: v for k, v in cases.items() if k in spec.get("cases", cases)}
    with torch.inference_mode():
        logits = {f"{case}.{i}": row for case, body in cases.items() for i, row in enumerate(run(model, spec, body))}
        if rank == 0 and world == 1:
            facts = one_rank_facts(model, spec, cases, logits)
            write_model_files(folder, spec, cases, logits, facts, vision_goldens(model, spec, cases))
        elif rank == 0:
            with np.load(folder / "logits.npz") as single:
                worst = max(float(np.abs(single[k] - v).max()) for k, v in logits.items())
            assert worst < 1e-4, worst
            facts = json.loads((folder / "facts.json").read_text())
            facts["two ranks against one, max abs difference of the logits"] = worst
            facts["shards"] = {
                k: "replicated" if tuple(mine[k].shape) == tuple(v.shape)
                else f"dim {next(i for i, (a, b) in enumerate(zip(mine[k].shape, v.shape)) if a != b)}"
                for k, v in weights.items()
            }  # fmt: skip
            (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
            print(f"{name}: two ranks agree with one within {worst:.1e}")
    dist.barrier()
    dist.destroy_process_group()


def one_rank_facts(model, spec: dict, cases: dict, logits: dict) -> dict:
    facts: dict = {
        "made with": {p: version(p) for p in ("llama-models", "torch", "torchvision", "fairscale", "pillow", "numpy")},
        "tensors": {k: "x".join(map(str, v.shape)) for k, v in model.state_dict().items()},
        "cross-attention runs before self-attention layers": model.text_model.fusion_schedule,
        "logits: standard deviation": round(float(np.std(logits["one_tile.0"])), 3),
    }
    # a prefill of the whole row against token-by-token decoding
    for case, body in cases.items():
        if "prompt" in body:
            whole = run(model, spec, {k: v for k, v in body.items() if k != "prompt"})[0]
            worst = float(np.abs(whole - logits[f"{case}.0"]).max())
            assert worst < 2e-5, (case, worst)
            facts.setdefault("decode against prefill, max abs difference", {})[case] = worst
    # skipping the cross-attention blocks on text is the same as masking them fully
    masked = run(model, spec, {**cases["mixed_batch"]}, text_only=False)[0]
    alone = run(model, spec, {"rows": [cases["mixed_batch"]["rows"][0]], "images": [[]]})[0]
    facts["a text row in a mixed batch against the row alone"] = float(np.abs(masked - alone).max())
    if "long" in cases:
        facts["faults: max abs change of the logits"] = {}
        for fault, (patch, case) in FAULTS.items():
            with patch(model, spec):
                wrong = run(model, spec, cases[case])
            change = max(float(np.abs(w - logits[f"{case}.{i}"]).max()) for i, w in enumerate(wrong))
            assert change > 1e-2, (fault, change)
            facts["faults: max abs change of the logits"][fault] = {"case": case, "change": round(change, 4)}
            print(f"  {fault:56s} {case:18s} {change:.3f}")
    return facts


def write_model_files(folder: Path, spec: dict, cases: dict, logits: dict, facts: dict, vision: dict) -> None:
    (folder / "params.json").write_text(json.dumps(spec["params"], indent=1) + "\n")
    np.savez_compressed(folder / "logits.npz", **logits)
    np.savez_compressed(folder / "vision.npz", **vision)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder.name}: {len(cases)} cases, logits sd {facts['logits: standard deviation']}")


def make_model(name: str) -> None:
    for old in (HERE / name).glob("*.pth"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        exchange = str(Path(scratch) / "full.pth")
        for world in sorted({1, MODELS[name]["shards"]}):
            init = str(Path(scratch) / f"init{world}")
            torch.multiprocessing.spawn(work, (world, name, init, exchange), nprocs=world)


def make_transform() -> None:
    from llama_models.llama3.multimodal.image_transform import VariableSizeImageTransform

    transforms = {tile: VariableSizeImageTransform(size=tile) for tile in (560, 448)}
    kept = {}

    def entry(seed: int, width: int, height: int) -> list:
        out: list = [width, height, seed]
        picture = Image.fromarray(inputs.image(width, height, seed))
        for tile, transform in transforms.items():
            try:
                tiles, (rows, columns) = transform(picture, max_num_chunks=4)
            except ValueError as error:  # a side that would shrink to nothing
                out.append([str(error)])
                continue
            data = tiles.numpy().astype("<f4")
            out.append([rows, columns, hashlib.sha256(data.tobytes()).hexdigest()[:32]])
            if seed in (5, 20, 33) and tile == 448:
                kept[f"{width}x{height}.{seed}.{tile}"] = data[:, :, ::16, ::16]
        return out

    file = {
        "legend": "[width, height, seed, at tile 560, at tile 448], each [rows, columns, first 32 hex digits of "
        "the sha256 of the float32 little-endian tiles [n, 3, tile, tile]], or [the reference's error]; images: "
        "inputs.image",
        "made with": {p: version(p) for p in ("llama-models", "torch", "torchvision", "pillow")},
        "sizes": [entry(i, *size) for i, size in enumerate(inputs.transform_sizes())],
        "large": [entry(1000 + i, *size) for i, size in enumerate(inputs.LARGE_SIZES)],
    }
    text = json.dumps(file, separators=(",", ":")).replace("]],[", "]],\n[")
    (HERE / "image_transform.json").write_text(text + "\n")
    np.savez_compressed(HERE / "image_tiles.npz", **kept)
    print("image_transform.json", len(text), "bytes")


# ---------------------------------------------------------------- chat format

I = {"type": "image"}


def T(text: str) -> dict:
    return {"type": "text", "text": text}


DIALOGS = {
    "text": [("user", "Hello, world!")],
    "image": [("user", [I, T("What is in this picture?")])],
    "image after text": [("user", [T("Describe this: "), I])],
    "system and image": [("system", "You are terse."), ("user", [I, T("How many red circles are there?")])],
    "two images": [("user", [I, T("first"), I, T("second, which differs?")])],
    "adjacent images": [("user", [I, I, T("Compare them.")])],
    "multi-turn": [
        ("user", [I, T("What is this?")]),
        ("assistant", "A shelf with 12 books."),
        ("user", "And the colour of the third one?"),
    ],
    "images in several turns": [
        ("system", "Answer in one word."),
        ("user", [I, T("Animal?")]),
        ("assistant", "Cat"),
        ("user", [T("And here?"), I]),
        ("assistant", "Dog"),
        ("user", "Thanks!"),
    ],
    "whitespace is kept": [
        ("system", "  lead and trail \n"),
        ("user", [T("\n\n  two  spaces\t tab "), I, T(" end \n")]),
    ],
    "special tokens in text stay text": [("user", "a<|eot_id|>b<|image|>c<|begin_of_text|>")],
    "unicode": [("user", [I, T("Schöne Grüße 你好 مرحبا 🦙🏽 — naïve “quotes” ½ ﬁ e\u0301")])],
    "numbers and code": [("user", "1234567 3.14159 0x1F\ndef f(x):\n\treturn x**2  # ok\n\n\n\nIt's I'LL we've")],
    "empty message": [("user", [I, T("")])],
    "only an image": [("user", [I])],
    "tool result": [("user", "Weather?"), ("assistant", "Let me look."), ("tool", '{"t": 21}')],
}


def make_chat() -> None:
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
    from llama_models.llama3.chat_format import ChatFormat, create_vision_mask
    from llama_models.llama3.tokenizer import Tokenizer

    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    tokenizer = Tokenizer.get_instance()
    pieces: dict[str, list[int]] = {}

    class Recorder:  # notes every text that the chat format tokenises
        special_tokens = tokenizer.special_tokens

        def encode(self, text, *, bos, eos):
            pieces[text] = tokenizer.encode(text, bos=False, eos=False)
            return tokenizer.encode(text, bos=bos, eos=eos)

    chat = ChatFormat(Recorder())

    def raw(content):
        if isinstance(content, str):
            return content
        return [RawTextItem(text=c["text"]) if "text" in c else RawMediaItem(data=dot.getvalue()) for c in content]

    def entry(made):
        return {"ids": made.tokens, "mask": [list(m) for m in made.vision.mask] if made.vision else []}

    file = {
        "legend": "ids: what the reference feeds the model (<|image|> as 128256). mask: [first, end) of the text "
        "positions that see each image; -1 is the end of the text. pieces: every text it tokenised, special tokens "
        "off.",
        "made with": {p: version(p) for p in ("llama-models", "tiktoken")},
        "special": {k: v for k, v in tokenizer.special_tokens.items() if "reserved" not in k},
        "dialogs": {
            name: {
                "messages": [{"role": r, "content": c} for r, c in messages],
                **entry(chat.encode_dialog_prompt([RawMessage(role=r, content=raw(c)) for r, c in messages])),
            }
            for name, messages in DIALOGS.items()
        },
        "completions": {
            name: {"content": content, **entry(chat.encode_content(raw(content)))}
            for name, content in {
                "text": "The capital of France is",
                "image": [I, T("If I had to write a haiku for this one")],
                "text, image": [T("Look: "), I, T(" nice")],
            }.items()
        },
        "pieces": pieces,
        # which text sees which image, for every pattern of up to seven tokens ("I": an image) with one image at least
        "ranges": [
            [pattern, create_vision_mask([letter == "I" for letter in pattern], True)]
            for length in range(1, 8)
            for pattern in map("".join, itertools.product(".I", repeat=length))
            if "I" in pattern
        ],
    }
    for text, ids in pieces.items():
        assert tokenizer.decode(ids) == text
    text = json.dumps(file, separators=(",", ":"), ensure_ascii=False).replace('},"', '},\n"')
    (HERE / "chat_format.json").write_text(text + "\n", encoding="utf-8")
    print("chat_format.json", len(DIALOGS), "dialogs")


if __name__ == "__main__":
    parts = SimpleNamespace(transform=make_transform, chat=make_chat)
    for part in sys.argv[1:] or [*MODELS, *vars(parts)]:
        make_model(part) if part in MODELS else getattr(parts, part)()
