"""GGUF files: every type of tensor against the package's own arithmetic, the configuration, logits, damage."""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_for_tests import (
    METADATA,
    TEXT,
    gguf_tensors,
    logits_of,
    random_language_model,
    read_model,
    transformers_model,
    write_gguf,
)
from torch import Tensor

from llama_multimodal.config import LanguageModelConfig, LinearRopeScaling, RopeScaling
from llama_multimodal.errors import CheckpointError, ConfigError, MissingExtraError, UserError
from llama_multimodal.weights.gguf import GGUFFile, config_from_gguf, gguf_rules, read_gguf_config
from llama_multimodal.weights.gguf_config import scaling_from_factors
from llama_multimodal.weights.rules import same_bits

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

LLAMA = {"general.architecture": "llama", **METADATA}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def written_kinds() -> Iterator[str]:
    """The types that the package quantizes."""
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quantize(np.zeros((1, 512), np.float32), kind)
        except NotImplementedError:
            continue
        yield kind.name


def read_kinds() -> Iterator[str]:
    """The quantized types that the package dequantizes."""
    for kind, (_, num_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        if kind.name not in PLAIN:
            yield kind.name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_language_model(LanguageModelConfig(TEXT))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", METADATA, gguf_tensors(model))


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(written_kinds()))
def test_what_the_package_quantizes(kind: str, tmp_path: Path) -> None:
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", METADATA, {"w": weight, "norm": weight[0]}, kind))
    to = gguf.GGMLQuantizationType[kind]
    wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), to), to).copy())
    assert file.entries["w"].shape == (6, 512) and file.entries["norm"].shape == (512,)
    assert file.entries["w"].dtype == PLAIN.get(kind, torch.float32)
    assert file.tensor("w").dtype == file.entries["w"].dtype
    assert same_bits(file.tensor("w").float(), wanted)
    assert same_bits(file.tensor("norm"), weight[0])
    _same_into(file, wanted)


@pytest.mark.parametrize("kind", list(read_kinds()))
def test_what_the_package_dequantizes(kind: str, tmp_path: Path) -> None:
    """Also the types that only llama.cpp writes, from random blocks; no byte that could make a scale infinite."""
    to = gguf.GGMLQuantizationType[kind]
    block, num_bytes = gguf.GGML_QUANT_SIZES[to]
    raw = np.random.default_rng(0).integers(0, 0x3C, (6, 512 // block * num_bytes), dtype=np.uint8)
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", METADATA, {"w": (raw, to)}))
    wanted = torch.from_numpy(gguf.dequantize(raw, to).copy())
    assert file.entries["w"].shape == wanted.shape and file.entries["w"].dtype == torch.float32
    assert same_bits(file.tensor("w"), wanted)
    _same_into(file, wanted)


def _same_into(file: GGUFFile, wanted: Tensor) -> None:
    """Into tensors of other shapes, strides and dtypes."""
    flat, halves = torch.empty(6, 512), torch.empty(6, 512, dtype=torch.bfloat16)
    turned, rows, reshaped = torch.empty(512, 6), torch.empty(3, 2, 512), torch.empty(2, 1536)
    for out in (flat, halves, turned.T, rows.transpose(0, 1), reshaped):
        file.copy_into("w", out)
    assert same_bits(flat, wanted) and same_bits(halves, wanted.bfloat16()) and same_bits(turned.T, wanted)
    assert same_bits(rows.transpose(0, 1).reshape(6, 512), wanted) and same_bits(reshaped.view(6, 512), wanted)


def test_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 64)
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", METADATA, {"w": weight}, "Q4_0"))
    whole, pieces = torch.empty(70, 64), torch.empty(70, 64)
    file.copy_into("w", whole)
    monkeypatch.setattr("llama_multimodal.weights.gguf._PIECE", 3 * 64)
    file.copy_into("w", pieces)
    assert same_bits(whole, pieces) and same_bits(whole, file.tensor("w"))


def test_reading_leaves_the_file_as_it_is(tiny: Path) -> None:
    before = tiny.read_bytes()
    file = GGUFFile(tiny)
    for name in file.entries:
        file.tensor(name).zero_()
    assert tiny.read_bytes() == before


# --- the configuration -----------------------------------------------------------------------------------------------


def test_configuration(tiny: Path) -> None:
    assert read_gguf_config(GGUFFile(tiny)) == LanguageModelConfig(TEXT)
    assert config_from_gguf(LLAMA, tied=True).text == replace(TEXT, tie_word_embeddings=True)


def test_what_files_leave_out() -> None:
    left_out = ("head_count_kv", "rope.", "vocab_size", "tokenizer.")
    raw: dict[str, Any] = {key: value for key, value in LLAMA.items() if not any(word in key for word in left_out)}
    tokens = ["<unk>", "<s>", "</s>", "<|eot_id|>", "a", "<|im_end|>"]
    raw |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    raw["tokenizer.ggml.token_type"] = [2, 3, 3, 3, 1, 1]  # the last only looks like a control token
    text = config_from_gguf(raw).text
    assert (text.num_key_value_heads, text.rope_theta, text.vocab_size) == (4, 10000.0, 6)
    assert (text.bos_token_id, text.eos_token_ids, text.pad_token_id) == (1, (2, 3), 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"general.architecture": "qwen2"}, "architecture is 'qwen2'; supported: llama"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 2.5}, "num_hidden_layers must be a whole number"),
        ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"llama.attention.head_count_kv": [2, 1]}, "num_key_value_heads must be a number"),
        ({"llama.attention.head_count": 5}, "hidden_size must divide"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8; this model needs 16"),
        ({"llama.attention.key_length": 32}, "key_length is 32"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.freq_bas": 1.0}, 'unknown key "rope.freq_bas"; did you mean "rope.freq_base"'),
        ({"llama.rope.scaling.type": "yarn"}, "scaling 'yarn' is not implemented"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, "factor must be a number above 0"),
        ({"tokenizer.ggml.eos_token_id": "two"}, "must be whole numbers"),
    ],
)
def test_refused_configurations(change: Mapping[str, Any], message: str) -> None:
    raw = {key: value for key, value in {**LLAMA, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        config_from_gguf(raw)


def test_linear_scaling() -> None:
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    assert config_from_gguf(LLAMA | scaling).text.rope_scaling == LinearRopeScaling(2.5)
    assert config_from_gguf(LLAMA | {"llama.rope.scale_linear": 4.0}).text.rope_scaling == LinearRopeScaling(4.0)
    assert config_from_gguf(LLAMA | {"llama.rope.scaling.type": "none"}).text.rope_scaling is None


def factors_of(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """What llama.cpp's converter stores in `rope_freqs.weight`."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    factors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        turns = context * float(frequency) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - kept) / scaling.factor + kept))
    return torch.tensor(factors)


@pytest.mark.parametrize(
    "head_dim, theta, scaling",
    [
        (64, 500000.0, RopeScaling(factor=32.0)),  # Llama 3.2 1B
        (128, 500000.0, RopeScaling(factor=32.0)),  # 3B
        (128, 500000.0, RopeScaling(factor=8.0)),  # Llama 3.1
        (64, 500000.0, RopeScaling(factor=4.0, high_freq_factor=8.0, original_max_position_embeddings=2048)),
        (128, 1e6, RopeScaling(factor=2.5, high_freq_factor=3.5, original_max_position_embeddings=4096)),
        (64, 100000.0, RopeScaling(factor=16.0, original_max_position_embeddings=1000)),
    ],
)
def test_llama3_scaling_from_its_result(head_dim: int, theta: float, scaling: RopeScaling) -> None:
    text = replace(TEXT, hidden_size=4 * head_dim, rope_theta=theta)
    assert scaling_from_factors(text, factors_of(head_dim, theta, scaling)) == scaling


def test_other_factors() -> None:
    ones = torch.ones(8)
    assert scaling_from_factors(TEXT, ones) is None
    assert scaling_from_factors(TEXT, 3 * ones) == LinearRopeScaling(3.0)
    known = RopeScaling(original_max_position_embeddings=300)
    assert scaling_from_factors(TEXT, factors_of(16, 10000.0, known), 300) == known
    for factors in (torch.linspace(1, 4, 8), torch.tensor([1.0] * 6 + [2.0, 1.5])):
        with pytest.raises(ConfigError, match="not of Llama 3"):
            scaling_from_factors(TEXT, factors)
    for factors in (torch.ones(7), 0 * ones, -ones, ones / 0):
        with pytest.raises(ConfigError, match="must hold 8 positive numbers"):
            scaling_from_factors(TEXT, factors)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    with pytest.raises(ConfigError, match="together"):
        config_from_gguf(LLAMA | scaling, rope_factors=2 * ones)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_logits_are_those_of_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = random_language_model(LanguageModelConfig(replace(TEXT, tie_word_embeddings=tied)))
    path = write_gguf(tmp_path / "model.gguf", METADATA, gguf_tensors(model), kind)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = logits_of(read_model(GGUFFile(path)), tokens)
    with torch.no_grad():
        theirs = transformers_model(path)(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    if kind == "F32":
        assert torch.equal(ours, logits_of(model, tokens))
    else:
        assert not torch.allclose(ours, logits_of(model, tokens), atol=1e-3)


def test_logits_with_llama3_scaling(tmp_path: Path) -> None:
    """transformers reads no `rope_freqs.weight`; its model is given the scaling that went into the file's."""
    pytest.importorskip("transformers")
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=32)
    config = LanguageModelConfig(replace(TEXT, hidden_size=128, rope_scaling=scaling))
    model = random_language_model(config)
    metadata = METADATA | {"llama.embedding_length": 128, "llama.rope.dimension_count": 32}
    tensors = gguf_tensors(model)
    factors = factors_of(32, 10000.0, scaling)
    path = write_gguf(tmp_path / "model.gguf", metadata, {**tensors, "rope_freqs.weight": factors})
    plain = write_gguf(tmp_path / "plain.gguf", metadata, tensors)
    file = GGUFFile(path)
    assert file.rope_factors is not None and "rope_freqs.weight" not in file.entries
    ours = read_model(file)
    assert ours.config == config
    tokens = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(1))
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    with torch.no_grad():
        theirs = transformers_model(plain, rope_parameters=rope)(tokens).logits
    torch.testing.assert_close(logits_of(ours, tokens), theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(read_model(GGUFFile(plain)), tokens), theirs, atol=1e-2)


def test_rows_of_queries_are_turned_as_llama_cpp_turns_them() -> None:
    """Its converter, from Hugging Face's halves: [H, 2, D/2] → [H, D/2, 2]."""
    rules = {rule.theirs[0]: rule for rule in gguf_rules(LanguageModelConfig(TEXT))}
    weight = torch.randn(64, 64)
    written = rules["blk.1.attn_q.weight"].write(weight)[0]
    assert torch.equal(written, weight.view(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64))
    written = rules["blk.1.attn_k.weight"].write(weight[:32])[0]
    assert torch.equal(written, weight[:32].view(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64))


# --- damage ----------------------------------------------------------------------------------------------------------


def refused(path: Path, data: bytes, pattern: str) -> None:
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=pattern):
        GGUFFile(path)


def test_every_truncation_is_refused(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    for end in [*range(0, 4000, 97), len(data) // 2, len(data) - 4096]:
        refused(tmp_path / "cut.gguf", data[:end], "empty|not a GGUF|truncated")


def test_wrong_beginnings(tiny: Path, tmp_path: Path) -> None:
    data, path = tiny.read_bytes(), tmp_path / "x.gguf"
    refused(path, b"GGML" + data[4:], "is not a GGUF file: it begins with b'GGML'")
    refused(path, b"PK\x03\x04" + data[4:], "is not a GGUF file")
    refused(path, data[:4] + struct.pack("<I", 1) + data[8:], "has version 1; .* 2 or 3 is read")
    refused(path, data[:4] + struct.pack(">I", 3) + data[8:], "is big-endian")
    with pytest.raises(CheckpointError, match="is missing"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="is not a file"):
        GGUFFile(tmp_path)


def test_huge_counts(tiny: Path, tmp_path: Path) -> None:
    data, path = tiny.read_bytes(), tmp_path / "x.gguf"
    huge = struct.pack("<Q", 1 << 62)
    refused(path, data[:8] + huge + data[16:], "4611686018427387904 tensors announced")
    refused(path, data[:16] + huge + data[24:], "4611686018427387904 metadata entries announced")
    refused(path, data[:24] + huge + data[32:], "4611686018427387904 characters announced")
    shape = struct.pack("<IQQ", 2, 64, 64)  # of the embedding
    assert data.count(shape)
    refused(path, data.replace(shape, struct.pack("<IQQ", 2, 1 << 40, 1 << 40), 1), "has the shape")
    refused(path, data.replace(shape, struct.pack("<IQQ", 2, 64, 1 << 40), 1), "truncated|overlaps")
    refused(path, data.replace(shape, struct.pack("<IQQ", 900, 64, 64), 1), "has 900 axes")


def test_what_is_twice(tiny: Path, tmp_path: Path) -> None:
    data, path = tiny.read_bytes(), tmp_path / "x.gguf"
    refused(path, data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_q.weight"), "'blk.1.attn_q.weight' is there twice")
    twice = data.replace(b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eot_token_id")
    refused(path, twice, "the metadata has 'tokenizer.ggml.eot_token_id' twice")


def test_a_missing_tensor(tiny: Path, tmp_path: Path) -> None:
    tensors = gguf_tensors(random_language_model(LanguageModelConfig(TEXT)))
    del tensors["blk.1.ffn_up.weight"]
    file = GGUFFile(write_gguf(tmp_path / "a.gguf", METADATA, tensors))
    assert "blk.1.ffn_up.weight" not in file.entries
    for read in (file.tensor, lambda name: file.copy_into(name, torch.empty(96, 64))):
        with pytest.raises(CheckpointError, match=r"lacks the tensor 'blk\.1\.ffn_up\.weight'"):
            read("blk.1.ffn_up.weight")


def test_types_that_are_not_read(tmp_path: Path) -> None:
    numbers = np.zeros((2, 64), np.int32)
    path = write_gguf(tmp_path / "a.gguf", METADATA, {"w": (numbers, gguf.GGMLQuantizationType.I32)})
    with pytest.raises(
        CheckpointError, match=r"of the type I32, which is not read; read are F32, F16, BF16, Q4_0.*Q6_K"
    ):
        GGUFFile(path)
    entry = struct.pack("<IQQI", 2, 64, 2, int(gguf.GGMLQuantizationType.I32))
    unknown = path.read_bytes().replace(entry, struct.pack("<IQQI", 2, 64, 2, 999))
    refused(path, unknown, "of the type number 999")


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", METADATA, {"w": torch.randn(64, 64)}, "Q8_0")
    data = path.read_bytes().replace(struct.pack("<IQQ", 2, 64, 64), struct.pack("<IQQ", 2, 48, 64))
    refused(path, data, "'w' has rows of 48, no multiple of the 32 in a block of Q8_0")


def test_one_part_of_several(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", METADATA | {"split.count": 3}, {"w": torch.randn(4, 4)})
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        GGUFFile(path)


def test_without_the_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"reading a GGUF file needs .*\[gguf\]"):
        GGUFFile(tiny)


def test_random_damage_ends_in_an_error_of_ours_or_in_numbers(tiny: Path, tmp_path: Path) -> None:
    data, path, rng = tiny.read_bytes(), tmp_path / "x.gguf", random.Random(0)
    header = data.index(b"output_norm.weight") + 40
    refusals = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            read_gguf_config(file)
            for name, info in file.entries.items():
                assert file.tensor(name).shape == info.shape
        except UserError:
            refusals += 1
    assert refusals > 100
