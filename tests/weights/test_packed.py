"""Packed weights in files: they come back bit for bit, in the format that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_for_tests import hf_tensors, random_model, same_model
from safetensors.torch import load_file, save_file
from small_model import make_inputs

from llama_multimodal import load, ops
from llama_multimodal.errors import CheckpointError, ConfigError, UserError
from llama_multimodal.models import VisionLanguageModel
from llama_multimodal.ops import Format
from llama_multimodal.quant.pack import PackedLinear, Packing, pack, use_fp8_activations
from llama_multimodal.weights.convert import convert
from llama_multimodal.weights.rules import same_bits
from llama_multimodal.weights.save import save_checkpoint

INPUTS = make_inputs([[1, 2, 3, 4, 5], [7, 8, 9]], [[], []])
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


def saved(folder: Path, packing: Packing, **options: Any) -> VisionLanguageModel:
    model = pack(random_model(), packing)
    save_checkpoint(model, folder, **options)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("format", "lm_head"), [("int8", None), ("int4", None), ("int4", "int8"), ("int4", "bf16"), ("fp8", None)]
)
def test_round_trip(tmp_path: Path, format: Format, lm_head: Format | None, symmetric: bool) -> None:
    model = saved(tmp_path, Packing(format, 16, symmetric, lm_head), max_shard_size=30_000)
    again, _ = load(tmp_path)
    mine, theirs = model.state_dict(), again.state_dict()
    if lm_head == "bf16":  # stored plain, so it comes back plain, in the model's dtype
        assert torch.equal(mine.pop("decoder.lm_head.values").float(), theirs.pop("decoder.lm_head.weight"))
    assert mine.keys() == theirs.keys() and all(same_bits(mine[name], theirs[name]) for name in mine)
    assert again.dtype == torch.float32 and again.config == model.config
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4)])
def test_stored_words_hold_what_the_format_says(tmp_path: Path, format: Format, bits: int) -> None:
    """Taken apart one value at a time, as compressed-tensors describes its format."""
    saved(tmp_path, Packing(format, 16, symmetric=False))
    stored = {name.removeprefix(Q_PROJ): value for name, value in hf_tensors(tmp_path).items() if Q_PROJ in name}
    rows, columns = stored["_shape"].tolist()
    assert stored["_packed"].dtype == torch.int32 and stored["_scale"].dtype == torch.float16

    def field(words: torch.Tensor, index: int) -> int:
        word = int(words[index * bits // 32]) & 0xFFFFFFFF
        return (word >> index * bits % 32) & ((1 << bits) - 1)

    plain = random_model().decoder.layers[1].attention.qkv.q_proj.weight
    expected = ops.unpack_weight(ops.pack_weight(plain.detach(), format, group=16, symmetric=False))
    for row in range(rows):
        for column in range(columns):
            value = field(stored["_packed"][row], column)
            zero = field(stored["_zero_point"][:, column // 16], row)
            scale = float(stored["_scale"][row, column // 16])
            assert (value - zero) * scale == pytest.approx(float(expected[row, column]), rel=1e-6, abs=1e-9)


def test_config_says_how_for_other_readers(tmp_path: Path) -> None:
    saved(tmp_path, Packing("int4", 16, lm_head="int8"))
    table = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (table["quant_method"], table["format"]) == ("compressed-tensors", "pack-quantized")
    groups = [
        (g["targets"], g["weights"]["num_bits"], g["weights"]["group_size"]) for g in table["config_groups"].values()
    ]
    assert groups == [(["re:.*language_model.*_proj$"], 4, 16), (["re:.*lm_head$"], 8, 16)]
    assert "re:.*vision_model.*" in table["ignore"]


def test_packing_while_loading_is_packing_afterwards(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path)
    loaded, _ = load(tmp_path, pack=Packing("int4", 16, lm_head="int8"))
    packed = pack(random_model(), Packing("int4", 16, lm_head="int8")).state_dict()
    assert all(torch.equal(value, packed[name]) for name, value in loaded.state_dict().items())
    by_name, _ = load(tmp_path, pack="bf16")
    assert isinstance(by_name.decoder.lm_head, PackedLinear) and by_name.decoder.lm_head.format == "bf16"


def test_bf16_is_saved_as_plain_weights(tmp_path: Path) -> None:
    model = random_model(dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path / "plain")
    save_checkpoint(pack(random_model(dtype=torch.bfloat16), "bf16"), tmp_path / "packed")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "packed")]
    assert files[0] == files[1]


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_unpacked_weights_are_what_the_packed_ones_stand_for(tmp_path: Path, layout: Any) -> None:
    model = saved(tmp_path, Packing("int4", 16), unpacked=True, layout=layout)
    plain, _ = load(tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert (plain(INPUTS).logits[0] - model(INPUTS).logits[0]).abs().max() < 1e-4
    assert not same_model(plain, random_model())


def test_the_meta_device_takes_packed_layers(tmp_path: Path) -> None:
    model = saved(tmp_path, Packing("int8", 16))
    for meta in (
        load(tmp_path, device="meta")[0],
        load(_plain(tmp_path / "p"), device="meta", pack=Packing("int8", 16))[0],
    ):
        head = meta.decoder.lm_head
        assert isinstance(head, PackedLinear) and head.values.is_meta
        assert head.weight.nbytes == model.decoder.lm_head.weight.nbytes  # type: ignore[union-attr]


def _plain(folder: Path) -> Path:
    save_checkpoint(random_model(), folder)
    return folder


def _with_activations(config: dict[str, Any]) -> None:
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}


def _other_method(config: dict[str, Any]) -> None:
    config["quantization_config"]["quant_method"] = "gptq"


@pytest.mark.parametrize(
    ("change", "message"),
    [(_other_method, 'quantized as "gptq"'), (_with_activations, "input_activations beside whole numbers")],
)
def test_other_quantizations_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path, Packing("int4", 16))
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}  # as "FP8-dynamic" checkpoints say it


def _with_fp8_activations(folder: Path, asked: dict[str, Any], part: str = "input_activations") -> None:
    saved(folder, Packing("fp8"))
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    for group in config["quantization_config"]["config_groups"].values():
        group[part] = asked
    (folder / "config.json").write_text(json.dumps(config))


def test_fp8_activations_are_of_the_files(tmp_path: Path) -> None:
    _with_fp8_activations(tmp_path, DYNAMIC | {"symmetric": True, "observer": None})
    model, _ = load(tmp_path)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert layers and all(layer.fp8_activations for layer in layers)
    plain = use_fp8_activations(saved(tmp_path / "plain", Packing("fp8")))
    logits = model(INPUTS).logits
    assert torch.equal(logits, plain(INPUTS).logits)
    without = saved(tmp_path / "without", Packing("fp8"))(INPUTS).logits
    assert 1e-4 < (logits - without).norm() / without.norm() < 0.2
    save_checkpoint(model, tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert torch.equal(again(INPUTS).logits, logits)


@pytest.mark.parametrize(
    ("asked", "part", "message"),
    [
        (DYNAMIC | {"strategy": "tensor"}, "input_activations", "a scale for each token"),
        (DYNAMIC | {"dynamic": False}, "input_activations", "a scale for each token"),
        ({"num_bits": 8, "type": "float", "strategy": "token"}, "input_activations", "a scale for each token"),
        (DYNAMIC | {"type": "int"}, "input_activations", "a scale for each token"),
        ("fp8", "input_activations", "a scale for each token"),
        (DYNAMIC, "output_activations", "output_activations, which are not computed"),
    ],
)
def test_other_activations_are_refused(tmp_path: Path, asked: Any, part: str, message: str) -> None:
    _with_fp8_activations(tmp_path, asked, part)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_fp8_activations_go_with_fp8_weights() -> None:
    with pytest.raises(ConfigError, match="fp8 activations go with fp8 weights, which the model lacks"):
        use_fp8_activations(pack(random_model(), Packing("int8", 16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[Q_PROJ].view(torch.uint8)[0].fill_(127), f"{Q_PROJ} holds values that are no numbers"),
        (lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"] * torch.inf}), "not finite"),
        (lambda t: t.update({f"{Q_PROJ}_scale": t[f"{Q_PROJ}_scale"][:1].clone()}), f"quantized {Q_PROJ}"),
        (lambda t: t.pop(f"{Q_PROJ}_scale"), f"quantized {Q_PROJ}"),
    ],
)
def test_damaged_fp8_weights_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    saved(tmp_path, Packing("fp8"))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def _changed(tensors: dict[str, torch.Tensor], kind: str) -> None:
    if kind == "missing":
        del tensors[f"{Q_PROJ}_shape"]
    elif kind == "shape":
        tensors[f"{Q_PROJ}_shape"] = torch.tensor([1, 2])
    elif kind == "width":
        tensors[f"{Q_PROJ}_packed"] = tensors[f"{Q_PROJ}_packed"][:, :-1].contiguous()
    elif kind == "dtype":
        tensors[f"{Q_PROJ}_packed"] = tensors[f"{Q_PROJ}_packed"].float()
    elif kind == "scale":
        tensors[f"{Q_PROJ}_scale"][0, 0] = float("inf")
    elif kind == "projector":
        del tensors["multi_modal_projector.weight"]
        tensors["multi_modal_projector.weight_packed"] = torch.zeros(32, 12, dtype=torch.int32)
        tensors["multi_modal_projector.weight_scale"] = torch.ones(32, 6, dtype=torch.float16)
    elif kind == "mixed":
        for part in ("packed", "scale", "shape"):
            del tensors[f"{Q_PROJ}_{part}"]
        tensors[Q_PROJ] = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", f"missing {Q_PROJ}_shape"),
        ("shape", r"_shape says \[1, 2\], and the model needs \[32, 32\]"),
        ("width", "neither int8 nor int4"),
        ("dtype", f"wrong dtype {Q_PROJ}_packed"),
        ("scale", "not finite"),
        ("projector", "missing multi_modal_projector.weight"),
        ("mixed", "must be packed alike"),
    ],
)
def test_damaged_packed_weights_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    saved(tmp_path, Packing("int4", 16))
    tensors = load_file(tmp_path / "model.safetensors")
    _changed(tensors, kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_what_cannot_be_done_says_so(tmp_path: Path) -> None:
    model = saved(tmp_path / "packed", Packing("int4", 16))
    with pytest.raises(CheckpointError, match="Meta's layout holds no packed weights"):
        save_checkpoint(model, tmp_path / "meta", "meta")
    with pytest.raises(CheckpointError, match="holds packed weights"):
        convert(tmp_path / "packed", tmp_path / "meta", "meta")
    with pytest.raises(ConfigError, match="packed already"):
        load(tmp_path / "packed", pack="int8")
    with pytest.raises(UserError, match='not as "int3"'):
        load(tmp_path / "packed", pack="int3")
    assert not (tmp_path / "meta").exists() or not list((tmp_path / "meta").iterdir())
