"""From a checkpoint to a smaller one: what is written, what it loads as, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from small_model import CONFIG, make_inputs, random_model

from llama_multimodal import load, quantize
from llama_multimodal.calibration import calibration_rows
from llama_multimodal.config import LanguageModelConfig
from llama_multimodal.errors import CheckpointError, ConfigError, PromptError
from llama_multimodal.models import LanguageModel, build_model
from llama_multimodal.models.layers import PackedLinear
from llama_multimodal.ops import Format
from llama_multimodal.processing import Processor
from llama_multimodal.processing.tokenizer import Tokenizer
from llama_multimodal.quant.pack import LM_HEAD, Packing, pack, pack_layer
from llama_multimodal.weights import checkpoint
from llama_multimodal.weights.save import save_checkpoint
from llama_multimodal.zoo.tokenizer import build_tokenizer

WIDER = replace(CONFIG, text=replace(CONFIG.text, intermediate_size=64))  # whole groups of 32 everywhere


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_checkpoint(random_model(config=WIDER), tmp_path / "plain")
    return tmp_path / "plain"


def text_model(tied: bool) -> LanguageModel:
    """A decoder alone, of random weights."""
    text = replace(WIDER.text, cross_attention_layers=(), num_extra_embeddings=0, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = build_model(LanguageModelConfig(text))
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    return model


def formats(model: Any) -> dict[str, str]:
    return {name: layer.format for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    bits = {name: (value.view(torch.uint8), theirs[name].view(torch.uint8)) for name, value in mine.items()}
    return mine.keys() == theirs.keys() and all(torch.equal(*pair) for pair in bits.values())


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("int8", {}),
        ("int4", {"group": 16, "symmetric": False}),
        ("fp8", {}),
        ("fp8", {"lm_head": "bf16"}),
        ("fp8", {"fp8_activations": True}),
        ("int4", {"keep": ["down_proj", "layers.0.attention.*"], "lm_head": "int4"}),
    ],
)
def test_what_is_saved_is_the_packed_model_bit_for_bit(plain: Path, format: Format, options: Any) -> None:
    done = quantize(plain, plain.parent / "small", format, **options)
    packing = Packing(
        format, options.get("group", 32), options.get("symmetric", True),
        options.get("lm_head", "int8" if format == "int4" else None),
        tuple(options.get("keep", ("cross_attention.*",) if format == "int4" else ())),
    )  # fmt: skip
    expected = pack(random_model(config=WIDER), packing)
    again, _ = load(done.folder)
    if options.get("lm_head") == "bf16":  # stored plain, so it comes back plain
        head = expected.decoder.lm_head
        assert isinstance(head, PackedLinear) and torch.equal(head.values.float(), again.decoder.lm_head.weight)
        expected.decoder.lm_head = again.decoder.lm_head
    assert same_state(again, expected) and formats(again) == formats(expected)
    files = sum(file.stat().st_size for file in done.folder.glob("model*.safetensors"))
    assert done.bytes_after == files < done.bytes_before


def test_plain_weights_are_never_all_in_memory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at each layer that is packed: what is packed so far, and one layer that is not."""
    held: list[int] = []

    def counting(model: LanguageModel, path: str, packing: Packing) -> None:
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        pack_layer(model, path, packing)

    monkeypatch.setattr(checkpoint, "pack_layer", counting)
    done = quantize(plain, plain.parent / "small", "int4", lm_head="int4", keep=())
    largest = max(value.nbytes for value in random_model(config=WIDER).decoder.parameters()) * 2  # gate and up together
    assert len(held) == 3 * 4 + 2 * 5 + 1
    assert max(held) < done.bytes_after + largest < done.bytes_before


def test_int4_spares_the_lm_head_and_the_cross_attention(plain: Path) -> None:
    small, _ = load(quantize(plain, plain.parent / "small", "int4").folder)
    found = formats(small)
    assert found.pop(LM_HEAD) == "int8" and set(found.values()) == {"int4"}
    assert len(found) == 3 * 4 + 2 * 2 and not any(name.startswith("decoder.layers.1.attention") for name in found)


def test_an_lm_head_that_is_the_embedding_stays(tmp_path: Path) -> None:
    save_checkpoint(text_model(tied=True), tmp_path / "plain")
    done = quantize(tmp_path / "plain", tmp_path / "small", "int8")
    small, _ = load(done.folder)
    assert done.tied and small.decoder.lm_head.weight is small.decoder.embedding.weight


def test_an_lm_head_that_is_the_embedding_gets_a_table_of_its_own_where_its_format_is_named(tmp_path: Path) -> None:
    model = text_model(tied=True)
    save_checkpoint(model, tmp_path / "plain")
    done = quantize(tmp_path / "plain", tmp_path / "small", "int4", lm_head="int8")
    small, _ = load(done.folder)
    assert not done.tied and not small.config.text.tie_word_embeddings
    assert torch.equal(small.decoder.embedding.weight, model.decoder.embedding.weight)
    assert same_state(small, pack(model, Packing("int4", lm_head="int8")))
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, small(make_inputs(tokens.tolist())).logits
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_an_lm_head_that_is_kept_has_no_format(tmp_path: Path, tied: bool) -> None:
    save_checkpoint(text_model(tied), tmp_path / "plain")
    with pytest.raises(ConfigError, match="the LM head is to be kept and to become int8"):
        quantize(tmp_path / "plain", tmp_path / "small", "int4", lm_head="int8", keep=["lm_head"])
    assert not (tmp_path / "small").exists()


def test_loading_by_a_name_spares_what_quantize_spares(plain: Path) -> None:
    loaded, _ = load(plain, pack="int4")
    assert same_state(loaded, load(quantize(plain, plain.parent / "small", "int4").folder)[0])


@pytest.mark.parametrize(
    ("format", "options"),
    [("int4", {"group": 16}), ("fp8", {}), ("fp8", {"fp8_activations": True}), ("int8", {"keep": ["o_proj"]})],
)
def test_the_configuration_names_what_is_packed_and_how(plain: Path, format: Format, options: Any) -> None:
    """By the library that defines the format: its schemes, held against the modules that transformers would have."""
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.utils import match_named_modules

    folder = quantize(plain, plain.parent / "small", format, **options).folder
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = library.QuantizationConfig.model_validate({k: v for k, v in table.items() if k != "quant_method"})
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.AutoModelForImageTextToText.from_config(
            transformers.AutoConfig.from_pretrained(folder, quantization_config=None)
        )
    expected: dict[tuple[int, str], int] = {}
    for layer in load(folder)[0].modules():
        if isinstance(layer, PackedLinear):
            kind = {"int8": (8, "int"), "int4": (4, "int"), "fp8": (8, "float")}[layer.format]
            expected[kind] = expected.get(kind, 0) + len(layer.shapes)
    found = {
        (scheme.weights.num_bits, str(scheme.weights.type)): len(
            list(match_named_modules(theirs, scheme.targets, config.ignore))
        )
        for scheme in config.config_groups.values()
    }
    assert found == expected and sum(found.values()) > 10


@pytest.mark.parametrize("format, options", [("int4", {}), ("fp8", {}), ("fp8", {"fp8_activations": True})])
def test_transformers_reads_it(plain: Path, format: Format, options: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    save_checkpoint(text_model(tied=False), plain.parent / "text")
    kept = ["layers.0.mlp.*"]
    folder = quantize(plain.parent / "text", plain.parent / "small", format, keep=kept, **options).folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    ours, _ = load(folder)
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = ours(make_inputs(tokens.tolist())).logits
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    build_tokenizer(["what is red", "a circle and a square"], 20).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_json(tmp_path / "tokenizer.json")
    text = replace(
        WIDER.text, vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_ids=(), pad_token_id=0,
        num_extra_embeddings=8,
    )  # fmt: skip
    return Processor(replace(WIDER, text=text, image_token_id=tokenizer.special("<|image|>")), tokenizer)


def test_calibration_rows_of_every_kind(tmp_path: Path, processor: Processor) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (30, 30), "red").save(folder / "a.png")
    (folder / "b.txt").write_text("a circle and a square " * 40)
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what"}]}]
    lines = [{"text": "what is red"}, {"messages": messages}, {"image": "a.png", "question": "what", "answer": "red"}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = calibration_rows(folder, processor, 20, length=16)
    assert not found.skipped and all(row.num_rows == 1 for row in found.rows) and len(found.rows) <= 20
    assert [len(row.images) for row in found.rows].count(1) == 3
    assert max(row.lengths[0] for row in found.rows if not row.images) <= 16
    assert len(calibration_rows(folder / "c.jsonl", processor, 2).rows) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it has no text"),
        ("{", "line 1: not JSON: "),
        ('{"prompt": "x"}', 'line 1 has neither "text" nor "messages" nor "image"'),
        ('{"image": "missing.png"}', "no row to calibrate on; rows.jsonl, line 1: .*missing.png"),
    ],
)
def test_calibration_files_without_a_row(tmp_path: Path, processor: Processor, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        calibration_rows(tmp_path / "rows.jsonl", processor)
    with pytest.raises(ConfigError, match=r"is no \.jsonl file; calibration takes"):
        calibration_rows(tmp_path / "tokenizer.json", processor)


def test_rows_that_cannot_be_used_are_told(tmp_path: Path, processor: Processor) -> None:
    text = '\ufeff{"text": "what is\u2028red"}\n{"image": "missing.png"}\n'  # JSON allows such a separator in a text
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    found = calibration_rows(tmp_path / "rows.jsonl", processor)
    assert len(found.rows) == 1 and len(found.skipped) == 1 and "line 2" in found.skipped[0]


def test_gptq_from_files(tmp_path: Path, processor: Processor) -> None:
    model = random_model(config=processor.config)  # type: ignore[arg-type]
    save_checkpoint(model, tmp_path / "plain", beside=processor.save)
    text = '\ufeff{"text": "what is\u2028red"}\n{"image": "missing.png"}\n'  # JSON allows such a separator in a text
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    seen: list[tuple[int, int]] = []
    done = quantize(
        tmp_path / "plain", tmp_path / "small", "int4", keep=(), method="gptq", calibration=tmp_path / "rows.jsonl",
        progress=lambda *at: seen.append(at),
    )  # fmt: skip
    assert done.rows == 1 and len(done.skipped) == 1 and seen[-1] == (100, 100) and seen == sorted(seen)
    by_gptq, _ = load(done.folder)
    nearest, _ = load(quantize(tmp_path / "plain", tmp_path / "rtn", "int4", keep=()).folder)
    assert formats(by_gptq) == formats(nearest) and not same_state(by_gptq, nearest)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("int3", {}, "weights are packed as bf16, int8, int4, fp8, not as"),
        ("bf16", {}, "bf16 is no quantization"),
        ("int4", {"group": 24}, r"groups of 24 do not divide the 32 inputs of layers.\*.attention.qkv, .*; the 64"),
        ("int4", {"keep": ["vision.*"]}, r'no layer is called "vision.\*", so it cannot be kept; some are layers'),
        ("fp8", {"lm_head": "int8"}, "no file holds fp8 and whole numbers"),
        ("int4", {"method": "gptqq"}, 'unknown method "gptqq"; did you mean "gptq"'),
        ("int4", {"method": "gptq"}, "give it calibration rows"),
        ("int4", {"calibration": "world"}, "takes no calibration rows"),
    ],
)
def test_requests_that_do_not_go(plain: Path, format: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(plain, plain.parent / "small", format, **options)
    assert not (plain.parent / "small").exists()


def test_places_that_do_not_go(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, other = plain.parent / "small", plain.parent / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    for target, message in ((plain, "the source itself"), (other, "holds no checkpoint"), (other / "letter.txt", "is")):
        with pytest.raises(CheckpointError, match=message):
            quantize(plain, target, "int8")
    assert [path.name for path in other.iterdir()] == ["letter.txt"]
    quantize(plain, small, "int8")
    before = (small / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="quantized already; quantize the checkpoint that it was made from"):
        quantize(small, plain.parent / "smaller", "int4")
    full = SimpleNamespace(total=1, used=1, free=10)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(CheckpointError, match="free some space"):
            quantize(plain, small, "int4")
    assert (small / "model.safetensors").read_bytes() == before
    quantize(plain, small, "int4")  # a checkpoint is replaced
    assert (small / "model.safetensors").read_bytes() != before


def test_a_processor_without_a_tokenizer_reads_no_text(plain: Path, tmp_path: Path) -> None:
    _, bare = load(plain)
    (tmp_path / "rows.jsonl").write_text('{"text": "what is red"}')
    with pytest.raises(ConfigError, match="no tokenizer"):
        calibration_rows(tmp_path / "rows.jsonl", bare)
    with pytest.raises(PromptError):
        bare([{"role": "user", "content": "x"}])
