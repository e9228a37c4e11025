"""The names and calls of the README that this project grew from, over the real library. docs/compat.md has the table.

Nothing is computed here: everything hands on to `config`, `models`, `ops`, `processing`, `generate` and `adapters`.
"""

from . import attention_cuda, fused_cuda, rmsnorm_cuda, rope_cuda
from .attention_cuda import KVCache
from .config import MLLAMAConfig, SiglipVisionConfig
from .model import MllamaForConditionalGeneration, MllamaOutput
from .parts import (
    FeedForward,
    GroupQueryAttention,
    Linear_LORA,
    LLAMARMSNorm,
    LLAMARotaryEmbedding,
    MultiModalProjector,
    TransformerBlock,
)
from .processor import MllamaImageProcessor, ProcessorOutput

__all__ = [
    "FeedForward",
    "GroupQueryAttention",
    "KVCache",
    "LLAMARMSNorm",
    "LLAMARotaryEmbedding",
    "Linear_LORA",
    "MLLAMAConfig",
    "MllamaForConditionalGeneration",
    "MllamaImageProcessor",
    "MllamaOutput",
    "MultiModalProjector",
    "ProcessorOutput",
    "SiglipVisionConfig",
    "TransformerBlock",
    "attention_cuda",
    "fused_cuda",
    "rmsnorm_cuda",
    "rope_cuda",
]
