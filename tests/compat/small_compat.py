"""A tiny model and tokenizers for the tests of `compat`."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from llama_multimodal.compat import MLLAMAConfig, MllamaForConditionalGeneration
from llama_multimodal.processing.tokenizer import BYTE_TO_CHAR

VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "num_channels": 3,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "n_heads": 4, "n_kv_heads": 2, "n_layers": 4, "hidden_dim": 48,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
IMAGE = 260  # the first id past the vocabulary


def config(**text: Any) -> MLLAMAConfig:
    return MLLAMAConfig(VISION, TEXT | text, projection_dim=20, image2text_projection_bias=True)


@torch.no_grad()
def model(seed: int = 0, **text: Any) -> MllamaForConditionalGeneration:
    """Every gate open, every weight random."""
    torch.manual_seed(seed)
    made = MllamaForConditionalGeneration(config(**text)).eval()
    for name, value in made.named_parameters():
        if name.endswith("_gate"):
            value.fill_(0.7)
        elif name.endswith("norm.weight"):
            value.copy_(1 + 0.2 * torch.randn(value.shape))
        elif "embedding" in name:
            value.copy_(torch.randn(value.shape))
    made.model.vision.patch_embedding.weight.mul_(4)
    return made


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, and four special ones: 260 in all."""
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(BYTE_TO_CHAR)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    return backend
