"""An encoder and a projector from outside the package, which is not touched: registered, assembled, saved, loaded."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama_multimodal as lmm
from llama_multimodal.config import Fusion, Preprocess, SiglipConfig, TextConfig
from llama_multimodal.errors import ConfigError

# --- what somebody else would write, in a file of their own ----------------------------------------------------------


@dataclass(frozen=True)
class ConvConfig:
    """Two strided convolutions."""

    channels: int = 12
    image_size: int = 32

    @property
    def output_size(self) -> int:
        return self.channels

    def num_tokens(self, height: int, width: int) -> int:
        return (height // 8) * (width // 8)

    def preprocess(self) -> Preprocess:
        return Preprocess(size=(self.image_size, self.image_size), mean=(0.5,) * 3, std=(0.5,) * 3)


class ConvEncoder(nn.Module):
    """[N, 3, H, W] → [N, H/8 · W/8, channels]"""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, config.channels, 4, stride=4)
        self.second = nn.Conv2d(config.channels, config.channels, 2, stride=2)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(pixels))).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class PoolConfig:
    """Every `stride` tokens become one, their mean."""

    stride: int = 4

    def num_tokens(self, tokens: int) -> int:
        return tokens // self.stride

    def check(self, vision_size: int, text_size: int, tokens: int) -> None:
        if tokens % self.stride:
            raise ConfigError(f"{tokens} tokens do not divide by {self.stride}; linear would fit")


class Pool(nn.Module):
    """[N, T, E] → [N, T / stride, D]"""

    def __init__(self, config: PoolConfig, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.stride = config.stride
        self.proj = nn.Linear(vision_size, text_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.unflatten(1, (-1, self.stride)).mean(2))


lmm.register_encoder("conv", ConvConfig, ConvEncoder)
lmm.register_projector("pool", PoolConfig, Pool)

# --- what the package makes of it ------------------------------------------------------------------------------------

TEXT = TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, cross_attention_layers=(), num_extra_embeddings=0, max_position_embeddings=64,
    rope_scaling=None, bos_token_id=60, eos_token_ids=(61,), pad_token_id=63,
)  # fmt: skip


@pytest.mark.parametrize("fusion", ["cross_attention", "splice"])
def test_a_model_of_foreign_parts(fusion: Fusion, tmp_path: Path) -> None:
    model, processor = lmm.from_parts("conv", TEXT, fusion=fusion, projector="pool")
    assert isinstance(model.vision, ConvEncoder) and isinstance(model.projector, Pool)
    for name, value in model.named_parameters():
        if name.endswith("_gate"):
            value.data.fill_(0.5)
    image = model.config.image_token_id
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 50, 3), generator=noise, dtype=torch.uint8).numpy()
    inputs = processor.encode_tokens([[1, image, 5], [2, 7]], [[pixels], []])
    assert inputs.images[0].num_tokens == (4 if fusion == "splice" else 1)
    logits = model(inputs).logits
    params = lmm.SamplingParams(max_new_tokens=4, temperature=0.0)
    tokens = lmm.generate(model, inputs, params).token_ids

    lmm.save(model, processor, tmp_path)
    again, reader = lmm.load(tmp_path)
    assert again.config == model.config and reader.preprocess == processor.preprocess
    assert torch.equal(again(inputs).logits, logits)
    assert lmm.generate(again, inputs, params).token_ids == tokens

    F.cross_entropy(logits[0], torch.arange(logits.shape[1])).backward()
    assert all(value.grad is not None and value.grad.any() for value in model.vision.parameters())
    assert all(value.grad is not None and value.grad.any() for value in model.projector.parameters())


def test_a_foreign_projector_says_what_fits() -> None:
    with pytest.raises(ConfigError, match="16 tokens do not divide by 3; linear would fit"):
        lmm.from_parts("conv", TEXT, projector=PoolConfig(stride=3))


def test_a_file_whose_parts_are_not_registered(tmp_path: Path) -> None:
    """In a process that has not run the other file, it is named with those that are known."""
    model, processor = lmm.from_parts("conv", TEXT, projector="pool")
    lmm.save(model, processor, tmp_path)
    code = (
        "import llama_multimodal as lmm\n"
        "try:\n"
        f"    lmm.load({str(tmp_path)!r})\n"
        "except lmm.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = 'config.json: vision: type "conv" is not known; known: tiled, siglip, clip, dinov2; a part of your own wants'
    assert done.stdout.startswith(f"{tmp_path}/{said} register_encoder")


def test_names_and_kinds_that_are_refused() -> None:
    lmm.register_encoder("conv", ConvConfig, ConvEncoder)  # again, the same
    with pytest.raises(ConfigError, match='the name "siglip" is taken by SiglipConfig; choose another'):
        lmm.register_encoder("siglip", ConvConfig, ConvEncoder)
    with pytest.raises(ConfigError, match="ConvEncoder must be a frozen dataclass"):
        lmm.register_encoder("other", ConvEncoder, ConvEncoder)
    with pytest.raises(ConfigError, match=r'no projector "pol"; known: .*pool.* did you mean "pool"'):
        lmm.from_parts(SiglipConfig(), TEXT, projector="pol")
