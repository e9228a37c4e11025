"""Llama 3.2 Vision, and vision-language models of your own, in plain PyTorch: exact, fast, readable.

The public names load on first use, so that `import llama_multimodal` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.config import LoraConfig
    from .adapters.lora import apply_lora, merge_lora, unmerge_lora, use_adapter
    from .adapters.peft_format import load_adapter, save_adapter
    from .assemble import from_parts, from_preset
    from .engine import AsyncEngine, DraftModel, Engine, EngineConfig, PromptLookup, Request
    from .errors import UserError
    from .generate import GenerationEvent, GenerationOutput, generate
    from .loading import load, save
    from .models import VisionLanguageModel, register_encoder, register_projector
    from .quantize import quantize
    from .sampling import SamplingParams

_HOMES = {
    "AsyncEngine": ".engine",
    "DraftModel": ".engine",
    "Engine": ".engine",
    "EngineConfig": ".engine",
    "GenerationEvent": ".generate",
    "GenerationOutput": ".generate",
    "LoraConfig": ".adapters.config",
    "PromptLookup": ".engine",
    "Request": ".engine",
    "SamplingParams": ".sampling",
    "UserError": ".errors",
    "VisionLanguageModel": ".models",
    "apply_lora": ".adapters.lora",
    "from_parts": ".assemble",
    "from_preset": ".assemble",
    "generate": ".generate",
    "load": ".loading",
    "load_adapter": ".adapters.peft_format",
    "merge_lora": ".adapters.lora",
    "quantize": ".quantize",
    "register_encoder": ".models",
    "register_projector": ".models",
    "save": ".loading",
    "save_adapter": ".adapters.peft_format",
    "unmerge_lora": ".adapters.lora",
    "use_adapter": ".adapters.lora",
}
__all__ = [
    "AsyncEngine",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "GenerationEvent",
    "GenerationOutput",
    "LoraConfig",
    "PromptLookup",
    "Request",
    "SamplingParams",
    "UserError",
    "VisionLanguageModel",
    "apply_lora",
    "from_parts",
    "from_preset",
    "generate",
    "load",
    "load_adapter",
    "merge_lora",
    "quantize",
    "register_encoder",
    "register_projector",
    "save",
    "save_adapter",
    "unmerge_lora",
    "use_adapter",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """Keeps `generate` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
