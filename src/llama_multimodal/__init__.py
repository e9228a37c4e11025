"""Llama 3.2 Vision, and vision-language models of your own, in plain PyTorch: exact, fast, readable.

The public names load on first use, so that `import llama_multimodal` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assemble import from_parts
    from .errors import UserError
    from .generate import GenerationEvent, GenerationOutput, generate
    from .loading import load, save
    from .models import VisionLanguageModel, register_encoder, register_projector
    from .quantize import quantize
    from .sampling import SamplingParams

_HOMES = {
    "GenerationEvent": ".generate",
    "GenerationOutput": ".generate",
    "SamplingParams": ".sampling",
    "UserError": ".errors",
    "VisionLanguageModel": ".models",
    "from_parts": ".assemble",
    "generate": ".generate",
    "load": ".loading",
    "quantize": ".quantize",
    "register_encoder": ".models",
    "register_projector": ".models",
    "save": ".loading",
}
__all__ = [
    "GenerationEvent",
    "GenerationOutput",
    "SamplingParams",
    "UserError",
    "VisionLanguageModel",
    "from_parts",
    "generate",
    "load",
    "quantize",
    "register_encoder",
    "register_projector",
    "save",
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
